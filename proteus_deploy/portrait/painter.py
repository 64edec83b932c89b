"""From captions to pictures: text encoder, decoder with its cache, tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Protocol, TypedDict, Unpack

from proteus_deploy.errors import InputError
from proteus_deploy.portrait.checkpoint import PortraitCheckpoint
from proteus_deploy.portrait.plan import CacheSettings, check_kernel
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "DrawOptions",
    "Painter",
    "TokenPainter",
    "TorchPainter",
    "check_captions",
    "to_pictures",
    "weight_dtype",
]

_MAX_CAPTION_CHARACTERS = 2000
_DTYPES = ("float32", "bfloat16", "float16")


class DrawOptions(TypedDict, total=False):
    """How to draw, where it isn't as the painter does by itself.

    seeds: one for each picture; without them `sampling.seed` and those that follow it.
    """

    sampling: Sampling | None
    cache: CacheSettings | None
    seeds: Sequence[int] | None
    report: Report
    cancel: Event | None


class Painter(Protocol):
    """Draws portraits; `sampling` and `cache` are what it draws with unless told otherwise."""

    @property
    def sampling(self) -> Sampling: ...

    @property
    def cache(self) -> CacheSettings: ...

    def draw(self, captions: Sequence[str], **options: Unpack[DrawOptions]) -> list[NDArray[np.uint8]]:
        """A picture for each caption, uint8 [H, W, 3], RGB.

        Raises InputError for what can't be drawn, Cancelled between two tokens once `cancel` is set.
        """
        ...


class TokenPainter(ABC):
    """A painter that writes code numbers first and turns them into pictures then."""

    sampling: Sampling
    cache: CacheSettings

    def draw(self, captions: Sequence[str], **options: Unpack[DrawOptions]) -> list[NDArray[np.uint8]]:
        """See `Painter.draw`."""
        return self.pictures(self.draw_tokens(captions, **options))

    @abstractmethod
    def draw_tokens(self, captions: Sequence[str], **options: Unpack[DrawOptions]) -> Tensor:
        """As `draw`, the pictures' code numbers int64 [B, tokens]."""

    @abstractmethod
    def pictures(self, tokens: Tensor) -> list[NDArray[np.uint8]]:
        """Code numbers int64 [B, tokens] as pictures uint8 [H, W, 3]."""


class TorchPainter(TokenPainter):
    """A portrait checkpoint in PyTorch, float32 unless `dtype` says otherwise.

    kernel: "torch", or "triton" for attention and ADSA's products in one kernel.
    cache_dtype: of keys and values; None for that of the weights. On a CPU with bfloat16 products, weights in
    bfloat16 beside a cache in float32 are faster than all in float32 (docs/portrait.md).
    Raises CheckpointError where the weights don't fit, InputError for another dtype or kernel.
    """

    def __init__(
        self,
        checkpoint: PortraitCheckpoint,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        kernel: str = "torch",
        cache_dtype: str | None = None,
    ) -> None:
        kind = weight_dtype(dtype)
        check_kernel(kernel)
        self.checkpoint = checkpoint
        self.sampling, self.cache = checkpoint.sampling, checkpoint.cache
        self._kernel = kernel
        self._cache_dtype = None if cache_dtype is None else weight_dtype(cache_dtype)
        self.captions = checkpoint.caption_encoder(device)
        self.gpt = checkpoint.build_gpt().to(device).cast(kind)
        self.vq = checkpoint.build_vq().to(device)

    @classmethod
    def open(cls, folder: str | Path, **options: str) -> TorchPainter:
        """Open a folder with `portrait.json`; options as in the constructor."""
        return cls(PortraitCheckpoint.open(folder), **options)

    def draw_tokens(
        self,
        captions: Sequence[str],
        *,
        sampling: Sampling | None = None,
        cache: CacheSettings | None = None,
        seeds: Sequence[int] | None = None,
        report: Report = no_report,
        cancel: Event | None = None,
    ) -> Tensor:
        """As `draw`, the pictures' code numbers int64 [B, tokens]."""
        from proteus_deploy.portrait.decoding import draw_tokens

        check_captions(captions)
        features, valid = self.captions(captions)
        weight = self.gpt.tok_embeddings.weight
        return draw_tokens(
            self.gpt,
            cache or self.cache,
            sampling or self.sampling,
            features.to(weight.device, weight.dtype),
            valid.to(weight.device),
            kernel=self._kernel,
            cache_dtype=self._cache_dtype,
            seeds=seeds,
            report=report,
            cancel=cancel,
        )

    def pictures(self, tokens: Tensor) -> list[NDArray[np.uint8]]:
        """Code numbers int64 [B, tokens] as pictures uint8 [H, W, 3]."""
        import torch

        with torch.no_grad():
            decoded = torch.cat([self.vq.decode(some) for some in tokens.split(16)])
        return list(to_pictures(decoded))


def weight_dtype(name: str) -> torch.dtype:
    """Of a decoder's weights. Raises InputError for another name than the three."""
    import torch

    if name not in _DTYPES:
        raise InputError(f"dtype is {name!r}; choose {', '.join(_DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def check_captions(captions: Sequence[str]) -> None:
    """Raises InputError for none, and for one that is empty or endless."""
    if isinstance(captions, str) or not len(captions):
        raise InputError(f"captions are {captions!r}; pass a list with at least one")
    for caption in captions:
        if not caption.strip():
            raise InputError(f"a caption is {caption!r}; say who is to be drawn")
        if len(caption) > _MAX_CAPTION_CHARACTERS:
            raise InputError(
                f"a caption has {len(caption)} characters; use at most {_MAX_CAPTION_CHARACTERS}"
            )


def to_pictures(decoded: Tensor) -> NDArray[np.uint8]:
    """Pixels [B, 3, H, W] in [-1, 1] as uint8 [B, H, W, 3]."""
    pixels = (decoded.float().clamp(-1, 1) + 1) * 127.5
    found: NDArray[np.uint8] = pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return found
