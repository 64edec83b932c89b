"""Checkpoint -> bundle: what is in it, what is refused, and that it is whole or absent.

Graphs are taken from a bundle that was exported once; the exporter itself is tested in test_onnx_graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from proteus_deploy import BackendError, CheckpointError, InputError
from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.export import export as export_module
from proteus_deploy.export.export import export_bundle, versions
from proteus_deploy.export.reference import SIZES, load_stages, load_video
from proteus_deploy.stage_table import ExportRanges, build_stage_table
from proteus_deploy.testing import TOLERANCES

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture
def checkpoint(parity: Path) -> Checkpoint:
    return Checkpoint.open(parity / "checkpoint")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def test_manifest_of_a_bundle(parity_bundle: Path, checkpoint: Checkpoint) -> None:
    bundle = Bundle.open(parity_bundle)
    manifest = bundle.manifest
    assert manifest["checkpoint"] == {"hash": checkpoint.hash, "lineage": "proteus"}
    assert bundle.table == build_stage_table(checkpoint)
    assert (bundle.dtype, manifest["reference"]) == ("fp32", "video")
    assert manifest["versions"] == versions()
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["versions"]["proteus-deploy"] != "absent"
    assert set(manifest["graphs"]) == {graph.name for graph in bundle.table.graphs}
    for record in manifest["graphs"].values():
        assert record["opset"] == 20
        assert all(name in manifest["files"] for name in record["files"])
    assert manifest["parity"]["status"] == "measured"
    errors = manifest["parity"]["relative_error"]
    assert set(errors) == set(manifest["graphs"])
    assert 0 < max(errors.values()) <= TOLERANCES["bundle", "graph", "fp32"].bound
    assert bundle.transformer == checkpoint.transformer
    assert bundle.config("vae") == checkpoint.vae
    assert bundle.config("scheduler") == checkpoint.scheduler


def test_manifest_holds_no_path_and_no_time(parity_bundle: Path, repository: Path) -> None:
    for name, content in contents(parity_bundle).items():
        if name.endswith(".json") and not name.startswith("tokenizer"):
            text = content.decode()
            assert str(repository) not in text, name
            assert str(parity_bundle.parent) not in text, name
            assert "checkpoint/" not in text, name


def test_recorded_reference(parity_bundle: Path) -> None:
    bundle = Bundle.open(parity_bundle)
    stages = list(load_stages(parity_bundle / "reference", bundle.table))
    assert [(stage.graph.name, stage.sizes) for stage in stages] == [
        (graph.name, sizes) for graph in bundle.table.graphs for sizes in SIZES
    ]
    video = load_video(parity_bundle / "reference")
    assert video is not None
    assert len(video.latents) == video.request.num_inference_steps == 4
    assert video.frames.shape == (1, 9, 3, 64, 96)
    assert video.frames.std() > 0.01, "a flat reference would let any bundle pass"


@pytest.mark.usefixtures("instant_export")
def test_same_checkpoint_gives_the_same_bytes(
    parity_bundle: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    said: list[tuple[str, int, int]] = []
    bundle = export_bundle(checkpoint, tmp_path / "a/bundle", report=lambda *words: said.append(words))
    assert contents(bundle.folder) == contents(parity_bundle)
    assert list(dict.fromkeys(phase for phase, _, _ in said)) == [
        "export",
        "reference",
        "reference video",
        "parity",
        "hash the checkpoint and the bundle",
    ]
    for phase in {phase for phase, _, _ in said}:
        done = [(count, total) for name, count, total in said if name == phase]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]


@pytest.mark.usefixtures("instant_export")
@pytest.mark.parametrize(
    ("reference", "files", "status"), [("stages", 16, "measured"), ("none", 0, "not measured")]
)
def test_how_much_reference_is_recorded(
    checkpoint: Checkpoint, tmp_path: Path, reference: Any, files: int, status: str
) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "bundle", reference=reference)
    assert bundle.manifest["reference"] == reference
    assert len(list(bundle.folder.glob("reference/*"))) == files
    assert load_video(bundle.folder / "reference") is None
    assert bundle.manifest["parity"]["status"] == status


@pytest.mark.usefixtures("instant_export")
def test_large_checkpoints_record_nothing_unless_asked(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "AUTO_REFERENCE_LIMIT_BYTES", 1000)
    assert export_bundle(checkpoint, tmp_path / "bundle").manifest["reference"] == "none"


@pytest.mark.usefixtures("instant_export")
def test_random_weights_need_no_weight_files(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    checkpoint = Checkpoint.open(folder, random_weights_seed=3)
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    assert bundle.manifest["reference"] == "none"
    assert checkpoint.hash != Checkpoint.open(folder, random_weights_seed=4).hash


@pytest.mark.usefixtures("instant_export")
def test_nothing_is_written_over_what_is_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists and is not empty; choose another folder"):
        export_bundle(checkpoint, target, reference="none")
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "mine.txt"]
    with pytest.raises(InputError, match="is not a bundle, so --overwrite does not replace it"):
        export_bundle(checkpoint, target, reference="none", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "mine.txt"]
    (target / "mine.txt").unlink()
    for reference in ("none", "stages"):  # an empty folder is filled, a bundle is replaced
        export_bundle(checkpoint, target, reference=reference, overwrite=True)
        assert Bundle.open(target).manifest["reference"] == reference
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_failure_half_way_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        raise OSError("No space left on device")

    monkeypatch.setattr(export_module, "export_graph", fail)
    old = tmp_path / "bundle"
    old.mkdir()
    (old / "manifest.json").write_text('{"kind": "proteus_deploy bundle"}')
    for target, overwrite in ((tmp_path / "new", False), (old, True)):
        with pytest.raises(OSError, match="No space left"):
            export_bundle(checkpoint, target, overwrite=overwrite)
    assert calls == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bundle", "manifest.json"]


@pytest.mark.usefixtures("instant_export")
def test_graph_that_does_not_load_is_named(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = vars(export_module)["export_graph"]  # the fixture's

    def spoil(graph: Any, table: Any, network: Any, destination: Path, **options: Any) -> Any:
        exported = take(graph, table, network, destination, **options)
        if graph.name == "denoiser":
            destination.write_bytes(b"not a graph")
        return exported

    monkeypatch.setattr(export_module, "export_graph", spoil)
    with pytest.raises(BackendError, match="the exported graph 'denoiser' does not load"):
        export_bundle(checkpoint, tmp_path / "bundle", reference="stages")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "dtype 'fp8' is unknown"),
        ({"reference": "all"}, "reference 'all' is unknown; choose from auto, video, stages, none"),
        ({"ranges": ExportRanges(max_height=100)}, "--max-height is 100; it must be a multiple of 16"),
        ({"ranges": ExportRanges(max_width=16)}, "--max-width is 16; .* at least 32"),
        ({"ranges": ExportRanges(max_height=-64)}, "--max-height is -64"),
        ({"ranges": ExportRanges(max_num_frames=0)}, "--max-num-frames is 0; it must be at least 1"),
        ({"ranges": ExportRanges(max_num_frames=-8)}, "--max-num-frames is -8; it must be at least 1"),
        ({"ranges": ExportRanges(max_videos=0)}, "max_videos is 0; it must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(checkpoint, tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["max_height", "max_width", "max_num_frames"])
def test_learned_positions_allow_one_size(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(use_learned_positional_embeddings=True))
    with pytest.raises(
        InputError, match=r"position table for one size only \(9 frames, 64x96 pixels\); leave"
    ):
        export_bundle(checkpoint, tmp_path / "bundle", ranges=ExportRanges(**{name: 64}))
    assert not (tmp_path / "bundle").exists()


def test_ranges_shape_the_contract(checkpoint: Checkpoint) -> None:
    table = build_stage_table(
        checkpoint, ExportRanges(max_height=32, max_width=160, max_num_frames=49, max_videos=2)
    )
    assert table.profile(table.graph("denoiser"))["latents"]["max"] == (4, 13, 32, 4, 20)
    assert table.profile(table.graph("vae_encoder"))["image"]["max"] == (1, 3, 32, 160)
    assert table.axes["I"].max == 2


def test_missing_exporter_is_said_first(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(BackendError, match="exporting needs onnx and onnxscript"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_named_and_nothing_is_left(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint()
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"] = weights["proj_out.weight"][:, :-1].contiguous()
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"wrong shape: proj_out\.weight is \[64, 95\]"):
        export_bundle(Checkpoint.open(folder), tmp_path / "out" / "bundle")
    assert not list((tmp_path / "out").iterdir())


def test_broken_tokenizer_is_not_copied(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    (folder / "tokenizer").unlink()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="tokenizer can't be read as a T5 tokenizer"):
        export_bundle(Checkpoint.open(folder), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_tokenizer_of_another_text_encoder_is_named(parity: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(parity / "checkpoint")
    small = replace(source, text_encoder={**source.text_encoder, "vocab_size": 2})
    with pytest.raises(CheckpointError, match=r"gives the token .* vocab_size is 2; the parts come from"):
        export_bundle(small, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tiny_checkpoint_comes_with_its_face_networks(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert bundle.manifest["checkpoint"]["hash"] == checkpoint.hash
    assert bundle.table == build_stage_table(checkpoint)
    assert "denoiser" in bundle.table.stages
    assert len(bundle.table.stages) > 6
    for name, error in bundle.manifest["parity"]["relative_error"].items():
        assert error <= TOLERANCES["bundle", "graph", "fp32"].bound, name
    assert list((tiny_bundle / "face_encoder").rglob("*.onnx"))
    json.loads((tiny_bundle / "manifest.json").read_text(), parse_constant=pytest.fail)
