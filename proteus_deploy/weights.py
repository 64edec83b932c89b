"""Weights on disk, read one tensor at a time. safetensors only; a pickle is refused."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from proteus_deploy.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_JSON_BYTES = 32 << 20  # the largest published one, a shard index, is far below
_MOST_THREADS = 16
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class WeightSource(Protocol):
    """Anything that knows shapes without reading, and reads one tensor on demand."""

    source: str

    def keys(self) -> Iterator[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def tensor(self, key: str) -> Tensor: ...


class SafetensorsFolder:
    """The safetensors files of one component folder: a single file or shards with an index.

    Raises CheckpointError when the folder has no safetensors, only pickles, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self._files = _weight_files(folder)
        self._key_file: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files:
            for key, shape in read_header(file).items():
                if key in self._key_file:
                    raise CheckpointError(
                        f"{key!r} is in both {self._key_file[key]} and {file}; remove one of them"
                    )
                self._key_file[key] = file
                self._shapes[key] = shape

    @property
    def files(self) -> tuple[Path, ...]:
        return self._files

    def keys(self) -> Iterator[str]:
        return iter(self._key_file)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def tensor(self, key: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._key_file[key], framework="pt") as file:
            return file.get_tensor(key)  # type: ignore[no-any-return]


class RandomWeights:
    """Weights that exist only while they are read: normal numbers from a seed and the key.

    Stands in for a checkpoint of real size where none can be stored; shapes come from the modules.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, seed: int, scale: float = 0.02) -> None:
        self.source = f"random weights (seed {seed})"
        self._shapes = dict(shapes)
        self._seed = seed
        self._scale = scale

    def keys(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def tensor(self, key: str) -> Tensor:
        import zlib

        import torch

        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(key.encode()))
        return torch.randn(self._shapes[key], generator=generator) * self._scale


def read_all(source: WeightSource, keys: Sequence[str]) -> Iterator[Tensor]:
    """The tensors of these keys, in order.

    Random ones are made by several threads, a few tensors ahead of the caller: each has a seed of its own, so
    they are the same bytes. Files are read one tensor at a time.
    """
    if not isinstance(source, RandomWeights):
        yield from (source.tensor(key) for key in keys)
        return
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for key in keys:
            waiting.append(pool.submit(source.tensor, key))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; a published checkpoint keeps each network in its own"
        )
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        found = ", ".join(index.name for index in indices)
        raise CheckpointError(f"{folder} has several indices ({found}); keep those of one variant only")
    if indices:
        return _shards(folder, indices[0])
    files = tuple(sorted(folder.glob("*.safetensors")))
    if files:
        return files
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({', '.join(pickles)}); a pickle can run code when "
            "it is opened, so only safetensors are loaded. "
            f"Convert it once with: proteus-deploy convert {folder}"
        )
    raise CheckpointError(f"{folder} has no .safetensors file")


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    try:
        names = set(read_json(index)["weight_map"].values())
    except (CheckpointError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}); download it again") from error
    for name in names:
        # Shards lie beside their index. The file itself may be a link, as it is in the hub's cache.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is not a .safetensors file in {folder}")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(f"{folder}: shards named in {index.name} are missing: {', '.join(missing)}")
    return tuple(folder / name for name in sorted(names))


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """{key: shape} of a safetensors file. Raises CheckpointError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} can't be read as safetensors ({error}); it is damaged or incomplete"
        ) from error


def check_keys(expected: Mapping[str, tuple[int, ...]], store: WeightSource) -> None:
    """Every expected key is present with its shape, and nothing else is.

    Raises CheckpointError that lists missing, unexpected and wrongly shaped keys by name.
    """
    found = {key: store.shape(key) for key in store.keys()}  # noqa: SIM118 - a protocol, not a dict
    problems: list[str] = []
    problems += [f"missing: {key} {list(expected[key])}" for key in expected if key not in found]
    problems += [f"unexpected: {key} {list(found[key])}" for key in found if key not in expected]
    problems += [
        f"wrong shape: {key} is {list(found[key])}, the config asks for {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{store.source}: the weights don't fit the config:\n  {shown}{more}")


def read_json(file: Path, *, error: type[InputError] = CheckpointError) -> dict[str, Any]:
    """A JSON object from a checkpoint or bundle, of at most 32 MiB.

    Raises `error` naming the file when it is absent, larger, nested too deeply or malformed.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_JSON_BYTES + 1)
        if len(content) > _MAX_JSON_BYTES:
            raise error(
                f"{file} has {file.stat().st_size} bytes; a JSON file of a checkpoint or bundle is never "
                f"above {_MAX_JSON_BYTES}, so this is another file: replace it by the right one"
            )
        document = json.loads(content.decode("utf-8"))
    except FileNotFoundError as cause:
        raise error(f"{file} is missing") from cause
    except RecursionError as cause:
        raise error(f"{file} is not readable JSON (nested too deeply)") from cause
    except (ValueError, OSError) as cause:
        if isinstance(cause, error):
            raise
        raise error(f"{file} is not readable JSON ({cause})") from cause
    if not isinstance(document, dict):
        raise error(f"{file} must hold a JSON object, not {type(document).__name__}")
    return document
