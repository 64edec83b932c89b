"""Measured tables of the README are what their result files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks import bench_report, readme_table, recipe_table
from proteus_deploy.benchmarks.machine import is_clean

# benchmarks/results/NAME.json, shown between <!-- NAME --> and <!-- /NAME --> of a page
PAGES = {
    "bench_mini": "README.md",
    "bench_mini_quantised": "docs/bench.md",
    "bench_mini_quantised_avx512": "docs/bench.md",
}


def shown(page: str, name: str) -> str | None:
    """What stands between the markers of a table; None without them."""
    found = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page, re.DOTALL)
    assert len(found) <= 1, f"{name} is shown more than once"
    assert found or name not in re.findall(r"<!-- /?(\w+) -->", page), (
        f"one marker of {name} without the other"
    )
    return found[0] if found else None


def test_the_advice_for_bfloat16_is_what_was_measured(repository: Path) -> None:
    """The loops' ratios that docs/bench.md and the README's choice quote."""
    files = ("bench_mini_quantised_avx512", "bench_mini")
    documents = [
        json.loads((repository / "benchmarks/results" / f"{name}.json").read_text()) for name in files
    ]
    medians = [
        {row["case"]: row["latency_ms"]["median"] for row in document["rows"]} for document in documents
    ]
    over = {
        case: (medians[0]["exact:onnxruntime:fp32"] / ms, medians[0]["published:eager:bf16"] / ms)
        for case, ms in medians[0].items()
    }
    page = " ".join((repository / "docs" / "bench.md").read_text(encoding="utf-8").split())
    best, int8, bf16 = (
        over[f"exact:{name}"] for name in ("compiled-cpu:bf16", "openvino:bf16+int8", "openvino:bf16")
    )
    assert f"{best[0]:.2f} times ONNX Runtime in float32, {best[1]:.2f} times the published form" in page
    assert f"on OpenVINO ({int8[0]:.2f} and {int8[1]:.2f})" in page
    assert f"then one in bfloat16 ({bf16[0]:.2f} and {bf16[1]:.2f})" in page
    whole = medians[1]["published:eager:bf16"] / medians[1]["exact:compiled-cpu:bf16"]
    front = (repository / "README.md").read_text(encoding="utf-8")
    low, high = sorted((whole, best[1]))
    assert (
        f"| {best[0]:.1f} times ONNX Runtime in float32 and {low:.1f} to {high:.1f} times the published"
        in front
    )
    assert f"the bundle {int8[0]:.2f} and {int8[1]:.1f} times |" in front


@pytest.mark.parametrize(("name", "page"), PAGES.items())
def test_a_page_shows_what_was_measured(repository: Path, name: str, page: str) -> None:
    """A file without its table, a table without its file, or figures that differ: all fail."""
    file = repository / "benchmarks" / "results" / f"{name}.json"
    document = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    wanted = None if document is None else bench_report.readme_table(document)
    assert shown((repository / page).read_text(encoding="utf-8"), name) == wanted
    if document is not None:
        assert is_clean(document["commit"]), "measure a commit, not a working tree"


def test_the_page_of_policies_shows_what_was_measured(repository: Path) -> None:
    results = repository / "benchmarks" / "results" / "tiny_model"
    tuned, bold, held_out, requests = (
        json.loads((results / f"{name}.json").read_text())
        for name in ("tune_50_steps", "plan_held_out_bold", "plan_held_out", "bench_requests")
    )
    chosen = next(trial for trial in tuned["trials"] if trial["name"] == tuned["chosen"])
    assert bold["planned"]["plan"] == chosen["plan"]
    assert requests["settings"]["plan"] == held_out["planned"]["plan"]
    lost = 1 - bold["planned"]["means"]["motion_background"] / bold["exact"]["means"]["motion_background"]
    before, after = held_out["exact"]["means"], held_out["planned"]["means"]
    moved = after["motion_background"] / before["motion_background"] - 1
    kept_out, people = tuned["settings"]["check"], len(held_out["settings"]["people"])
    cases = len(tuned["settings"]["cases"])
    page = " ".join((repository / "docs" / "policies.md").read_text(encoding="utf-8").split())
    wanted = [
        (
            f"Without `--confident`, {cases} people and float32, `tune` tried "
            f"{len(tuned['trials']) - 1} plans on {cases - kept_out} people"
        ),
        f"is `{chosen['name']}`: {chosen['work']:.0%} of the rows. It passed again on {kept_out} people",
        (
            f"On {people} held-out people it breaks the budget**: {bold['planned']['means']['psnr']:.1f} dB, "
            f"{lost:.0%} less motion"
        ),
        f"steps, {held_out['planned']['work']:.0%} of the rows",
        f"{after['psnr']:.1f} dB, FaceSim {before['face_sim_arc']:.4f} exact and {after['face_sim_arc']:.4f}",
        (
            f"motion {before['motion_background']:.3f} and {after['motion_background']:.3f} "
            f"({moved:+.1%}). With"
        ),
    ]
    for words in (*wanted, *request_rows(requests)):
        assert words in page
    assert chosen["passed"]
    assert not bold["planned"]["passed"]
    assert held_out["planned"]["passed"]
    for document in (tuned, bold, held_out, requests):
        assert is_clean(document["commit"])


def request_rows(document: dict[str, Any]) -> list[str]:
    """The rows that the page of policies shows of whole requests."""
    rows = []
    for row in document["rows"]:
        ratios = [row[f"request_speedup_vs_published_{precision}"] for precision in ("bf16", "fp32")]
        cells = " | ".join(f"{ratio:.2f}x" for ratio in ratios)
        rows.append(f"| `{row['case']}` | {row['request_ms']['median'] / 1000:.2f} | {cells} |")
    return rows


def test_the_tuned_plan_is_what_was_measured(repository: Path) -> None:
    """Searched, held against other people and timed in one form: compiled, the CPU's attention, frozen."""
    results = repository / "benchmarks" / "results" / "tiny_model"
    tuned, held_out, requests = (
        json.loads((results / f"{name}.json").read_text())
        for name in ("tune_confident", "plan_held_out_bf16", "bench_requests_avx512")
    )
    how = {name: held_out["settings"][name] for name in ("dtype", "backend", "attention", "frozen")}
    assert how == {"dtype": "bf16", "backend": "compiled", "attention": "cpu-bf16", "frozen": True}
    assert tuned["settings"]["backend"] == "compiled-attention-cpu-bf16-frozen"
    chosen = next(trial for trial in tuned["trials"] if trial["name"] == tuned["chosen"])
    assert requests["settings"]["plan"] == held_out["planned"]["plan"] == chosen["plan"]
    assert tuned["checks"][-1]["name"] == f"{chosen['name']}, again"
    assert tuned["checks"][-1]["passed"]
    assert all(" ci_" in bound for bound in tuned["settings"]["bounds"]), "searched with --confident"
    assert held_out["planned"]["passed"]
    before, after = held_out["exact"]["means"], held_out["planned"]["means"]
    moved = after["motion_background"] / before["motion_background"] - 1
    ends = {row[0]: sorted(map(float, row[3].split(" … "))) for row in held_out["planned"]["gate"]}
    rise, drop = ends["motion_background"], ends["face_sim_arc"]  # the last row of motion is its rise
    row = next(row for row in requests["rows"] if row["case"] == "plan:compiled-cpu:bf16")
    faster = row["request_speedup_vs_published_bf16"]
    assert faster >= 4
    kept_out, people = tuned["settings"]["check"], len(tuned["settings"]["cases"])
    page = " ".join((repository / "docs" / "policies.md").read_text(encoding="utf-8").split())
    for words in (
        f"tried {len(tuned['trials']) - 1} plans of {tuned['settings']['num_inference_steps']} steps",
        f"on {people - kept_out} people, and those that passed on {kept_out} others",
        f"`{chosen['name']}`: {chosen['work']:.0%} of the rows;",
        f"of {len(tuned['checks'])} plans checked the first that passed",
        f"On {len(held_out['settings']['people'])} held-out people, in the same form, it keeps the budget",
        f"| | {after['psnr']:.1f} dB | {ends['psnr'][0]:.1f} to {ends['psnr'][1]:.1f} | at least 30 dB |",
        (
            f"| {before['face_sim_arc']:.4f} | {after['face_sim_arc']:.4f} | change {-drop[1]:+.4f} to "
            f"{-drop[0]:+.4f} |"
        ),
        (
            f"| {before['motion_background']:.3f} | {after['motion_background']:.3f} ({moved:+.1%}) | change "
            f"{rise[0]:+.1f}% to {rise[1]:+.1f}% |"
        ),
        f"The loop alone is {row['speedup_vs_published_bf16']:.2f} times",
        f"Medians of {requests['settings']['rounds']} interleaved rounds",
        *request_rows(requests),
    ):
        assert words in page
    front = (repository / "README.md").read_text(encoding="utf-8")
    assert f"| {faster:.1f} times as fast" in front
    assert f"PSNR {after['psnr']:.1f} dB to the same form without a plan" in front
    assert after["face_sim_arc"] >= before["face_sim_arc"]
    for document in (tuned, held_out, requests):
        assert is_clean(document["commit"])


def test_the_page_of_recipes_shows_what_was_measured(repository: Path) -> None:
    file = repository / "benchmarks" / "results" / "tiny_model" / "quantised_recipes.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    page = (repository / "docs" / "quantize.md").read_text(encoding="utf-8")
    assert shown(page, "quantised_recipes") == recipe_table.recipe_table(document)
    assert is_clean(document["commit"])
    assert not [row for row in (*document["rows"], *document["parity"]["rows"]) if row["status"] == "failed"]
    measured = [row for row in document["rows"] if row["recipe"] == "int8" and "video" in row]
    assert {row["backend"] for row in measured} == set(document["settings"]["video_backends"])
    for row in measured:
        assert row["video"]["means"]["psnr"] >= 28
        assert row["video"]["means"]["face_sim_arc"] >= document["exact"]["face_sim_arc"] - 0.01


def spread(median: float) -> dict[str, float]:
    return {"median": median, "p20": median, "p80": median, "n": 3}


@pytest.fixture(name="document")
def _document() -> dict[str, Any]:
    ok = {
        "case": "exact:compiled:bf16",
        "status": "ok",
        "latency_ms": spread(17_240.0),
        "step_ms": spread(340.4),
        "speedup_vs_published_bf16": 1.804,
        "speedup_vs_published_fp32": None,
        "share_of_floor": 0.517,
        "relative_error": 0.0123,
    }
    return {
        "machine": {"cpu": "Some CPU", "cores": 2, "extensions": ["amx_bf16"], "gpu": None},
        "versions": {"torch": "2.13.0", "diffusers": "0.42", "openvino": "2026.1"},
        "commit": "0123456789abcdef",
        "settings": {
            "size": "mini",
            "steps": 50,
            "rounds": 3,
            "device": "cpu",
            "threads": 2,
            "video": {"num_frames": 17, "height": 256, "width": 256},
        },
        "rows": [ok, {**ok, "case": "exact:openvino:bf16", "status": "not measured", "reason": "absent"}],
    }


def test_table_of_a_document(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = bench_report.readme_table(document)
    lines = table.splitlines()
    assert lines[2:] == [
        "| `exact:compiled:bf16` | 17.2 | 1.80x |  | 340 | 52% | 1.2e-02 |",
        "",
        (
            "`mini`, 17 frames at 256x256, 50 steps under guidance, medians of 3 interleaved rounds; Some "
            "CPU, 2 cores (amx_bf16), 2 threads; torch 2.13.0, openvino 2026.1; commit 0123456789ab."
        ),
    ]
    assert lines[0].count("|") == lines[2].count("|")
    file = tmp_path / "bench_mini.json"
    file.write_text(json.dumps(document))
    assert readme_table.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert shown(f"# Title\n\n{printed}\nmore", "bench_mini") == table
    for commit, way_out in (("0123456789abcdef-dirty", "git status"), ("unknown", "measure in a clone")):
        file.write_text(json.dumps(document | {"commit": commit}))
        assert readme_table.main([str(file)]) == 2
        refused = capsys.readouterr()
        assert refused.out == ""
        assert f"{commit}, not at a commit" in refused.err
        assert way_out in refused.err


def test_a_lone_marker_is_noticed() -> None:
    assert shown("no table", "bench_mini") is None
    with pytest.raises(AssertionError, match="one marker of bench_mini without the other"):
        shown("<!-- bench_mini -->\n| a |\n", "bench_mini")
