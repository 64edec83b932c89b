"""One denoiser on several devices: each process computes its share of the tokens (Ulysses).

model/sharded_sequence.py has the arithmetic; here it is put into a pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.model.sharded_sequence import SequenceParallelDenoiser
from proteus_deploy.process_groups import check_process_group, check_same
from proteus_deploy.runtime.eager import EagerBackend, EagerGraph
from proteus_deploy.stage_calls import DenoiserStage

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from proteus_deploy.model.config import TransformerConfig
    from proteus_deploy.pipeline import Pipeline

__all__ = ["use_sequence_parallel"]


def use_sequence_parallel(pipeline: Pipeline, group: ProcessGroup | None = None) -> None:
    """Share the denoiser's tokens among the processes of `group` (None: all that were started together).

    Every process opens the same pipeline, on its own device, and makes the same requests, one at a time: all
    of them get the same video. A seed has to be given, and who cancels has to cancel in all of them. Together
    with `use_guidance_parallel`, this comes first.
    A step raises InputError where the processes' inputs differ.
    Raises BackendError when torch.distributed was not initialised, the backend isn't PyTorch, the denoiser
    is shared already, or the number of processes doesn't divide its heads.
    """
    check_process_group(group, "the sequence")
    backend = pipeline.backend
    if not isinstance(backend, EagerBackend):
        raise BackendError(
            f"backend {backend.name!r} can't share a sequence: its denoiser is one closed graph; open the "
            "checkpoint with Pipeline.from_checkpoint, or share the rows with use_guidance_parallel"
        )
    if backend.cuda_graphs:
        raise BackendError(
            "a CUDA graph can't span the exchanges of a shared sequence; open the pipeline without "
            "cuda_graphs"
        )
    stage: Any = pipeline.stages["denoiser"]
    if getattr(stage, "backend", None) is not backend:
        raise BackendError(
            "the pipeline's denoiser was replaced already; call use_sequence_parallel once, on a freshly "
            "opened pipeline, and use_guidance_parallel after it"
        )
    if "controlnet" in pipeline.stages:
        raise BackendError(
            "a pipeline with a control network can't share its sequence; open it without controlnet, or "
            "share the rows with use_guidance_parallel"
        )
    heads = pipeline.config.backbone.num_attention_heads
    processes = torch.distributed.get_world_size(group)
    if heads % processes:
        possible = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise BackendError(
            f"the denoiser has {heads} attention heads, which {processes} processes can't share evenly; "
            f"start {possible} of them"
        )
    shared = _SharedBackend(backend, pipeline.config, group)
    pipeline.stages["denoiser"] = DenoiserStage(shared, pipeline.config)


class _SharedBackend:
    """A backend whose denoiser is computed by all processes of a group together."""

    def __init__(self, backend: EagerBackend, config: TransformerConfig, group: ProcessGroup | None) -> None:
        self.name = backend.name
        self.table = backend.table
        self.dtype = backend.dtype
        self.device = backend.device
        self.checks_ranges = backend.checks_ranges
        self._backend = backend
        self._config = config
        self._group = group
        # Keyed by the whole denoiser, so that its weights are freed when the pipeline's backend releases it.
        self._shared: WeakKeyDictionary[EagerGraph, _SharedGraph] = WeakKeyDictionary()

    def runner(self, graph: str) -> _SharedGraph:
        whole = self._backend.runner(graph)
        if whole not in self._shared:
            module: Any = whole.module
            with torch.inference_mode(False):
                shared = SequenceParallelDenoiser(self._config, module, self._group)
            compiled = self.name.startswith("compiled")
            frozen = self._backend.frozen
            self._shared[whole] = _SharedGraph(whole.graph, shared, compiled=compiled, frozen=frozen)
        if self._backend.sealed:
            self._shared[whole].seal()
        return self._shared[whole]

    def release(self, graph: str) -> None:
        self._backend.release(graph)

    def close(self) -> None:
        self._backend.close()


class _SharedGraph(EagerGraph):
    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Raises InputError when the processes' inputs differ, or break the contract."""
        check_same(inputs, self.module.shares.group)  # type: ignore[union-attr, arg-type]
        return super().__call__(**inputs)
