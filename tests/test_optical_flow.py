"""Flow estimators: a known shift, directions, sizes, and RAFT's plumbing without its weights."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proteus_deploy.errors import BackendError, CheckpointError, InputError
from proteus_deploy.optical_flow import DisFlow, RaftFlow, backward_flow, flow_magnitude
from proteus_deploy.testing import Tolerance, assert_close

EXACT = Tolerance(0.0, "absolute", "the same numbers, moved")


def texture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth coloured clouds, RGB uint8: something to see at every pixel."""
    import cv2

    noise = np.random.default_rng(seed).uniform(0, 255, (height, width, 3)).astype(np.float32)
    clouds = cv2.GaussianBlur(noise, (0, 0), 2.0)
    low, high = clouds.min(), clouds.max()
    return np.asarray((clouds - low) / (high - low) * 255, dtype=np.uint8)


def shifted(frames: int, height: int, width: int, step: tuple[int, int]) -> NDArray[np.uint8]:
    """A camera pan over the clouds: the picture moves by `step` = (x, y) pixels a frame."""
    margin = 8 * frames
    wide = texture(height + 2 * margin, width + 2 * margin)
    corners = [(margin - step[1] * k, margin - step[0] * k) for k in range(frames)]
    return np.stack([wide[y : y + height, x : x + width] for y, x in corners])


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "medium"])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (61, 83)])
def test_dis_recovers_a_known_shift(
    preset: Literal["ultrafast", "fast", "medium"], height: int, width: int
) -> None:
    flow = DisFlow(preset)(shifted(3, height, width, (3, -2)))
    assert flow.shape == (2, height, width, 2)
    assert flow.dtype == np.float32
    inner = flow[:, 12:-12, 12:-12]  # what comes in at the border has no past
    bound = {"ultrafast": 0.25, "fast": 0.2, "medium": 0.05}[preset]
    error = float(np.median(np.linalg.norm(inner - (3, -2), axis=-1)))
    mean = float(np.linalg.norm(inner - (3, -2), axis=-1).mean())
    assert_close(f"DIS {preset}, median end point error", error, 0.0, Tolerance(bound, "absolute", "pixels"))
    # A few pixels in flat clouds are further off.
    assert_close(f"DIS {preset}, mean end point error", mean, 0.0, Tolerance(2 * bound, "absolute", "pixels"))


def test_dis_gives_exactly_zero_for_equal_frames() -> None:
    frames = np.repeat(texture(40, 48)[None], 3, axis=0)
    assert not DisFlow()(frames).any()


def test_dis_does_not_remember() -> None:
    estimator = DisFlow()
    frames = shifted(3, 48, 48, (2, 1))
    first = estimator(frames)
    estimator(frames[::-1])
    assert_close("DIS called again", estimator(frames), first, EXACT)


def test_dis_takes_read_only_frames_with_strides() -> None:
    wide = shifted(3, 48, 96, (2, 1))
    view = wide[::-1, :, ::2]
    view.flags.writeable = False
    assert_close("DIS of a view", DisFlow()(view), DisFlow()(view.copy()), EXACT)


def test_backward_flow_leads_back_to_the_frame_before() -> None:
    """Frame by frame in the order of the clip: the steps differ, so a mixed-up order shows."""
    still = shifted(4, 64, 64, (2, 0))
    frames = still[[0, 1, 3]]  # moves by 2, then by 4
    flow = backward_flow(DisFlow(), frames)
    assert flow.flags.c_contiguous
    for entry, expected in enumerate((-2.0, -4.0)):
        found = float(np.median(flow[entry, 12:-12, 12:-12, 0]))
        assert_close(f"step {entry}", found, expected, Tolerance(0.05, "absolute", "pixels"))


def test_flow_magnitude() -> None:
    flow = np.zeros((2, 4, 5, 2), dtype=np.float32)
    flow[1, 2, 3] = (3, -4)
    flow.flags.writeable = False
    magnitude = flow_magnitude(flow)
    assert magnitude.shape == (2, 4, 5)
    assert magnitude[1, 2, 3] == 5
    assert magnitude.sum() == 5
    half = flow_magnitude(torch.tensor(flow).bfloat16())
    assert half.dtype == torch.float32
    assert_close("bfloat16 flow", half, magnitude, EXACT)
    with pytest.raises(InputError, match=r"shape \[2, 4, 5\]; expected \[..., H, W, 2\]"):
        flow_magnitude(torch.zeros(2, 4, 5))


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 16, 16, 3), dtype=np.float32),
        np.zeros((2, 16, 16), dtype=np.uint8),
        np.zeros((2, 16, 16, 4), dtype=np.uint8),
        np.zeros((1, 16, 16, 3), dtype=np.uint8),
    ],
)
def test_frames_of_another_kind_are_refused(frames: Any) -> None:
    with pytest.raises(InputError, match=r"expected RGB uint8 \[F, H, W, 3\], two or more"):
        DisFlow()(frames)


def test_dis_refuses_what_is_too_small_and_unknown_presets() -> None:
    with pytest.raises(InputError, match=r"frames are 16x11; DIS needs at least 12 pixels"):
        DisFlow()(np.zeros((2, 11, 16, 3), dtype=np.uint8))
    assert DisFlow()(np.zeros((2, 12, 12, 3), dtype=np.uint8)).shape == (1, 12, 12, 2)
    with pytest.raises(InputError, match="choose one of ultrafast, fast, medium"):
        DisFlow("slow")  # type: ignore[arg-type]


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.models.optical_flow", raising=False)
    with pytest.raises(BackendError, match=r"needs torchvision.*pip install \"proteus-deploy\[raft\]\""):
        RaftFlow(tmp_path / "raft.safetensors")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendError, match=r"needs opencv-python.*pip install \"proteus-deploy\[train\]\""):
        DisFlow()


class FakeRaft(torch.nn.Module):
    """Stands where raft_large stands: flow is the difference of the levels times `gain`; keeps its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(
        self, image1: torch.Tensor, image2: torch.Tensor, num_flow_updates: int
    ) -> list[torch.Tensor]:
        assert num_flow_updates == 12
        self.seen.append((image1, image2))
        flow = self.gain * (image2 - image1)[:, :2] * 127.5
        return [torch.full_like(flow, torch.nan), flow]


@pytest.fixture
def raft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[FakeRaft, Path]:
    """A fake torchvision, and a weight file for its network."""
    from safetensors.torch import save_file

    model = FakeRaft()
    module = types.ModuleType("torchvision.models.optical_flow")
    module.raft_large = lambda *, weights, progress: model  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    file = tmp_path / "raft_large.safetensors"
    save_file({"gain": torch.tensor(2.0)}, file)
    return model, file


def test_raft_sees_pixels_normalised_once(raft: tuple[FakeRaft, Path]) -> None:
    """[-1, 1] and no further; padded to a size it takes; cropped back; each pair once, in order."""
    model, weights = raft
    frames = np.zeros((6, 70, 131, 3), dtype=np.uint8)
    frames[:, 3, 5, 0] = 0, 255, 255, 155, 0, 40
    flow = RaftFlow(weights, batch=2)(frames)
    images = torch.cat([pair[0] for pair in model.seen])
    assert [len(pair[0]) for pair in model.seen] == [2, 2, 1]
    assert images.dtype == torch.float32
    assert tuple(images.shape) == (5, 3, 128, 136)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert flow.shape == (5, 70, 131, 2)
    assert flow.dtype == np.float32
    steps = 2 * np.diff(frames[:, 3, 5, 0].astype(np.float64))
    assert_close(
        "steps", flow[:, 3, 5, 0], steps, Tolerance(1e-3, "absolute", "levels of 255 as float32 in [-1, 1]")
    )
    assert np.count_nonzero(np.abs(flow) > 1e-3) == np.count_nonzero(steps)


def test_raft_weights_that_do_not_fit(raft: tuple[FakeRaft, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors does not exist"):
        RaftFlow(tmp_path / "nowhere.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: gain; unexpected: other"):
        RaftFlow(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="must be at least 1"):
        RaftFlow(raft[1], batch=0)
