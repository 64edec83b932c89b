"""Stages and their graphs: the tensor contracts that everything else is derived from.

A *stage* is a named pure function of the pipeline. It is exported as one or more *graphs* (only the
VAE decoder needs several). A graph's inputs and outputs have axes that are numbers, symbols, or a
multiple of a symbol ("2y"); a StageTable gives each symbol its range. Sample inputs, ONNX dynamic
axes, TensorRT profiles, request validation and benchmark shapes all come from this table.

Symbols: B batch (2 under guidance), I identities, N tokens given to the text encoder, L text tokens
given to the denoiser, P identity-prompt tokens, M image tokens, R rank of adapters, T timesteps, f token
frames, y and x token rows and columns, h and w latent rows and columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import torch

Axis = int | str
DType = Literal["float", "float32", "int64"]
Fill = Literal["normal", "unit", "tokens", "timesteps", "gate", "cos", "sin"]

_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")
_MAX_SIZE = 2**31 - 1  # what ONNX Runtime and TensorRT count an axis with
_MAX_AXIS_LENGTH = 20
_AXIS = re.compile(r"([1-9]\d*)?([A-Za-z]+)")


@dataclass(frozen=True)
class AxisRange:
    """Inclusive bounds of a symbol, and the value that engines are tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(
                f"axis range {self.min}:{self.opt}:{self.max} must satisfy 1 <= min <= opt <= max"
            )


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. dtype "float" means the precision that the stage was exported in.

    optional: an input that may be left out, in PyTorch; a graph in a file has none, so JSON doesn't say it.
    """

    name: str
    axes: tuple[Axis, ...]
    dtype: DType = "float"
    fill: Fill = "normal"
    high: int = 0  # exclusive upper bound of integer fills
    optional: bool = False

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["optional"]
        return document

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete shape for the given symbol values."""
        return tuple(axis_size(axis, sizes) for axis in self.axes)


@dataclass(frozen=True)
class Graph:
    name: str
    stage: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "stage": self.stage,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols of the inputs, in order of first use."""
        found = (split_axis(axis)[1] for spec in self.inputs for axis in spec.axes if isinstance(axis, str))
        return tuple(dict.fromkeys(found))

    def input(self, name: str) -> TensorSpec:
        for spec in self.inputs:
            if spec.name == name:
                return spec
        known = ", ".join(spec.name for spec in self.inputs)
        raise InputError(f"graph {self.name!r} has no input {name!r}; its inputs are {known}")


@dataclass(frozen=True)
class StageTable:
    axes: Mapping[str, AxisRange]
    graphs: tuple[Graph, ...]

    def graph(self, name: str) -> Graph:
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise InputError(f"no graph {name!r}; the table has {', '.join(graph.name for graph in self.graphs)}")

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(graph.stage for graph in self.graphs))

    def sizes(self, which: Literal["min", "opt", "max"]) -> dict[str, int]:
        return {symbol: getattr(bounds, which) for symbol, bounds in self.axes.items()}

    def profile(self, graph: Graph) -> dict[str, dict[str, tuple[int, ...]]]:
        """{input: {"min" | "opt" | "max": shape}}: what a TensorRT optimisation profile needs."""
        return {
            spec.name: {which: spec.shape(self.sizes(which)) for which in ("min", "opt", "max")}
            for spec in graph.inputs
        }

    def dims(self, spec: TensorSpec) -> list[int]:
        """Sizes of a tensor's axes as the graphs declare them; -1 for an axis that may change."""
        return [self._dim(axis) for axis in spec.axes]

    def _dim(self, axis: Axis) -> int:
        if isinstance(axis, str) and self.is_dynamic(split_axis(axis)[1]):
            return -1
        return axis_size(axis, self.sizes("opt"))

    def is_dynamic(self, symbol: str) -> bool:
        """A symbol whose range is one number is exported as that number."""
        bounds = self.axes[symbol]
        return bounds.min != bounds.max

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises InputError for the first symbol outside its range."""
        for symbol, size in sizes.items():
            bounds = self.axes.get(symbol)
            if bounds is not None and not bounds.min <= size <= bounds.max:
                raise InputError(
                    f"{AXIS_MEANING.get(symbol, symbol)} ({symbol}) is {size}; "
                    f"the declared range is {bounds.min} to {bounds.max}"
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "axes": {symbol: asdict(bounds) for symbol, bounds in self.axes.items()},
            "graphs": [graph.to_json() for graph in self.graphs],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StageTable:
        """The table that `to_json` wrote. Raises InputError naming the field that no table could have."""
        _check_keys("the table", document, ("axes", "graphs"))
        axes = {
            symbol: _range_from_json(symbol, bounds)
            for symbol, bounds in _expect("axes", document["axes"], dict).items()
        }
        graphs = tuple(_graph_from_json(entry, axes) for entry in _expect("graphs", document["graphs"], list))
        if not graphs:
            raise InputError("graphs is empty; a table has at least one graph")
        _check_unique("graphs", [graph.name for graph in graphs])
        return cls(axes, graphs)


AXIS_MEANING = {
    "B": "batch",
    "I": "number of identities",
    "L": "text tokens",
    "M": "image tokens",
    "N": "tokens given to the text encoder",
    "P": "identity-prompt tokens",
    "R": "rank of adapters",
    "T": "timesteps",
    "f": "token frames",
    "y": "token rows (height / 16)",
    "x": "token columns (width / 16)",
    "h": "latent rows (height / 8)",
    "w": "latent columns (width / 8)",
}


def _expect(where: str, value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {dict: "an object", list: "a list", int: "a whole number", str: "text"}
        raise InputError(f"{where} is {_cut(value)}; it must be {words[kind]}")
    return value


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _check_keys(where: str, value: Any, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    found = _expect(where, value, dict)
    missing = [key for key in needed if key not in found]
    unknown = [key for key in found if key not in needed and key not in optional]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown field {_cut(unknown[0])}"
        raise InputError(f"{where} {what}; its fields are {', '.join((*needed, *optional))}")


def _check_unique(where: str, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{where} name {twice!r} twice; every name must be another")


def _name_from_json(where: str, value: Any) -> str:
    """Names become file names, so they are words."""
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise InputError(f"{where} is {_cut(value)}; a name is 1 to 100 letters, digits and underscores")
    return value


def _range_from_json(symbol: str, document: Any) -> AxisRange:
    where = f"axes[{_cut(symbol)}]"
    if _AXIS.fullmatch(symbol) is None or split_axis(symbol)[1] != symbol:
        raise InputError(f"{where}: a symbol is made of letters, like 'h'")
    _check_keys(where, document, ("min", "opt", "max"))
    sizes = {key: _expect(f"{where}[{key!r}]", value, int) for key, value in document.items()}
    if max(sizes.values()) > _MAX_SIZE:
        raise InputError(f"{where} reaches {_cut(max(sizes.values()))}; a size is at most {_MAX_SIZE}")
    return AxisRange(**sizes)


def _graph_from_json(document: Any, axes: Mapping[str, AxisRange]) -> Graph:
    _check_keys("an entry of graphs", document, ("name", "stage", "inputs", "outputs"))
    name = _name_from_json("the name of a graph", document["name"])
    where = f"graph {name!r}"
    inputs, outputs = (
        tuple(_spec_from_json(where, spec, axes) for spec in _expect(f"{where}: {key}", document[key], list))
        for key in ("inputs", "outputs")
    )
    if not inputs or not outputs:
        raise InputError(f"{where} has no {'outputs' if inputs else 'inputs'}; a graph has at least one")
    _check_unique(f"{where}: inputs and outputs", [spec.name for spec in (*inputs, *outputs)])
    graph = Graph(name, _name_from_json(f"{where}: stage", document["stage"]), inputs, outputs)
    for spec in outputs:
        for axis in spec.axes:
            if isinstance(axis, str) and split_axis(axis)[1] not in graph.symbols:
                raise InputError(f"{where}: output {spec.name!r} has the axis {axis!r}, which no input has")
    return graph


def _spec_from_json(graph: str, document: Any, axes: Mapping[str, AxisRange]) -> TensorSpec:
    _check_keys(f"{graph}: a tensor", document, ("name", "axes"), ("dtype", "fill", "high"))
    name = _name_from_json(f"{graph}: the name of a tensor", document["name"])
    where = f"{graph}: tensor {name!r}"
    for axis in _expect(f"{where}: axes", document["axes"], list):
        _check_axis(where, axis, axes)
    spec = TensorSpec(**{**document, "axes": tuple(document["axes"])})
    for key, value, known in (("dtype", spec.dtype, get_args(DType)), ("fill", spec.fill, get_args(Fill))):
        if value not in known:
            raise InputError(f"{where}: {key} is {_cut(value)}; choose from {', '.join(known)}")
    lowest = 1 if spec.fill in ("tokens", "timesteps") else 0
    if not lowest <= _expect(f"{where}: high", spec.high, int) <= _MAX_SIZE:
        raise InputError(f"{where}: high is {_cut(spec.high)}; it must be {lowest} to {_MAX_SIZE}")
    return spec


def _check_axis(where: str, axis: Any, axes: Mapping[str, AxisRange]) -> None:
    if isinstance(axis, str):
        factor, symbol = split_axis(axis) if len(axis) <= _MAX_AXIS_LENGTH else (0, axis)
        if symbol not in axes:
            raise InputError(f"{where}: axis {_cut(axis)} has no range; the symbols are {', '.join(axes)}")
        if factor * axes[symbol].max > _MAX_SIZE:
            raise InputError(f"{where}: axis {axis!r} reaches above {_MAX_SIZE}, the largest size")
    elif not 1 <= _expect(f"{where}: an axis", axis, int) <= _MAX_SIZE:
        raise InputError(f"{where}: an axis is {_cut(axis)}; a number must be 1 to {_MAX_SIZE}")


def split_axis(axis: str) -> tuple[int, str]:
    """ "8h" -> (8, "h"); "B" -> (1, "B")."""
    match = _AXIS.fullmatch(axis)
    if match is None:
        raise InputError(
            f"axis {axis!r} is not a symbol with an optional whole factor in front, like 'h' or '8h'"
        )
    return int(match[1] or 1), match[2]


def axis_size(axis: Axis, sizes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    factor, symbol = split_axis(axis)
    return factor * sizes[symbol]


def sample_inputs(graph: Graph, sizes: Mapping[str, int], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Deterministic inputs of the right shapes and plausible ranges; float tensors are float32.

    The same (graph, sizes, seed) gives the same numbers on every machine.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    angles: dict[tuple[int, ...], torch.Tensor] = {}  # rotary tables share their angles
    inputs = {}
    for spec in graph.inputs:
        if spec.optional:
            continue
        shape = spec.shape(sizes)
        if spec.fill in ("cos", "sin"):
            if shape not in angles:
                pairs = torch.rand((*shape[:-1], shape[-1] // 2), generator=generator) * 6.283185
                angles[shape] = pairs.repeat_interleave(2, dim=-1)
            inputs[spec.name] = getattr(torch, spec.fill)(angles[shape])
        elif spec.fill in ("tokens", "timesteps"):
            inputs[spec.name] = torch.randint(0, spec.high, shape, generator=generator)
        elif spec.fill == "gate":
            inputs[spec.name] = torch.ones(shape)
        elif spec.fill == "unit":
            inputs[spec.name] = torch.rand(shape, generator=generator) * 2 - 1
        else:
            inputs[spec.name] = torch.randn(shape, generator=generator)
    return inputs
