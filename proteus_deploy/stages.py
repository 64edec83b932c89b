"""Stages and their graphs: the tensor contracts that everything else is derived from.

A *stage* is a named pure function of the pipeline. It is exported as one or more *graphs* (only the
VAE decoder needs several). A graph's inputs and outputs have axes that are numbers, symbols, or a
multiple of a symbol ("2y"); a StageTable gives each symbol its range. Sample inputs, ONNX dynamic
axes, TensorRT profiles, request validation and benchmark shapes all come from this table.

Symbols: B batch (2 under guidance), I identities, N tokens given to the text encoder, L text tokens
given to the denoiser, P identity-prompt tokens, M image tokens, T timesteps, f token frames, y and x
token rows and columns, h and w latent rows and columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import torch

Axis = int | str
DType = Literal["float", "float32", "int64"]
Fill = Literal["normal", "unit", "tokens", "timesteps", "gate", "cos", "sin"]

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
    """One input or output. dtype "float" means the precision that the stage was exported in."""

    name: str
    axes: tuple[Axis, ...]
    dtype: DType = "float"
    fill: Fill = "normal"
    high: int = 0  # exclusive upper bound of integer fills

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete shape for the given symbol values."""
        return tuple(axis_size(axis, sizes) for axis in self.axes)


@dataclass(frozen=True)
class Graph:
    name: str
    stage: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

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
            "graphs": [asdict(graph) for graph in self.graphs],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StageTable:
        return cls(
            axes={symbol: AxisRange(**bounds) for symbol, bounds in document["axes"].items()},
            graphs=tuple(
                Graph(
                    name=graph["name"],
                    stage=graph["stage"],
                    inputs=tuple(_spec_from_json(spec) for spec in graph["inputs"]),
                    outputs=tuple(_spec_from_json(spec) for spec in graph["outputs"]),
                )
                for graph in document["graphs"]
            ),
        )


AXIS_MEANING = {
    "B": "batch",
    "I": "number of identities",
    "L": "text tokens",
    "M": "image tokens",
    "N": "tokens given to the text encoder",
    "P": "identity-prompt tokens",
    "T": "timesteps",
    "f": "token frames",
    "y": "token rows (height / 16)",
    "x": "token columns (width / 16)",
    "h": "latent rows (height / 8)",
    "w": "latent columns (width / 8)",
}


def _spec_from_json(document: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(**{**document, "axes": tuple(document["axes"])})


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
