"""The TensorRT backend's refusals, and its binding logic on an engine made of Python."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy.bundle import Bundle, EngineSet
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.runtime import open_bundle_backend, tensorrt_backend
from proteus_deploy.runtime.tensorrt_backend import TensorRTBackend, TensorRTGraph, set_weight_budget
from proteus_deploy.stages import AxisRange, Graph, StageTable, TensorSpec

GRAPH = Graph(
    "doubler",
    "doubler",
    (TensorSpec("x", ("B", 3)), TensorSpec("offset", ("B",), "int64")),
    (TensorSpec("y", ("B", 3)),),
)
CONTRACT = {
    "inputs": [
        {"name": "x", "dtype": "fp32", "shape": [-1, 3]},
        {"name": "offset", "dtype": "int64", "shape": [-1]},
    ],
    "outputs": [{"name": "y", "dtype": "fp32", "shape": [-1, 3]}],
    "profile": {
        "x": {"min": [1, 3], "opt": [2, 3], "max": [4, 3]},
        "offset": {"min": [1], "opt": [2], "max": [4]},
    },
}


class FakeRuntimeCache:
    content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = content
        return True

    def serialize(self) -> bytes:
        return self.content + b"+kernel"


class FakeConfig:
    cache: FakeRuntimeCache | None = None

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> None:
        self.cache = cache


class FakeContext:
    """Computes y = 2·x + offset through the addresses it was given, as an engine would."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.refuse = ""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.refuse != f"shape {name}"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.refuse != f"address {name}"

    def infer_shapes(self) -> list[str]:
        return [name for name in ("x", "offset") if name not in self.shapes or self.refuse == f"infer {name}"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 1234
        rows = self.shapes["x"][0]
        x = (ctypes.c_float * (3 * rows)).from_address(self.addresses["x"])
        offset = (ctypes.c_int64 * rows).from_address(self.addresses["offset"])
        y = (ctypes.c_float * (3 * rows)).from_address(self.addresses["y"])
        for index in range(3 * rows):
            y[index] = 2 * x[index] + offset[index // 3]
        return self.refuse != "execute"


class FakeEngine:
    def __init__(self, names: tuple[str, ...] = ("x", "offset", "y")) -> None:
        self.names = names
        self.num_io_tensors = len(names)
        self.context: FakeContext | None = FakeContext()
        self.config = FakeConfig()

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_runtime_config(self) -> FakeConfig:
        return self.config

    def create_execution_context(self, config: FakeConfig | None = None) -> FakeContext | None:
        return self.context


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(TensorRTGraph, "_stream", lambda self: 1234)
    return FakeEngine()


def _graph(engine: FakeEngine, **options: Any) -> TensorRTGraph:
    return TensorRTGraph(GRAPH, engine, CONTRACT, device="cpu", **options)


def _inputs(rows: int = 2) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(3.0 * rows).reshape(rows, 3), "offset": torch.arange(rows) * 10}


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_tensors_are_bound_by_name(engine: FakeEngine, rows: int) -> None:
    inputs = _inputs(rows)
    outputs = _graph(engine)(**inputs)
    assert outputs.keys() == {"y"}
    assert torch.equal(outputs["y"], 2 * inputs["x"] + inputs["offset"][:, None])


def test_inputs_that_are_not_contiguous(engine: FakeEngine) -> None:
    x = torch.arange(6.0).reshape(3, 2).T
    assert not x.is_contiguous()
    outputs = _graph(engine)(x=x, offset=torch.tensor([1, 2, 3, 4])[::2])
    assert torch.equal(outputs["y"], 2 * x + torch.tensor([[1.0], [3.0]]))


def test_calls_do_not_share_outputs(engine: FakeEngine) -> None:
    graph = _graph(engine)
    first, second = graph(**_inputs())["y"], graph(**_inputs(4))["y"]
    assert first.shape == (2, 3)
    assert second.shape == (4, 3)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.zeros(5, 3), "offset": torch.zeros(5, dtype=torch.int64)},
            r"shape \[5, 3\].* \[1, 3\] to \[4, 3\]",
        ),
        ({"x": torch.zeros(2, 4)}, r"input 'x' has shape \[2, 4\]"),
        ({"offset": torch.zeros(3, dtype=torch.int64)}, "input 'offset' has shape"),
        ({"x": torch.zeros(2, 3, dtype=torch.float16)}, r"input 'x' is torch.float16 .* torch.float32"),
        ({"x": torch.zeros(2, 3, device="meta")}, r"input 'x' is torch.float32 on meta"),
        ({"z": torch.zeros(1)}, "'z' is not an input"),
    ],
)
def test_input_that_does_not_fit_is_named(engine: FakeEngine, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _graph(engine)(**{**_inputs(), **changes})


def test_missing_input_is_named(engine: FakeEngine) -> None:
    with pytest.raises(InputError, match="input 'offset' is missing"):
        _graph(engine)(x=torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ("shape x", r"shape \[2, 3\] of 'x' is refused"),
        ("address offset", "address of 'offset' is refused"),
        ("address y", "address of 'y' is refused"),
        ("infer offset", "shapes depend on offset"),
        ("execute", "doubler: the engine failed on cpu"),
    ],
)
def test_what_the_engine_refuses_is_an_error(engine: FakeEngine, refuse: str, message: str) -> None:
    assert engine.context is not None
    engine.context.refuse = refuse
    with pytest.raises(BackendError, match=message):
        _graph(engine)(**_inputs())


def test_engine_of_another_graph_is_refused() -> None:
    with pytest.raises(
        BackendError, match="doubler: the engine has the tensors latents, y, its record offset, x, y"
    ):
        _graph(FakeEngine(("latents", "y")))


def test_engine_without_a_context_is_refused(engine: FakeEngine) -> None:
    engine.context = None
    with pytest.raises(BackendError, match="no execution context; the GPU's memory"):
        _graph(engine)


def test_closed_graph_is_refused(engine: FakeEngine) -> None:
    graph = _graph(engine)
    graph.close()
    graph.close()
    with pytest.raises(BackendError, match="doubler: the engine was closed"):
        graph(**_inputs())


def test_runtime_cache_is_kept_between_loads(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "caches/doubler.cache"
    for expected in (b"+kernel", b"+kernel+kernel"):
        graph = _graph(engine, runtime_cache=file)
        graph(**_inputs())
        graph.close()
        assert file.read_bytes() == expected
    assert engine.config.cache is not None


class StreamingEngine(FakeEngine):
    """What weight streaming needs of an ICudaEngine; `most` is what it lets the budget be."""

    streamable_weights_size = 1000
    most = 1000

    def __init__(self) -> None:
        super().__init__()
        self._budget = -1

    def get_weight_streaming_automatic_budget(self) -> int:
        return 700

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        self._budget = min(value, self.most)


@pytest.mark.parametrize(("asked", "expected"), [(None, 700), (0, 0), (400, 400), (5000, 1000)])
def test_weights_kept_on_the_gpu(asked: int | None, expected: int) -> None:
    engine = StreamingEngine()
    set_weight_budget(engine, "doubler", asked, streams=True)
    assert engine.weight_streaming_budget_v2 == expected


def test_weight_budget_that_cannot_be_followed() -> None:
    engine = StreamingEngine()
    set_weight_budget(engine, "doubler", None, streams=False)
    assert engine.weight_streaming_budget_v2 == -1, "an engine that doesn't stream is left alone"
    with pytest.raises(InputError, match="budget of 10 bytes is for engines built with --weight-streaming"):
        set_weight_budget(engine, "doubler", 10, streams=False)
    with pytest.raises(InputError, match="budget of -1 bytes is below 0"):
        set_weight_budget(engine, "doubler", -1, streams=True)
    engine.most = 100
    with pytest.raises(BackendError, match="TensorRT refused a weight budget of 400 of 1000 bytes"):
        set_weight_budget(engine, "doubler", 400, streams=True)


def _bundle(folder: Path) -> Bundle:
    (folder / "engines/sm89").mkdir(parents=True)
    (folder / "engines/sm89/manifest.json").write_text("{}")
    table = StageTable({"B": AxisRange(1, 2, 4)}, (GRAPH,))
    return Bundle(folder, {"dtype": "fp32"}, table)


def _engines(folder: Path, **changes: Any) -> EngineSet:
    document = {"target": "sm89", "flavour": "tensorrt_rtx", "version": "1.0", **changes}
    return EngineSet("sm89", folder, document)


def test_no_gpu_says_that_engines_are_built_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_backend, "current_gpu", lambda index=0: None)
    message = "engines for sm89 are built, not run: no CUDA device here"
    with pytest.raises(BackendError, match=message):
        TensorRTGraph.open(_engines(tmp_path), GRAPH)
    with pytest.raises(BackendError, match=message):
        open_bundle_backend(_bundle(tmp_path), "tensorrt")
    with pytest.raises(BackendError, match="run on a CUDA device, not on 'cpu'"):
        TensorRTBackend(_bundle(tmp_path / "other"), device="cpu")


def test_other_gpu_and_other_version_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    monkeypatch.setattr(tensorrt_backend, "current_gpu", lambda index=0: "sm120")
    with pytest.raises(
        BackendError, match="engines for sm89 don't run on this sm120; build with --target sm120"
    ):
        TensorRTGraph.open(_engines(tmp_path), GRAPH)
    monkeypatch.setattr(tensorrt_backend, "current_gpu", lambda index=0: "sm89")
    with pytest.raises(BackendError, match=r"built with tensorrt_rtx 1\.0, installed is .*; build it again"):
        TensorRTGraph.open(_engines(tmp_path), GRAPH)


def test_backend_opens_graphs_once_and_releases_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine
) -> None:
    opened: list[str] = []

    def open_graph(engines: EngineSet, graph: Graph, **options: Any) -> TensorRTGraph:
        opened.append(graph.name)
        return _graph(engine)

    monkeypatch.setattr(tensorrt_backend, "current_gpu", lambda index=0: "sm89")
    monkeypatch.setattr(TensorRTGraph, "open", open_graph)
    monkeypatch.setattr(Bundle, "engines", lambda self, target: _engines(tmp_path))
    backend = TensorRTBackend(_bundle(tmp_path))
    assert (backend.name, backend.dtype, backend.checks_ranges) == ("tensorrt", torch.float32, True)
    runner = backend.runner("doubler")
    assert backend.runner("doubler") is runner
    backend.release("doubler")
    with pytest.raises(BackendError, match="closed"):
        runner(**_inputs())
    backend.runner("doubler")
    backend.close()
    assert opened == ["doubler", "doubler"]
