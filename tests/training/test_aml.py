"""Adaptive motion learning: bounds, exact grouping, a moving square, the published form in plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from proteus_deploy.errors import InputError
from proteus_deploy.optical_flow import DisFlow
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.training.aml import (
    aml_weights,
    clip_heat,
    motion_heat,
    pool_to_latents,
    published_heat,
)

FLOAT32 = Tolerance(1e-6, "relative", "the same sums in another order, float32 against float64")
EXACT = Tolerance(0.0, "absolute", "the same numbers")


def latent_of(frame: int) -> int:
    """Which latent frame the causal VAE puts a frame into: 0 alone, then fours."""
    return 0 if frame == 0 else 1 + (frame - 1) // 4


def changed(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    return set(torch.nonzero((before != after).flatten(1).any(dim=1)).flatten().tolist())


def random_flow(frames: int, size: int = 16, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(frames - 1, size, size, 2) * scale


@given(
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    lam=st.sampled_from([0.0, 0.5, 1.0, 7.0]),
    seed=st.integers(0, 20),
    masked=st.booleans(),
    published=st.booleans(),
)
def test_weights_stay_within_bounds(
    scale: float, lam: float, seed: int, masked: bool, published: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    flow = torch.randn(8, 24, 16, 2, generator=generator) * scale
    mask = torch.rand(9, 24, 16, generator=generator) > 0.5 if masked else None
    heat = published_heat(flow, mask, latent_size=(3, 3, 2)) if published else motion_heat(flow, mask)
    assert heat.shape == (3, 3, 2)
    weights = aml_weights(heat, lam)
    assert 1 <= weights.min().item() <= weights.max().item() <= 1 + lam
    level = aml_weights(heat, lam, normalise=True)
    assert abs(level.mean().item() - 1) < 1e-6
    assert (1 - 1e-6) / (1 + lam) <= level.min().item() <= level.max().item() <= (1 + lam) * (1 + 1e-6)


def test_normalisation_is_per_clip() -> None:
    heat = torch.rand(2, 3, 4, 4) * torch.tensor([0.1, 1.0])[:, None, None, None]
    together = aml_weights(heat, 2.0, normalise=True)
    alone = torch.stack([aml_weights(clip, 2.0, normalise=True) for clip in heat])
    assert_close("normalised in a batch", together, alone, EXACT)


@pytest.mark.parametrize("lam", [-1.0, math.nan, math.inf])
def test_lambda_that_means_nothing_is_refused(lam: float) -> None:
    with pytest.raises(InputError, match="lam is"):
        aml_weights(torch.zeros(1, 1, 1), lam)


@pytest.mark.parametrize("frames", [9, 17, 49])
def test_each_latent_depends_on_exactly_its_frames(frames: int) -> None:
    flow, mask = random_flow(frames), torch.ones(frames, 16, 16)
    heat = motion_heat(flow, mask)
    assert heat.shape == (1 + (frames - 1) // 4, 2, 2)
    for frame in range(1, frames):
        other = flow.clone()
        other[frame - 1] *= 1.5
        # Frame 0 has no motion of its own and copies frame 1.
        expected = {latent_of(frame)} | ({0} if frame == 1 else set())
        assert changed(heat, motion_heat(other, mask)) == expected, f"motion of frame {frame}"
    for frame in range(frames):
        other = mask.clone()
        other[frame] = 0
        assert changed(heat, motion_heat(flow, other)) == {latent_of(frame)}, f"mask of frame {frame}"


@pytest.mark.parametrize("frames", [9, 17, 49])
def test_frames_of_a_group_and_pixels_of_a_block_count_alike(frames: int) -> None:
    values = torch.rand(frames, 16, 24, dtype=torch.float64)
    groups = [
        [frame for frame in range(frames) if latent_of(frame) == t] for t in range(latent_of(frames - 1) + 1)
    ]
    expected = np.array(
        [
            [
                [values[group, y : y + 8, x : x + 8].numpy().mean() for x in range(0, 24, 8)]
                for y in range(0, 16, 8)
            ]
            for group in groups
        ]
    )
    assert_close(
        "float64 means", pool_to_latents(values), expected, Tolerance(1e-12, "relative", "order of sums")
    )
    assert_close("float32 means", pool_to_latents(values.float()), expected, FLOAT32)
    assert [len(group) for group in groups] == [1] + [4] * ((frames - 1) // 4)


def test_other_ratios_and_a_single_frame() -> None:
    values = torch.rand(7, 8, 12)
    assert pool_to_latents(values, temporal_ratio=2, spatial_ratio=4).shape == (4, 2, 3)
    assert_close("no pooling", pool_to_latents(values, temporal_ratio=1, spatial_ratio=1), values, EXACT)
    assert pool_to_latents(torch.rand(1, 8, 8)).shape == (1, 1, 1)


def square_flow(frames: int, moving: set[int], size: int = 64) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """A 16 x 16 square that moves by 4 pixels to the right into each frame of `moving`.

    Returns the exact flow from each frame back to the one before, and where the square is in each frame.
    """
    left, flow, mask = 0, torch.zeros(frames - 1, size, size, 2), np.zeros((frames, size, size), dtype=bool)
    for frame in range(frames):
        if frame in moving:
            left += 4
            flow[frame - 1, 24:40, left : left + 16, 0] = -4
        mask[frame, 24:40, left : left + 16] = True
    return flow, mask


def test_heat_lies_where_and_when_the_square_moved() -> None:
    moving = {5, 6, 7, 8}
    flow, mask = square_flow(17, moving)
    heat = motion_heat(flow)
    assert set(torch.nonzero(heat.flatten(1).any(dim=1)).flatten().tolist()) == {2}
    # Where: the share of a latent's pixels and frames that the moving square covers, times the sigmoid.
    share = pool_to_latents(torch.tensor(mask & np.isin(np.arange(17), list(moving))[:, None, None]).float())
    expected = share * torch.sigmoid(torch.tensor(4.0))
    assert_close("heat of the square", heat, expected, FLOAT32)
    assert heat[2].max().item() > 0.8
    # The mask of the person changes nothing; the mask of what stands still takes all of it away.
    assert_close("inside the mask", motion_heat(flow, mask), heat, EXACT)
    assert not motion_heat(flow, ~mask).any()


def square_clip(step: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Nine frames of a textured 16 x 16 square, `step` pixels a frame to the right over a still scene."""
    import cv2

    random = np.random.default_rng(3)
    noise = random.integers(0, 90, (96, 192, 3), np.uint8)
    scene = np.asarray(cv2.GaussianBlur(noise, (0, 0), 2), np.uint8)
    square = cv2.GaussianBlur(random.integers(100, 256, (16, 16, 3), np.uint8), (0, 0), 1.5)
    frames, mask = np.repeat(scene[None], 9, axis=0), np.zeros((9, 96, 192), dtype=bool)
    for k in range(9):
        left = 8 + step * k
        frames[k, 40:56, left : left + 16] = square
        mask[k, 40:56, left : left + 16] = True
    return frames, mask


def test_clip_heat_follows_a_square_through_estimated_flow() -> None:
    frames, mask = square_clip(4)
    heat = clip_heat(frames, mask, estimator=DisFlow())
    assert heat.shape == (3, 12, 24)
    assert not heat[pool_to_latents(torch.tensor(mask).float()) == 0].any()
    centres = [float((latent.sum(0) * torch.arange(24)).sum() / latent.sum()) for latent in heat]
    # The square's centre is at 16 + 4k, a group's mean frame is 0, 2.5 or 6.5, a cell is 8 pixels wide.
    expected = [(16 + 4 * k) / 8 - 0.5 for k in (0, 2.5, 6.5)]
    assert_close("centres", centres, expected, Tolerance(0.25, "absolute", "quarter of a cell: 2 pixels"))
    # Without a mask it is the threshold that keeps the still background cold.
    everywhere = clip_heat(frames, None, estimator=DisFlow())
    assert everywhere[:, :3].max().item() == 0
    assert clip_heat(frames, None, estimator=DisFlow(), still_px=0.0)[:, :3].mean().item() > 0.4


def test_backward_flow_keeps_what_moves_by_more_than_its_width() -> None:
    """Forward flow stands on the frame before, where the mask of this frame has no square any more."""
    step = 20
    _, mask = square_clip(step)
    forward, backward = torch.zeros(8, 96, 192, 2), torch.zeros(8, 96, 192, 2)
    forward[torch.tensor(mask[:-1])] = torch.tensor([float(step), 0.0])
    backward[torch.tensor(mask[1:])] = torch.tensor([-float(step), 0.0])
    assert not motion_heat(forward, mask)[1:].any()
    found = motion_heat(backward, mask)[1:]
    assert_close(
        "heat",
        found.sum(),
        torch.tensor(mask[1:]).sum() / 256,
        Tolerance(1e-6, "relative", "sigmoid(20) = 1"),
    )


def numpy_published(
    flow: NDArray[np.float64], mask: NDArray[np.float64], size: tuple[int, int, int], channels: int
) -> NDArray[np.float64]:
    """The published heat map written out with loops: magnitudes, last one twice, mask, sigmoid, trilinear."""
    magnitude = np.sqrt(flow[..., 0] ** 2 + flow[..., 1] ** 2)
    magnitude = np.concatenate([magnitude, magnitude[-1:]]) * mask
    heat = np.where(magnitude != 0, 1 / (1 + np.exp(-magnitude)), 0.0)

    def taps(source: int, target: int, index: int) -> list[tuple[int, float]]:
        place = max((index + 0.5) * source / target - 0.5, 0.0)
        low = int(place)
        return [(low, 1 - (place - low)), (min(low + 1, source - 1), place - low)]

    out = np.zeros((size[0], channels, size[1], size[2]))
    for t, y, x in np.ndindex(*size):
        out[t, :, y, x] = sum(
            wt * wy * wx * heat[ft, fy, fx]
            for ft, wt in taps(heat.shape[0], size[0], t)
            for fy, wy in taps(heat.shape[1], size[1], y)
            for fx, wx in taps(heat.shape[2], size[2], x)
        )
    return out


@pytest.mark.parametrize("frames", [9, 17, 49])
def test_published_form_against_plain_numpy(frames: int) -> None:
    flow = random_flow(frames, 24)
    flow[:, :6, :9] = 0
    mask = (torch.rand(frames, 24, 24) > 0.3).float()
    size = 1 + (frames - 1) // 4, 3, 3
    expected = numpy_published(flow.double().numpy(), mask.double().numpy(), size, 4)
    assert_close(
        "published heat", published_heat(flow, mask, latent_size=size, channels=4), expected, FLOAT32
    )
    assert_close("without channels", published_heat(flow, mask, latent_size=size), expected[:, 0], FLOAT32)
    whole = published_heat(flow, None, latent_size=size)
    assert_close("whole frame", whole, published_heat(flow, torch.ones_like(mask), latent_size=size), EXACT)


def test_published_form_passes_over_frames_and_pixels() -> None:
    """What the clean form mends: of 49 frames 25 are read, and 2 x 2 pixels of each 8 x 8 block."""
    flow = torch.ones(48, 8, 8, 2, requires_grad=True)
    published_heat(flow, latent_size=(13, 1, 1)).sum().backward()
    assert flow.grad is not None
    read = flow.grad[..., 0] != 0
    # Frame 48 repeats the motion of frame 47, and is the only one of the two that is read.
    assert read.flatten(1).any(dim=1).sum().item() == 25
    assert torch.nonzero(read.any(dim=0)).tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]
    clean = torch.ones(48, 8, 8, 2, requires_grad=True)
    motion_heat(clean).sum().backward()
    assert clean.grad is not None
    assert (clean.grad[..., 0] != 0).all()


def test_clip_heat_puts_the_motion_of_a_pixel_where_it_is_in_its_own_frame() -> None:
    """An estimator that says how far from its first picture alone: clean must ask for each frame's own."""

    def red(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.stack([frames[:-1, ..., 0], np.zeros_like(frames[:-1, ..., 0])], axis=-1).astype(np.float32)

    frames = np.random.default_rng(0).integers(0, 5, (9, 8, 8, 3), dtype=np.uint8)
    own = torch.tensor(np.concatenate([frames[1:2], frames[1:]])[..., 0]).float()
    expected = pool_to_latents(torch.where(own > 0, torch.sigmoid(own), own))
    assert_close("clean", clip_heat(frames, estimator=red), expected, FLOAT32)
    above = torch.where(own > 2, torch.sigmoid(own), torch.zeros_like(own))
    assert_close("still_px", clip_heat(frames, estimator=red, still_px=2.5), pool_to_latents(above), FLOAT32)
    forward = published_heat(red(frames), latent_size=(3, 1, 1))
    assert_close("published", clip_heat(frames, estimator=red, aml="published"), forward, EXACT)


def test_clip_heat_published_is_the_published_form_of_the_forward_flow() -> None:
    frames, mask = square_clip(4)
    got = clip_heat(frames, mask, estimator=DisFlow(), aml="published")
    assert_close("by hand", got, published_heat(DisFlow()(frames), mask, latent_size=(3, 12, 24)), EXACT)
    with pytest.raises(InputError, match="choose clean or published"):
        clip_heat(frames, mask, estimator=DisFlow(), aml="paper")  # type: ignore[arg-type]


def test_batches_and_low_precision() -> None:
    flow, mask = torch.randn(2, 8, 16, 24, 2), torch.rand(2, 9, 16, 24) > 0.5
    heat = motion_heat(flow, mask)
    assert_close(
        "clean", heat, torch.stack([motion_heat(*clip) for clip in zip(flow, mask, strict=True)]), EXACT
    )
    old = published_heat(flow, mask, latent_size=(3, 2, 3))
    one = [published_heat(f, m, latent_size=(3, 2, 3)) for f, m in zip(flow, mask, strict=True)]
    assert_close("published", old, torch.stack(one), EXACT)
    half = motion_heat(flow.bfloat16(), mask)
    assert half.dtype == torch.float32
    assert_close("bfloat16 flow", half, heat, Tolerance(1e-2, "relative", "the flow is rounded at 4e-3"))
    weights = aml_weights(heat.bfloat16())
    assert weights.dtype == torch.float32
    assert 1 <= weights.min().item() <= weights.max().item() <= 2


@pytest.mark.parametrize(
    ("flow", "mask", "message"),
    [
        (torch.zeros(9, 16, 16, 2), None, r"10 frames don't fit the causal VAE.*use 1 \+ 4 n frames"),
        (torch.zeros(8, 16, 20, 2), None, r"20x16 pixels: width and height must be multiples of 8"),
        (
            torch.zeros(8, 16, 16, 2),
            torch.zeros(8, 16, 16),
            r"mask has shape \[8, 16, 16\]; expected \[9, 16",
        ),
        (
            torch.zeros(8, 16, 16, 2),
            torch.full((9, 16, 16), 255),
            r"mask runs to 255; expected values in \[0",
        ),
        (torch.full((8, 16, 16, 2), torch.nan), None, "not finite"),
        (torch.zeros(0, 16, 16, 2), None, "F at least 2"),
        (torch.zeros(16, 16, 2), None, "F-1, H, W, 2"),
    ],
)
def test_what_does_not_fit_is_refused(flow: Any, mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        motion_heat(flow, mask)
