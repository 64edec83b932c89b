"""LlamaGen's image tokenizer: pictures to code numbers and back.

Axes: B pictures, H and W pixels, h and w tokens (H / downsample), Z channels of a code.

Weights have the published names.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from proteus_deploy.portrait.config import VqConfig

__all__ = ["VqModel"]


class VqModel(nn.Module):
    """Encoder, codebook, decoder. Raises CheckpointError (through VqConfig) for sizes that can't be."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Code numbers int64 [B, h * w], row by row, of pixels [B, 3, H, W] in [-1, 1]."""
        return self.quantize.nearest(self.quant_conv(self.encoder(pixels))).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], about [-1, 1], of code numbers [B, h * w] of a square picture."""
        side = round(codes.shape[1] ** 0.5)
        vectors = self.quantize.vectors()[codes].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return self.decode_vectors(vectors)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Pixels of codebook vectors [B, Z, h, w]."""
        return cast(Tensor, self.decoder(self.post_quant_conv(vectors)))


class Codebook(nn.Module):
    """Vectors that tokens stand for, of unit length where the config says so."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        self.unit = config.codebook_l2_norm

    def vectors(self) -> Tensor:
        """[codes, Z]."""
        weight = self.embedding.weight
        return functional.normalize(weight, dim=-1) if self.unit else weight

    def nearest(self, features: Tensor) -> Tensor:
        """The code next to each of features [B, Z, h, w], int64 [B, h, w]."""
        vectors = self.vectors()
        flat = features.permute(0, 2, 3, 1)
        if self.unit:
            return (functional.normalize(flat, dim=-1) @ vectors.T).argmax(dim=-1)
        distance = vectors.square().sum(dim=-1) - 2 * (flat @ vectors.T)
        return distance.argmin(dim=-1)


class Encoder(nn.Module):
    """Levels of residual blocks, each half the side of the one before; attention on the last."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.encoder_ch_mult]
        self.conv_in = _convolution(3, config.ch)
        self.conv_blocks = nn.ModuleList()
        width = config.ch
        for index, wide in enumerate(widths):
            last = index == len(widths) - 1
            self.conv_blocks.append(Level(width, wide, config.num_res_blocks, attention=last))
            if not last:
                self.conv_blocks[-1].downsample = Downsample(wide)
            width = wide
        self.mid = _middle(width)
        self.norm_out = _norm(width)
        self.conv_out = _convolution(width, config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = block(x)
        return cast(Tensor, self.conv_out(functional.silu(self.norm_out(x))))


class Decoder(nn.Module):
    """The way back: attention on the first level, each further one twice the side."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in reversed(config.decoder_ch_mult)]
        width = widths[0]
        self.conv_in = _convolution(config.z_channels, width)
        self.mid = _middle(width)
        self.conv_blocks = nn.ModuleList()
        for index, wide in enumerate(widths):
            self.conv_blocks.append(Level(width, wide, config.num_res_blocks + 1, attention=index == 0))
            if index < len(widths) - 1:
                self.conv_blocks[-1].upsample = Upsample(wide)
            width = wide
        self.norm_out = _norm(width)
        self.conv_out = _convolution(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)
        return cast(Tensor, self.conv_out(functional.silu(self.norm_out(x))))


class Level(nn.Module):
    """Residual blocks of one size, with attention after each where asked, then a change of size."""

    def __init__(self, width: int, wide: int, blocks: int, *, attention: bool) -> None:
        super().__init__()
        widths = [width] + [wide] * blocks
        self.res = nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))
        self.attn = nn.ModuleList(PixelAttention(wide) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        resize = self.downsample or self.upsample
        return x if resize is None else cast(Tensor, resize(x))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width), _convolution(width, wide)
        self.norm2, self.conv2 = _norm(wide), _convolution(wide, wide)
        self.nin_shortcut = None if width == wide else nn.Conv2d(width, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(functional.silu(self.norm1(x)))
        inner = self.conv2(functional.silu(self.norm2(inner)))
        return cast(Tensor, inner + (x if self.nin_shortcut is None else self.nin_shortcut(x)))


class PixelAttention(nn.Module):
    """One head of attention among all positions of a picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            layer(normed).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )
        out = functional.scaled_dot_product_attention(query, key, value).squeeze(1)
        return x + cast(Tensor, self.proj_out(out.transpose(1, 2).reshape(x.shape)))


class Upsample(nn.Module):
    """Each pixel four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest")))


class Downsample(nn.Module):
    """A convolution with stride 2 whose padding lies to the right and below."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(functional.pad(x, (0, 1, 0, 1))))


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(width, width), PixelAttention(width), ResidualBlock(width, width)])


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def _convolution(width: int, wide: int) -> nn.Conv2d:
    return nn.Conv2d(width, wide, 3, padding=1)
