"""EVA02-CLIP-L-14-336, the image half: a pooled vector and five hidden states of the aligned face.

Key names are those of the public checkpoint below `visual.`; every size is read from the weights.
Axes: B images, N tokens (one class token, then g x g patches), W width, H heads, D head width.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from proteus_deploy.errors import CheckpointError
from proteus_deploy.identity._weights import fill_module, read_tensors, shape_of
from proteus_deploy.identity.features import HIDDEN_STATES
from proteus_deploy.weights import read_header

__all__ = ["CONFIG_NAME", "PUBLISHED_HIDDEN_LAYERS", "ImageTower", "ImageTowerSizes", "load_image_tower"]

# A hidden state is what the first k blocks have made: the published code notes the input of blocks 4, 8, ….
PUBLISHED_HIDDEN_LAYERS = (4, 8, 12, 16, 20)
CONFIG_NAME = "image_tower.json"

_PREFIX = "visual."
# The text half of the CLIP checkpoint, and a token that only masked pre-training uses.
_IGNORED_PREFIXES = ("text.", "logit_scale", "visual.mask_token")
_PUBLISHED_HEAD_WIDTH = 64
_NORM_EPSILON = 1e-6
# Positions are measured in units of a 16 x 16 grid, the one the model was first trained on.
_ROPE_GRID = 16
_ROPE_BASE = 10000.0
# Checkpoints hold the rotation tables in half precision; anything further off is another schedule.
_ROPE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class ImageTowerSizes:
    """Sizes of the tower; `grid` patches of `patch` pixels on each side of the image."""

    width: int
    depth: int
    head_width: int
    mlp_width: int
    patch: int
    grid: int
    pooled: int
    hidden_layers: tuple[int, ...] = PUBLISHED_HIDDEN_LAYERS

    @property
    def image_size(self) -> int:
        return self.grid * self.patch


class _Attention(nn.Module):
    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        query = rotate(self._split(self.q_proj(x) + self.q_bias), cosines, sines)
        key = rotate(self._split(self.k_proj(x)), cosines, sines)
        value = self._split(self.v_proj(x) + self.v_bias)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.proj(self.inner_attn_ln(mixed.transpose(1, 2).flatten(2)))
        return result

    def _split(self, x: Tensor) -> Tensor:
        heads = x.reshape(x.shape[0], x.shape[1], -1, self.head_width)
        return heads.transpose(1, 2)  # [B, H, N, D]


class _SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=_NORM_EPSILON)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.w3(self.ffn_ln(functional.silu(self.w1(x)) * self.w2(x)))
        return result


class _Block(nn.Module):
    def __init__(self, sizes: ImageTowerSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=_NORM_EPSILON)
        self.attn = _Attention(sizes.width, sizes.head_width)
        self.norm2 = nn.LayerNorm(sizes.width, eps=_NORM_EPSILON)
        self.mlp = _SwiGLU(sizes.width, sizes.mlp_width)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cosines, sines)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        patches: Tensor = self.proj(image)
        return patches.flatten(2).transpose(1, 2)


class ImageTower(nn.Module):
    """`face` float [B, 3, S, S], CLIP-normalised -> "pooled" [B, 768], "hidden_0" .. "hidden_4" [B, N, W].

    The pooled vector is not normalised. Real sizes: S = 336, N = 577, W = 1024.
    """

    rope_cosines: Tensor
    rope_sines: Tensor

    def __init__(self, sizes: ImageTowerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.empty(1, sizes.grid**2 + 1, sizes.width))
        self.patch_embed = PatchEmbedding(sizes.width, sizes.patch)
        self.blocks = nn.ModuleList(_Block(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=_NORM_EPSILON)
        self.head = nn.Linear(sizes.width, sizes.pooled)
        cosines, sines = rope_tables(sizes.grid, sizes.head_width)
        # The class token has no place in the image: it is turned by no angle.
        still = torch.ones(1, sizes.head_width, device="cpu")
        self.register_buffer("rope_cosines", torch.cat([still, cosines]), persistent=False)
        self.register_buffer("rope_sines", torch.cat([0 * still, sines]), persistent=False)

    def forward(self, face: Tensor) -> dict[str, Tensor]:
        patches = self.patch_embed(face)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        outputs: dict[str, Tensor] = {}
        for done, block in enumerate(self.blocks, start=1):
            x = block(x, self.rope_cosines, self.rope_sines)
            if done in self.sizes.hidden_layers:
                outputs[f"hidden_{self.sizes.hidden_layers.index(done)}"] = x
        return {"pooled": self.head(self.norm(x)[:, 0]), **outputs}


def rope_tables(grid: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the turn of each patch, float32 [grid * grid, head_width], on the CPU.

    The first half of a head turns with the patch's row, the second half with its column; channels turn in
    neighbouring pairs.
    """
    half = head_width // 2
    speeds = _ROPE_BASE ** -(torch.arange(0, half, 2, device="cpu").float() / half)
    places = torch.arange(grid, device="cpu") / grid * _ROPE_GRID
    angles = (places[:, None] * speeds).repeat_interleave(2, dim=1)
    rows = angles[:, None, :].expand(grid, grid, half)
    columns = angles[None, :, :].expand(grid, grid, half)
    both = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_width)
    return both.cos(), both.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of x [B, H, N, D] by the angles of tables [N, D]."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    # The tables are float32; attention needs queries and keys in the precision of the values.
    return (x * cosines + turned * sines).to(x.dtype)


def load_image_tower(path: str | Path) -> ImageTower:
    """Load the tower in float32, frozen, from a safetensors file with the public key names.

    An `image_tower.json` beside it may say {"hidden_layers": [k1, .., k5]}: hidden state i is what the first
    k_i blocks made. Without it the published 4, 8, 12, 16, 20 hold.
    Raises CheckpointError for a missing or damaged file, and for keys, sizes or layers that do not fit.
    """
    path = Path(path)
    tensors = {
        key.removeprefix(_PREFIX): value
        for key, value in read_tensors(path).items()
        if not key.startswith(_IGNORED_PREFIXES)
    }
    ropes = {key: tensors.pop(key) for key in list(tensors) if "rope.freqs_" in key}
    sizes = _sizes_from_weights(tensors, ropes, path)
    with torch.device("meta"):
        tower = ImageTower(sizes)
    _check_ropes(ropes, sizes, path)
    fill_module(tower, tensors, path)
    return tower


def read_image_tower_sizes(path: str | Path) -> ImageTowerSizes:
    """The sizes of the tower in a safetensors file, from its header alone.

    Raises CheckpointError as `load_image_tower` does.
    """
    path = Path(path)
    shapes = {
        key.removeprefix(_PREFIX): torch.empty(shape, device="meta")
        for key, shape in read_header(path).items()
    }
    ropes = {key: shapes.pop(key) for key in list(shapes) if "rope.freqs_" in key}
    return _sizes_from_weights(shapes, ropes, path)


def _sizes_from_weights(tensors: dict[str, Tensor], ropes: dict[str, Tensor], path: Path) -> ImageTowerSizes:
    width, _, patch, _ = shape_of(tensors, "patch_embed.proj.weight", 4, path)
    tokens = shape_of(tensors, "pos_embed", 3, path)[1]
    grid = math.isqrt(tokens - 1)
    if grid**2 != tokens - 1:
        raise CheckpointError(f"{path}: pos_embed has {tokens} tokens; expected 1 + a square of patches")
    numbers = {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")}
    # The published loader makes the rotation tables anew; a file without them has the published head width.
    head_width = shape_of(ropes, "rope.freqs_cos", 2, path)[1] if ropes else _PUBLISHED_HEAD_WIDTH
    if width % head_width or head_width % 4:
        raise CheckpointError(
            f"{path}: a width of {width} can't be cut into heads of {head_width} (a multiple of 4)"
        )
    depth = len(numbers)
    return ImageTowerSizes(
        width=width,
        depth=depth,
        head_width=head_width,
        mlp_width=shape_of(tensors, "blocks.0.mlp.w1.weight", 2, path)[0],
        patch=patch,
        grid=grid,
        pooled=shape_of(tensors, "head.weight", 2, path)[0],
        hidden_layers=_read_hidden_layers(path.with_name(CONFIG_NAME), depth),
    )


def _read_hidden_layers(config: Path, depth: int) -> tuple[int, ...]:
    layers: object = list(PUBLISHED_HIDDEN_LAYERS)
    if config.is_file():
        try:
            layers = json.loads(config.read_text(encoding="utf-8"))["hidden_layers"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f'{config} can\'t be read ({error!r}); expected {{"hidden_layers": [4, 8, 12, 16, 20]}}'
            ) from error
    if (
        not isinstance(layers, list)
        or len(layers) != HIDDEN_STATES
        or not all(type(layer) is int and 1 <= layer <= depth for layer in layers)
        or sorted(set(layers)) != layers
    ):
        raise CheckpointError(
            f"hidden layers {layers} do not fit a tower of {depth} blocks; write {HIDDEN_STATES} rising "
            f'numbers from 1 to {depth} to {config} as {{"hidden_layers": [..]}}'
        )
    return tuple(layers)


def _check_ropes(ropes: dict[str, Tensor], sizes: ImageTowerSizes, path: Path) -> None:
    """Tables in the file are not used, as in the published loader, but they must mean the same rotation."""
    cosines, sines = rope_tables(sizes.grid, sizes.head_width)
    for key, table in ropes.items():
        expected = cosines if key.endswith("cos") else sines
        if table.shape != expected.shape or (table.float() - expected).abs().max() > _ROPE_TOLERANCE:
            raise CheckpointError(
                f"{path}: {key} is not the published rotation of a {sizes.grid} x {sizes.grid} grid and "
                f"heads of {sizes.head_width}; this tower was trained with another position scheme"
            )
