"""`proteus-deploy export`: table, JSON, refusals; graphs come from a bundle that was exported once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from proteus_deploy.bundle import Bundle
from proteus_deploy.cli.main import main

pytest.importorskip("onnxruntime")


@pytest.fixture
def words(parity: Path, tmp_path: Path) -> list[str]:
    return ["export", str(parity / "checkpoint"), "--output-dir", str(tmp_path / "bundle")]


@pytest.mark.usefixtures("instant_export")
def test_table(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].split() == ["graph", "nodes", "MiB", "error", "under", "ONNX", "Runtime"]
    bundle = Bundle.open(tmp_path / "bundle")
    assert [line.split()[0] for line in lines[2:-1]] == [graph.name for graph in bundle.table.graphs]
    assert all("e-0" in line for line in lines[2:-1])
    assert lines[-1] == f"{tmp_path / 'bundle'} (fp32)"
    assert output.err.splitlines()[0] == "export: started, 8 parts"
    assert "reference video: done, 4 parts" in output.err


@pytest.mark.usefixtures("instant_export")
def test_json(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json", "--reference", "stages"]) == 0
    document = json.loads(capsys.readouterr().out)
    bundle = Bundle.open(tmp_path / "bundle")
    assert document == {
        "bundle": str(bundle.folder),
        "hash": bundle.hash,
        "dtype": "fp32",
        "parity": bundle.manifest["parity"],
    }


@pytest.mark.usefixtures("instant_export")
def test_without_a_reference(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--reference", "none"]) == 0
    output = capsys.readouterr().out
    assert "parity was not measured: exported without a recorded reference" in output
    assert output.count("not measured") == 9
    assert main(["verify", words[-1]]) == 2
    assert "--checkpoint" in capsys.readouterr().err


@pytest.mark.usefixtures("instant_export")
def test_overwrite_has_to_be_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--reference", "none"]) == 0
    before = Bundle.open(words[-1]).hash
    assert main(words) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert Bundle.open(words[-1]).hash == before
    assert main([*words, "--overwrite"]) == 0
    assert Bundle.open(words[-1]).hash != before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-height", "100"], "--max-height is 100; it must be a multiple of 16, at least 32"),
        (["--max-width", "0"], "--max-width is 0"),
        (["--max-num-frames", "0"], "--max-num-frames is 0; it must be at least 1"),
        (["--max-videos", "0"], "max_videos is 0"),
    ],
)
def test_wrong_ranges(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main([*words, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


def test_learned_positions_say_why(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint(use_learned_positional_embeddings=True)
    assert main(["export", str(folder), "--output-dir", str(tmp_path / "b"), "--max-height", "64"]) == 2
    assert "position table for one size only (9 frames, 64x96 pixels)" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--dtype", "int8"], ["--reference", "all"], ["--max-height", "tall"]])
def test_words_that_argparse_refuses(words: list[str], more: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, *more])
    assert stopped.value.code == 2


def test_folder_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--output-dir", str(tmp_path / "bundle")]) == 2
    assert "model_index.json is missing" in capsys.readouterr().err
