"""Recipes side by side: rows with figures, rows with reasons, what is kept, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy import GenerateRequest
from proteus_deploy.benchmarks import quantised_recipes, recipe_trials
from proteus_deploy.benchmarks.plan_trials import TuningCase
from proteus_deploy.benchmarks.recipe_table import HEADERS, recipe_table
from proteus_deploy.benchmarks.recipe_trials import RecipeTrials
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.encoders import Encoders
from proteus_deploy.export import export
from proteus_deploy.export.onnx_graph import ExportedGraph, traced_model, write_model
from proteus_deploy.testing import TOLERANCES

pytest.importorskip("onnxruntime")

RULES: dict[str, dict[str, Any]] = {
    "weights-int8": {"layers": "transformer_blocks.*", "weight": "int8"},
    "weights-nvfp4": {
        "layers": "transformer_blocks.*",
        "weight": "nvfp4",
        "granularity": "block",
        "block_size": 16,
    },
}


@pytest.fixture
def recipes(tmp_path: Path) -> list[str]:
    """Files of recipes that read no statistics and quantise the denoiser alone."""
    files = []
    for name, rule in RULES.items():
        files.append(tmp_path / f"{name}.json")
        document = {"schema_version": 1, "name": name, "graphs": {"denoiser": {"rules": [rule]}}}
        files[-1].write_text(json.dumps(document))
    return [str(file) for file in files]


@pytest.fixture(scope="module")
def traces() -> list[Any]:
    return []


@pytest.fixture
def exports(traces: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The denoiser is traced once, and the other graphs are empty files; names of those written."""
    written: list[str] = []

    def take(graph: Any, table: Any, network: Any, destination: Path, **settings: Any) -> ExportedGraph:
        written.append(graph.name)
        if graph.name != "denoiser":
            destination.touch()
            return ExportedGraph((destination.name,), 20, {}, 0)
        if not traces:
            traces.append((traced_model(graph, table, network, dtype=settings["dtype"]), network))
        model, own = traces[0]
        dtype, quantisation = settings["dtype"], settings["quantisation"]
        return write_model(model.clone(), own, destination, dtype=dtype, quantisation=quantisation)

    monkeypatch.setattr(export, "export_graph", take)
    return written


def test_rows_of_a_checkpoint(
    parity: Path,
    recipes: list[str],
    exports: list[str],
    small_request: Callable[..., GenerateRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, work = Checkpoint.open(parity / "checkpoint"), tmp_path / "work"
    case = TuningCase("one", "one", small_request())
    backends = ("onnxruntime", "eager")
    document: dict[str, Any] = {
        "machine": {"cpu": "Some CPU", "cores": 2, "extensions": []},
        "versions": {"torch": "2"},
        "commit": "0123456789abcdef",
        "settings": {
            "people": [1],
            "video_backends": ["openvino"],
            "num_inference_steps": 2,
            "rounds": 2,
            "threads": 1,
        },
        "parity": {"rows": [{"recipe": "weights-int8", "backend": "eager", "relative_error": 0.25}]},
    }
    document["parity"]["rows"][0] |= {"status": "ok", "reason": ""}
    with RecipeTrials(checkpoint, work, recipes, None, backends=backends) as trials:
        document |= {"rows": trials.rows, "bytes": trials.sizes()}
        trials.errors()
        trials.latencies(2)
        stated = {(row["recipe"], row["backend"]): row["status"] for row in trials.rows}
        document["exact"] = trials.videos([case], Encoders(), ("psnr", "motion_background"))
    rows = {(row["recipe"], row["backend"]): row for row in trials.rows}
    assert set(rows) == {(name, backend) for name in ("fp32", *RULES) for backend in backends}
    refused = rows.pop(("weights-nvfp4", "onnxruntime"))
    assert refused["status"] == "not measured"
    assert "no kernel for the nvfp4 weights of denoiser" in refused["reason"]
    assert "latency_ms" not in refused
    for (recipe, backend), row in rows.items():
        assert stated[recipe, backend] == "ok", row["reason"]
        # Without its other graphs, ONNX Runtime makes no video; what was measured before stays.
        assert (row["status"] == "ok") == (backend == "eager"), row["reason"]
        assert row["latency_ms"]["n"] == 2
        assert row["speedup_vs_eager_fp32"] > 0 < row["speedup_vs_onnxruntime_fp32"]
    assert rows["fp32", "eager"]["relative_error"] == 0
    assert rows["fp32", "eager"]["video"]["means"] == document["exact"]
    assert rows["fp32", "onnxruntime"]["relative_error"] <= TOLERANCES["bundle", "graph", "fp32"].bound
    one, other = (rows["weights-int8", backend]["relative_error"] for backend in backends)
    assert 0 < one <= TOLERANCES["quantised", "denoiser", "int8"].bound
    # Both hold the same codes; their difference is rounding, small beside what the codes cost.
    assert one == pytest.approx(other, rel=0.1)
    psnr = [rows[recipe, "eager"]["video"]["means"]["psnr"] for recipe in ("fp32", "weights-int8")]
    assert psnr[0] == 100 > psnr[1] > 20
    shares = [document["bytes"][name]["share_of_fp32"] for name in ("fp32", *RULES)]
    assert shares[0] == 1 > shares[1] > shares[2] > 0

    lines = recipe_table(json.loads(json.dumps(document))).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(cells) for cells in table} == {len(HEADERS)}
    shown = next(cells for cells in table if cells[:2] == ["`weights-int8`", "eager"])
    assert shown[HEADERS.index("error, parity")] == "2.5e-01"
    assert shown[HEADERS.index("error")] == f"{other:.1e}"
    assert any(
        line.startswith("- `weights-nvfp4` on onnxruntime, tiny model: not measured.") for line in lines
    )
    assert lines[-1].endswith("commit 0123456789ab.")

    # Once more: bundles and videos are there.
    exports.clear()
    monkeypatch.setattr(recipe_trials, "atomic_file", pytest.fail)
    with RecipeTrials(checkpoint, work, recipes, None, backends=backends) as again:
        assert again.sizes() == document["bytes"]
        assert again.videos([case], Encoders(), ("psnr",))["psnr"] == 100
    assert exports == []


def test_a_recipe_that_can_not_be_exported_keeps_its_rows(
    parity: Path, exports: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "odd.json"
    rule = {"layers": "absent.*", "weight": "int8"}
    graphs = {"denoiser": {"rules": [rule]}}
    file.write_text(json.dumps({"schema_version": 1, "name": "odd", "graphs": graphs}))
    checkpoint = Checkpoint.open(parity / "checkpoint")
    with RecipeTrials(checkpoint, tmp_path / "work", [str(file)], None, backends=["eager"]) as trials:
        sizes = trials.sizes()
        trials.errors()
    assert "names no layer of denoiser" in sizes["odd"]["reason"]
    plain, odd = trials.rows
    assert (plain["status"], odd["status"]) == ("ok", "failed")
    assert "names no layer of denoiser" in odd["reason"]


def test_simulation_has_a_row_only_where_there_are_no_products(parity: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(parity / "checkpoint")
    trials = RecipeTrials(checkpoint, tmp_path, ["int8-weight"], None)
    assert [row["backend"] for row in trials.rows] == 2 * ["onnxruntime", "openvino", "eager"]
    with pytest.raises(InputError, match="backend 'tpu' is unknown"):
        RecipeTrials(checkpoint, tmp_path, ["int8-weight"], None, backends=["tpu"])
    with pytest.raises(InputError, match="no recipe 'int9'"):
        RecipeTrials(checkpoint, tmp_path, ["int9"], None)


def test_parity_cases(parity: Path, tmp_path: Path) -> None:
    cases = quantised_recipes.parity_cases(parity)
    assert [case.name for case in cases] == sorted(file.name for file in parity.glob("case_*"))
    assert all(case.request.identity is not None for case in cases)
    with pytest.raises(InputError, match="holds no case_"):
        quantised_recipes.parity_cases(tmp_path)
    with pytest.raises(SystemExit):
        quantised_recipes.main(["--json", str(tmp_path / "result.json")])
