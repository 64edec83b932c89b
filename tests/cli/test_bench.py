"""`proteus-deploy bench`: rows, files, and what is said when something is missing or wrong."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy.benchmarks import (
    adapter_cost,
    candidate_process,
    denoising_loop,
    opened_candidate,
    scaling,
    sizes,
)
from proteus_deploy.benchmarks.candidates import parse_candidate, quantised_candidates
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.cli import bench as command
from proteus_deploy.cli.main import main
from proteus_deploy.export.activation_statistics import ActivationStatistics
from proteus_deploy.export.quantised_export import made_up_statistics
from proteus_deploy.export.quantize import plan_module
from proteus_deploy.export.recipe import Recipe
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.eager import EagerGraph


def run(*words: str) -> int:
    return main(["bench", "--steps", "2", "--rounds", "2", "--no-memory", *words])


def test_rows_and_files(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "csv", "markdown")}
    page = tmp_path / "bench.html"
    words = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    words += ["--checkpoint", str(tiny_checkpoint), "--report", str(page), "--plots", str(tmp_path / "plots")]
    assert run("--candidate", "exact:eager:bf16", "--candidate", "exact:tensorrt:bf16", *words) == 0
    document = json.loads(files["json"].read_text())
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == [
        "published:eager:fp32",
        "published:eager:bf16",
        "exact:eager:bf16",
        "exact:tensorrt:bf16",
    ]
    absent = rows.pop("exact:tensorrt:bf16")
    assert absent["status"] == "not measured"
    assert absent["reason"] == "tensorrt runs engines; pass a bundle that `proteus-deploy build` was run on"
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["latency_ms"]["n"] == 2
        assert row["step_ms"]["n"] == 4
        assert row["step_ms"]["median"] > 0
        assert row["floor_ms"] > 0
    assert rows["published:eager:fp32"]["relative_error"] == 0
    assert rows["published:eager:fp32"]["speedup_vs_published_fp32"] == 1
    assert 0 < rows["exact:eager:bf16"]["relative_error"] < 0.5
    assert document["ceilings"]["flops_of_a_step"] > 0
    assert {"machine", "versions", "commit", "settings"} <= set(document)
    assert document["settings"]["weights"]
    with files["csv"].open() as stream:
        table = list(csv.DictReader(stream))
    assert [line["case"] for line in table] == [row["case"] for row in document["rows"]]
    assert float(table[0]["latency_ms.median"]) == rows["published:eager:fp32"]["latency_ms"]["median"]
    lines = files["markdown"].read_text().splitlines()
    assert lines[0].startswith("| case | loop s |")
    assert lines[5].startswith("| exact:tensorrt:bf16 |")
    text = page.read_text()
    assert text.count("<svg") == 2
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"loops.png", "steps.png"}
    assert "<script" not in text
    output = capsys.readouterr()
    assert output.out.splitlines()[0].split()[:2] == ["case", "loop"]
    assert "interleaved rounds" in output.out
    assert "timing: done" in output.err


def test_a_bundle_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    """Without a checkpoint there is no published form, and the rows say how to have it."""
    pytest.importorskip("onnxruntime")
    file = tmp_path / "bench.json"
    assert run(str(tiny_bundle), "--candidate", "exact:onnxruntime:fp32", "--json", str(file)) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["status"] for row in rows] == ["not measured", "not measured", "ok"]
    assert "add --checkpoint DIR" in rows[0]["reason"]
    assert rows[2]["speedup_vs_published_fp32"] is None
    assert rows[2]["relative_error"] is None


def test_memory_is_measured_in_a_process_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    words = ["--checkpoint", str(tiny_checkpoint), "--candidate", "exact:eager:fp32", "--baseline", "none"]
    assert main(["bench", "--steps", "1", "--rounds", "1", *words, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["peak_memory_bytes"] > 50 << 20
    assert row["cold_start_s"] > 0
    assert "memory_reason" not in row


def test_a_process_does_not_inherit_the_peak_of_its_parent() -> None:
    """This one has torch loaded; the child has not."""
    code = "from proteus_deploy.benchmarks.candidate_process import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = candidate_process.peak_memory()
    assert mine is not None
    assert 0 < int(child.stdout) < mine / 2


def test_a_candidate_that_fails_keeps_its_row(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bench.json"
    measured = denoising_loop.run_loop

    def break_bf16(config: Any, scheduler: Any, backend: Any, *rest: Any, **how: Any) -> Any:
        if "bfloat16" in str(backend.dtype):
            raise RuntimeError("no such kernel")
        return measured(config, scheduler, backend, *rest, **how)

    monkeypatch.setattr(opened_candidate, "run_loop", break_bf16)
    words = ["--checkpoint", str(tiny_checkpoint), "--candidate", "exact:eager:fp32", "--json", str(file)]
    assert run(*words) == 1
    rows = {row["case"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["published:eager:bf16"]["status"] == "failed"
    assert rows["published:eager:bf16"]["reason"] == "no such kernel"
    assert rows["exact:eager:fp32"]["status"] == "ok"


def test_recipes_beside_the_published_form(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In PyTorch; that bundles are made by recipe is tested where exports are (test_quantised_export.py)."""
    file, statistics = tmp_path / "bench.json", tmp_path / "statistics"
    _write_statistics(tiny_checkpoint, statistics)
    words = ["--checkpoint", str(tiny_checkpoint), "--json", str(file), "--calibration", str(statistics)]
    for recipe in ("int8", "fp8", "int4-weight"):
        words += ["--candidate", f"exact:eager:fp32+{recipe}"]
    assert run(*words) == 0
    document = json.loads(file.read_text())
    rows = {row["case"]: row for row in document["rows"] if row["recipe"]}
    assert [row["recipe"] for row in document["rows"]] == [None, None, "int8", "fp8", "int4-weight"]
    fp8 = rows.pop("exact:eager:fp32+fp8")
    assert fp8["status"] == "not measured"
    assert "which PyTorch does on CUDA devices from sm89 on" in fp8["reason"]
    for case, row in rows.items():
        assert row["status"] == "ok", row["reason"]
        assert 1e-5 < row["relative_error"] < 0.5, case
        assert row["floor_ms"] is None, "products of codes have no measured rate"
    assert document["settings"]["statistics"] == ActivationStatistics.load(statistics).hash


def test_a_recipe_goes_to_every_backend_of_the_device() -> None:
    names = [one.name for one in quantised_candidates("int8", "cpu")]
    assert names == [f"exact:{name}:fp32+int8" for name in ("compiled", "onnxruntime", "openvino")]
    assert [one.name for one in quantised_candidates("fp8", "cuda:0")] == [
        "exact:compiled:bf16+fp8",
        "exact:tensorrt:bf16+fp8",
    ]
    assert parse_candidate("exact:openvino:bf16+int8").recipe == "int8"


def _write_statistics(checkpoint: Path, folder: Path) -> None:
    """Every channel reaches 4, said to be recorded on `checkpoint`."""
    found = Checkpoint.open(checkpoint)
    plans = {
        name: plan_module(Recipe.load("int8"), name, NetworkFactory(found, folded=True)(name).module)
        for name in ("denoiser", "text_encoder")
    }
    layers = made_up_statistics(plans).layers
    ActivationStatistics(layers, (0,), {"checkpoint": found.hash, "settings": {}, "cases": []}).save(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--candidate", "exact:eager:fp32+int3"], "no recipe 'int3'; ready ones are fp8"),
        (["--candidate", "exact:eager:fp32+"], "names no recipe after the +"),
        (["--candidate", "published:eager:fp32+int8"], "runs in eager PyTorch, without a recipe"),
        (["--quantize", "int8"], "recipe 'int8' needs statistics of activations; run `proteus-deploy calib"),
        (["--calibration", "here"], "no candidate's recipe reads statistics; leave it out"),
        (["--candidate", "exact:eager"], "is not form:backend:precision"),
        (["--candidate", "fast:eager:fp32"], "form is 'fast'; choose from published, exact, plan"),
        (["--candidate", "exact:cudnn:fp32"], "backend is 'cudnn'; choose from eager"),
        (["--candidate", "exact:eager:int8"], "precision is 'int8'; choose from fp32"),
        (["--guidance-scale", "1"], "loops are timed under guidance"),
        (["--candidate", "published:compiled:bf16"], "the published form runs in eager PyTorch"),
        (["--candidate", "plan:eager:fp32"], "there is no plan; add --plan FILE"),
        (["--steps", "0"], "--steps is 0; choose at least 1"),
        (["--values", "9,17"], "--values 9,17 is of no scale; add --scale frames|resolution|steps|batch"),
        (["--scale", "steps", "--end-to-end"], "--scale times loops only; leave out --end-to-end"),
        (["--scale", "frames", "--values", "2"], "frames '2' is less than two latent frames"),
        (["--scale", "steps", "--values", "4,many"], "steps 'many' isn't a whole number from 1 to 1000"),
        (["--scale", "resolution", "--values", "100x96"], "isn't HEIGHTxWIDTH in multiples of 16 pixels"),
        (["--rounds", "0"], "--rounds is 0; choose at least 1"),
        (["--size", "5b"], "--size 5b takes days on a CPU; add --device cuda"),
        (["--size", "tiny", "--checkpoint", "x"], "--size tiny brings its own model; leave it out"),
        (["--checkpoint", "nowhere"], "nowhere is not a folder"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_foreign_checkpoint_is_refused(
    tiny_bundle: Path, parity: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(tiny_bundle), "--checkpoint", str(parity / "checkpoint")) == 2
    assert "was exported from another checkpoint" in capsys.readouterr().err


def test_words_of_the_command_are_those_that_exist() -> None:
    assert command._SIZES == sizes.SIZES
    assert command._SCALES == scaling.SCALES


def test_adapters(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On PyTorch in place of two exports, which tests/adapters has."""

    def open_eagerly(checkpoint: Checkpoint, table: Any, _: Path) -> EagerGraph:
        network = NetworkFactory(checkpoint)("denoiser").materialise(torch.float32)
        return EagerGraph(table.graph("denoiser"), network)

    monkeypatch.setattr(adapter_cost, "_open", open_eagerly)
    file = tmp_path / "adapters.json"
    assert run("--adapters", "4", "--checkpoint", str(tiny_checkpoint), "--json", str(file)) == 0
    document = json.loads(file.read_text())
    assert set(document["step_ms"]) == {"without room", "idle", "adapter"}
    assert all(spread["n"] == 2 and spread["median"] > 0 for spread in document["step_ms"].values())
    assert set(document["swap_ms"]) == {"file", "memory"}
    assert document["settings"]["rank"] == 4
    assert document["idle_differs_by"] < 1e-4, "inputs that hold zeros change nothing"
    assert "another adapter, from file" in capsys.readouterr().out


def test_adapters_with_flags_of_loops(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--adapters", "4", "--scale", "frames") == 2
    assert "--adapters 4 times steps, no loops; leave out --scale" in capsys.readouterr().err
    assert run("--adapters", "0") == 2
    assert "the rank is 0; choose 1 to 512" in capsys.readouterr().err
    assert run("--adapters", "4", str(tiny_bundle)) == 2
    assert "pass its checkpoint with --checkpoint alone" in capsys.readouterr().err
