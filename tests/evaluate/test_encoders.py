"""The folder of the encoders: what is found, what is missing, and what is refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from proteus_deploy.errors import CheckpointError
from proteus_deploy.evaluate.encoders import load_encoders
from proteus_deploy.evaluate.inception_network import InceptionFeatures
from proteus_deploy.evaluate.measure import measure_with_reasons
from proteus_deploy.evaluate.perceptual_distance import AlexNetMaps


@pytest.fixture
def folder(tmp_path: Path, clip_folder: Path, pack_folder: Path) -> Path:
    """A folder with the pack and CLIP."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "buffalo_l").symlink_to(pack_folder)
    (tmp_path / "clip").symlink_to(clip_folder)
    return tmp_path


def write_small_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """perceptual.safetensors, and a reader of it that gives two maps of the pixels."""

    class Small(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [images, images[:, :2, ::4, ::4]]

    module = types.ModuleType("proteus_deploy.evaluate.perceptual_network")
    module.load_perceptual_network = lambda path: Small()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    save_file({"gain": torch.ones(1)}, folder / "perceptual.safetensors")


def write_lpips(folder: Path, *, alexnet: bool = True, weights: bool = True) -> None:
    if alexnet:
        save_file(AlexNetMaps().state_dict(), folder / "alexnet.safetensors")
    if weights:
        channels = (64, 192, 384, 256, 256)
        tensors = {f"lin{n}.model.1.weight": torch.ones(1, count, 1, 1) for n, count in enumerate(channels)}
        save_file(tensors, folder / "lpips.safetensors")


def test_missing_parts_are_none_with_a_reason(folder: Path) -> None:
    encoders = load_encoders(folder)
    assert encoders.faces is not None
    assert encoders.clip is not None
    assert encoders.curricular is None
    assert encoders.face_features is None
    assert encoders.perceptual is None
    assert encoders.reason("curricular") == f"{folder} has no curricularface.safetensors"
    assert (
        encoders.reason("face_features")
        == f"{folder} has no inception_v3.safetensors or perceptual.safetensors"
    )
    assert "alexnet.safetensors and lpips.safetensors or perceptual.safetensors" in encoders.reason(
        "perceptual"
    )
    assert encoders.describe() == {}


def test_a_video_is_measured_with_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn people, the hand-made detector, and small random networks in the public layouts."""
    from proteus_deploy.evaluate.ir_backbone import IRBackbone, IRSizes
    from proteus_deploy.training.avatars import make_clip, make_photo

    torch.manual_seed(0)
    sizes = IRSizes(channels=4, units=((4, 2), (8, 2)), grid=28, embedding=6)
    save_file(IRBackbone(sizes).state_dict(), folder / "curricularface.safetensors")
    write_small_network(folder, monkeypatch)
    clip = make_clip(0, 0, num_frames=2)
    measured = measure_with_reasons(
        clip.frames,
        photo=make_photo(0, 0, size=160).image,
        prompt="a man waves",
        person_mask=clip.person_mask,
        reference=clip.frames,
        encoders=load_encoders(folder),
        flow=lambda _frames: clip.flow,
    )
    assert measured.reasons == {}
    values = measured.values
    assert values["face_detection_rate"] == 1.0
    assert 0.5 < (values["face_sim_arc"] or 0) < 1
    assert 0.5 < (values["face_sim_cur"] or 0) < 1
    assert (values["face_fid"] or 0) > 0
    assert values["psnr"] == 100.0
    assert values["ssim"] == pytest.approx(1.0)
    assert values["lpips"] == 0.0


def test_the_public_networks_of_the_distances(folder: Path) -> None:
    write_lpips(folder)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in InceptionFeatures(16).state_dict().items()}
    save_file({k: torch.ones(s) for k, s in shapes.items() if len(s)}, folder / "inception_v3.safetensors")
    encoders = load_encoders(folder)
    assert encoders.describe() == {"face_fid": "Inception-V3", "lpips": "LPIPS v0.1 (AlexNet)"}
    assert encoders.face_features is not None
    assert encoders.face_features(np.zeros((1, 224, 224, 3), np.uint8)).shape == (1, 128)


def test_two_scales_of_one_measure_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_network(folder, monkeypatch)
    write_lpips(folder)
    with pytest.raises(CheckpointError, match=r"perceptual\.safetensors and alexnet\.safetensors, lpips"):
        load_encoders(folder)


@pytest.mark.parametrize("alexnet", [True, False])
def test_half_of_lpips_is_refused(folder: Path, alexnet: bool) -> None:
    write_lpips(folder, alexnet=alexnet, weights=not alexnet)
    with pytest.raises(CheckpointError, match=r"only one of alexnet\.safetensors and lpips\.safetensors"):
        load_encoders(folder)


@pytest.mark.parametrize("name", ["curricularface.bin", "inception_v3.pth", "perceptual.pt", "lpips.pth"])
def test_a_pickle_is_refused_with_the_command(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    (folder / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=rf"pickles are not loaded.*proteus-deploy convert .*{name}"):
        load_encoders(folder)


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_folder_with_nothing_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = tmp_path / "encoders"
    make(folder)
    with pytest.raises(
        CheckpointError, match=r"is not a folder|holds none of the encoders: models/buffalo_l"
    ):
        load_encoders(folder)
