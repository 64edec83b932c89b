"""PyTorch backends: the eager reference and the compiled one."""

from __future__ import annotations

import re
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from proteus_deploy.errors import BackendError
from proteus_deploy.kernels.joint_attention import check_attention_runs_on
from proteus_deploy.kernels.launch import check_kernels_run_on
from proteus_deploy.model.direct_convolutions import use_direct_convolutions
from proteus_deploy.model.networks import Kernels
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.backend import Quantizer, bind_sizes
from proteus_deploy.runtime.compiled import CompiledNetwork
from proteus_deploy.stage_table import ExportRanges, build_stage_table
from proteus_deploy.stages import Graph, StageTable

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint

_CUDA = re.compile(r"cuda(:\d{1,4})?")

# The reference has no largest batch; the table only needs a range that makes identities batched.
_UNLIMITED_VIDEOS = 64

# A second copy of T5-XXL's weights is as large as the denoiser's, for three short runs in a request.
_NEVER_FROZEN = ("text_encoder",)


class EagerBackend:
    """Networks of a checkpoint in PyTorch. With `compiled`, each goes through torch.compile (inductor).

    A compiled backend compiles each combination of sizes when it first meets it, up to a limit; `seal`
    refuses new ones from then on.
    """

    checks_ranges = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        compiled: bool = False,
        cuda_graphs: bool = False,
        frozen: bool = False,
        folded: bool = False,
        kernels: Kernels = "reference",
        attention: str = "torch",
        table: StageTable | None = None,
        weights_of: EagerBackend | None = None,
        quantize: Quantizer | None = None,
    ) -> None:
        """folded: identity attention in its folded form. kernels: "triton" runs the denoiser on the fused
        kernels, which need a CUDA device (or Triton's interpreter). attention: the denoiser's, by a name of
        `kernels.joint_attention.attention_with`, with any `kernels`. table: the contracts to hold to; None
        makes one for any batch. weights_of: a backend on the same checkpoint, device and dtype whose weights
        are shared: two forms of a network take the memory of one. cuda_graphs: with `compiled` on a CUDA
        device, replay each size's launches as one CUDA graph. frozen: with `compiled` on a CPU, weights
        are laid out for the processor's products when a size is compiled, but for the text encoder's: faster,
        and a copy of these weights for each size. quantize: None, or what puts layers of lower
        precision into the networks.

        Raises BackendError when the device isn't here, or kernels, attention or graphs can't run on it.
        Weights are read on first use of each network."""
        self.name = ("compiled" if compiled else "eager") + ("-triton" if kernels == "triton" else "")
        self.device = resolve_device(device)
        if kernels == "triton":
            check_kernels_run_on(self.device)
        if attention != "torch":
            check_attention_runs_on(attention, self.device, dtype)
            self.name += f"-attention-{attention}"
        self.dtype = dtype
        if table is not None and ("controlnet" in table.stages) != (checkpoint.controlnet is not None):
            raise BackendError(
                f"only one of the checkpoint {checkpoint.folder} and the bundle has a control network; open "
                "the checkpoint with the controlnet that the bundle was exported with, or without one"
            )
        unlimited = ExportRanges(max_videos=_UNLIMITED_VIDEOS)
        self.table = table or build_stage_table(checkpoint, unlimited, optional_adapters=True)
        self._factory = NetworkFactory(checkpoint, folded=folded, kernels=kernels, attention=attention)
        if cuda_graphs and not (compiled and self.device.type == "cuda"):
            raise BackendError(
                f"cuda_graphs replays what was compiled for a CUDA device; here compiled is {compiled} "
                f"and the device {self.device}: leave it out, or pass compiled=True and device='cuda'"
            )
        if frozen and not (compiled and self.device.type == "cpu"):
            raise BackendError(
                f"frozen lays out weights for compiled networks on a CPU; here compiled is {compiled} and "
                f"the device {self.device}: leave it out, or take both (--backend compiled, compiled=True)"
            )
        if frozen and quantize is not None:
            raise BackendError(
                f"frozen would turn the stored codes of {quantize.name!r} back into whole weights; leave one "
                "of the two out"
            )
        if frozen:
            self.name += "-frozen"
        self._compiled, self.cuda_graphs, self.frozen = compiled, cuda_graphs, frozen
        self.sealed = False
        self._weights_of = weights_of
        if weights_of is not None and (weights_of.device, weights_of.dtype) != (self.device, dtype):
            raise BackendError(
                f"weights in {weights_of.dtype} on {weights_of.device} can't be shared by a backend in "
                f"{dtype} on {self.device}; open it without weights_of"
            )
        self._quantize = quantize
        if quantize is not None:
            quantize.check_runs_on(self.device)
            if weights_of is not None:
                raise BackendError(
                    f"layers of {quantize.name!r} have weights of their own; open the backend without "
                    "weights_of"
                )
            self.name += f"-{quantize.name}"
        self._runners: dict[str, EagerGraph] = {}
        self._loading = Lock()  # threads that need a network at the same time read it once

    def runner(self, graph: str) -> EagerGraph:
        with self._loading:
            return self._loaded(graph)

    def _loaded(self, graph: str) -> EagerGraph:
        if graph not in self._runners:
            contract = self.table.graph(graph)
            # First needed within a request, weights would be inference tensors, which nothing can change.
            with torch.inference_mode(False):
                network = self._factory(graph)
                if self._quantize is not None:
                    self._quantize(graph, network, self.dtype, self.device)
                if self._weights_of is None:
                    module = network.materialise(self.dtype, self.device)
                else:
                    module = network.share(self._weights_of.runner(graph).module)
                if not self._compiled:  # inductor chooses for itself
                    use_direct_convolutions(module, self.device, self.dtype)
            runner = EagerGraph(
                contract,
                module,
                compiled=self._compiled,
                cuda_graphs=self.cuda_graphs,
                frozen=self.frozen and graph not in _NEVER_FROZEN,
            )
            if self.sealed:
                runner.seal()
            self._runners[graph] = runner
        return self._runners[graph]

    def seal(self) -> None:
        """Compile nothing more: sizes that were not met yet raise BackendError, so no request waits for a
        compiler. Raises BackendError on a backend that isn't compiled."""
        if not self._compiled:
            raise BackendError(f"seal is for compiled backends; {self.name} runs any size as it comes")
        self.sealed = True
        for runner in self._runners.values():
            runner.seal()

    def release(self, graph: str) -> None:
        self._runners.pop(graph, None)

    def close(self) -> None:
        self._runners.clear()


def default_dtype(device: str | torch.device, *, compiled: bool) -> torch.dtype:
    """Of a pipeline that was given none: bfloat16 where a compiled one runs on a CPU with AMX,
    whose products are many times faster in it, and float32 elsewhere."""
    amx = compiled and str(device) == "cpu" and torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - no public name
    return torch.bfloat16 if amx else torch.float32


def resolve_device(device: str | torch.device) -> torch.device:
    """ "cpu", "cuda" or "cuda:N", as text or torch.device. Raises BackendError for any other, or absent."""
    name: object = str(device) if isinstance(device, torch.device) else device
    if name == "cpu":
        return torch.device(name)
    if not isinstance(name, str) or not _CUDA.fullmatch(name):
        raise BackendError(
            f"device is {device!r}; PyTorch runs here on 'cpu', 'cuda' or 'cuda:N': choose one"
        )
    if not torch.cuda.is_available():
        raise BackendError(
            f"device {name!r} was asked for, but PyTorch sees no CUDA device; use device='cpu'"
        )
    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        raise BackendError(
            f"device {name!r} was asked for; here are 'cuda:0' to 'cuda:{count - 1}': choose one"
        )
    return torch.device(name)


class EagerGraph:
    """One network behind the contract of its graph."""

    def __init__(
        self,
        graph: Graph,
        module: nn.Module,
        *,
        compiled: bool = False,
        cuda_graphs: bool = False,
        frozen: bool = False,
    ) -> None:
        self.graph = graph
        self.module = module
        self._compiled = (
            CompiledNetwork(graph.name, module, cuda_graphs=cuda_graphs, frozen=frozen) if compiled else None
        )

    def seal(self) -> None:
        """Refuse sizes that were not compiled yet; nothing to do for what isn't compiled."""
        if self._compiled is not None:
            self._compiled.seal()

    @torch.inference_mode()
    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """As `run`, without gradients."""
        return self.run(**inputs)

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Raises InputError when names or shapes break the contract, BackendError for sizes that aren't
        compiled and can't be."""
        sizes = bind_sizes(self.graph, inputs, broadcast=True)
        ordered = [inputs.get(spec.name) for spec in self.graph.inputs]  # None: optional, and left out
        outputs = self.module(*ordered) if self._compiled is None else self._compiled(sizes, *ordered)
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: value for spec, value in zip(self.graph.outputs, values, strict=True)}
