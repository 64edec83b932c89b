"""Small modules that several networks share. Attribute names are the published state dict's."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proteus_deploy.model.config import TRAIN_TIMESTEPS


def sinusoid(
    timesteps: Tensor, channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Tensor:
    """Sinusoidal embedding, [T] -> [T, channels] float32 (DDPM, arXiv 2006.11239; base 10,000)."""
    half = channels // 2
    # At t = 999 the last bit of a frequency moves an angle by 6e-5, so the order of operations is diffusers'.
    exponent = -math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(exponent / (half - freq_shift))[None]
    sin, cos = angles.sin(), angles.cos()
    return torch.cat((cos, sin) if flip_sin_to_cos else (sin, cos), dim=-1)


class SinusoidTable(nn.Module):
    """`sinusoid` of the timesteps 0..999 as a table: timesteps are whole numbers.

    A lookup gives the same bits in every runtime and precision. Computed in the graph, an angle near 999
    shows each runtime's own exp in the fifth digit, and is lost altogether where a runtime runs the
    product in bfloat16.
    """

    table: Tensor

    def __init__(self, channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> None:
        super().__init__()
        self._compute = partial(
            sinusoid, channels=channels, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift
        )
        self.register_buffer("table", self._compute(torch.arange(TRAIN_TIMESTEPS)), persistent=False)

    def computed_buffers(self) -> dict[str, Tensor]:
        return {"table": self._compute(torch.arange(TRAIN_TIMESTEPS, device="cpu"))}

    def forward(self, timesteps: Tensor) -> Tensor:
        """[T] int64 -> [T, channels] float32."""
        return F.embedding(timesteps, self.table)


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear. [T, channels] -> [T, width]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))  # type: ignore[no-any-return]


def mapping(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear-LN-LeakyReLU twice, then Linear: the shape of every feature mapping in this model class."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.LeakyReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.LeakyReLU(),
        nn.Linear(hidden_dim, out_dim),
    )


def heads_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Plain attention on [B, N, H*D] tensors; returns [B, N, H*D]."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class PerceiverAttention(nn.Module):
    """Cross-attention of latents to [context ; latents] (Flamingo's resampler, arXiv 2204.14198)."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """context [B, M, width], latents [B, Q, width] -> [B, Q, width], residual not added."""
        latents = self.norm2(latents)
        key, value = self.to_kv(torch.cat((self.norm1(context), latents), dim=1)).chunk(2, dim=-1)
        attended = heads_attention(self.to_q(latents), key, value, self.heads)
        return self.to_out(attended)  # type: ignore[no-any-return]


def feed_forward(width: int, hidden_dim: int) -> nn.Sequential:
    """LN, Linear, GELU, Linear; no bias, as published."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, hidden_dim, bias=False),
        nn.GELU(),
        nn.Linear(hidden_dim, width, bias=False),
    )
