"""Measurements of the published size: limits that end a process, rows that go on, and small slices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks import real_size_denoiser, real_size_engines, real_size_export
from proteus_deploy.benchmarks.limited_process import Limits, run_limited
from proteus_deploy.benchmarks.real_size_export import earlier_rows, put_row, write_configs
from proteus_deploy.errors import InputError
from proteus_deploy.export.recipe import Recipe

HOLD = "import time; held = bytearray(256 << 20); held[::4096] = b'x' * (1 << 16); time.sleep(60)"
NO_LEFT = 0  # bytes that the machine keeps: none, so that other work can't end these


def test_a_process_says_what_it_found() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(1); print('noise'); print('{\"x\": 1}')"]
    outcome = run_limited(command, Limits(1 << 30, NO_LEFT))
    assert outcome.result == {"x": 1}
    assert outcome.reason == ""
    assert outcome.seconds >= 1
    assert outcome.peak_resident_bytes is not None
    assert outcome.peak_anonymous_bytes is not None
    assert outcome.peak_resident_bytes >= outcome.peak_anonymous_bytes > 0


def test_a_process_that_takes_too_much_is_ended() -> None:
    outcome = run_limited([sys.executable, "-c", HOLD], Limits(128 << 20, NO_LEFT))
    assert outcome.result is None
    assert "GiB of memory; the limit was 0.1" in outcome.reason
    assert outcome.peak_anonymous_bytes is not None
    assert outcome.peak_anonymous_bytes > 128 << 20


def test_a_process_ends_before_the_machine_is_full() -> None:
    outcome = run_limited([sys.executable, "-c", HOLD], Limits(1 << 40, 1 << 50))
    assert outcome.result is None
    assert "GiB left" in outcome.reason


def test_a_process_that_never_ends() -> None:
    outcome = run_limited([sys.executable, "-c", HOLD], Limits(1 << 40, NO_LEFT, timeout_s=0.5))
    assert outcome.reason == "killed after 0 s"


def test_a_failure_is_quoted() -> None:
    outcome = run_limited([sys.executable, "-c", "raise SystemExit('no such thing')"], Limits(1 << 40))
    assert outcome.result is None
    assert outcome.reason == "exit code 1: no such thing"


def test_rows_go_on(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert earlier_rows(file, "abc") == []
    rows: list[dict[str, Any]] = []
    for recipe, seconds in (("int8", 1), ("fp8", 2), ("int8", 3)):
        put_row(rows, {"case": "export", "recipe": recipe, "layers": 2, "seconds": seconds})
    assert [(row["recipe"], row["seconds"]) for row in rows] == [("int8", 3), ("fp8", 2)]
    file.write_text(json.dumps({"commit": "abc", "rows": rows}))
    assert earlier_rows(file, "abc") == rows
    with pytest.raises(InputError, match="holds results of commit abc, and this is abd"):
        earlier_rows(file, "abd")


def test_a_slice_is_the_published_size_with_fewer_layers(tmp_path: Path) -> None:
    document = json.loads((write_configs(tmp_path, 3) / "transformer" / "config.json").read_text())
    assert document == {**real_size_export.TRANSFORMER, "num_layers": 3}


def test_only_the_denoiser_is_left() -> None:
    recipe = Recipe.load("int8")
    alone = real_size_denoiser.denoiser_alone(recipe)
    assert set(alone.graphs) == {"denoiser"}
    assert alone.graphs["denoiser"] == recipe.graphs["denoiser"]
    with pytest.raises(InputError, match="says nothing of the denoiser"):
        real_size_denoiser.denoiser_alone(Recipe("none", "", {"text_encoder": recipe.graphs["text_encoder"]}))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, parity: Path) -> None:
    """Configs of the parity checkpoint in place of the published ones."""
    checkpoint = parity / "checkpoint"
    monkeypatch.setattr(
        real_size_export, "TRANSFORMER", json.loads((checkpoint / "transformer" / "config.json").read_text())
    )
    monkeypatch.setattr(real_size_export, "VAE", json.loads((checkpoint / "vae" / "config.json").read_text()))
    monkeypatch.setattr(
        real_size_export,
        "TEXT_ENCODER",
        json.loads((checkpoint / "text_encoder" / "config.json").read_text()),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_rows_of_quantised_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_size_export, "describe_commit", lambda _: "abc")
    output = tmp_path / "rows.json"
    arguments = ["--work-dir", str(tmp_path / "work"), "--output", str(output), "--dtype", "bf16"]
    assert real_size_export.main([*arguments, "--quantize", "int8", "--layers", "3", "--keep"]) == 0
    document = json.loads(output.read_text())
    assert document["settings"]["graphs"] == ["denoiser"]
    (row,) = document["rows"]
    assert row == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["status"] == "ok"
    assert row["statistics"] == "made up"
    assert row["linear_layers"]["int8 x int8"] == 6
    folder = tmp_path / "work" / "denoiser-int8-3"
    assert row["file_bytes"] == sum(file.stat().st_size for file in folder.glob("denoiser.onnx*"))
    assert json.loads((folder / "quantization.json").read_text())["recipe"]["name"] == "int8"
    assert real_size_export.main([*arguments, "--quantize", "no-such-recipe"]) == 1
    failed = json.loads(output.read_text())["rows"][1]
    assert failed["status"] == "failed"
    assert "no recipe 'no-such-recipe'" in failed["reason"]
    assert (tmp_path / "work" / "denoiser-int8-3").is_dir()


def test_layers_are_for_slices(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        real_size_export.main(["--work-dir", str(tmp_path), "--output", "x.json", "--layers", "3"])
    assert "--layers is for --quantize" in capsys.readouterr().err


def test_a_line_through_the_slices() -> None:
    def row(recipe: str, layers: int, resident: int | None, status: str = "built, not run") -> dict[str, Any]:
        peaks = {"peak_memory_bytes": resident, "peak_anonymous_bytes": None}
        return {"recipe": recipe, "layers": layers, "status": status, **peaks}

    rows = [row("int8", 3, 1300), row("int8", 6, 1600), row("int8", 12, 2200), row("int8", 24, 9, "failed")]
    rows += [row("fp8", 3, 10), row("int4", 3, 10), row("int4", 42, 20)]
    found = real_size_engines.extrapolate(rows, 42)
    line = {"fixed_bytes": 1000, "bytes_per_layer": 100, "slices": [3, 6, 12], "bytes": 5200}
    assert found == {"int8": {"peak_memory_bytes": line}}, "one slice, or the whole itself, makes no line"


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_rows_of_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    monkeypatch.setattr(real_size_engines, "describe_commit", lambda _: "abc")
    output, work = tmp_path / "rows.json", tmp_path / "work"
    arguments = ["--work-dir", str(work), "--output", str(output), "--quantize", "int8-weight"]
    assert real_size_engines.main([*arguments, "--layers", "3", "--keep"]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["status"] == "built, not run"
    assert row["engine_bytes"] > 0
    assert row["peak_memory_bytes"] >= row["peak_anonymous_bytes"] > 0
    folder = work / "denoiser-int8-weight-3"
    assert row["onnx_bytes"] == sum(file.stat().st_size for file in folder.glob("denoiser.onnx*"))
    assert not list(folder.glob("*.engine"))
    # The file is there, so only the build runs, and at once it has more than it may.
    assert real_size_engines.main([*arguments, "--layers", "3", "--memory-limit-gib", "0.01"]) == 1
    (failed,) = json.loads(output.read_text())["rows"]
    assert failed["status"] == "failed"
    assert "the limit was 0.0" in failed["reason"]
    assert not folder.exists()


@pytest.mark.parametrize("layers", ["2", "43"])
def test_slices_have_a_middle(layers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        real_size_engines.main(
            ["--work-dir", str(tmp_path), "--output", "x.json", "--quantize", "int8", "--layers", layers]
        )
    assert "a first, a middle and a last layer" in capsys.readouterr().err
