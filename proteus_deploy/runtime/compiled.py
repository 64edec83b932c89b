"""torch.compile for one network: fixed sizes, a limit on how many, and never a silent step back to eager.

Each combination of sizes is compiled by itself, since kernels for known sizes are faster and dynamic ones
were not always found to compile. PyTorch would run what passes its own limit of recompilations uncompiled
without a word; here that is an error, and `seal` makes one of every size that was not met before.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn

from proteus_deploy.errors import BackendError

__all__ = ["MAX_SIZES", "CompiledNetwork"]

MAX_SIZES = 16  # of one network: more are a sign that requests weren't sorted into buckets


class CompiledNetwork:
    """A network behind torch.compile, callable with its positional inputs.

    cuda_graphs: record each size's launches as a CUDA graph and replay it; needs a CUDA device.
    frozen: let the compiler keep the weights as constants, in the order that its products want: a copy for
    each size, which later changes of the weights don't reach, and which the compiler keeps until the process
    ends. Only without gradients.
    """

    def __init__(
        self, name: str, module: nn.Module, *, cuda_graphs: bool = False, frozen: bool = False
    ) -> None:
        self._name = name
        self._frozen = frozen
        self._cuda_graphs = cuda_graphs
        self._sealed = False
        self._sizes: set[tuple[tuple[int, ...] | None, ...]] = set()
        mode = "reduce-overhead" if cuda_graphs else None
        # As an option, too: a network of the same class that isn't frozen has other code then.
        options: dict[str, Any] | None = {"freezing": True} if frozen else None
        self._call = torch.compile(module, fullgraph=True, dynamic=False, mode=mode, options=options)

    def seal(self) -> None:
        """From now on, sizes that this network was not compiled for are refused."""
        self._sealed = True

    def __call__(self, sizes: Mapping[str, int], *inputs: Tensor | None) -> Any:
        """sizes: the contract's symbols, for errors. None stands for an optional input that was left out.

        Raises BackendError where these sizes can't be compiled.
        """
        if self._frozen and torch.is_grad_enabled():  # inductor would leave the weights as they are, silently
            raise BackendError(
                f"{self._name} is frozen, and gradients are on; call it under torch.no_grad(), or open the "
                "backend without frozen"
            )
        key = tuple(None if tensor is None else tuple(tensor.shape) for tensor in inputs)
        if key not in self._sizes:
            self._check_room(sizes)
        # In a context of its own: each patch of a configuration leaves a variable behind in the caller's.
        outputs = copy_context().run(self._run, inputs)
        self._sizes.add(key)
        return _copied(outputs) if self._cuda_graphs else outputs

    def _run(self, inputs: tuple[Tensor | None, ...]) -> Any:
        # A limit of PyTorch's own counts the networks of a whole process; ours counts those of this one.
        limit = torch._dynamo.config.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True)  # noqa: SLF001
        # Both halves of the compiler read it while they meet a size; given as an option, one would not.
        freezing = torch._inductor.config.patch(freezing=self._frozen)  # noqa: SLF001
        with limit, freezing:
            if self._cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            return self._call(*inputs)

    def _check_room(self, sizes: Mapping[str, int]) -> None:
        wanted = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
        if self._sealed:
            raise BackendError(
                f"{self._name} is sealed at the {len(self._sizes)} sizes that it was warmed up with, and "
                f"{wanted} is not one of them; warm up with it before sealing, or ask for another size"
            )
        if len(self._sizes) >= MAX_SIZES:
            raise BackendError(
                f"{self._name} was compiled for {MAX_SIZES} sizes already, and {wanted} would be one more; "
                "sort requests into fewer sizes, or use the backend 'eager', which takes any"
            )


def _copied(outputs: Any) -> Any:
    """A replayed graph writes its outputs to the same memory every time; policies keep older ones."""
    if isinstance(outputs, tuple):
        return tuple(output.clone() for output in outputs)
    return outputs.clone()
