"""Budgets and the gate: what holds, what fails, and that nothing is skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.errors import CheckFailed, InputError
from proteus_deploy.evaluate.gate import Bound, Budget, GateResult, check, read_budget
from proteus_deploy.evaluate.measurements import (
    FORMAT,
    VideoMeasurement,
    difference,
    evaluation_document,
    read_measurements,
)
from proteus_deploy.evaluate.metrics import METRICS

ReadBudget = Callable[[str], Budget]


@pytest.fixture
def budget(tmp_path: Path) -> ReadBudget:
    """budget(text) -> the budget of that TOML."""

    def read(text: str) -> Budget:
        file = tmp_path / "budget.toml"
        file.write_text(text)
        return read_budget(file, METRICS)

    return read


def videos(*values: float | None, metric: str = "psnr", **fields: Any) -> list[VideoMeasurement]:
    return [
        VideoMeasurement(f"v{index}", {metric: value}, seed=index, **fields)
        for index, value in enumerate(values)
    ]


def checked(
    bound: Bound, measured: list[VideoMeasurement], baseline: list[VideoMeasurement] | None = None
) -> GateResult:
    return check(Budget((bound,)), measured, baseline, known=METRICS)


def test_reading(budget: ReadBudget) -> None:
    found = budget(
        'confidence = 0.9\n[[bound]]\nmetric = "face_sim_arc"\nmin = 0.5\nmax_drop = 2\n'
        '[[bound]]\nmetric = "lpips"\nmax = 0.2\nstatistic = "worst"\nseeds = [1, 0]\n'
        '[[bound]]\nmetric = "clip_score"\nmax_drop = 5\nrelative = true\nstatistic = "ci_low"\n'
    )
    assert found.bounds == (
        Bound("face_sim_arc", "min", 0.5),
        Bound("face_sim_arc", "max_drop", 2.0),
        Bound("lpips", "max", 0.2, "worst", seeds=(1, 0)),
        Bound("clip_score", "max_drop", 5.0, "ci_low", relative=True),
    )
    assert found.confidence == 0.9
    assert found.name == "budget.toml"
    assert found.metrics == ("face_sim_arc", "lpips", "clip_score")
    assert found.needs_baseline


def test_a_confident_budget_looks_at_the_ends_of_intervals() -> None:
    """The mean of 29, 31, 33 is inside and the lower end of its interval is not."""
    bounds = (
        Bound("psnr", "min", 30.0),
        Bound("motion_background", "max_drop", 5.0, relative=True),
        Bound("motion_background", "max_rise", 5.0, relative=True),
        Bound("lpips", "max", 0.2),
        Bound("lpips", "max", 0.4, "worst"),
    )
    budget = Budget(bounds, name="mine")
    confident = budget.confident()
    assert [bound.statistic for bound in confident.bounds] == [
        "ci_low",
        "ci_low",
        "ci_high",
        "ci_high",
        "worst",
    ]
    assert confident.name == "mine, at the ends of 95% intervals"
    assert replace(budget, confidence=0.995).confident().name.endswith("ends of 99.5% intervals")
    assert [replace(bound, statistic="mean") for bound in confident.bounds[:4]] == list(bounds[:4])
    measured = videos(29.0, 31.0, 33.0)
    for tried, passed in ((Budget(bounds[:1]), True), (Budget(bounds[:1]).confident(), False)):
        assert check(tried, measured, known=METRICS).passed is passed


HEAD = '[[bound]]\nmetric = "psnr"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no \\[\\[bound\\]\\]"),
        ("bound = []", "has no \\[\\[bound\\]\\]"),
        ("bound = 3", "has no \\[\\[bound\\]\\]"),
        ("bound = [3]", "bound 1 is 3"),
        ("[[bound]", "not readable TOML"),
        ("threshold = 1\n" + HEAD + "min = 3", "unknown key 'threshold'"),
        ("confidence = 95\n" + HEAD + "min = 3", "confidence is 95"),
        ("confidence = true\n" + HEAD + "min = 3", "confidence is True"),
        (HEAD + "minimum = 3", "unknown key 'minimum'"),
        (HEAD, "has no limit"),
        ("[[bound]]\nmin = 3", "names no metric"),
        ('[[bound]]\nmetric = "pnsr"\nmin = 3', "'pnsr' is no metric; there are .*psnr"),
        (HEAD + 'min = "3"', "min is '3'; it is a finite number"),
        (HEAD + "min = nan", "min is nan"),
        (HEAD + "min = true", "min is True"),
        (HEAD + 'min = 3\nstatistic = "median"', "statistic is 'median'"),
        (HEAD + "min = 3\nseeds = []", "seeds is empty"),
        (HEAD + "min = 3\nseeds = [1.0]", "seeds is \\[1.0\\]"),
        (HEAD + "min = 3\nseeds = [true]", "seeds is \\[True\\]"),
        (HEAD + "min = 3\nrelative = true", "min can't be relative"),
        (HEAD + 'max_drop = 3\nrelative = "yes"', "relative is 'yes'"),
        (HEAD + "max_drop = -1", "largest change allowed"),
        (HEAD + 'min = 3\nstatistic = "ci_high"', "use 'ci_low'"),
        ('[[bound]]\nmetric = "lpips"\nmax = 3\nstatistic = "ci_low"', "use 'ci_high'"),
        ('[[bound]]\nmetric = "lpips"\nmin = 3', "better lower.* use max or max_rise"),
        (HEAD + "max = 3", "better higher.* use min or max_drop"),
        ('[[bound]]\nmetric = "motion_background"\nmin = 3\nmax = 2', "nothing could pass"),
    ],
)
def test_wrong_budget(budget: ReadBudget, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        budget(text)


def test_absent_and_large_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not readable TOML"):
        read_budget(tmp_path / "absent.toml", METRICS)
    (tmp_path / "large.toml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(InputError, match="it is no budget"):
        read_budget(tmp_path / "large.toml", METRICS)


def test_neither_way_is_better_takes_both_sides(budget: ReadBudget) -> None:
    found = budget('[[bound]]\nmetric = "motion_background"\nmin = 1\nmax = 2')
    assert [bound.kind for bound in found.bounds] == ["min", "max"]


@pytest.mark.parametrize(("limit", "passed"), [(30.0, True), (30.1, False)])
def test_mean(limit: float, passed: bool) -> None:
    (row,) = checked(Bound("psnr", "min", limit), videos(20.0, 40.0)).rows
    assert row.value == 30
    assert row.passed == passed
    assert row.reason == ("" if passed else "30 is below 30.1")
    assert row.n == 2


def test_worst_is_on_the_side_of_the_bound() -> None:
    (low,) = checked(Bound("psnr", "min", 25, "worst"), videos(20.0, 40.0)).rows
    assert (low.value, low.reason) == (20, "20 is below 25 (v0)")
    measured = videos(0.1, 0.4, 0.2, metric="lpips")
    (high,) = checked(Bound("lpips", "max", 0.3, "worst"), measured).rows
    assert (high.value, high.reason) == (0.4, "0.4 is above 0.3 (v1)")


def test_interval_end() -> None:
    """The mean passes and the interval's end doesn't."""
    measured = videos(20.0, 40.0, 30.0, 31.0)
    assert checked(Bound("psnr", "min", 29), measured).passed
    (row,) = checked(Bound("psnr", "min", 29, "ci_low"), measured).rows
    assert not row.passed
    assert row.value == row.ci_low
    (upper,) = checked(Bound("lpips", "max", 0.3, "ci_high"), videos(0.1, 0.4, metric="lpips")).rows
    assert upper.value == upper.ci_high == 0.4


def test_interval_of_one_video_fails_by_name() -> None:
    (row,) = checked(Bound("psnr", "min", 1, "ci_low"), videos(40.0)).rows
    assert not row.passed
    assert "no confidence interval" in row.reason


def test_drop_is_paired_by_case() -> None:
    """Same means in another order: pairs see drops of 20 that two means would not."""
    measured, baseline = videos(20.0, 40.0), videos(40.0, 20.0)
    (mean,) = checked(Bound("psnr", "max_drop", 0), measured, baseline).rows
    assert mean.value == 0
    assert (mean.ci_low, mean.ci_high) == (-20, 20)
    (worst,) = checked(Bound("psnr", "max_drop", 5, "worst"), measured, baseline).rows
    assert (worst.value, worst.reason) == (20, "20 is above 5 (v0)")
    (end,) = checked(Bound("psnr", "max_drop", 5, "ci_low"), measured, baseline).rows
    assert (end.value, end.passed) == (20, False)


def test_gain_is_a_negative_drop() -> None:
    (row,) = checked(Bound("psnr", "max_drop", 0), videos(33.0), videos(30.0)).rows
    assert (row.value, row.passed) == (-3, True)
    (rise,) = checked(Bound("lpips", "max_rise", 0.1), *(videos(v, metric="lpips") for v in (0.5, 0.3))).rows
    assert rise.value == pytest.approx(0.2)
    assert not rise.passed


def test_relative_drop() -> None:
    """Mean: 3 of a mean of 30, ten per cent. Worst: 6 of 20, thirty per cent."""
    measured, baseline = videos(14.0, 40.0), videos(20.0, 40.0)
    (mean,) = checked(Bound("psnr", "max_drop", 9.9, relative=True), measured, baseline).rows
    assert mean.value == pytest.approx(10)
    assert not mean.passed
    assert mean.bound == "mean drop ≤ 9.9 %"
    (worst,) = checked(Bound("psnr", "max_drop", 31, "worst", relative=True), measured, baseline).rows
    assert worst.value == pytest.approx(30)
    assert worst.passed


def test_relative_to_a_negative_baseline() -> None:
    """From -2 to -3 is a drop of half its size, not a gain."""
    measured, baseline = videos(-3.0), videos(-2.0)
    for bound in (
        Bound("psnr", "max_drop", 10, "mean", relative=True),
        Bound("psnr", "max_drop", 10, "worst", relative=True),
    ):
        (row,) = checked(bound, measured, baseline).rows
        assert row.value == pytest.approx(50)


@pytest.mark.parametrize(
    ("bound", "measured", "baseline", "reason"),
    [
        (Bound("psnr", "min", 1), [], None, "no video was measured"),
        (Bound("psnr", "min", 1, seeds=(9,)), videos(3.0), None, "no video with the seeds 9"),
        (Bound("psnr", "min", 1, seeds=(0, 9)), videos(3.0), None, "no video has the seed 9"),
        (Bound("psnr", "min", 1), videos(3.0, None), None, "not measured for v1: it gave no value"),
        (Bound("psnr", "min", 1), videos(math.nan), None, "not measured for v0: it gave nan"),
        (Bound("ssim", "min", 0), videos(3.0), None, "not measured for v0"),
        (
            Bound("psnr", "min", 1),
            videos(*[None] * 5, reasons={"psnr": "no reference"}),
            None,
            "not measured for v0, v1, v2 and 2 more: no reference",
        ),
        (Bound("psnr", "max_drop", 1), videos(3.0, 3.0), videos(3.0), "the baseline has no video v1"),
        (Bound("psnr", "max_drop", 1), videos(3.0), videos(3.0, 3.0), "video v1 was not measured here"),
        (Bound("psnr", "max_drop", 1), videos(3.0), videos(None), "the baseline has no value for v0"),
        (Bound("psnr", "max_drop", 1, relative=True), videos(3.0), videos(0.0), "of v0 is 0"),
        (
            Bound("psnr", "max_drop", 1, relative=True),
            videos(3.0, 3.0),
            videos(1.0, -1.0),
            "the baseline's mean is 0",
        ),
    ],
)
def test_what_keeps_a_bound_from_being_checked_fails_it(
    bound: Bound, measured: list[VideoMeasurement], baseline: list[VideoMeasurement] | None, reason: str
) -> None:
    (row,) = checked(bound, measured, baseline).rows
    assert not row.passed
    assert row.value is None
    assert reason in row.reason


def test_seeds_choose_videos_of_both_runs() -> None:
    bound = Bound("psnr", "max_drop", 1, seeds=(0,))
    (row,) = checked(bound, videos(3.0, 1.0), videos(3.0, 9.0)).rows
    assert (row.value, row.n, row.passed) == (0, 1, True)


def test_missing_baseline_is_wrong_input() -> None:
    with pytest.raises(InputError, match="max_drop on psnr compares with a baseline, and none was given"):
        checked(Bound("psnr", "max_drop", 1), videos(3.0))


def test_budget_made_by_hand_is_checked_too() -> None:
    with pytest.raises(InputError, match="'sharpness' is no metric"):
        checked(Bound("sharpness", "min", 1), videos(3.0))


def test_no_bounds_do_not_pass() -> None:
    assert not GateResult((), "budget", 0.95).passed


def test_raise_if_failed_names_the_bounds() -> None:
    good, bad = Bound("psnr", "min", 1), Bound("psnr", "min", 50)
    checked(good, videos(3.0)).raise_if_failed()
    result = check(Budget((good, bad)), videos(3.0), known=METRICS)
    assert not result.passed
    with pytest.raises(CheckFailed, match="budget: 1 of 2 bounds: psnr mean ≥ 50: 3 is below 50"):
        result.raise_if_failed()


def test_table_has_a_row_for_each_bound() -> None:
    result = check(
        Budget((Bound("psnr", "min", 1), Bound("ssim", "min", 1))), videos(3.0, 5.0), known=METRICS
    )
    assert result.headers()[3] == "95% CI"
    first, second = result.table()
    assert first == ("psnr", "mean ≥ 1", "4", "3 … 5", 2, "passed", "")
    assert second[2:6] == ("", "", 2, "FAILED")


def test_clusters_widen_the_gate_s_interval() -> None:
    """Persons that differ, videos of each that don't: the drawn unit is the person."""
    measured = [
        VideoMeasurement(f"{person}{seed}", {"psnr": value}, person=person, seed=seed)
        for person, value in (("ann", 20.0), ("bob", 40.0))
        for seed in range(10)
    ]
    (row,) = checked(Bound("psnr", "min", 1), measured).rows
    assert (row.ci_low, row.ci_high) == (20, 40)


def test_document_can_be_read_back_as_a_baseline(tmp_path: Path) -> None:
    measured = videos(3.0, None, person="ann", prompt="<waves>", settings={"num_inference_steps": 4})
    document = evaluation_document(
        measured, {"psnr": METRICS["psnr"]}, baseline=videos(2.0, 7.0), about={"date": "today"}
    )
    assert document["metrics"][0]["estimate"]["mean"] == 3
    assert document["metrics"][0]["difference"]["mean"] == 1
    assert document["metrics"][0]["not_measured"] == {"v1": "it gave no value"}
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert list(read_measurements(tmp_path / "run.json")) == measured


def test_difference_needs_a_common_case() -> None:
    assert difference(videos(3.0), [VideoMeasurement("other", {"psnr": 3.0})], "psnr") is None


def _document(*videos: str) -> str:
    return f'{{"format": "{FORMAT}", "videos": [{", ".join(videos)}]}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "is not 'proteus-deploy evaluation 1'"),
        ('{"format": "other"}', "is not 'proteus-deploy evaluation 1'"),
        (_document(), "holds no videos"),
        (_document("3"), "damaged entry"),
        (_document('{"case": "a"}'), "damaged entry"),
        (_document('{"case": "a", "values": {"psnr": "x"}}'), "damaged entry"),
        (_document('{"case": "a", "values": {}, "seed": "1"}'), "damaged entry"),
        (_document('{"case": "a", "values": {}, "colour": 1}'), "damaged entry"),
        (_document(*['{"case": "a", "values": {}}'] * 2), "the case 'a' more than once"),
    ],
)
def test_damaged_baseline(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_measurements(tmp_path / "run.json")
