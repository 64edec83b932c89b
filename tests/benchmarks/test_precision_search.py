"""The search for a mixture of formats: what it tries, what it takes, and the documents of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks import sensitivity_plot
from proteus_deploy.benchmarks.plan_trials import TuningCase
from proteus_deploy.benchmarks.precision_report import page, precision_document, rows
from proteus_deploy.benchmarks.precision_search import PrecisionSearch, recipe_of
from proteus_deploy.benchmarks.precision_trials import PrecisionTrials, denoiser_module
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.budget import Bound, Budget
from proteus_deploy.evaluate.encoders import Encoders
from proteus_deploy.evaluate.gate import check
from proteus_deploy.evaluate.metrics import METRICS
from proteus_deploy.export.precision_path import EXPORTED
from proteus_deploy.export.quantized_linear import QuantizedLinear
from proteus_deploy.pipeline import Pipeline
from proteus_deploy.policies.plan import Plan
from proteus_deploy.request import GenerateRequest

FORMATS = ["int8-weight", "nvfp4-weight"]  # neither needs statistics


@pytest.fixture(name="cases")
def _cases(small_request: Callable[..., GenerateRequest]) -> list[TuningCase]:
    return [TuningCase(f"case {seed}", str(seed), small_request(seed=seed)) for seed in (1, 2)]


def budget(decibels: float) -> Budget:
    return Budget((Bound("psnr", "min", decibels),), name=f"{decibels} dB")


@pytest.fixture(name="search")
def _search(parity: Path, parity_pipeline: Pipeline, tmp_path: Path) -> PrecisionSearch:
    return PrecisionSearch(
        Checkpoint.open(parity / "checkpoint"),
        parity_pipeline,
        None,
        FORMATS,
        budget(1.0),
        Encoders(),
        tmp_path / "sensitivities.json",
        steps_per_case=1,
    )


@pytest.mark.slow
def test_the_cheapest_inside_the_budget(
    search: PrecisionSearch, cases: list[TuningCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = search.run(cases[:1])
    assert everything.chosen.name == f"mixed {len(everything.path) - 1} of {len(everything.path) - 1}"
    known = search.sensitivities.read_bytes()
    eight, four = everything.ready
    assert eight.means["psnr"] > four.means["psnr"]
    # A ready recipe keeps some layers. The one of 8 bits gives identity attention codes, the one of 4 keeps
    # it, so which of the two is smaller depends on the model.
    assert four.weight_bytes > everything.chosen.weight_bytes
    assert max(eight.weight_bytes, four.weight_bytes) < everything.trials[0].weight_bytes
    # A bound between the two: some layers have four bits, others more.
    bound = (eight.means["psnr"] + four.means["psnr"]) / 2
    found = replace(search, budget=budget(bound)).run(cases[:1])
    assert search.sensitivities.read_bytes() == known
    exact, *tried = found.trials
    assert (exact.name, exact.recipe, exact.measured_error) == ("exact", None, 0.0)
    assert exact.cost == found.path[0].cost
    assert all(kind == EXPORTED for kind in found.path[0].kinds.values())
    assert found.chosen.gate.passed
    assert all(one.gate.passed == (one.means["psnr"] >= bound) for one in found.trials)
    costs = [one.cost for one in found.trials if one.gate.passed and one.cost is not None]
    assert found.chosen.cost == min(costs)
    recipe = found.chosen.recipe
    assert recipe is not None
    assert recipe.weight_formats == ("int8", "nvfp4")
    assert recipe == recipe_of(found.table, found.path[int(found.chosen.name.split()[1])], found.chosen.name)
    for one in tried:
        # As tests/export/test_sensitivity.py says, where the bound comes from.
        assert one.measured_error == pytest.approx(one.predicted_error, rel=0.11)
        units = found.table.weight_bytes(found.path[int(one.name.split()[1])].kinds)
        folded = exact.weight_bytes - found.table.weight_bytes(found.path[0].kinds)
        assert one.weight_bytes == units + folded
    module = denoiser_module(search.pipeline)
    assert not any(isinstance(part, QuantizedLinear) for part in module.modules())

    # Documents
    about = {"settings": {"model": "<model>", "budget": "b", "formats": FORMATS}}
    document = json.loads(json.dumps(precision_document(found, about)))
    assert document["chosen"] == found.chosen.name
    assert document["recipe"] == recipe.hash
    assert sum(document["counts"].values()) == len(found.table.units)
    assert len(document["path"]) == len(found.path)
    table = rows(document)
    assert table[0][0] == "exact"
    assert {cells[-1] for cells in table} == {"passed", "broken: psnr"}
    text = page(document, bound)
    assert text.count("<svg") == 3
    assert "&lt;model&gt;" in text
    assert "<script" not in text
    assert "transformer_blocks.1.ff.net.2 as nvfp4-weight" in text
    source, picture = tmp_path / "tune.json", tmp_path / "plot.png"
    source.write_text(json.dumps(document))
    assert sensitivity_plot.main([str(source), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")

    # The second set of cases fails all that is quantised.
    real = PrecisionTrials.trial

    def strict(self: PrecisionTrials, *words: Any, **settings: Any) -> Any:
        trial = real(self, *words, **settings)
        failing = check(budget(1.0), [], [], known=METRICS)
        return replace(trial, gate=failing) if [one.name for one in self._cases] == ["case 2"] else trial

    monkeypatch.setattr(PrecisionTrials, "trial", strict)
    careful = replace(search, budget=budget(bound)).run(cases[:1], cases[1:])
    assert (careful.chosen.name, careful.chosen.recipe) == ("exact", None)
    passing = sorted((one for one in careful.trials if one.gate.passed), key=lambda one: one.cost or 0)
    assert [one.name for one in careful.checks] == [one.name for one in passing]
    assert precision_document(careful, about)["recipe"] is None


def test_costs_decide(
    search: PrecisionSearch, cases: list[TuningCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where four bits cost more than eight, nothing gets them."""
    from proteus_deploy.benchmarks import precision_search as module
    from proteus_deploy.export.precision_units import Unit
    from proteus_deploy.export.sensitivity import Sensitivity, SensitivityTable

    units = (
        Unit("proj_out", ("proj_out",), 6144, 96),
        Unit("norm_out.linear", ("norm_out.linear",), 9216, 48),
    )
    values = {
        unit.pattern: {
            "int8-weight": Sensitivity((1e-4,), unit.weights),
            "nvfp4-weight": Sensitivity((1e-2,), unit.weights // 2),
        }
        for unit in units
    }
    table = SensitivityTable(units, tuple(FORMATS), values, 4, ())
    monkeypatch.setattr(module, "measure_sensitivities", lambda *_, **__: table)
    by_bytes = search.run(cases[:1])
    assert set(by_bytes.path[-1].kinds.values()) == {"nvfp4-weight"}
    dear = replace(search, costs={"int8-weight": 1.0, "nvfp4-weight": 1.5, EXPORTED: 2.0})
    found = dear.run(cases[:1])
    assert set(found.path[-1].kinds.values()) == {"int8-weight"}
    assert found.path[-1].cost == 6144 + 9216


def test_what_can_not_be_searched(search: PrecisionSearch, cases: list[TuningCase], parity: Path) -> None:
    with pytest.raises(InputError, match="there are no cases"):
        search.run([])
    planned = replace(cases[0], request=replace(cases[0].request, plan=Plan()))
    with pytest.raises(InputError, match="case 1 has a plan or no seed"):
        search.run([planned])
    with pytest.raises(InputError, match=r"101.0 dB: the exact videos break it \(psnr .*choose wider bounds"):
        replace(search, budget=budget(101.0)).run(cases[:1])
    with pytest.raises(InputError, match="3 steps of each case were asked for; of 2 choose 1 to 2"):
        replace(search, steps_per_case=3).run(cases[:1])
    with (
        Pipeline.from_checkpoint(parity / "checkpoint", compiled=True) as compiled,
        pytest.raises(
            InputError, match="the pipeline runs on compiled; layers are tried on the eager backend"
        ),
    ):
        replace(search, pipeline=compiled).run(cases[:1])
    assert not search.sensitivities.exists()


def test_a_heat_map_of_nothing() -> None:
    document = {
        "sensitivities": {"proj_out": {"int8": {"error": 0.0, "weight_bytes": 1}}},
        "settings": {"formats": ["int8"]},
        "kinds": {},
    }
    with pytest.raises(ValueError, match="no layer has an error above 0"):
        sensitivity_plot.sensitivity_plot(document)
