"""AOTInductor backend: graphs that PyTorch compiled ahead of time, run without compiler or model code.

A package (`.pt2`) is machine code, so opening one is running it: open only bundles that you trust. The hash
of every file is compared with the manifest first, which finds damage but not a forger, who can write both.
Weights lie beside the package as safetensors, are mapped from there, and are never copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy._files import inside
from proteus_deploy.errors import BackendError, BundleError, InputError
from proteus_deploy.runtime.backend import bind_sizes, resolve_dtype
from proteus_deploy.runtime.cpu_instructions import missing_instructions
from proteus_deploy.stages import Graph, StageTable

if TYPE_CHECKING:
    from pathlib import Path

    from proteus_deploy.bundle import Bundle, EngineSet

TARGET = "aotinductor-cpu"
FLAVOUR = "aotinductor"


def torch_version() -> str:
    """Version of PyTorch without what was built into it: "2.13.0+cpu" -> "2.13.0"."""
    return torch.__version__.partition("+")[0]


class AotInductorBackend:
    """The packages that `build --target aotinductor-cpu` made."""

    name = "aotinductor"
    checks_ranges = True

    def __init__(self, bundle: Bundle, *, device: str = "cpu") -> None:
        """Raises BackendError without packages, or with those of another PyTorch or CPU; BundleError for
        damaged ones. Nothing is loaded before all of that was looked at."""
        if str(device) != "cpu":
            raise BackendError(
                f"aotinductor packages run on the CPU, not on {str(device)!r}; use device='cpu'"
            )
        if TARGET not in bundle.targets:
            raise BackendError(
                f"{bundle.folder} has no AOTInductor packages; make them with: "
                f"proteus-deploy build {bundle.folder} --target {TARGET} --checkpoint DIR"
            )
        self.engines = bundle.engines(TARGET)
        _check_fits_here(self.engines)
        self.device = torch.device("cpu")
        self.dtype = resolve_dtype(bundle.dtype)
        self.table = bundle.table
        self._runners: dict[str, AotInductorGraph] = {}

    def runner(self, graph: str) -> AotInductorGraph:
        if graph not in self._runners:
            contract = self.table.graph(graph)
            package = self.engines.file(graph)
            weights = self.engines.graphs[graph].get("weights")
            if not isinstance(weights, str) or weights not in self.engines.document["files"]:
                raise BundleError(
                    f"{self.engines.folder}: graph {graph!r} has no file of weights among 'files'; "
                    "build it again"
                )
            model, constants = load_package(package, inside(self.engines.folder, weights))
            self._runners[graph] = AotInductorGraph(contract, self.table, model, constants, dtype=self.dtype)
        return self._runners[graph]

    def release(self, graph: str) -> None:
        self._runners.pop(graph, None)

    def close(self) -> None:
        self._runners.clear()


def _check_fits_here(engines: EngineSet) -> None:
    document, again = engines.document, "build it again here, or copy packages that were built for it"
    cpu = document.get("cpu")
    if not isinstance(cpu, dict) or not isinstance(cpu.get("needs"), list):
        raise BundleError(f"{engines.folder}: the manifest does not say which CPU it is for; build it again")
    if document.get("version") != torch_version():
        raise BackendError(
            f"{engines.folder} was compiled with PyTorch {document.get('version')}, installed is "
            f"{torch_version()}; build it again or install that version"
        )
    if missing := missing_instructions(cpu["needs"], str(cpu.get("machine"))):
        raise BackendError(
            f"{engines.folder} was compiled for {cpu.get('machine')} with {cpu.get('instruction_set')}; "
            f"this CPU lacks {', '.join(missing)}: {again}"
        )


def load_package(package: Path, weights: Path | None) -> tuple[Any, Mapping[str, Tensor]]:
    """The compiled model and the weights it points into, which must live as long as it does.

    weights: None leaves it without; it can't run then. Raises BackendError with PyTorch's reason.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch._inductor import aoti_load_package

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            model = aoti_load_package(str(package))
        if weights is None:
            return model, {}
        constants = load_file(weights)
        model.load_constants(constants, check_full_update=True, user_managed=True)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise BackendError(f"PyTorch can't load {package}: {error}") from error
    return model, constants


class AotInductorGraph:
    """A loaded package behind the contract of its graph."""

    def __init__(
        self,
        graph: Graph,
        table: StageTable,
        model: Any,
        constants: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
    ) -> None:
        self.graph = graph
        self._table = table
        self._model = model
        self._constants = constants  # the model holds their addresses only
        self._dtypes = {"float": dtype, "float32": torch.float32, "int64": torch.int64}

    @torch.inference_mode()
    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Raises InputError when names, shapes, ranges, dtypes or devices break the contract."""
        self._table.check(bind_sizes(self.graph, inputs))
        outputs = self._model(*(self._checked(name, inputs[name]) for name in self._names))
        values = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return {spec.name: value for spec, value in zip(self.graph.outputs, values, strict=True)}

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.graph.inputs)

    def _checked(self, name: str, value: Tensor) -> Tensor:
        """The input, contiguous. Compiled code gets a bare address and the strides it was traced with."""
        wanted = self._dtypes[self.graph.input(name).dtype]
        if value.dtype != wanted or value.device.type != "cpu":
            raise InputError(
                f"{self.graph.name}: input {name!r} is {value.dtype} on {value.device}; the package takes "
                f"{wanted} on cpu"
            )
        return value.contiguous()
