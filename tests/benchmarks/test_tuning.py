"""The search for a plan: what it tries, what it takes, and the published form it is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks import plan_families as module
from proteus_deploy.benchmarks import tuning
from proteus_deploy.benchmarks.plan_trials import PlanTrials, TuningCase
from proteus_deploy.benchmarks.published_form import use_published_form
from proteus_deploy.benchmarks.tuning import search_plan
from proteus_deploy.benchmarks.tuning_report import page, row, tuning_document
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.budget import Bound, Budget
from proteus_deploy.evaluate.encoders import Encoders
from proteus_deploy.evaluate.gate import check
from proteus_deploy.evaluate.metrics import METRICS
from proteus_deploy.pipeline import Pipeline
from proteus_deploy.policies.guided_steps import GuidanceInterval
from proteus_deploy.policies.plan import Plan
from proteus_deploy.policies.step_cache import EasyCache
from proteus_deploy.request import GenerateRequest
from proteus_deploy.testing import TOLERANCES, assert_close

BUDGET = Budget((Bound("psnr", "min", 25.0),), name="25 dB")
STEPS = 10


@pytest.fixture(name="cases")
def _cases(small_request: Callable[..., GenerateRequest]) -> list[TuningCase]:
    return [
        TuningCase(f"case {seed}", str(seed), small_request(num_inference_steps=STEPS, seed=seed))
        for seed in (1, 2)
    ]


@pytest.fixture(name="short_sweeps")
def _short_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer settings of each policy: the search is the same."""
    monkeypatch.setattr(module, "_THRESHOLDS", (0.0, 100.0, 200.0))
    monkeypatch.setattr(module, "REUSES", ("velocity",))
    monkeypatch.setattr(module, "_EVERY", (2,))
    monkeypatch.setattr(module, "_LOWEST", (200,))
    monkeypatch.setattr(module, "_SHARES", (1.0, 0.3, 0.2))
    monkeypatch.setattr(module, "_POWERS", (2.0,))
    monkeypatch.setattr(module, "_TRENDS", (0.25,))


@pytest.mark.usefixtures("short_sweeps")
def test_the_chosen_plan_is_the_cheapest_that_passes(
    parity_pipeline: Pipeline, cases: list[TuningCase]
) -> None:
    found = search_plan(parity_pipeline, cases, BUDGET, Encoders())
    exact = found.trials[0]
    assert (exact.name, exact.work, exact.means["psnr"]) == ("exact", 1.0, 100.0)
    passing = [trial for trial in found.trials if trial.gate.passed]
    assert found.chosen.work == min(trial.work for trial in passing)
    assert all(trial.gate.passed == (trial.means["psnr"] >= 25.0) for trial in found.trials)
    named = {trial.name: trial for trial in found.trials}
    # A threshold of 0 leaves nothing out: the same video, all the work.
    assert named["easycache velocity 0"].work == 1.0
    assert named["easycache velocity 0"].means["psnr"] == 100.0
    assert named["schedule 3 power 2 trend 0.25"].work == 0.3
    assert any("," in name for name in named), "policies were never combined"
    combined = next(trial for name, trial in named.items() if "," in name)
    assert combined.plan.step_cache is not None
    assert combined.plan.guidance_reuse is not None or combined.plan.guidance_interval is not None
    front = found.front()
    assert [trial.work for trial in front] == sorted(trial.work for trial in front)
    assert [trial.means["psnr"] for trial in front] == sorted(trial.means["psnr"] for trial in front)


@pytest.mark.usefixtures("short_sweeps")
def test_what_fits_the_cases_of_the_search_alone_is_not_chosen(
    parity_pipeline: Pipeline, cases: list[TuningCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second set of cases fails all that leaves work out: the next cheapest is taken, and the next."""
    real = PlanTrials.trial

    def strict(self: PlanTrials, name: str, plan: Plan) -> Any:
        trial = real(self, name, plan)
        if name.endswith(", again") and trial.work < 1:
            worse = check(BUDGET, [], [], known=METRICS)
            return replace(trial, gate=worse)
        return trial

    monkeypatch.setattr(PlanTrials, "trial", strict)
    found = search_plan(parity_pipeline, cases[:1], BUDGET, Encoders(), check_cases=cases[1:])
    assert found.chosen.work == 1
    passing = [trial for trial in found.trials if trial.gate.passed]
    assert len(found.checks) > 1
    assert [trial.gate.passed for trial in found.checks] == [False] * (len(found.checks) - 1) + [True]
    works = [trial.work for trial in found.checks]
    assert works == sorted(works)
    skipped = {trial.name for trial in passing if trial.work < 1}
    assert {trial.name.removesuffix(", again") for trial in found.checks[:-1]} == skipped
    assert tuning_document(found, {})["checks"][-1]["name"] == f"{found.chosen.name}, again"


@pytest.mark.parametrize(
    ("holds", "chosen", "checked"),
    [
        # Halving looks at 2 and 4 of five places, both pass; the check decides.
        (0.62, "guidance from 3", ["guidance from 4", "guidance from 3"]),
        (0.7, "guidance from 2", ["guidance from 4", "guidance from 3", "guidance from 2"]),
        (1.0, "exact", [*(f"guidance from {place}" for place in (4, 3, 2, 1, 0)), "exact"]),
    ],
)
def test_what_fails_the_check_comes_back_more_careful(
    parity_pipeline: Pipeline,
    cases: list[TuningCase],
    monkeypatch: pytest.MonkeyPatch,
    holds: float,
    chosen: str,
    checked: list[str],
) -> None:
    """holds: least work of the plans that pass on the cases kept out; of the others all do."""
    places = [
        (f"guidance from {place}", Plan(guidance_interval=GuidanceInterval(lowest=lowest)))
        for place, lowest in enumerate((100, 300, 500, 700, 800))
    ]
    monkeypatch.setattr(tuning, "plan_families", lambda *_, **__: [places])
    real = PlanTrials.trial

    def strict(self: PlanTrials, name: str, plan: Plan) -> Any:
        trial = real(self, name, plan)
        worse = check(BUDGET, [], [], known=METRICS)
        return replace(trial, gate=worse) if name.endswith(", again") and trial.work < holds else trial

    monkeypatch.setattr(PlanTrials, "trial", strict)
    wide = Budget((Bound("psnr", "min", -1000.0),), name="anything")
    found = search_plan(parity_pipeline, cases[:1], wide, Encoders(), check_cases=cases[1:])
    assert [trial.name for trial in found.trials[:3]] == ["exact", "guidance from 2", "guidance from 4"]
    assert [trial.name.removesuffix(", again") for trial in found.checks] == checked
    assert found.chosen.name == chosen
    assert all((trial.name == "exact, again") == (trial.work == 1) for trial in found.checks)
    assert len({trial.name for trial in found.trials}) == len(found.trials), "each is tried once"


@pytest.mark.usefixtures("short_sweeps")
def test_both_parts_of_a_pair_come_back(
    parity_pipeline: Pipeline, cases: list[TuningCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a schedule with guidance reused, each part; no more are tried than the search had tried."""
    monkeypatch.setattr(module, "_SHARES", (0.9, 0.6, 0.5))
    monkeypatch.setattr(module, "_EVERY", (2, 3, 4))
    monkeypatch.setattr(module, "_LOWEST", ())
    real = PlanTrials.trial

    def strict(self: PlanTrials, name: str, plan: Plan) -> Any:
        trial = real(self, name, plan)
        worse = check(BUDGET, [], [], known=METRICS)
        return replace(trial, gate=worse) if name.endswith(", again") and trial.work < 1 else trial

    monkeypatch.setattr(PlanTrials, "trial", strict)
    wide = Budget((Bound("psnr", "min", -1000.0),), name="anything")
    policies = ("schedule", "guidance")
    found = search_plan(
        parity_pipeline, cases[:1], wide, Encoders(), check_cases=cases[1:], policies=policies
    )
    boldest, searched = "schedule 5 power 2 trend 0.25", 6  # exact, two of each family, the pair
    pairs = [trial.name.removesuffix(", again") for trial in found.checks if ", guidance" in trial.name]
    assert pairs[0] == f"{boldest}, guidance every 4"
    assert {"schedule 6 power 2 trend 0.25, guidance every 4", f"{boldest}, guidance every 3"} <= set(pairs)
    assert len(found.trials) == 2 * searched, "all places of both would be 16"
    assert found.chosen.name == "exact"


def test_cases_kept_out_that_no_video_can_pass(
    parity_pipeline: Pipeline, cases: list[TuningCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PlanTrials.exact

    def broken(self: PlanTrials) -> Any:
        exact = real(self)
        others = self._cases[0] is cases[1]
        return replace(exact, gate=check(BUDGET, [], [], known=METRICS)) if others else exact

    monkeypatch.setattr(PlanTrials, "exact", broken)
    monkeypatch.setattr(tuning, "plan_families", lambda *_, **__: [])
    with pytest.raises(InputError, match="25 dB: the exact videos of the cases kept out break it"):
        search_plan(parity_pipeline, cases[:1], BUDGET, Encoders(), check_cases=cases[1:])


@pytest.mark.usefixtures("short_sweeps")
def test_work_is_counted_in_rows(parity_pipeline: Pipeline, cases: list[TuningCase]) -> None:
    """Guidance every other step between 5 warm steps and 1 last: 8 of 10 steps with both prompts."""
    found = search_plan(parity_pipeline, cases[:1], BUDGET, Encoders())
    named = {trial.name: trial for trial in found.trials}
    assert named["guidance every 2"].work == (10 + 8) / 20


@pytest.mark.usefixtures("short_sweeps")
def test_documents(parity_pipeline: Pipeline, cases: list[TuningCase]) -> None:
    found = search_plan(parity_pipeline, cases[:1], BUDGET, Encoders())
    document = tuning_document(found, {"settings": {"model": "<model>", "budget": BUDGET.name}})
    assert document["chosen"] == found.chosen.name
    assert [trial["name"] for trial in document["trials"]] == [trial.name for trial in found.trials]
    text = page(found, document, 25.0)
    assert "&lt;model&gt;" in text
    assert "<script" not in text
    assert text.count("<svg") == 1
    broken = next(trial for trial in found.trials if not trial.gate.passed)
    assert row(broken)[-1] == "broken: psnr"


def test_wrong_cases(parity_pipeline: Pipeline, cases: list[TuningCase]) -> None:
    with pytest.raises(InputError, match="there are no cases"):
        search_plan(parity_pipeline, [], BUDGET, Encoders())
    other = replace(cases[1], request=replace(cases[1].request, num_inference_steps=STEPS + 1))
    with pytest.raises(InputError, match=r"differ in num_inference_steps .*a plan belongs to one schedule"):
        search_plan(parity_pipeline, [cases[0], other], BUDGET, Encoders())
    planned = replace(cases[0].request, plan=Plan(step_cache=EasyCache(threshold=0.1)))
    with pytest.raises(InputError, match="case 1 has a plan; tuning starts from exact requests"):
        search_plan(parity_pipeline, [replace(cases[0], request=planned)], BUDGET, Encoders())


def test_a_budget_that_nothing_meets(parity_pipeline: Pipeline, cases: list[TuningCase]) -> None:
    unreachable = Budget((Bound("psnr", "min", 101.0),), name="impossible")
    with pytest.raises(InputError, match=r"impossible: the exact videos break it .*choose wider bounds"):
        search_plan(parity_pipeline, cases[:1], unreachable, Encoders())


@pytest.fixture(name="published")
def _published(parity: Path) -> Iterator[Pipeline]:
    with Pipeline.from_checkpoint(parity / "checkpoint") as pipeline:
        yield pipeline


def test_the_published_form_gives_the_same_video(
    published: Pipeline, parity_pipeline: Pipeline, small_request: Callable[..., GenerateRequest]
) -> None:
    request = small_request(num_inference_steps=3)
    calls: list[str] = []
    for name in ("identity_fusion", "identity_schedule"):
        stage: Any = published.stages[name]

        class Counted:
            inputs = stage.inputs

            def __init__(self, name: str, stage: Any) -> None:
                self.name, self.stage = name, stage

            def __call__(self, **inputs: Any) -> Any:
                calls.append(self.name)
                return self.stage(**inputs)

        published.stages[name] = Counted(name, stage)  # type: ignore[assignment]
    use_published_form(published)
    frames = published.generate(request).frames
    want = parity_pipeline.generate(request).frames
    assert_close("frames", frames, want, TOLERANCES["parity", "frames"])
    # Once before the loop, as ours does, and once more in each of the three steps.
    assert calls.count("identity_fusion") == calls.count("identity_schedule") == 4


def test_plan_on_people_that_the_search_has_not_seen(tmp_path: Path) -> None:
    from proteus_deploy.benchmarks import tiny_model_plan
    from proteus_deploy.benchmarks.tiny_model_quality import VALIDATION
    from proteus_deploy.training.avatars import HELD_OUT_SEEDS

    assert not set(VALIDATION) & set(HELD_OUT_SEEDS)
    plan, found = tmp_path / "plan.json", tmp_path / "found.json"
    Plan(step_cache=EasyCache(threshold=9.0)).save(plan)
    flags = ["--people", "1", "--num-inference-steps", "8"]
    assert tiny_model_plan.main([str(plan), "--json", str(found), *flags]) == 1
    document = json.loads(found.read_text())
    assert document["settings"]["people"] == [next(iter(HELD_OUT_SEEDS))]
    assert document["exact"]["work"] == 1
    assert document["planned"]["work"] < 1
    assert document["planned"]["means"]["psnr"] < document["exact"]["means"]["psnr"]


def test_the_front_is_drawn(tmp_path: Path) -> None:
    from PIL import Image

    from proteus_deploy.benchmarks import front_plot

    def trial(name: str, work: float, psnr: float) -> dict[str, Any]:
        return {"name": name, "work": work, "means": {"psnr": psnr}}

    document = {
        "chosen": "bold",
        "front": ["bold", "careful", "exact"],
        "settings": {"bounds": ["psnr mean ≥ 30", "motion_background mean drop ≤ 5 %"]},
        "trials": [
            trial("exact", 1.0, 100.0),
            trial("bold", 0.3, 31.0),
            trial("worse", 0.5, 28.0),
            trial("careful", 0.6, 41.0),
        ],
    }
    canvas = front_plot.front_plot(document)
    svg = canvas.svg()
    assert canvas.described == "PSNR in dB over the share of rows: bold 31.0 at 0.30; careful 41.0 at 0.60"
    assert all(words in svg for words in ("chosen: bold", "25 dB", "45 dB", "stroke-dasharray"))
    assert "exact<" not in svg
    source, picture = tmp_path / "tune.json", tmp_path / "front.png"
    source.write_text(json.dumps(document))
    assert front_plot.main([str(source), "--output", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.size == (1520, 860)
