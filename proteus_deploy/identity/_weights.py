"""Fill a module from a safetensors file, and say exactly what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_LISTED_KEYS = 8


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises CheckpointError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; copy it from the checkpoint")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); copy it again, or make it from the published "
            "pickle with: proteus-deploy convert"
        ) from error


def shape_of(tensors: dict[str, torch.Tensor], key: str, rank: int, path: Path) -> tuple[int, ...]:
    """The shape of one tensor, from which sizes of the network are read."""
    if key not in tensors:
        raise CheckpointError(
            f"{path} has no tensor {key!r}, which this network needs; is it another network?"
        )
    shape = tuple(tensors[key].shape)
    if len(shape) != rank:
        raise CheckpointError(f"{path}: {key!r} has shape {list(shape)}; expected {rank} axes")
    return shape


def fill_module(module: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Assign `tensors` to `module` (made on the meta device), floating ones as float32, and freeze it.

    Raises CheckpointError that lists missing, unexpected and wrongly shaped keys.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    problems = [
        ("missing", sorted(expected.keys() - tensors.keys())),
        ("unexpected", sorted(tensors.keys() - expected.keys())),
        (
            "wrongly shaped",
            [
                f"{key} {list(tensors[key].shape)} instead of {list(shape)}"
                for key, shape in sorted(expected.items())
                if key in tensors and tuple(tensors[key].shape) != shape
            ],
        ),
    ]
    found = [f"{kind}: {_listing(keys)}" for kind, keys in problems if keys]
    if found:
        raise CheckpointError(
            f"{path} does not fit {type(module).__name__}; {'; '.join(found)}. Is it another network?"
        )
    floats = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    module.load_state_dict(floats, assign=True)
    module.eval().requires_grad_(False)


def _listing(keys: list[str]) -> str:
    more = len(keys) - _LISTED_KEYS
    return ", ".join(keys[:_LISTED_KEYS]) + (f" and {more} more" if more > 0 else "")
