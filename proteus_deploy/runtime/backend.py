"""What a backend is: something that turns a graph of the stage table into a callable."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeGuard

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.stages import Graph, StageTable, TensorSpec, split_axis

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from proteus_deploy.bundle import Bundle
    from proteus_deploy.model.networks import Network


class Runner(Protocol):
    """One graph, ready to run. Named tensors in, named tensors out, on the backend's device."""

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]: ...


class Backend(Protocol):
    """Opens graphs on first use and keeps them until `release` or `close`."""

    name: str
    table: StageTable
    dtype: torch.dtype  # of "float" inputs and outputs
    device: torch.device
    checks_ranges: bool  # whether sizes outside the table's ranges can't run

    def runner(self, graph: str) -> Runner: ...

    def release(self, graph: str) -> None:
        """Give the memory of one graph back; the next `runner` loads it again."""

    def close(self) -> None: ...


class RefitBackend(Backend, Protocol):
    """A backend whose engines can be given other weights, in place of inputs for adapters."""

    refits: bool

    def refit(self, graph: str, key: Hashable, deltas: Callable[[], Mapping[str, Tensor]]) -> float:
        """Make a graph's weights those of the export plus float32 deltas() by name; the wall seconds it took.

        key: tells sets of deltas apart, () being none; with the one that is set nothing is done.
        """


def refits(backend: object) -> TypeGuard[RefitBackend]:
    """Whether adapters reach the denoiser of this backend as other weights."""
    return bool(getattr(backend, "refits", False))


class Quantizer(Protocol):
    """Puts layers of lower precision into a network; `export.torch_quantizer` has the one that reads recipes.

    name: for the backend's. hash: of all that decides the results, for caches.
    """

    name: str

    @property
    def hash(self) -> str: ...

    def check_runs_on(self, device: torch.device) -> None:
        """Raises BackendError where the device can't compute what was asked for."""

    def __call__(self, graph: str, network: Network, dtype: torch.dtype, device: torch.device) -> None:
        """Change the module of `network` in place, before its weights are read."""


def refuse_custom_operators(bundle: Bundle, runtime: str) -> None:
    """Raises BackendError where a graph has operators that are not ONNX's own, which `runtime` can't run."""
    records = bundle.manifest["graphs"].items()
    found = [
        f"{name} ({', '.join(record['custom_operators'])})"
        for name, record in sorted(records)
        if record.get("custom_operators")
    ]
    if found:
        raise BackendError(
            f"{runtime} has no kernels for the custom operators of {', '.join(found)}: this bundle was "
            "exported with --identity-plugin, for TensorRT. Build it and run it with the backend tensorrt, "
            "or export again without that flag"
        )


# Inputs of which one row may stand for every row of the batch.
ONE_FOR_ALL = ("face_tokens", "adapter_down", "adapter_up", "adapter_scale")


def bind_sizes(graph: Graph, inputs: Mapping[str, Tensor], *, broadcast: bool = False) -> dict[str, int]:
    """Check names, ranks and shapes of `inputs` against the contract; return the symbols' values.

    `broadcast` lets one identity, and its adapters, stand for the whole batch, as PyTorch can.
    Raises InputError naming the input, its shape and the contract's axes.
    """
    expected = {spec.name for spec in graph.inputs}
    if missing := {spec.name for spec in graph.inputs if not spec.optional} - set(inputs):
        raise InputError(f"{graph.name}: input {_names(missing)} is missing; inputs are {_contract(graph)}")
    if extra := set(inputs) - expected:
        raise InputError(f"{graph.name}: {_names(extra)} is not an input; inputs are {_contract(graph)}")
    sizes: dict[str, int] = {}
    for spec in graph.inputs:
        if spec.optional and spec.name not in inputs:
            continue
        shape = tuple(inputs[spec.name].shape)
        if broadcast and spec.name in ONE_FOR_ALL and spec.axes[0] == "B" and shape[:1] == (1,):
            shape = (sizes.get("B", 1), *shape[1:])
        _bind_one(graph, spec, shape, sizes)
    return sizes


def _bind_one(graph: Graph, spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    mismatch = f"{graph.name}: input {spec.name!r} has shape {list(shape)}; the contract is {list(spec.axes)}"
    if len(shape) != len(spec.axes):
        raise InputError(mismatch)
    for size, axis in zip(shape, spec.axes, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise InputError(mismatch)
            continue
        factor, symbol = split_axis(axis)
        if size % factor or sizes.setdefault(symbol, size // factor) != size // factor:
            known = {symbol: value for symbol, value in sizes.items() if value}
            raise InputError(f"{mismatch}, with {known} from the inputs before it")


def _names(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _contract(graph: Graph) -> str:
    return ", ".join(f"{spec.name} {list(spec.axes)}" for spec in graph.inputs)


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """ "fp32", "float32", "fp16", "float16", "bf16" or "bfloat16" -> torch.dtype, which may be given itself.

    Raises InputError for any other.
    """
    import torch

    known = {
        "fp32": torch.float32,
        "float32": torch.float32,
        "fp16": torch.float16,
        "float16": torch.float16,
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
    }
    if isinstance(name, torch.dtype) and name in known.values():
        return name
    if not isinstance(name, str) or name not in known:
        raise InputError(f"dtype {name!r} is unknown; choose from {', '.join(known)}")
    return known[name]


def short_dtype(dtype: torch.dtype) -> str:
    """torch.float32 -> "fp32", torch.float16 -> "fp16", torch.bfloat16 -> "bf16"."""
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(dtype).removeprefix("torch.")]
