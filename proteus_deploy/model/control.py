"""A control network for CogVideoX: what a control video (pose, depth, edges) adds to the denoiser's tokens.

The form is that of the published CogVideoX ControlNets (`CogVideoXControlnet`, github.com/TheDenk/
cogvideox-controlnet): pixels are folded into channels, two 1x1 convolutions narrow them, a mean over pairs of
frames follows each; the result stands beside the noisy latents, and a short CogVideoX transformer reads both.
Its tokens after block k are added to the denoiser's after block k.

Axes: B batch, F latent frames, K control blocks, c control channels, h and w latent pixels, L text tokens,
N video tokens on a grid [f, y, x], d width of the denoiser.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from proteus_deploy.model.control_config import ControlConfig
from proteus_deploy.model.layers import SinusoidTable, TimestepMLP
from proteus_deploy.model.transformer import Block, PatchEmbed, pad_rotary

__all__ = ["ControlEncoder", "ControlNetwork"]

_GROUPS = 2  # of the norms


class ControlEncoder(nn.Module):
    """The `control_encoder` stage: once for a control video, whatever the number of steps."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        self.downscale = config.downscale
        folded, middle, last = config.folded_channels
        self.controlnet_encode_first = _narrow(folded, middle)
        self.controlnet_encode_second = _narrow(middle, last)

    def forward(self, video: Tensor) -> Tensor:
        """[1, 4F, C, 8h, 8w] in [-1, 1] -> [1, F, c, h, w].

        A latent frame stands for four frames, and the first for one: it comes four times, so that its means
        over pairs leave it as it is.
        """
        frames: Tensor = self.controlnet_encode_first(_fold_pixels(video[0], self.downscale))
        frames = self.controlnet_encode_second(_mean_of_pairs(frames))
        return _mean_of_pairs(frames)[None]


def _narrow(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1), nn.GroupNorm(_GROUPS, out), nn.ReLU())


def _fold_pixels(frames: Tensor, side: int) -> Tensor:
    """[F, C, side*h, side*w] -> [F, C * side * side, h, w], as `nn.PixelUnshuffle`, which has no ONNX form
    for sizes that may change."""
    count, channels, height, width = frames.shape
    x = frames.reshape(count, channels, height // side, side, width // side, side)
    return x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def _mean_of_pairs(frames: Tensor) -> Tensor:
    return frames.reshape(-1, 2, *frames.shape[1:]).mean(1)


class ControlNetwork(nn.Module):
    """The `controlnet` stage: the residuals of one step."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        backbone = config.backbone
        self.patch_embed = PatchEmbed(backbone)
        self.time_table = SinusoidTable(
            backbone.width, flip_sin_to_cos=backbone.flip_sin_to_cos, freq_shift=backbone.freq_shift
        )
        self.time_embedding = TimestepMLP(backbone.width, backbone.time_embed_dim)
        self.transformer_blocks = nn.ModuleList(Block(backbone) for _ in range(backbone.num_layers))
        self.out_projectors = nn.ModuleList(
            nn.Linear(backbone.width, config.out_dim) for _ in range(backbone.num_layers * config.projected)
        )

    def forward(
        self,
        latents: Tensor,
        encoded: Tensor,
        text: Tensor,
        timestep: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
    ) -> tuple[Tensor, ...]:
        """What is added to the denoiser's video tokens after its first K blocks: K of [B, f, y, x, d].

        Apart, since together they would pass 2^31 elements at the published size.

        latents [B, F, C, h, w] (noisy ones only), encoded [B, F, c, h, w], text [B, L, d_text] (the prompt's
        alone: the published networks never saw fused tokens), timestep [B] int64, rotary tables [f, y, x, D].
        """
        time = self.time_embedding(self.time_table(timestep).to(latents.dtype))
        tokens, video = self.patch_embed(text, torch.cat((latents, encoded), dim=2))
        rotary = pad_rotary(rotary_cos, rotary_sin, text.shape[1])
        residuals = []
        for index, block in enumerate(self.transformer_blocks):
            tokens, video = block(tokens, video, time, rotary)
            residual = self.out_projectors[index](video) if self.out_projectors else video
            residuals.append(residual.unflatten(1, rotary_cos.shape[:3]))
        return tuple(residuals)
