"""Other weights for a loaded TensorRT engine: built, not run, for want of a GPU.

An engine that was built with `--refit` takes new values for its weights without being built again. They keep
the names of the ONNX file's initialisers, which are those of the network's parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError

if TYPE_CHECKING:
    from proteus_deploy.runtime.tensorrt_api import TensorRT
    from proteus_deploy.weights import WeightSource

__all__ = ["EngineRefitter"]

_DATA_TYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}
_SHOWN_NAMES = 3


class EngineRefitter:
    """Keeps what one engine's weights are, and changes them."""

    def __init__(
        self, api: TensorRT, engine: Any, graph: str, weights: Callable[[Container[str]], WeightSource]
    ) -> None:
        """engine: an ICudaEngine built with the flag REFIT. weights: gives the source of its own, by names.

        Raises BackendError for an engine that takes no other weights.
        """
        if not engine.refittable:
            raise BackendError(f"{graph}: this engine takes no other weights; build it with --refit")
        self._api, self._graph, self._engine = api, graph, engine
        self._refitter = api.module.Refitter(engine, api.log)
        self._names = set(self._refitter.get_all_weights())
        self._weights = weights(self._names)
        self._changed: set[str] = set()
        self._key: Hashable = ()

    def set(self, key: Hashable, deltas: Callable[[], Mapping[str, Tensor]]) -> float:
        """Make the weights those of the export plus deltas() by name; wall seconds, 0 where they are already.

        key: tells sets of deltas apart; () is that of none. No call of the engine may be running. A delta is
        float32 and is added before the sum is rounded to the weight's precision. Raises BackendError where
        TensorRT refuses; the weights are then unknown, and the next call sets all that were ever changed.
        """
        if key == self._key:
            return 0.0
        started_s = time.perf_counter()
        added = deltas()
        self._check_names(added)
        self._key = None
        self._changed |= added.keys()
        try:
            self._refit({name: added.get(name) for name in sorted(self._changed)})
        except BaseException:
            # What the old one was given lies in memory that is free now.
            self._refitter = self._api.module.Refitter(self._engine, self._api.log)
            raise
        self._key, self._changed = key, set(added)
        return time.perf_counter() - started_s

    def _refit(self, deltas: Mapping[str, Tensor | None]) -> None:
        held = [self._give(name, delta) for name, delta in deltas.items()]
        # Weights that TensorRT keeps in one piece with these must be given again, too.
        missing = self._refitter.get_missing_weights()
        self._check_names(missing)
        held += [self._give(name, None) for name in missing]
        if not self._refitter.refit_cuda_engine():
            raise BackendError(f"{self._graph}: TensorRT refused other weights: {self._api.last_errors()}")
        del held  # only now: TensorRT reads the memory in that call

    def _check_names(self, wanted: Collection[str]) -> None:
        unknown = sorted(set(wanted) - (self._names & set(self._weights.keys())))
        if unknown:
            shown = ", ".join(map(repr, unknown[:_SHOWN_NAMES]))
            raise BackendError(
                f"{self._graph}: {len(unknown)} of {len(wanted)} weights to change aren't both the engine's "
                f"and the export's, such as {shown}: it is of another network or a quantised graph; export a "
                "bundle with --max-lora-rank, whose engines take adapters as inputs"
            )

    def _give(self, name: str, delta: Tensor | None) -> Tensor:
        """Hand a weight to TensorRT; the tensor whose memory it is going to read."""
        own = self._weights.tensor(name)
        value = (own if delta is None else (own.float() + delta).to(own.dtype)).contiguous()
        module = self._api.module
        kind = getattr(module.DataType, _DATA_TYPES[value.dtype])
        weights = module.Weights(kind, value.data_ptr(), value.numel())
        if not self._refitter.set_named_weights(name, weights):
            raise BackendError(f"{self._graph}: TensorRT refused {name}: {self._api.last_errors()}")
        return value
