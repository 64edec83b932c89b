"""Latents -> frames: by tiles in space and by chunks in time, with memory bounded by one tile's chunk.

Axes: F latent frames, h, w latent rows and columns (8 pixels each).
Chunks and tiles are those of diffusers' AutoencoderKLCogVideoX, whose group norms see one chunk of one
tile at a time; other cuts would give other pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from proteus_deploy.runtime.backend import Backend

SCALE = 8  # pixels per latent pixel
_CHUNK = 2


@dataclass(frozen=True)
class Tiling:
    """Tile size in latent pixels and the overlaps, as fractions of a tile."""

    height: int
    width: int
    overlap_height: float = 1 / 6
    overlap_width: float = 1 / 5

    def __post_init__(self) -> None:
        if self.height < 2 or self.width < 2:
            raise InputError(
                f"tiles of {self.height}x{self.width} latent pixels are too small; use at least 2x2"
            )
        if not (0 <= self.overlap_height < 1 and 0 <= self.overlap_width < 1):
            raise InputError("tile overlaps are fractions of a tile, at least 0 and below 1")
        if min(self.stride) < 1:
            raise InputError(
                f"tiles of {self.height}x{self.width} latent pixels with overlaps of {self.overlap_height} "
                f"and {self.overlap_width} don't advance; make the tiles larger or the overlaps smaller"
            )

    @classmethod
    def for_vae(cls, config: dict[str, Any]) -> Tiling:
        """Half the VAE's sample size, as published."""
        return cls(int(config["sample_height"] // 2 / SCALE), int(config["sample_width"] // 2 / SCALE))

    @property
    def stride(self) -> tuple[int, int]:
        return int(self.height * (1 - self.overlap_height)), int(self.width * (1 - self.overlap_width))


def chunks(frames: int) -> list[tuple[int, int]]:
    """[(start, stop), ...] of latent frames: 3 first when the count is odd, then 2 at a time.

    With an even count the decoder has no lone first frame, and 2k latent frames give 8k video frames
    rather than 8k - 3: the published decoder's way.
    """
    count, extra = max(frames // _CHUNK, 1), frames % _CHUNK
    return [(_CHUNK * i + (extra if i else 0), _CHUNK * (i + 1) + extra) for i in range(count)]


def output_frames(frames: int) -> int:
    """Video frames that `frames` latent frames decode to."""
    return 4 * frames - 3 if frames % 2 else 4 * frames


def decode(
    backend: Backend,
    latents: Tensor,
    *,
    tiling: Tiling | None = None,
    on_part: Callable[[int, int], None] | None = None,
) -> Tensor:
    """latents [1, C, F, h, w], divided by the scaling factor -> frames [1, 3, F', 8h, 8w], CPU, float32.

    on_part(done, total) is called after every chunk of every tile; it may raise to stop the work.
    Raises InputError for a single latent frame, which is an image and not a video.
    """
    import torch

    _, _, frames, height, width = latents.shape
    if frames < _CHUNK:
        raise InputError(f"{frames} latent frame can't be decoded; a video has at least {_CHUNK}")
    tile = (
        tiling if tiling and (height > tiling.height or width > tiling.width) else Tiling(height, width, 0, 0)
    )
    places = list(_places(tile, height, width))
    total, done = len(places) * len(chunks(frames)), 0

    def count() -> None:
        nonlocal done
        done += 1
        if on_part is not None:
            on_part(done, total)

    video = torch.empty(1, 3, output_frames(frames), height * SCALE, width * SCALE)
    edges = _Edges(tile)
    for top, left in places:
        part = latents[..., top : top + tile.height, left : left + tile.width]
        pixels = _decode_tile(backend, part, count)
        edges.blend(pixels, top, left)
        stride_y, stride_x = tile.stride
        keep = pixels[..., : stride_y * SCALE, : stride_x * SCALE]
        rows, columns = (
            slice(top * SCALE, top * SCALE + keep.shape[-2]),
            slice(left * SCALE, left * SCALE + keep.shape[-1]),
        )
        video[..., rows, columns] = keep
    return video


def _places(tile: Tiling, height: int, width: int) -> Iterator[tuple[int, int]]:
    stride_y, stride_x = tile.stride
    for top in range(0, height, stride_y):
        for left in range(0, width, stride_x):
            yield top, left


def _decode_tile(backend: Backend, latents: Tensor, count: Callable[[], None]) -> Tensor:
    import torch

    parts: list[torch.Tensor] = []
    caches: dict[str, Tensor] = {}
    for start, stop in chunks(latents.shape[2]):
        graph = f"vae_decoder_first_{stop - start}" if start == 0 else "vae_decoder_next"
        outputs = backend.runner(graph)(latents=latents[:, :, start:stop].contiguous(), **caches)
        parts.append(outputs.pop("frames").float().cpu())
        caches = {name.replace("cache_out", "cache_in"): cache for name, cache in outputs.items()}
        count()
    return torch.cat(parts, dim=2)


class _Edges:
    """Blends each tile with the one above and the one to its left, keeping only their edges."""

    def __init__(self, tile: Tiling) -> None:
        stride_y, stride_x = tile.stride
        self.rows = (tile.height - stride_y) * SCALE
        self.columns = (tile.width - stride_x) * SCALE
        self._above: dict[int, Tensor] = {}  # bottom edge of the tile above, by its left
        self._left: Tensor | None = None

    def blend(self, pixels: Tensor, top: int, left: int) -> None:
        if left == 0:
            self._left = None
        if top > 0 and self.rows:
            _ramp(self._above[left], pixels, self.rows, dim=-2)
        if self._left is not None:
            _ramp(self._left, pixels, self.columns, dim=-1)
        if self.rows:
            self._above[left] = pixels[..., -self.rows :, :].clone()
        if self.columns:
            self._left = pixels[..., -self.columns :].clone()


def _ramp(before: Tensor, after: Tensor, extent: int, *, dim: int) -> None:
    """Cross-fade the end of `before` into the start of `after`, in place, over at most `extent` pixels."""
    import torch

    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return
    shape = [1] * after.ndim
    shape[dim] = extent
    weight = (torch.arange(extent) / extent).reshape(shape)
    start = after.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start.copy_(end * (1 - weight) + start * weight)
