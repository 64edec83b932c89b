"""Engines from hand-made graphs: contract, refusals, memory, cache. Real builds, for absent GPUs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proteus_deploy.bundle import Bundle
from proteus_deploy.errors import BackendError, BundleError, InputError
from proteus_deploy.export import host_memory, tensorrt_engine
from proteus_deploy.export.engine_cache import EngineCache, default_folder
from proteus_deploy.export.tensorrt_engine import build_engine
from proteus_deploy.runtime import tensorrt_api
from proteus_deploy.runtime.tensorrt_api import EngineOptions, TensorRT, current_gpu
from proteus_deploy.stages import Graph, StageTable

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    # Ahead of time is what these tests are about, on a machine with a GPU too.
    monkeypatch.setattr(tensorrt_api, "current_gpu", lambda index=0: None)
    monkeypatch.setattr(tensorrt_engine, "current_gpu", lambda index=0: None)
    return TensorRT.load("tensorrt_rtx")


@pytest.fixture
def build(bundle: Bundle, api: TensorRT, tmp_path: Path) -> Build:
    def build(name: str, target: str = "sm89", of: Bundle = bundle, **options: Any) -> dict[str, Any]:
        onnx_file = options.pop("onnx_file", of.onnx_file(name))
        destination = tmp_path / "engines" / f"{name}.engine"
        graph = of.table.graph(name)
        kept = {"api": api, "destination": destination, "dtype": of.dtype, **options}
        return build_engine(onnx_file, graph, of.table, target, **kept)

    return build


def _save(model: Any, file: Path) -> Path:
    import onnx

    onnx.save(model, str(file))
    return file


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("target", ["sm80", "sm89", "sm120"])
def test_contract_is_that_of_the_network(
    build: Build, new_bundle: Callable[..., Bundle], dtype: str, target: str, tmp_path: Path
) -> None:
    record = build("first", target, new_bundle("other", dtype))
    contract = record["contract"]
    assert contract["inputs"] == [
        {"name": "x", "dtype": dtype, "shape": [-1, 16]},
        {"name": "timestep", "dtype": "int64", "shape": [-1]},
    ]
    assert contract["outputs"] == [{"name": "y", "dtype": dtype, "shape": [-1, 16]}]
    assert contract["profile"]["x"] == {"min": [1, 16], "opt": [2, 16], "max": [4, 16]}
    assert contract["layers"]["matrix_multiply"] == 1
    assert contract["precisions"].keys() == {dtype}
    assert record["status"] == "built, not run"
    assert record["file"] == "first.engine"
    assert not record["cached"]
    assert record["bytes"] == (tmp_path / "engines/first.engine").stat().st_size > 1000
    assert record["memory"]["predicted_bytes"] > 0
    assert json.loads(json.dumps(record)) == record


def test_symbol_of_one_size_is_static_and_multiples_are_dynamic(build: Build) -> None:
    contract = build("second_start")["contract"]
    assert contract["inputs"][0] == {"name": "a", "dtype": "fp32", "shape": [3, -1]}
    assert contract["inputs"][1] == {"name": "gate", "dtype": "fp32", "shape": [1]}
    assert contract["profile"]["a"] == {"min": [3, 4], "opt": [3, 16], "max": [3, 128]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": ("float", (2, 16))},
            r"graph 'first', input 'x': .* shape \[2, 16\], .*\['B', 16\].*\[-1, 16\]",
        ),
        ({"timestep": ("float32", ("B",))}, "input 'timestep': the ONNX file has dtype fp32, .* int64"),
    ],
)
def test_mismatch_is_named(
    build: Build, bundle: Bundle, new_model: Any, tmp_path: Path, changes: Any, message: str
) -> None:
    model = new_model(bundle.table.graph("first"), "fp32", **changes)
    with pytest.raises(BundleError, match=message):
        build("first", onnx_file=_save(model, tmp_path / "wrong.onnx"))
    assert not list((tmp_path / "engines").glob("*"))


def test_dtype_of_another_export_is_named(build: Build) -> None:
    with pytest.raises(BundleError, match="input 'x': the ONNX file has dtype fp32, the stage table fp16"):
        build("first", dtype="fp16")


def test_missing_and_undeclared_inputs_are_named(
    build: Build, bundle: Bundle, new_model: Any, tmp_path: Path
) -> None:
    model = new_model(bundle.table.graph("first"), "fp32")
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    with pytest.raises(BundleError, match="lacks input 'x'"):
        build("first", onnx_file=_save(model, tmp_path / "wrong.onnx"))
    with pytest.raises(BundleError, match="graph 'second_start': the ONNX file lacks input 'a'"):
        build("second_start", onnx_file=bundle.onnx_file("first"))


def test_node_that_cannot_be_parsed_is_named(
    build: Build, bundle: Bundle, new_model: Any, tmp_path: Path
) -> None:
    model = new_model(bundle.table.graph("second_start"), "fp32")
    model.graph.node[1].op_type = "SequenceAt"
    with pytest.raises(BundleError, match=r"can't parse .*node 'node_gate' \(SequenceAt\)"):
        build("second_start", onnx_file=_save(model, tmp_path / "wrong.onnx"))


def test_failed_build_tells_what_tensorrt_said(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "_add_profile", lambda *_: None)
    with pytest.raises(
        BackendError, match=r"graph 'first' for sm89: .*no optimization profile has been defined"
    ):
        build("first")


def test_full_disk_is_an_error(api: TensorRT, bundle: Bundle) -> None:
    builder, network = api.new_network()
    parser = api.parse(network, bundle.onnx_file("second_next"))
    config = api.new_config(builder, "sm89", EngineOptions())
    table, graph = bundle.table, bundle.table.graph("second_next")
    tensorrt_engine._add_profile(builder, config, network, graph, table)
    with pytest.raises(OSError, match="No space left"):
        api.write_engine(builder, network, config, Path("/dev/full"))
    del parser


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a model \xff\xff", "is not an ONNX model"), (None, "is missing")],
)
def test_file_that_is_no_graph_is_named(
    build: Build, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "bad.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BundleError, match=rf"bad\.onnx {message}"):
        build("first", onnx_file=file)


def test_weights_outside_the_folder_are_refused(build: Build, bundle: Bundle, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(bundle.onnx_file("first")), load_external_data=False)
    (entry,) = [e for e in model.graph.initializer[0].external_data if e.key == "location"]
    entry.value = "../../secret"
    with pytest.raises(BundleError, match=r"'../../secret', which is outside its folder"):
        build("first", onnx_file=_save(model, tmp_path / "wrong.onnx"))
    entry.value = "absent.data"
    with pytest.raises(BundleError, match=r"'absent.data', which is missing"):
        build("first", onnx_file=_save(model, tmp_path / "wrong.onnx"))


@pytest.mark.parametrize("target", ["sm90", "sm100"])
def test_data_centre_target_tells_the_way_out(build: Build, target: str) -> None:
    with pytest.raises(InputError, match=f"no ahead-of-time target '{target}'.* sm89.*--flavour tensorrt"):
        build("first", target)


@pytest.mark.parametrize("target", ["", "SM89", "89", "rtx4090", "../sm89", "sm"])
def test_unknown_target_lists_the_known_ones(build: Build, target: str) -> None:
    with pytest.raises(InputError, match=r"no target .* one of sm75, sm80, sm86, sm89, sm120, sm121"):
        build("first", target)


def test_current_needs_a_gpu(api: TensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"'current' needs a CUDA device .* sm75"):
        api.resolve_target("current")
    monkeypatch.setattr(tensorrt_api, "current_gpu", lambda index=0: "sm89")
    assert api.resolve_target("current") == "sm89"


def test_bf16_needs_ampere(build: Build, new_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(InputError, match=r"bf16, which sm75 doesn't have .*--dtype fp16"):
        build("first", "sm75", new_bundle("other", "bf16"))
    assert build("first", "sm75", new_bundle("half", "fp16"))["bytes"]


def test_fp8_needs_ada(build: Build, bundle: Bundle, new_model: Any, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    model = new_model(bundle.table.graph("first"), "fp16")
    model.graph.initializer.extend(
        [
            helper.make_tensor("scale", TensorProto.FLOAT16, (), [0.5]),
            helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, (), [0]),
        ]
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"]),
    ]
    old = list(model.graph.node)
    old[0].input[:] = ["xd", "wd"]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old])
    file = _save(model, tmp_path / "fp8.onnx")
    with pytest.raises(InputError, match="fp8, which sm86 doesn't have"):
        build("first", "sm86", onnx_file=file, dtype="fp16")
    assert "fp8" in build("first", "sm89", onnx_file=file, dtype="fp16")["contract"]["precisions"]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (EngineOptions(refit=True), "--refit"),
        (EngineOptions(strip_weights=True), "--strip-weights"),
        (EngineOptions(refit=True, strip_weights=True), "--refit and --strip-weights"),
    ],
)
def test_strip_and_refit_are_refused_without_a_gpu(build: Build, options: EngineOptions, flags: str) -> None:
    with pytest.raises(BackendError, match=f"can't make engines with {flags} ahead of time"):
        build("first", options=options)


def test_other_options_build(build: Build) -> None:
    assert build("first", options=EngineOptions(optimization_level=0, tf32=True))["bytes"]
    with pytest.raises(InputError, match="optimization level 6 is not between 0 and 5"):
        EngineOptions(optimization_level=6)


def test_too_little_memory_is_refused_before_the_build(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    little = host_memory.HostMemory(1 << 20, "the machine")
    monkeypatch.setattr(host_memory, "available", lambda: little)
    monkeypatch.setattr(TensorRT, "parse", lambda *_: pytest.fail("nothing is parsed"))
    message = (
        r"building first for sm89 is predicted to need 0\.25 GiB .* 0\.00 GiB are available .*--force-memory"
    )
    with pytest.raises(InputError, match=message):
        build("first")
    monkeypatch.undo()
    monkeypatch.setattr(host_memory, "available", lambda: little)
    assert build("first", force_memory=True)["bytes"]


def test_prediction_counts_external_data(tmp_path: Path) -> None:
    from proteus_deploy.export.engine_source import EngineSource

    onnx = pytest.importorskip("onnx")
    np = pytest.importorskip("numpy")
    weight = onnx.numpy_helper.from_array(np.zeros((512, 1024), np.float32), "w")
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    body = onnx.helper.make_graph([node], "g", [], [], [weight])
    file = tmp_path / "g.onnx"
    onnx.save(onnx.helper.make_model(body), str(file), save_as_external_data=True, location="g.data")
    source = EngineSource.read(file)
    assert source.external == (tmp_path / "g.data",)
    assert source.weight_bytes == 512 * 1024 * 4 + file.stat().st_size
    base = host_memory.predict_bytes(0, source.nodes, streamed=True)
    grown = host_memory.predict_bytes(source.weight_bytes, source.nodes, streamed=True) - base
    assert grown == pytest.approx(3.0 * source.weight_bytes)


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (4 << 30, "the machine")),
        (
            {
                "proc/self/cgroup": "0::/pod/app\n",
                "sys/fs/cgroup/pod/memory.max": f"{3 << 30}\n",
                "sys/fs/cgroup/pod/memory.current": f"{2 << 30}\n",
                "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {1 << 29}\n",
                "sys/fs/cgroup/pod/app/memory.max": "max\n",
            },
            ((1 << 30) + (1 << 29), "the container's memory limit"),
        ),
        (
            {
                "proc/self/cgroup": "7:blkio:/\n4:memory:/job\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
                "sys/fs/cgroup/memory/memory.stat": "cache 5\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{1 << 30}\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{1 << 29}\n",
                "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 0\n",
            },
            (1 << 29, "the container's memory limit"),
        ),
    ],
    ids=["no limit", "cgroup v2 with a limit above", "cgroup v1"],
)
def test_available_memory(tmp_path: Path, files: dict[str, str], expected: tuple[int, str]) -> None:
    root = _write(tmp_path, {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable:    {4 << 20} kB\n", **files})
    assert host_memory.available(root) == host_memory.HostMemory(*expected)


def test_available_memory_is_unknown_elsewhere(tmp_path: Path) -> None:
    assert host_memory.available(tmp_path) is None
    host_memory.check("x", 1 << 60, None)


def test_available_memory_of_this_machine() -> None:
    memory = host_memory.available()
    assert memory is not None
    assert 0 < memory.available < 1 << 50


def test_cache_hit_reuses_the_bytes(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EngineCache(tmp_path / "cache")
    engine = tmp_path / "engines/first.engine"
    built = build("first", cache=cache)
    content = engine.read_bytes()
    engine.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(TensorRT, "parse", lambda *_: pytest.fail("nothing is built"))
        reused = build("first", cache=cache)
    assert engine.read_bytes() == content
    assert (built["cached"], reused["cached"]) == (False, True)
    assert reused["contract"] == built["contract"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: next(folder.glob("*.plan")).write_bytes(b"foreign"),
        lambda folder: next(folder.glob("*.plan")).write_bytes(next(folder.glob("*.plan")).read_bytes()[:-1]),
        lambda folder: next(folder.glob("*.plan")).unlink(),
        lambda folder: next(folder.glob("*.json")).write_text("{"),
        lambda folder: next(folder.glob("*.json")).write_text("[]"),
        lambda folder: next(folder.glob("*.json")).write_text('{"sha256": 1, "record": {}}'),
    ],
    ids=["altered", "truncated", "missing", "no JSON", "a list", "no sha256"],
)
def test_damaged_cache_entry_is_built_again(
    build: Build, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    cache = EngineCache(tmp_path / "cache")
    build("first", cache=cache)
    damage(cache.folder)
    assert not build("first", cache=cache)["cached"]
    assert build("first", cache=cache)["cached"]


def test_cache_tells_everything_apart(
    build: Build, new_bundle: Callable[..., Bundle], bundle: Bundle, tmp_path: Path
) -> None:
    cache = EngineCache(tmp_path / "cache")
    wider = StageTable({**bundle.table.axes, "B": type(bundle.table.axes["B"])(1, 2, 8)}, bundle.table.graphs)
    builds: list[Callable[[], dict[str, Any]]] = [
        lambda: build("first", cache=cache),
        lambda: build("first", "sm86", cache=cache),
        lambda: build("first", of=Bundle(bundle.folder, bundle.manifest, wider), cache=cache),
        lambda: build("first", options=EngineOptions(tf32=True), cache=cache),
        lambda: build("first", of=other, cache=cache),  # only the external weights differ
    ]
    other = new_bundle("other", weight=0.2)
    assert [run()["cached"] for run in builds] == [False] * len(builds)
    assert [run()["cached"] for run in builds] == [True] * len(builds)


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTEUS_DEPLOY_CACHE", "/own")
    assert default_folder() == Path("/own/engines")
    monkeypatch.delenv("PROTEUS_DEPLOY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_folder() == Path("/xdg/proteus_deploy/engines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache/proteus_deploy/engines"


class FakeTensorRT:
    """The parts of `tensorrt` that the adapter asks for while it sets a build up."""

    def __init__(self, version: str) -> None:
        self.__version__ = version
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=3)
        self.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})

    def Builder(self, log: Any) -> Any:  # noqa: N802 - the package's name
        return SimpleNamespace(create_network=lambda flags: flags)


@pytest.mark.parametrize(("version", "flags"), [("10.9.0.34", 8), ("10.16.1", 8), ("11.4.1.2", 0)])
def test_network_is_strongly_typed_in_each_version(version: str, flags: int) -> None:
    assert TensorRT("tensorrt", FakeTensorRT(version)).new_network()[1] == flags


def test_tensorrt_builds_for_the_gpu_present_only(monkeypatch: pytest.MonkeyPatch) -> None:
    api = TensorRT("tensorrt", FakeTensorRT("11.4.1"))
    monkeypatch.setattr(tensorrt_api, "current_gpu", lambda index=0: "sm90")
    assert api.resolve_target("current") == api.resolve_target("sm90") == "sm90"
    api.check_options(EngineOptions(refit=True, strip_weights=True))
    with pytest.raises(BackendError, match="only for the GPU it runs on: sm89 was asked for, here is sm90"):
        api.resolve_target("sm89")
    monkeypatch.setattr(tensorrt_api, "current_gpu", lambda index=0: None)
    with pytest.raises(BackendError, match=r"here is no CUDA device; .*--flavour tensorrt_rtx"):
        api.resolve_target("sm89")


def test_absent_package_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_api._load.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(
        BackendError, match=r'tensorrt can\'t be imported.*pip install "proteus-deploy\[tensorrt\]"'
    ):
        TensorRT.load("tensorrt")
    with pytest.raises(InputError, match="no TensorRT flavour 'trt'; choose one of tensorrt_rtx, tensorrt"):
        TensorRT.load("trt")


def test_gpu_is_asked_without_torch() -> None:
    gpu = current_gpu()
    assert gpu is None or gpu.startswith("sm")


def test_engine_that_cannot_be_loaded_is_named(api: TensorRT, tmp_path: Path, build: Build) -> None:
    file = tmp_path / "foreign.engine"
    file.write_bytes(b"not an engine at all" * 100)
    with pytest.raises(BackendError, match=r"can't load the engine .*foreign\.engine: .+"):
        api.deserialize(file)


def test_layer_report_where_the_gpu_is_present(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inspector = SimpleNamespace(get_engine_information=lambda form: '{"Layers": ["one"]}')
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    monkeypatch.setattr(tensorrt_engine, "current_gpu", lambda index=0: "sm89")
    monkeypatch.setattr(TensorRT, "deserialize", lambda api, file: engine)
    assert build("first")["status"] == "loaded, not run"
    assert json.loads((tmp_path / "engines/first.layers.json").read_text()) == {"Layers": ["one"]}
    assert build("second_next", "sm120")["status"] == "built, not run"


def test_graph_without_dynamic_axes_needs_no_profile(
    build: Build, bundle: Bundle, new_model: Any, tmp_path: Path
) -> None:
    table = StageTable({**bundle.table.axes, "h": type(bundle.table.axes["h"])(4, 4, 4)}, bundle.table.graphs)
    graph: Graph = table.graph("second_next")
    model = new_model(graph, "fp32", a=("float", (3, 8)), b=("float", (3, 8)))
    fixed = Bundle(bundle.folder, bundle.manifest, table)
    record = build("second_next", of=fixed, onnx_file=_save(model, tmp_path / "fixed.onnx"))
    assert record["contract"]["inputs"][0]["shape"] == [3, 8]
