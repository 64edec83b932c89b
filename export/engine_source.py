"""The files behind one ONNX graph: the model and the weights that it keeps beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proteus_deploy._files import inside, sha256_of
from proteus_deploy.errors import BackendError, BundleError, InputError


@dataclass(frozen=True)
class EngineSource:
    """An ONNX file, its external data files (sorted), their total size and the number of nodes.

    custom_operators: those that are not ONNX's own, as domain::name.
    """

    onnx_file: Path
    external: tuple[Path, ...]
    weight_bytes: int
    nodes: int
    custom_operators: tuple[str, ...] = ()

    @classmethod
    def read(cls, onnx_file: Path) -> EngineSource:
        """Raises BundleError for a file that isn't ONNX or whose data is missing or outside its folder."""
        try:
            import onnx
        except ImportError as error:
            raise BackendError(
                'building engines needs the package onnx; install it with: pip install "proteus-deploy[onnx]"'
            ) from error
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        if not onnx_file.is_file():
            raise BundleError(f"{onnx_file} is missing; export the bundle again")
        try:
            model = onnx.load(str(onnx_file), load_external_data=False)
        except DecodeError as error:
            raise BundleError(
                f"{onnx_file} is not an ONNX model ({error}); export the bundle again"
            ) from error
        names = sorted({name for tensor in _tensors(model.graph) if (name := _location(tensor)) is not None})
        external = tuple(_external_file(onnx_file, name) for name in names)
        size = sum(file.stat().st_size for file in (onnx_file, *external))
        custom = {f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain}
        return cls(onnx_file, external, size, len(model.graph.node), tuple(sorted(custom)))

    def digest(self) -> str:
        """sha256 over the model and all of its external data."""
        whole = hashlib.sha256(sha256_of(self.onnx_file).encode())
        for file in self.external:
            whole.update(f"\n{file.name} {sha256_of(file)}".encode())
        return whole.hexdigest()


def _tensors(graph: Any) -> Iterator[Any]:
    """Initialisers and tensor attributes, those of nested graphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for nested in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
                yield from _tensors(nested)


def _location(tensor: Any) -> str | None:
    for entry in tensor.external_data:
        if entry.key == "location":
            return str(entry.value)
    return None


def _external_file(onnx_file: Path, name: str) -> Path:
    try:
        file = inside(onnx_file.parent, name)
    except InputError as error:
        raise BundleError(f"{onnx_file} takes weights from {name!r}, which is outside its folder") from error
    if not file.is_file():
        raise BundleError(
            f"{onnx_file} takes weights from {name!r}, which is missing; export the bundle again"
        )
    return file
