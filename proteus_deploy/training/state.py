"""What training needs to go on to the same bits, as one safetensors file: weights, averages, AdamW, counters.

Keys: `module.NAME`, `average.NAME`, `adam.FIELD.NAME`. The counters and settings stand in the metadata.

Where parameters are sharded (FSDP), each process holds a piece of every tensor. The file has them whole, so
that another number of processes, or one, can go on from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import CheckpointError, InputError

__all__ = [
    "Averages",
    "StoredTensors",
    "check_settings",
    "drop_later_lines",
    "gather",
    "load_tensors",
    "open_tensors",
    "pack",
    "parameter_groups",
    "save_tensors",
    "unpack",
]

_METADATA = "proteus_deploy"


class Averages:
    """An exponential moving average of named parameters. `decay` 0 keeps none: the average is the weights.

    Kept in float32 whatever the parameters are: in bfloat16 a thousandth of a number would be lost in its
    rounding.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.values = {key: _float_copy(value) for key, value in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step`, from 0. A young average forgets faster, or it would stay at the start."""
        if self.values:
            kept = min(self.decay, (1 + step) / (10 + step))
            current = [self.parameters[key].detach().float() for key in self.values]
            torch._foreach_lerp_(list(self.values.values()), current, 1 - kept)


def pack(
    weights: Mapping[str, Tensor],
    averages: Averages,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """All tensors of a training run, to be saved."""
    tensors = {f"module.{key}": value.detach() for key, value in weights.items()}
    tensors |= {f"average.{key}": value for key, value in averages.values.items()}
    for key, parameter in parameters.items():
        for field, value in optimiser.state.get(parameter, {}).items():
            tensors[f"adam.{field}.{key}"] = torch.as_tensor(value)
    return tensors


@torch.no_grad()
def unpack(
    tensors: Mapping[str, Tensor],
    averages: Averages,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """Put parameters, averages and optimiser back; return all the weights that `pack` was given.

    Raises InputError where a tensor is missing or has another shape.
    """
    for key, value in averages.values.items():
        value.copy_(_piece(tensors, f"average.{key}", value))
    fields: dict[str, list[str]] = {}
    for stored in tensors:
        if stored.startswith("adam."):
            _, field, key = stored.split(".", 2)
            fields.setdefault(key, []).append(field)
    for key, parameter in parameters.items():
        parameter.copy_(_piece(tensors, f"module.{key}", parameter))
        if key in fields:
            # Step counters, which have no shape, stay on the CPU, where AdamW keeps them.
            optimiser.state[parameter] = {
                field: (
                    tensors[f"adam.{field}.{key}"].clone()
                    if field == "step"
                    else _piece(tensors, f"adam.{field}.{key}", parameter).clone()
                )
                for field in fields[key]
            }
    return _below(tensors, "module.")


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Each tensor whole and on the CPU; all processes take part, those without `keep` get nothing."""
    result = {}
    for key, value in tensors.items():
        whole = value.full_tensor() if _is_sharded(value) else value  # type: ignore[attr-defined]
        if keep:
            result[key] = whole.detach().cpu()
    return result


def save_tensors(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and what is to be known about them; the file is whole or absent."""
    from safetensors.torch import save_file

    with atomic_file(file) as temporary:
        save_file(_separate(tensors), temporary, {_METADATA: json.dumps(facts)})


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for: a state can be larger than the memory."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self._names = tuple(opened.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._names:
            raise KeyError(key)
        tensor: Tensor = self._opened.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_tensors(file: Path) -> tuple[StoredTensors, dict[str, Any]]:
    """The inverse of `save_tensors`. Raises CheckpointError for a file that is damaged or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
        facts = dict(json.loads((opened.metadata() or {})[_METADATA]))  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} can't be read ({error!r}); remove it to train anew") from error
    return StoredTensors(opened), facts


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`open_tensors` with all tensors read."""
    tensors, facts = open_tensors(file)
    return dict(tensors), facts


def check_settings(
    facts: Mapping[str, Any], mine: Mapping[str, Any], file: Path, *, group: str = "settings"
) -> None:
    """Raises InputError naming the first value in which a saved run differs.

    group: which of the facts it is about, `settings` or what else was saved.
    """
    saved = facts.get(group)
    wanted = json.loads(json.dumps(mine))
    if saved == wanted:
        return
    saved = saved if isinstance(saved, dict) else {}
    different = [key for key in {**wanted, **saved} if saved.get(key) != wanted.get(key)]
    first = different[0] if different else group
    raise InputError(
        f"{file} was trained with {first} = {saved.get(first)!r}, now it is {wanted.get(first)!r}; "
        "go on with the same settings, or choose another folder"
    )


def drop_later_lines(log: Path, step: int) -> None:
    """Remove lines of steps that were logged and then lost, because no state was saved after them."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if kept != lines:
            with atomic_file(log) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    """The step of a line of a log; infinity for a line that was cut off while it was written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _float_copy(value: Tensor) -> Tensor:
    return value.detach().to(torch.float32, copy=True)


def _is_sharded(value: Tensor) -> bool:
    return hasattr(value, "full_tensor")


def _piece(tensors: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    """A stored tensor where `like` is, and as much of it as this process has of `like`."""
    if key not in tensors:
        raise InputError(f"the saved state has no {key}; it is of another network, choose another folder")
    stored = tensors[key]
    if stored.shape != like.shape:
        raise InputError(
            f"{key} of the saved state has shape {list(stored.shape)}, the network's {list(like.shape)}; "
            "it is of another network, choose another folder"
        )
    if not _is_sharded(like):
        return stored.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    # Each process has read the whole tensor: it cuts its piece out, nothing is sent.
    return distribute_tensor(stored.to(like.device), mesh, placements, src_data_rank=None)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (tied embeddings do): each gets its own copy."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        own = value.detach().cpu().contiguous()
        result[key] = own.clone() if own.data_ptr() in seen and own.numel() else own
        seen.add(own.data_ptr())
    return result


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) don't."""
    listed = list(parameters)
    groups = [
        {"params": [one for one in listed if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in listed if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
