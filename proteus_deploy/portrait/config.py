"""Sizes of the portrait model: LlamaGen's GPT and its VQ tokenizer, under the names of the published code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from proteus_deploy.errors import CheckpointError

__all__ = ["GPT_SIZES", "GptConfig", "VqConfig", "config_from_json"]


@dataclass(frozen=True)
class GptConfig:
    """LlamaGen's decoder (Sun et al. 2024, section 3.2): Llama's blocks with rotary embedding over two axes.

    model_type: what is drawn from: "c2i" a class, "t2i" features of a caption.
    cls_token_num: positions that the condition takes before the image's. block_size: tokens of an image, a
    square number. caption_dim: width of the text encoder. num_classes: of "c2i", without the empty one.
    multiple_of, ffn_dim_multiplier: a block is 8/3 dim wide inside, times the multiplier, rounded up.
    """

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    num_classes: int = 1000
    caption_dim: int = 2048
    model_type: Literal["c2i", "t2i"] = "c2i"
    vocab_size: int = 16384
    cls_token_num: int = 1
    block_size: int = 256

    def __post_init__(self) -> None:
        if self.model_type not in ("c2i", "t2i"):
            raise CheckpointError(f"model_type is {self.model_type!r}; choose c2i (classes) or t2i (text)")
        for name in ("dim", "n_layer", "n_head", "vocab_size", "cls_token_num", "block_size"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} is {getattr(self, name)}; it has to be at least 1")
        if self.dim % self.n_head or self.head_dim % 4:
            raise CheckpointError(
                f"dim {self.dim} over {self.n_head} heads gives {self.dim / self.n_head:g} channels each; "
                "rotary embedding over two axes needs a multiple of 4"
            )
        if self.n_head % self.kv_heads:
            raise CheckpointError(f"{self.n_head} heads can't share {self.kv_heads} heads of keys and values")
        if self.grid_size**2 != self.block_size:
            raise CheckpointError(f"block_size is {self.block_size}; an image's tokens form a square")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def grid_size(self) -> int:
        """Tokens along each side of an image."""
        return math.isqrt(self.block_size)

    @property
    def length(self) -> int:
        """Positions of a whole image with its condition."""
        return self.cls_token_num + self.block_size

    @property
    def hidden_dim(self) -> int:
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    def cache_bytes(self, tokens: int, sequences: int, element_bytes: int) -> int:
        """Keys and values of every layer, in bytes: 2 x layers x key heads x head size x tokens x element."""
        return 2 * self.n_layer * self.kv_heads * self.head_dim * tokens * sequences * element_bytes


# Layers, heads, width of the published sizes.
GPT_SIZES: dict[str, tuple[int, int, int]] = {
    "GPT-B": (12, 12, 768),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-1B": (22, 32, 2048),
    "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}


@dataclass(frozen=True)
class VqConfig:
    """LlamaGen's image tokenizer: a convolutional autoencoder around a codebook of unit vectors.

    encoder_ch_mult, decoder_ch_mult: width of each level in multiples of `ch`; each level but one halves the
    side, so VQ-16 has five and VQ-8 four. ch, num_res_blocks: always 128 and 2 in the published code.
    """

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    ch: int = 128
    num_res_blocks: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder_ch_mult", tuple(self.encoder_ch_mult))
        object.__setattr__(self, "decoder_ch_mult", tuple(self.decoder_ch_mult))
        if self.ch % 32:
            raise CheckpointError(
                f"ch is {self.ch}; its norms have 32 groups, so it has to be a multiple of 32"
            )
        if not self.encoder_ch_mult:
            raise CheckpointError("encoder_ch_mult is empty; it names the width of each level, one at least")
        if len(self.encoder_ch_mult) != len(self.decoder_ch_mult):
            raise CheckpointError(
                f"encoder_ch_mult has {len(self.encoder_ch_mult)} levels and decoder_ch_mult "
                f"{len(self.decoder_ch_mult)}; a picture comes out at the size that goes in"
            )

    @property
    def downsample(self) -> int:
        """Pixels along a token's side."""
        return int(2 ** (len(self.encoder_ch_mult) - 1))


_Config = TypeVar("_Config", GptConfig, VqConfig)


def config_from_json(kind: type[_Config], found: Mapping[str, Any]) -> _Config:
    """A config from a file's entries.

    Raises CheckpointError for unknown entries, missing ones and values that don't fit together.
    """
    known = {field.name for field in fields(kind)}
    unknown = sorted(found.keys() - known)
    if unknown:
        raise CheckpointError(
            f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    try:
        return kind(**found)
    except TypeError as error:
        raise CheckpointError(f"{kind.__name__}: {error}") from error
