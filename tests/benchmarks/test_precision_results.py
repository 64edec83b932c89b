"""The page of `tune` shows the mixed recipe that was measured."""

from __future__ import annotations

import json
from pathlib import Path

from proteus_deploy.benchmarks import precision_report
from proteus_deploy.benchmarks.machine import is_clean
from proteus_deploy.export.recipe import Recipe


def test_the_page_of_tuning_shows_the_mixed_recipe(repository: Path) -> None:
    results = repository / "benchmarks" / "results" / "tiny_model"
    document = json.loads((results / "tune_quantize.json").read_text(encoding="utf-8"))
    assert is_clean(document["commit"]), "measure a commit, not a working tree"
    recipe = Recipe.read(results / "mixed_recipe.json")
    assert recipe.hash == document["recipe"]
    page = (repository / "docs" / "tune.md").read_text(encoding="utf-8")
    exact = document["trials"][0]["weight_bytes"]
    again = [precision_report.row(trial, exact) for trial in document["checks"]]
    for cells in (*precision_report.rows(document), *again):
        assert f"| {' | '.join(cells)} |" in page
    counts = ", ".join(f"{count} {kind}" for kind, count in document["counts"].items())
    apart = max(
        abs(trial["measured_error"] / trial["predicted_error"] - 1)
        for trial in document["trials"]
        if trial["predicted_error"]
    )
    units, settings = len(document["sensitivities"]), document["settings"]
    searched = len(settings["cases"]) - settings["check"]
    words = " ".join(page.split())
    for wanted in (
        f"`{document['chosen']}`: of {units} units {counts}",
        f"at most {apart:.1%} apart",
        f"searched on {searched} drawn person, tried again on {settings['check']}",
        f"{settings['num_inference_steps']} steps",
    ):
        assert wanted in words
