"""Adaptive motion learning: which latents the loss looks at harder, because the person moves there.

Axes: F frames, H x W pixels, C latent channels, and on the latent grid T frames of h x w, where
T = 1 + (F-1)/4, h = H/8, w = W/8. Functions of a flow take any leading batch axes.

    M_k = |flow of frame k|                                             pixels a frame
    H   = sigmoid(M) where inside the mask and M > 0, else 0            in [0, 1]
    w   = 1 + lambda * (H on the latent grid)                           in [1, 1 + lambda]

The paper writes sigmoid(mask * M). Read literally, that is 0.5 wherever nothing moves or the mask is 0, which
only weakens lambda: 1 + lambda (1/2 + x) is a multiple of 1 + lambda' x, lambda' = lambda / (1 + lambda/2).
The published code, with which the published weights were trained, leaves those pixels at 0; so do we.

How H comes to the latent grid differs. The published code interpolates, which reads 25 of 49 frames and a
quarter of the pixels, and spreads the frames evenly, while the causal VAE puts frame 0 alone into latent 0
and the next fours into one latent each. `motion_heat` averages exactly the pixels and frames that the VAE
puts into a latent; `published_heat` is the published form, for comparison.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional as F

from proteus_deploy.errors import InputError
from proteus_deploy.optical_flow import (
    FlowEstimator,
    backward_flow,
    flow_magnitude,
    tensor_from_array,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["AmlForm", "aml_weights", "clip_heat", "motion_heat", "pool_to_latents", "published_heat"]

AmlForm = Literal["clean", "published"]


def clip_heat(
    frames: NDArray[np.uint8],
    mask: Tensor | NDArray[np.generic] | None = None,
    *,
    estimator: FlowEstimator,
    aml: AmlForm = "clean",
    temporal_ratio: int = 4,
    spatial_ratio: int = 8,
    still_px: float = 0.1,
) -> Tensor:
    """Heat of one clip from its frames, float32 [T, h, w] in [0, 1]: flow and `motion_heat` in one call.

    frames: RGB uint8 [F, H, W, 3]. mask: [F, H, W], 1 on the person; None is the whole frame.

    The clean form takes the flow from each frame back to the one before it, so that magnitude, mask and
    latent agree about the place of a pixel however fast it moves; only frame 0, which copies frame 1, is one
    motion off. `still_px` is a tenth of a pixel because no estimator gives exactly zero where nothing moves.
    The published form takes the flow forward and knows no `still_px`.
    """
    if aml == "clean":
        flow = backward_flow(estimator, frames)
        return motion_heat(
            flow, mask, temporal_ratio=temporal_ratio, spatial_ratio=spatial_ratio, still_px=still_px
        )
    if aml != "published":
        raise InputError(f"aml is {aml!r}; choose clean or published")
    flow = estimator(frames)
    steps, height, width = flow.shape[:3]
    _check_grid(steps + 1, height, width, temporal_ratio, spatial_ratio)
    size = 1 + steps // temporal_ratio, height // spatial_ratio, width // spatial_ratio
    return published_heat(flow, mask, latent_size=size)


def motion_heat(
    flow: Tensor | NDArray[np.float32],
    mask: Tensor | NDArray[np.generic] | None = None,
    *,
    temporal_ratio: int = 4,
    spatial_ratio: int = 8,
    still_px: float = 0.0,
) -> Tensor:
    """The clean heat map, float32 [..., T, h, w] in [0, 1], averaged over what the VAE puts into a latent.

    flow: [..., F-1, H, W, 2] in pixels; entry k-1 is the motion between frames k-1 and k and counts for
    frame k; frame 0 takes that of frame 1. mask: [..., F, H, W], above 0.5 inside; None is the whole frame.
    still_px: a magnitude of at most this many pixels is no motion.

    Forward flow stands on the pixels of frame k-1, the mask on those of frame k: what moves by more than its
    own width in one frame is masked away. Pass the flow from k back to k-1 (`backward_flow`) to have both on
    frame k. Raises InputError on shapes that don't fit the latent grid and on flow that is not finite.
    """
    steps = _finite_magnitude(flow)
    magnitude = torch.cat((steps[..., :1, :, :], steps), dim=-3)
    inside = magnitude > still_px
    if mask is not None:
        inside = inside & (_checked_mask(mask, magnitude) > 0.5)
    heat = torch.where(inside, torch.sigmoid(magnitude), torch.zeros_like(magnitude))
    return pool_to_latents(heat, temporal_ratio=temporal_ratio, spatial_ratio=spatial_ratio)


def published_heat(
    flow: Tensor | NDArray[np.float32],
    mask: Tensor | NDArray[np.generic] | None = None,
    *,
    latent_size: tuple[int, int, int],
    channels: int | None = None,
) -> Tensor:
    """The published heat map, float32 [..., T, h, w] in [0, 1], or [..., T, C, h, w] with `channels` = C.

    flow: [..., F-1, H, W, 2] in pixels, forward: entry k counts for frame k, the last one also for frame F-1.
    mask: [..., F, H, W] in [0, 1], which multiplies the magnitude. The sigmoid is taken where the product is
    not 0; then trilinear interpolation, align_corners False, no antialiasing, to latent_size = (T, h, w).
    Source: train.py, compute_raft, and util/utils.py, resize_mask, of the published code.
    """
    steps = _finite_magnitude(flow)
    magnitude = torch.cat((steps, steps[..., -1:, :, :]), dim=-3)
    if mask is not None:
        magnitude = magnitude * _checked_mask(mask, magnitude)
    heat = torch.where(magnitude != 0, torch.sigmoid(magnitude), torch.zeros_like(magnitude))
    batch = heat.shape[:-3]
    resized = F.interpolate(
        heat.reshape(-1, 1, *heat.shape[-3:]), size=latent_size, mode="trilinear", align_corners=False
    ).reshape(*batch, *latent_size)
    if channels is None:
        return resized
    return resized.unsqueeze(-3).expand(*batch, latent_size[0], channels, *latent_size[1:]).contiguous()


def aml_weights(heat: Tensor, lam: float = 1.0, normalise: bool = False) -> Tensor:
    """Heat [..., T, h, w] in [0, 1] -> weights 1 + lam * heat in [1, 1 + lam], at least float32.

    normalise: divide by the clip's own mean, so that its loss keeps the scale that it has without weights;
    the weights then have mean 1 and lie in [1 / (1 + lam), 1 + lam]. Published: lam 1, not normalised.
    """
    if not (math.isfinite(lam) and lam >= 0):
        raise InputError(f"lam is {lam}; expected a number of at least 0 (0 switches the weights off)")
    weights = 1 + lam * heat.to(torch.promote_types(heat.dtype, torch.float32))
    return weights / weights.mean(dim=(-3, -2, -1), keepdim=True) if normalise else weights


def pool_to_latents(values: Tensor, *, temporal_ratio: int = 4, spatial_ratio: int = 8) -> Tensor:
    """Average [..., F, H, W] over frames {0}, {1..4}, {5..8}, ... and 8 x 8 blocks: [..., T, h, w].

    Serves masks as well: a latent gets the share of its pixels that lie inside. At least float32.
    """
    count, height, width = values.shape[-3:]
    _check_grid(count, height, width, temporal_ratio, spatial_ratio)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    blocks: Tensor = (
        wide.unflatten(-1, (-1, spatial_ratio)).unflatten(-3, (-1, spatial_ratio)).mean(dim=(-3, -1))
    )
    first, rest = blocks[..., :1, :, :], blocks[..., 1:, :, :]
    if count == 1:
        return first
    groups = rest.unflatten(-3, (-1, temporal_ratio)).mean(dim=-3)
    return torch.cat((first, groups), dim=-3)


def _finite_magnitude(flow: Tensor | NDArray[np.float32]) -> Tensor:
    magnitude = flow_magnitude(flow)
    if magnitude.ndim < 3 or magnitude.shape[-3] == 0:
        raise InputError(
            f"flow has shape {[*magnitude.shape, 2]}; expected [..., F-1, H, W, 2], F at least 2"
        )
    if not bool(torch.isfinite(magnitude).all()):
        raise InputError("flow holds numbers that are not finite; leave that clip out")
    return magnitude


def _checked_mask(mask: Tensor | NDArray[np.generic], magnitude: Tensor) -> Tensor:
    """The mask as float32 on the device of `magnitude`, of the same shape and within [0, 1]."""
    checked = tensor_from_array(mask).to(magnitude.device, torch.float32)
    if checked.shape != magnitude.shape:
        raise InputError(
            f"mask has shape {list(checked.shape)}; expected {list(magnitude.shape)}, one entry a frame: "
            "a mask has one frame more than the flow"
        )
    if not bool(((checked >= 0) & (checked <= 1)).all()):
        raise InputError(f"mask runs to {checked.max().item():g}; expected values in [0, 1] (divide by 255?)")
    return checked


def _check_grid(frames: int, height: int, width: int, temporal_ratio: int, spatial_ratio: int) -> None:
    if temporal_ratio < 1 or spatial_ratio < 1:
        raise InputError(f"the ratios are {temporal_ratio} and {spatial_ratio}; both must be at least 1")
    if frames < 1 or (frames - 1) % temporal_ratio:
        raise InputError(
            f"{frames} frames don't fit the causal VAE, which keeps frame 0 alone and takes the rest in "
            f"groups of {temporal_ratio}; use 1 + {temporal_ratio} n frames"
        )
    if height % spatial_ratio or width % spatial_ratio:
        raise InputError(f"{width}x{height} pixels: width and height must be multiples of {spatial_ratio}")
