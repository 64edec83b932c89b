"""Turn published pickles into safetensors, without running the code that a pickle can hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

__all__ = ["PICKLE_SUFFIXES", "convert", "convert_folder", "find_pickles"]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
# Training scripts wrap the weights in one of these, and some in two.
_WRAPPERS = ("state_dict", "model", "module")
_DATA_PARALLEL_PREFIX = "module."


def convert(path: str | Path, output: str | Path | None = None) -> Path:
    """Convert one pickle of tensors and return the safetensors file, written whole or not at all.

    output: where to; by default beside the pickle, with the same stem. Each tensor becomes contiguous and its
    own copy, in the dtype it has; values that are no tensors (step counters, settings) are left out.
    A folder given as `path` is refused: use `convert_folder`.

    Raises CheckpointError when the file is no pickle of plain tensors, and says so when it holds code.
    """
    import torch
    from safetensors.torch import save_file

    source = Path(path)
    if source.suffix not in PICKLE_SUFFIXES or not source.is_file():
        raise InputError(
            f"{source} is not a file ending in {', '.join(PICKLE_SUFFIXES)}; pass a pickled checkpoint"
        )
    target = Path(output) if output is not None else source.with_suffix(".safetensors")
    if target.suffix != ".safetensors":
        raise InputError(f"the output {target} does not end in .safetensors; choose a name that does")
    tensors = _tensors(_load_plain(source), source)
    copies: dict[str, torch.Tensor] = {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    with atomic_file(target) as temporary:
        save_file(copies, temporary, metadata={"format": "pt"})
    return target


def find_pickles(folder: str | Path) -> list[Path]:
    """All files below `folder` that end like a pickle, in the order of their paths."""
    return sorted(
        file for file in Path(folder).rglob("*") if file.suffix in PICKLE_SUFFIXES and file.is_file()
    )


def convert_folder(folder: str | Path) -> list[Path]:
    """Convert every pickle below `folder`, each beside itself; return the files written.

    Raises InputError when there is none, or when two pickles would become the same file.
    """
    pickles = find_pickles(folder)
    if not pickles:
        raise InputError(
            f"no file ending in {', '.join(PICKLE_SUFFIXES)} lies below {folder}; nothing to convert"
        )
    targets: dict[Path, Path] = {}
    for pickle in pickles:
        other = targets.setdefault(pickle.with_suffix(".safetensors"), pickle)
        if other != pickle:
            raise InputError(
                f"{other} and {pickle} would both become {pickle.with_suffix('.safetensors')}; "
                "convert one of them with --output"
            )
    return [convert(pickle) for pickle in pickles]


def _load_plain(source: Path) -> Any:
    """Unpickle with the loader that knows tensors and containers only, mapped from disk where possible."""
    import pickle

    import torch

    if source.stat().st_size == 0:
        raise CheckpointError(f"{source} is empty; download it again")
    try:
        # Files of before torch 1.6 are no zip archives and can't be mapped; they are read whole.
        return torch.load(source, map_location="cpu", weights_only=True, mmap=_is_zip(source))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{source} holds code or objects besides tensors and will not be loaded: running it could do "
            "anything. Ask its author for a file of plain tensors (torch.save of a state_dict) or for "
            f"safetensors. The loader said: {_first_line(error)}"
        ) from error
    except Exception as error:  # a damaged archive raises RuntimeError, EOFError, KeyError, …
        raise CheckpointError(
            f"{source} can't be read as a torch checkpoint ({_first_line(error)}); download it again"
        ) from error


def _is_zip(source: Path) -> bool:
    with source.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _tensors(loaded: Any, source: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a loaded object, taken out of common wrappers."""
    import torch

    while isinstance(loaded, Mapping) and not any(
        isinstance(value, torch.Tensor) for value in loaded.values()
    ):
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    tensors = {
        str(name): value
        for name, value in (loaded.items() if isinstance(loaded, Mapping) else ())
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise CheckpointError(
            f"{source} holds no named tensors (found: {type(loaded).__name__}); expected a state_dict, "
            f"bare or under one of {', '.join(_WRAPPERS)}"
        )
    if all(name.startswith(_DATA_PARALLEL_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_DATA_PARALLEL_PREFIX): value for name, value in tensors.items()}
    strange = [name for name, value in tensors.items() if value.layout != torch.strided or value.is_quantized]
    if strange:
        raise CheckpointError(
            f"{source}: {', '.join(strange[:4])} are sparse or quantised tensors, which safetensors "
            "can't hold; save them dense first"
        )
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
