"""Refit against TensorRT's calls, on an engine made of Python that keeps what it is given."""

from __future__ import annotations

import ctypes
from collections.abc import Container, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.runtime.backend import refits
from proteus_deploy.runtime.tensorrt_backend import TensorRTGraph
from proteus_deploy.runtime.tensorrt_refit import EngineRefitter
from proteus_deploy.stages import Graph, TensorSpec

NUMPY_TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


class FakeWeights:
    """trt.Weights(type, pointer, count)."""

    def __init__(self, kind: str, pointer: int, count: int) -> None:
        self.kind, self.pointer, self.count = kind, pointer, count

    def read(self) -> Tensor:
        dtype = NUMPY_TYPES[self.kind]
        size = self.count * torch.empty((), dtype=dtype).element_size()
        raw = bytearray(ctypes.string_at(self.pointer, size))
        return torch.frombuffer(raw, dtype=dtype)


class FakeRefitter:
    """trt.Refitter: weights are taken on `refit_cuda_engine`, from memory that must live until then."""

    def __init__(self, engine: FakeEngine, log: object) -> None:
        self.engine, self.log = engine, log
        self.given: dict[str, FakeWeights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.weights)

    def get_missing_weights(self) -> list[str]:
        fused = {"k"} if "q" in self.given else set()
        return sorted(fused - self.given.keys())

    def set_named_weights(self, name: str, weights: FakeWeights) -> bool:
        self.given[name] = weights
        return name != self.engine.refuses

    def refit_cuda_engine(self) -> bool:
        if self.engine.refuses == "all" or self.get_missing_weights():
            return False
        self.engine.taken.append(sorted(self.given))
        for name, weights in self.given.items():
            self.engine.weights[name] = weights.read()
        self.given = {}
        return True


class FakeEngine:
    refittable = True
    num_io_tensors = 2
    refuses = ""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = {name: value.flatten().clone() for name, value in weights.items()}
        self.taken: list[list[str]] = []

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def create_execution_context(self) -> object:
        return object()


class Exported:
    """A WeightSource of what was exported."""

    source = "denoiser.onnx"

    def __init__(self, weights: dict[str, Tensor], names: Container[str]) -> None:
        self.weights = {name: value for name, value in weights.items() if name in names}

    def keys(self) -> Iterator[str]:
        return iter(self.weights)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.weights[key].shape)

    def tensor(self, key: str) -> Tensor:
        return self.weights[key].clone()


API: Any = SimpleNamespace(
    module=SimpleNamespace(
        Refitter=FakeRefitter,
        Weights=FakeWeights,
        DataType=SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BF16="BF16"),
    ),
    log=object(),
    last_errors=lambda: "reasons of its own",
)


def _made(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], FakeEngine, EngineRefitter]:
    """Weights q, k and v; q and k are one piece in the engine."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(4, 3, generator=generator).to(dtype) for name in "qkv"}
    engine = FakeEngine(weights)
    return weights, engine, EngineRefitter(API, engine, "denoiser", lambda names: Exported(weights, names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_the_exports_plus_the_delta(dtype: torch.dtype) -> None:
    weights, engine, refitter = _made(dtype)
    delta = torch.full((4, 3), 0.125)
    assert refitter.set("a", lambda: {"q": delta, "v": 2 * delta}) > 0
    for name, factor in (("q", 1), ("k", 0), ("v", 2)):
        expected = (weights[name].float() + factor * delta).to(dtype).flatten()
        assert torch.equal(engine.weights[name], expected)
    assert engine.taken == [["k", "q", "v"]], "k stands with q in one piece"


def test_only_what_differs_is_done() -> None:
    weights, engine, refitter = _made()
    delta = torch.ones(4, 3)

    def untouched() -> dict[str, Tensor]:
        raise AssertionError("these weights are set already")

    assert refitter.set((), untouched) == 0
    refitter.set("a", lambda: {"v": delta})
    assert refitter.set("a", untouched) == 0
    refitter.set("b", lambda: {"q": delta})
    assert torch.equal(engine.weights["v"], weights["v"].flatten()), "of the one before nothing is left"
    refitter.set((), dict)
    assert all(torch.equal(engine.weights[name], value.flatten()) for name, value in weights.items())
    assert engine.taken == [["v"], ["k", "q", "v"], ["k", "q"]]


def test_after_a_refusal_everything_is_set_again() -> None:
    weights, engine, refitter = _made()
    refitter.set("a", lambda: {"v": torch.ones(4, 3)})
    engine.refuses = "all"
    with pytest.raises(BackendError, match="TensorRT refused other weights: reasons of its own"):
        refitter.set("b", lambda: {"q": torch.ones(4, 3)})
    engine.refuses = ""
    refitter.set((), dict)
    assert engine.taken[-1] == ["k", "q", "v"]
    assert all(torch.equal(engine.weights[name], value.flatten()) for name, value in weights.items())
    engine.refuses = "q"
    with pytest.raises(BackendError, match="TensorRT refused q: reasons of its own"):
        refitter.set("b", lambda: {"q": torch.ones(4, 3)})


def test_what_can_not_be_changed() -> None:
    weights, engine, refitter = _made()
    with pytest.raises(BackendError, match=r"1 of 2 weights .* such as 'codes'.*--max-lora-rank"):
        refitter.set("a", lambda: {"q": torch.ones(4, 3), "codes": torch.ones(4, 3)})
    assert engine.taken == []
    engine.refittable = False
    with pytest.raises(BackendError, match="takes no other weights; build it with --refit"):
        EngineRefitter(API, engine, "denoiser", lambda names: Exported(weights, names))


def test_a_loaded_engine() -> None:
    weights, engine, _ = _made()
    graph = Graph("denoiser", "denoiser", (TensorSpec("x", (1,)),), (TensorSpec("y", (1,)),))
    tensors = {"inputs": [{"name": "x", "dtype": "fp32"}], "outputs": [{"name": "y", "dtype": "fp32"}]}
    contract = {**tensors, "profile": {}}
    loaded = TensorRTGraph(graph, engine, contract, device="cpu", api=API)
    loaded.refit("a", lambda: {"v": torch.ones(4, 3)}, lambda names: Exported(weights, names))
    assert torch.equal(engine.weights["v"], (weights["v"] + 1).flatten())
    loaded.close()
    with pytest.raises(BackendError, match="the engine was closed"):
        loaded.refit("b", dict, lambda names: Exported(weights, names))


def test_other_backends_do_not() -> None:
    assert not refits(object())
    assert refits(SimpleNamespace(refits=True))
