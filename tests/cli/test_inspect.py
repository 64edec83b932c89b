"""`proteus-deploy inspect`: checkpoints, bundles, and what is neither."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.cli.main import main
from proteus_deploy.stage_table import build_stage_table


def _document(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(["inspect", str(path), "--json"]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def _copy_with_links(source: Path, destination: Path) -> Path:
    """A copy that shares the files' bytes; files to be changed have to be replaced, not written into."""
    return Path(shutil.copytree(source, destination, copy_function=os.link))


def test_checkpoint_in_tables(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_checkpoint)]) == 0
    printed = capsys.readouterr().out
    for fact in ("proteus, CogVideoX 1.0", "96x96, 17 frames", "CogVideoXDPMScheduler, v_prediction"):
        assert fact in printed
    assert "missing     nothing" in printed


def test_checkpoint_parameters_are_those_of_the_files(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = _document(tiny_checkpoint, capsys)
    stages = document["stages"]
    assert isinstance(stages, list)
    expected = set(build_stage_table(Checkpoint.open(tiny_checkpoint)).stages)
    assert {stage["stage"] for stage in stages} == expected
    for component in ("transformer", "vae", "text_encoder"):
        (file,) = (tiny_checkpoint / component).glob("*.safetensors")
        with safe_open(file, framework="pt") as handle:
            count = sum(handle.get_tensor(key).numel() for key in handle.keys())  # noqa: SIM118 - not a dict
        found = [stage for stage in stages if stage["component"] == component]
        assert sum(stage["parameters"] for stage in found) == count
        assert all(stage["dtypes"] == ["F16"] for stage in found)


def test_checkpoint_without_face_encoder(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy_with_links(tiny_checkpoint, tmp_path / "checkpoint")
    shutil.rmtree(folder / "face_encoder")
    assert _document(folder, capsys)["missing"] == ["face_encoder"]
    assert main(["inspect", str(folder)]) == 0
    assert "pass identity features" in capsys.readouterr().out


def test_checkpoint_reads_no_weights(tiny_checkpoint: Path) -> None:
    """Weights of a real checkpoint are tens of gigabytes; torch alone takes longer than the whole command."""
    code = (
        "import sys; from proteus_deploy.cli.main import main; "
        f"code = main(['inspect', {str(tiny_checkpoint)!r}]); "
        "sys.exit(code or 'diffusers' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_truncated_weights_are_named(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy_with_links(tiny_checkpoint, tmp_path / "checkpoint")
    (file,) = (folder / "vae").glob("*.safetensors")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])
    assert main(["inspect", str(folder)]) == 2
    assert str(file) in capsys.readouterr().err


def test_config_that_is_no_config(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy_with_links(tiny_checkpoint, tmp_path / "checkpoint")
    (folder / "transformer" / "config.json").unlink()
    (folder / "transformer" / "config.json").write_text("[]")
    assert main(["inspect", str(folder)]) == 2
    assert "must hold a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    "inner",
    ["vae", "vae/diffusion_pytorch_model.safetensors", "face_encoder/models/antelopev2/scrfd_tiny.onnx"],
)
def test_part_of_a_checkpoint_names_the_folder_to_pass(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], inner: str
) -> None:
    assert main(["inspect", str(tiny_checkpoint / inner)]) == 2
    assert f"a part of the checkpoint {tiny_checkpoint}; pass that folder" in capsys.readouterr().err


def test_part_of_a_bundle_names_the_folder_to_pass(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny_bundle / "onnx" / "denoiser.onnx")]) == 2
    assert f"a part of the bundle {tiny_bundle}; pass that folder" in capsys.readouterr().err


def test_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "neither a checkpoint nor a bundle" in capsys.readouterr().err
    (tmp_path / "loose.safetensors").touch()
    assert main(["inspect", str(tmp_path / "loose.safetensors")]) == 2
    assert "is a file; a checkpoint is a folder" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_bundle_as_json(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, bundle = _document(tiny_bundle, capsys), Bundle.open(tiny_bundle)
    assert document["kind"] == "bundle"
    assert document["hash"] == bundle.hash
    graphs = document["graphs"]
    assert isinstance(graphs, list)
    assert [graph["graph"] for graph in graphs] == [graph.name for graph in bundle.table.graphs]
    denoiser = next(graph for graph in graphs if graph["graph"] == "denoiser")
    assert denoiser["bytes"] >= (tiny_bundle / "onnx" / "denoiser.onnx").stat().st_size
    assert {tensor["name"] for tensor in denoiser["inputs"]} >= {"latents", "text", "timestep"}
    assert document["parity"] == bundle.manifest["parity"]


def test_bundle_in_tables(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle)]) == 0
    printed = capsys.readouterr().out
    assert "[B, f, 32, 2y, 2x]" in printed
    assert "cache_in_00 …" in printed
    assert "token columns (width / 16)" in printed
    assert "relative_error.denoiser" in printed


def test_altered_bundle_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy_with_links(tiny_bundle, tmp_path / "bundle")
    file = folder / "config" / "vae.json"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content.replace(b"0.7", b"0.8"))
    assert main(["inspect", str(folder)]) == 2
    assert f"{file} differs from the manifest" in capsys.readouterr().err


def test_engines_of_a_bundle_without_any(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle), "--engines"]) == 0
    assert "none built" in capsys.readouterr().out


def test_engines_of_a_checkpoint(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_checkpoint), "--engines"]) == 2
    assert "--engines is for a bundle" in capsys.readouterr().err
