"""`proteus-deploy tune`: the plan on disk, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks import plan_families
from proteus_deploy.cli.main import main
from proteus_deploy.export import sensitivity
from proteus_deploy.export.precision_units import units_of
from proteus_deploy.export.recipe import Recipe
from proteus_deploy.policies.plan import plan_from_json, read_plan
from proteus_deploy.tiny.trained import ENCODERS, MODEL


def test_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_families, "_SHARES", (0.8,))
    monkeypatch.setattr(plan_families, "_POWERS", (2.0,))
    monkeypatch.setattr(plan_families, "_TRENDS", (0.0,))
    monkeypatch.setattr(plan_families, "_EVERY", (2,))
    monkeypatch.setattr(plan_families, "_LOWEST", ())
    plan, document, page = (tmp_path / name for name in ("plan.json", "tuning.json", "tuning.html"))
    words = ["--output", str(plan), "--json", str(document), "--report", str(page)]
    policies = ["--policy", "schedule", "--policy", "guidance"]
    size = ["--people", "2", "--check", "1", "--num-inference-steps", "8"]
    assert main(["tune", *size, *policies, *words]) == 0
    found = json.loads(document.read_text())
    assert found["settings"]["model"] == "the tiny model that ships"
    assert found["trials"][0]["name"] == "exact"
    chosen = next(trial for trial in found["trials"] if trial["name"] == found["chosen"])
    assert chosen["passed"]
    assert (len(found["settings"]["cases"]), found["settings"]["check"]) == (2, 1)
    assert found["checks"][-1]["name"] == f"{found['chosen']}, again"
    assert found["checks"][-1]["passed"]
    kinds = {trial["plan"].get("step_cache", {}).get("kind") for trial in found["trials"]}
    assert kinds == {None, "schedule"}
    assert read_plan(plan) == plan_from_json(chosen["plan"])
    assert page.read_text().startswith("<!doctype html>")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["plan", "work", "psnr", "dB", "likeness", "motion", "budget"]
    assert lines[-1].startswith(f"{found['chosen']}: ")


@pytest.mark.slow
def test_a_recipe_for_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four units: the others are the same work."""
    monkeypatch.setattr(sensitivity, "units_of", lambda shapes: units_of(shapes)[-4:])
    recipe, document, page = (tmp_path / name for name in ("recipe.json", "tuning.json", "tuning.html"))
    words = ["--output", str(recipe), "--json", str(document), "--report", str(page)]
    size = ["--people", "2", "--check", "1", "--num-inference-steps", "2", "--steps-per-case", "1"]
    assert main(["tune", "--quantize", "--formats", "int8-weight", *size, *words]) == 0
    found = json.loads(document.read_text())
    assert found["settings"]["formats"] == ["int8-weight"]
    assert found["chosen"] == "mixed 4 of 4"
    assert found["checks"][-1]["passed"]
    assert Recipe.load(recipe).hash == found["recipe"]
    assert recipe.with_suffix(".sensitivities.json").is_file()
    assert page.read_text().startswith("<!doctype html>")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["denoiser", "weights", "of", "exact"]
    assert lines[-1].startswith("mixed 4 of 4: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(MODEL)], "needs --cases: only the model that ships brings its own"),
        ([str(MODEL), "--cases", "cases.json"], "needs --encoders"),
        (["--people", "0"], "--people is 0; choose 1 to 30"),
        (["--budget", "nowhere.toml"], "nowhere.toml"),
        (["--check", "4"], "--check is 4; of 4 cases it can keep 0 to 3 out of the search"),
        (["--confident"], "two cases or more for an interval, and there are 3 to search with and 1 to check"),
        (["--confident", "--people", "1"], "there are 1 to search with and 0 to check"),
        (["--backend", "openvino"], "--backend openvino runs bundles"),
        (["--formats", "int8"], "--formats is for the search of a recipe; add --quantize"),
        (["--steps-per-case", "2"], "--steps-per-case is for the search of a recipe; add --quantize"),
        (["--quantize", "--policy", "guidance"], "--policy is for plans; leave it out with --quantize"),
        (["--frozen"], "here compiled is False and the device cpu"),
        (["--quantize", "--frozen"], "--frozen is for plans; leave it out with --quantize"),
        (
            ["--quantize", "--backend", "compiled"],
            "--backend is compiled; --quantize tries layers on the eager",
        ),
        (["--quantize"], "format 'int4-weight' needs statistics of activations"),
        (["--quantize", "--formats", "int8-weight,int2"], "format 'int2' is unknown"),
        (
            ["--quantize", "--formats", "int8-weight", "--cost", "int8-weight=much"],
            "--cost is 'int8-weight=much'; it is a format, once each, and a number",
        ),
        (["--quantize", "--calibration", "nowhere"], "nowhere"),
    ],
)
def test_wrong_flags(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *words, "--output", str(tmp_path / "plan.json")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is not readable JSON"),
        ([], "must be a JSON list"),
        (["a.jpg"], "case 1 is 'a.jpg'; a case is an object"),
        ([{"photo": "a.jpg"}], "case 1: prompt is None; it is text"),
        ([{"photo": "a.jpg", "prompt": "waves", "sed": 1}], "unknown key 'sed'"),
        ([{"photo": "a.jpg", "prompt": "waves", "seed": "1"}], "seed is '1'; it is a whole number"),
        ([{"photo": "a.jpg", "prompt": "waves"}], "a.jpg is not a file"),
    ],
)
def test_wrong_cases(document: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cases.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    words = ["--cases", str(file), "--encoders", str(ENCODERS), "--output", str(tmp_path / "plan.json")]
    assert main(["tune", str(MODEL), *words]) == 2
    assert message in capsys.readouterr().err
