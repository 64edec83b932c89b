"""The tiny VQ tokenizer, trained on drawn photos.

The loss of one batch, on pixels in [-1, 1]:

    sum(m |x' - x|) / sum(m)  +  the same of differences between neighbouring pixels
      +  |sg(z) - e|^2  +  1/4 |z - sg(e)|^2

m is 1, and 3 on faces. z are the encoder's vectors of unit length, e the code next to each, sg stops the
gradient (van den Oord et al. 2017, equation 3).

A codebook that starts at random has few codes that are ever the nearest, and those alone learn. So the
autoencoder first learns without one, its unit vectors shaken instead; then the codes start as the means of
its vectors of many photos, found by k-means on the sphere, and all are in use from the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional

from proteus_deploy.portrait.vq import VqModel
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.tiny_model.fitting import FitSettings, LossFunction, fit
from proteus_deploy.training.tiny_portrait.configs import VQ

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CODE_SETTINGS", "SMOOTH_SETTINGS", "code_loss", "pixels_of", "spherical_means", "train_tokenizer"]

SMOOTH_SETTINGS = FitSettings(steps=500, learning_rate=2e-3, warmup=50, ema=0.99, optimiser="muon")
CODE_SETTINGS = FitSettings(steps=2200, learning_rate=2e-3, warmup=50, ema=0.995, optimiser="muon", seed=1)
_BATCH = 8
_FACE_WEIGHT = 3.0
_COMMITMENT = 0.25
_SHAKE = 0.15  # of each of the eight channels of a unit vector
_MEANS_PHOTOS = 512
_MEANS_ROUNDS = 20


def train_tokenizer(
    folder: Path,
    photos: NDArray[np.uint8],
    faces: NDArray[np.bool_],
    *,
    smooth: FitSettings = SMOOTH_SETTINGS,
    codes: FitSettings = CODE_SETTINGS,
    report: Report = no_report,
    cancel: Event | None = None,
) -> VqModel:
    """Train in `folder` (see fitting.fit) on photos uint8 [N, H, W, 3] and masks of faces [N, H, W].

    smooth, codes: how the two parts are trained. Returns the model in float32, eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(smooth.seed)
        model = VqModel(VQ)

    def loss_of(use_codes: bool) -> LossFunction:
        def loss(_: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
            chosen = torch.randperm(len(photos), generator=generator)[:_BATCH].numpy()
            pixels = pixels_of(photos[chosen])
            weights = 1.0 + (_FACE_WEIGHT - 1.0) * torch.from_numpy(faces[chosen]).float().unsqueeze(1)
            parts = code_loss(model, pixels, weights, None if use_codes else generator)
            return parts["loss"], {name: float(value.detach()) for name, value in parts.items()}

        return loss

    if not (folder / "vq.safetensors").exists():
        fit(model, loss_of(False), smooth, folder=folder, name="vq_smooth", report=report, cancel=cancel)
        with torch.no_grad():
            features = [
                _unit_features(model, pixels_of(photos[start : start + 64]))
                for start in range(0, min(_MEANS_PHOTOS, len(photos)), 64)
            ]
            flat = torch.cat([one.permute(0, 2, 3, 1).flatten(0, 2) for one in features])
            model.quantize.embedding.weight.copy_(spherical_means(flat, VQ.codebook_size, _MEANS_ROUNDS))
    fit(model, loss_of(True), codes, folder=folder, name="vq", report=report, cancel=cancel)
    return model


def code_loss(model: VqModel, pixels: Tensor, weights: Tensor, shake: Generator | None) -> dict[str, Tensor]:
    """The parts of the loss and their sum as "loss". pixels [B, 3, H, W]; weights [B, 1, H, W].

    shake: what shakes the encoder's vectors in place of the codebook; None for the codebook.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unit = _unit_features(model, pixels)
        found = {}
        if shake is None:
            numbers = model.quantize.nearest(unit)
            near = model.quantize.vectors()[numbers].permute(0, 3, 1, 2)
            found["code"] = (near - unit.detach()).square().mean()
            found["commitment"] = (near.detach() - unit).square().mean()
            passed = unit + (near - unit).detach()
        else:
            noise = torch.randn(unit.shape, generator=shake)
            passed = functional.normalize(unit + _SHAKE * noise, dim=1)
        decoded = model.decode_vectors(passed).float()
    total = weights.sum() * pixels.shape[1]
    error = decoded - pixels
    found["absolute"] = (weights * error.abs()).sum() / total
    found["edges"] = (weights[..., 1:] * error.diff(dim=-1).abs()).sum() / total
    found["edges"] = found["edges"] + (weights[..., 1:, :] * error.diff(dim=-2).abs()).sum() / total
    loss = found["absolute"] + found["edges"]
    if shake is None:
        loss = loss + found["code"] + _COMMITMENT * found["commitment"]
    return {"loss": loss, **found}


def _unit_features(model: VqModel, pixels: Tensor) -> Tensor:
    return functional.normalize(model.quant_conv(model.encoder(pixels)).float(), dim=1)


def spherical_means(points: Tensor, count: int, rounds: int) -> Tensor:
    """k-means on the sphere: unit vectors [count, Z] that points [N, Z] of unit length gather around.

    The first means are evenly chosen points; one that nothing is near to starts again from the point that is
    farthest from its own mean.
    """
    means = points[torch.linspace(0, len(points) - 1, count).long()]
    for _ in range(rounds):
        nearness, owner = (points @ means.T).max(dim=1)
        sums = torch.zeros_like(means).index_add_(0, owner, points)
        empty = torch.bincount(owner, minlength=count) == 0
        if bool(empty.any()):
            sums[empty] = points[nearness.argsort()[: int(empty.sum())]]
        means = functional.normalize(sums, dim=1)
    return means


def pixels_of(photos: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    # Contiguous: bfloat16 convolutions whose channels lie last take three times as long on a CPU.
    return torch.from_numpy(photos.copy()).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
