"""TensorRT's own report of a finished engine: which precision each layer of ours took, what was fused.

The JSON of `IEngineInspector` at detailed verbosity (NVIDIA TensorRT documentation, "Engine Inspector"): a
list of layers, each with Name, LayerType, Inputs, Outputs (Name, Dimensions, Format/Datatype) and, since
TensorRT 8.5, Metadata with the ONNX nodes that were fused into it. It can be had on the engine's GPU only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proteus_deploy.errors import BundleError
from proteus_deploy.export.engine_layers import onnx_nodes

# Words of "Format/Datatype" -> our names; the first that is found counts.
_WORDS = (
    (re.compile(r"\bfp4|\be2m1", re.IGNORECASE), "fp4"),
    (re.compile(r"\bint4", re.IGNORECASE), "int4"),
    (re.compile(r"\bfp8|\be4m3", re.IGNORECASE), "fp8"),
    (re.compile(r"\bint8", re.IGNORECASE), "int8"),
    (re.compile(r"\bbf(loat)?16", re.IGNORECASE), "bf16"),
    (re.compile(r"\bhalf|\bfp16", re.IGNORECASE), "fp16"),
    (re.compile(r"\bfloat\b|\bfp32", re.IGNORECASE), "fp32"),
)
_FEWEST_BITS = ("fp4", "int4", "fp8", "int8", "fp16", "bf16", "fp32")
_QDQ = re.compile(r"quantize", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayer:
    """A layer of the engine. nodes: ONNX nodes in it. read, written: precisions, fewest bits first."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    read: tuple[str, ...]
    written: tuple[str, ...]

    @property
    def is_reformat(self) -> bool:
        return self.kind.lower() == "reformat" or self.name.startswith("Reformatting CopyNode")


@dataclass(frozen=True)
class InspectedEngine:
    """All layers. detailed: False where TensorRT listed names alone."""

    layers: tuple[EngineLayer, ...]
    detailed: bool

    @classmethod
    def read(cls, file: Path) -> InspectedEngine:
        """Raises BundleError for a file that is no layer report."""
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} can't be read ({error}); build the engine again") from error
        listed = document.get("Layers") if isinstance(document, dict) else None
        if not isinstance(listed, list):
            raise BundleError(f"{file} has no list 'Layers'; build the engine again")
        detailed = [entry for entry in listed if isinstance(entry, dict)]
        names = [EngineLayer(str(entry), "", (), (), ()) for entry in listed if not isinstance(entry, dict)]
        return cls((*(_layer(entry) for entry in detailed), *names), bool(detailed) and not names)

    @property
    def reformats(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers if layer.is_reformat)

    def taken(self, node: str) -> str | None:
        """Precision in which the engine reads for `node`: the fewest bits; None where it isn't listed."""
        holders = [layer for layer in self.layers if node in layer.nodes and not layer.is_reformat]
        read = {name for layer in holders for name in layer.read or layer.written}
        return next((name for name in _FEWEST_BITS if name in read), None)

    def fused(self, nodes: tuple[str, ...]) -> bool | None:
        """Whether one layer holds all `nodes`; None where none of them is listed."""
        if not any(node in layer.nodes for layer in self.layers for node in nodes):
            return None
        return any(set(nodes) <= set(layer.nodes) for layer in self.layers)

    def alone(self, nodes: frozenset[str]) -> tuple[str, ...]:
        """Names of layers that hold nothing but Q/DQ `nodes`: pairs which were not folded."""
        return tuple(
            layer.name
            for layer in self.layers
            if not layer.is_reformat
            and ((layer.nodes and set(layer.nodes) <= nodes) or (not layer.nodes and _QDQ.search(layer.kind)))
        )


def _layer(entry: Mapping[str, Any]) -> EngineLayer:
    return EngineLayer(
        name=str(entry.get("Name", "")),
        kind=str(entry.get("LayerType", "")),
        nodes=onnx_nodes(str(entry.get("Metadata", ""))),
        read=_precisions(entry.get("Inputs")),
        written=_precisions(entry.get("Outputs")),
    )


def _precisions(tensors: Any) -> tuple[str, ...]:
    found = set()
    for tensor in tensors if isinstance(tensors, list) else ():
        words = tensor.get("Format/Datatype", tensor.get("DataType", "")) if isinstance(tensor, dict) else ""
        name = next((ours for pattern, ours in _WORDS if pattern.search(str(words))), None)
        if name is not None:
            found.add(name)
    return tuple(sorted(found, key=_FEWEST_BITS.index))
