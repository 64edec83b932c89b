"""The tiny video autoencoder: CogVideoX's architecture, trained from nothing on drawn clips and photos.

The loss of one batch, on pixels in [-1, 1]:

    sum(m |x' - x|) / sum(m)  +  1/2 (the same of differences between neighbouring pixels)  +  beta KL

m is 1, and 3 on faces: they are small and all that identity rests on. The differences keep outlines sharp,
which an absolute error alone lets blur. KL is the mean over latents of KL(N(mean, std) || N(0, 1)).

Pictures come first, then clips. On a single frame all taps of a causal convolution see the same picture, so
it is a convolution of two dimensions with the sum of the taps, at a third of the cost, and nine pictures
teach more than nine frames that hardly differ. Before the clips, the whole sum moves to the tap of the
present frame: the autoencoder starts as one of single frames and learns what time adds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.tiny_model.configs import VAE
from proteus_deploy.training.tiny_model.fitting import FitSettings, LossFunction, fit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CLIP_SETTINGS", "PICTURE_SETTINGS", "FrameBatches", "latent_scale", "train_vae", "vae_loss"]

PICTURE_SETTINGS = FitSettings(steps=4000, learning_rate=2e-3, warmup=50, ema=0.995, optimiser="muon")
CLIP_SETTINGS = FitSettings(steps=2400, learning_rate=1e-3, warmup=30, ema=0.99, optimiser="muon", seed=1)
_KL_WEIGHT = 5e-4
_FACE_WEIGHT = 3.0
_EDGE_WEIGHT = 0.5
_FACE_PART = 3
# Clips, frames, side of the kinds of batches, in the order they take turns. With clips: crops, whole frames,
# longer clips that pass through the causal cache, and pictures, all of which the autoencoder meets when it
# serves.
_PICTURE_TURNS = ((4, 1, 96),)
_CLIP_TURNS = ((2, 9, 64), (1, 9, 96), (4, 9, 48), (1, 17, 64), (2, 9, 64), (4, 1, 96))


class FrameBatches:
    """Batches of pixels and their weights, from drawn clips and aligned photos.

    frames: uint8 [N, F, H, W, 3]. parts: uint8 [N, F, H, W], 3 on faces. photos: uint8 [M, H, W, 3].
    """

    def __init__(
        self, frames: NDArray[np.uint8], parts: NDArray[np.uint8], photos: NDArray[np.uint8]
    ) -> None:
        self.frames, self.parts, self.photos = frames, parts, photos

    def __call__(self, step: int, generator: Generator, *, clips: bool) -> tuple[Tensor, Tensor]:
        """x [B, 3, F, H, W] in [-1, 1] and weights [B, 1, F, H, W] of a step."""
        turns = _CLIP_TURNS if clips else _PICTURE_TURNS
        count, length, side = turns[step % len(turns)]
        if length == 1 and step % 4 == 1:  # every fourth picture batch is of aligned faces
            chosen = _integers(generator, count, len(self.photos))
            pixels = torch.stack([torch.from_numpy(self.photos[index].copy()) for index in chosen])
            return _scaled(pixels[:, None]), torch.ones(count, 1, 1, side, side)
        crops, weights = [], []
        for index in _integers(generator, count, len(self.frames)):
            start, across, down = self._place(index, length, side, generator)
            where = (
                index,
                slice(start, start + length),
                slice(down, down + side),
                slice(across, across + side),
            )
            crops.append(torch.from_numpy(self.frames[where].copy()))
            face = torch.from_numpy(self.parts[where] == _FACE_PART)
            weights.append(1.0 + (_FACE_WEIGHT - 1.0) * face.float())
        return _scaled(torch.stack(crops)), torch.stack(weights)[:, None]

    def _place(self, index: int, length: int, side: int, generator: Generator) -> tuple[int, int, int]:
        """First frame, left and upper edge of a crop; every second one lies around a face."""
        import numpy as np

        frames, height, width = self.frames.shape[1:4]
        start, across, down, coin = (
            int(_integers(generator, 1, room)[0])
            for room in (frames - length + 1, width - side + 1, height - side + 1, 2)
        )
        if coin and side < width:
            rows, columns = np.nonzero(self.parts[index, start] == _FACE_PART)
            if len(rows):
                shift = _integers(generator, 2, 17) - 8
                across = int(np.clip(columns.mean() - side / 2 + shift[0], 0, width - side))
                down = int(np.clip(rows.mean() - side / 2 + shift[1], 0, height - side))
        return start, across, down


def vae_loss(vae: nn.Module, pixels: Tensor, weights: Tensor, generator: Generator) -> dict[str, Tensor]:
    """The parts of the loss and their sum as "loss". pixels [B, 3, F, H, W]; weights [B, 1, F, H, W]."""
    vae_any = cast(Any, vae)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = vae_any._encode(pixels).float()  # noqa: SLF001 - encode() draws from the global generator
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        noise = torch.randn(mean.shape, generator=generator)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        decoded = vae_any._decode(latents).sample.float()  # noqa: SLF001
    total = weights.sum() * pixels.shape[1]
    error = decoded - pixels
    absolute = (weights * error.abs()).sum() / total
    edges = sum(
        (weights * functional.pad(error.diff(dim=axis).abs(), pad)).sum() / total
        for axis, pad in ((-1, (0, 1)), (-2, (0, 0, 0, 1)))
    )
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    loss = absolute + _EDGE_WEIGHT * edges + _KL_WEIGHT * kl
    return {"loss": loss, "absolute": absolute, "kl": kl, "mse": error.square().mean()}


def train_vae(
    folder: Path,
    batches: FrameBatches,
    *,
    pictures: FitSettings = PICTURE_SETTINGS,
    clips: FitSettings = CLIP_SETTINGS,
    report: Report = no_report,
    cancel: Event | None = None,
) -> nn.Module:
    """Train in `folder` (see fitting.fit); returns diffusers' AutoencoderKLCogVideoX, float32, eval mode.

    pictures, clips: how the two parts are trained.
    """
    from diffusers import AutoencoderKLCogVideoX

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(pictures.seed)
        vae = AutoencoderKLCogVideoX.from_config(VAE)
    convolutions = _flatten_pictures(vae)

    def loss_of(use_clips: bool) -> LossFunction:
        def loss(step: int, generator: Generator) -> tuple[Tensor, dict[str, float]]:
            pixels, weights = batches(step, generator, clips=use_clips)
            parts = vae_loss(vae, pixels, weights, generator)
            details = {key: float(value.detach()) for key, value in parts.items() if key != "loss"}
            return parts["loss"], {**details, "frames": pixels.shape[2]}

        return loss

    if not (folder / "vae.safetensors").exists():
        fit(vae, loss_of(False), pictures, folder=folder, name="vae_pictures", report=report, cancel=cancel)
        with torch.no_grad():
            for convolution in convolutions:
                whole = convolution.weight.sum(dim=2)
                convolution.weight.zero_()
                convolution.weight[:, :, -1] = whole
    return fit(vae, loss_of(True), clips, folder=folder, name="vae", report=report, cancel=cancel)


def _flatten_pictures(vae: nn.Module) -> list[nn.Conv3d]:
    """Let causal convolutions take single frames in two dimensions; returns those that look back in time."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d

    causal = [module for module in vae.modules() if isinstance(module, CogVideoXCausalConv3d)]
    for module in causal:
        module.forward = partial(_causal_forward, module, module.forward)  # type: ignore[method-assign]
    return [module.conv for module in causal if module.time_kernel_size > 1]


def _causal_forward(
    module: Any, in_time: Callable[..., Any], x: Tensor, conv_cache: Tensor | None = None
) -> Any:
    if x.shape[2] > 1 or conv_cache is not None:
        return in_time(x, conv_cache)
    flat = functional.conv2d(
        x.squeeze(2),
        module.conv.weight.sum(dim=2),
        module.conv.bias,
        stride=module.conv.stride[1:],
        padding=(module.height_pad, module.width_pad),
    )
    return flat.unsqueeze(2), None


@torch.no_grad()
def latent_scale(vae: nn.Module, frames: NDArray[np.uint8], *, clips: int = 64) -> float:
    """The `scaling_factor` that gives latents of clips a standard deviation of 1, as CogVideoX's has it.

    frames: uint8 [N, F, H, W, 3], of which the first `clips` are looked at.
    """
    squares, sums, count = 0.0, 0.0, 0
    for clip in frames[:clips]:
        moments = cast(Any, vae)._encode(_scaled(torch.from_numpy(clip.copy())[None]))  # noqa: SLF001
        mean = moments.chunk(2, dim=1)[0].double()
        squares, sums, count = (
            squares + float(mean.square().sum()),
            sums + float(mean.sum()),
            count + mean.numel(),
        )
    deviation = (squares / count - (sums / count) ** 2) ** 0.5
    return float(1.0 / deviation)


def _scaled(pixels: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] -> float32 [B, 3, F, H, W] in [-1, 1]."""
    return pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def _integers(generator: Generator, count: int, below: int) -> NDArray[np.int64]:
    result: NDArray[np.int64] = torch.randint(below, (count,), generator=generator).numpy()
    return result
