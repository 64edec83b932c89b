"""Identity attention as a TensorRT plugin: the node, the PTX, and what the builder is told about both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from proteus_deploy import BackendError, InputError
from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.cli.main import main
from proteus_deploy.errors import BundleError
from proteus_deploy.export import export, identity_plugin, tensorrt_engine
from proteus_deploy.export.engine_cache import EngineCache
from proteus_deploy.export.engine_source import EngineSource
from proteus_deploy.export.identity_onnx import (
    INPUTS,
    OPERATOR_ID,
    fuse_identity_attention,
    identity_translations,
)
from proteus_deploy.export.onnx_graph import export_graph
from proteus_deploy.kernels.identity_attention import FoldedIdentity, folded_identity_attention
from proteus_deploy.kernels.ptx import read_parameters
from proteus_deploy.model.config import IdentityAttentionConfig
from proteus_deploy.model.identity_attention import IdentityAttention
from proteus_deploy.model.networks import Network
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.backend import refuse_custom_operators
from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeBackend, OnnxRuntimeGraph, open_session
from proteus_deploy.runtime.openvino_backend import OpenVinoBackend
from proteus_deploy.runtime.tensorrt_api import TensorRT
from proteus_deploy.stage_table import build_stage_table
from proteus_deploy.stages import AxisRange, Graph, StageTable, TensorSpec, sample_inputs
from proteus_deploy.testing import TOLERANCES, assert_close
from proteus_deploy.weights import RandomWeights

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TARGETS = (80, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def plugin(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], str]]:
    """plugin(name) -> what the builder got for one case of plugin_driver.py, and its PTX."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("plugin")
    # A process of its own: in this one kernels may be interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(repository)
    driver = Path(__file__).parent / "plugin_driver.py"
    done = subprocess.run(
        [sys.executable, str(driver), str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads((folder / "cases.json").read_text(encoding="utf-8"))

    def read(name: str) -> tuple[dict[str, Any], str]:
        if name not in document["cases"]:
            return document, ""
        return document["cases"][name], (folder / f"{name}.ptx").read_text(encoding="utf-8")

    return read


CASES = [
    *(f"64-bf16-{target}-None" for target in TARGETS),
    "64-bf16-80-4", "64-bf16-89-3", "64-bf16-90-7", "64-bf16-100-4", "64-bf16-120-4",
    "64-fp16-90-2", "64-fp32-90-2", "3072-bf16-90-0", "3072-bf16-90-7",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_launched_as_its_ptx_asks(name: str, plugin: Any) -> None:
    case, text = plugin(name)
    entry, parameters = read_parameters(text)
    assert entry == case["kernel"]
    # TensorRT passes inputs, whole numbers, outputs: pointers are 64 bits wide, the numbers 32.
    scalars = len(case["scalars"][0])
    assert case["inputs"] == len(INPUTS)
    assert [kind for _, kind in parameters] == ["u64"] * 6 + ["u32"] * scalars + ["u64"] * case["outputs"]
    assert case["scalars"] == [[1, 1], [17_550, 2], [65, 1]]  # tokens, identities
    for launch, grid in zip(case["launches"], case["triton_grids"], strict=True):
        assert [launch["grid_x"], launch["grid_y"]] == grid
        assert launch["grid_z"] == launch["block_y"] == launch["block_z"] == 1
        assert f".reqntid {launch['block_x']}\n" in text


@pytest.mark.parametrize("name", CASES)
def test_ptx_assembles_for_its_target_without_spills(name: str, plugin: Any) -> None:
    case, text = plugin(name)
    assembled = case["assembled"]
    assert assembled.get("error") is None
    assert assembled["arch"].removesuffix("a") == f"sm_{case['target']}"
    assert assembled["local_bytes"] == 0
    assert ".version 8.7\n" in text  # drivers of 2025 read it
    assert ".py" not in text  # no file of the machine that compiled


def test_the_last_tactic_at_16_bits_needs_no_leave_for_shared_memory(plugin: Any) -> None:
    first, last = plugin("3072-bf16-90-0")[0], plugin("3072-bf16-90-7")[0]
    assert first["launches"][0]["shared_mem"] > 48 * 1024
    assert 0 < last["launches"][0]["shared_mem"] <= 48 * 1024
    assert last["tactics"] == [1, 2, 3, 4, 5, 6, 7]


def test_types_and_layouts_are_those_of_the_node(plugin: Any) -> None:
    case, _ = plugin("64-fp16-90-2")
    assert case["combination"] == ["FP16", "FP16", "FP32", "FP16", "FP16", "FP32", "FP16"]
    assert case["layouts"] == "LINEAR"
    assert case["output"] == [["B", "N", 64], "HALF"]
    assert plugin("64-bf16-90-7")[0]["combination"][0] == "BF16"


def test_a_failure_in_the_builder_is_kept_and_the_key_names_what_compiles(plugin: Any) -> None:
    document, _ = plugin("document")
    assert document["refusal"] == f"{OPERATOR_ID}: width must be fixed when the engine is built"
    assert document["kept"] is True
    assert set(document["key"]) == {"triton", "kernel"}


class Denoisers:
    """The parity checkpoint's denoiser as it is always exported, and with the node."""

    def __init__(self, checkpoint: Path, standard: Path, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(checkpoint)
        self.table = build_stage_table(self.checkpoint)
        self.graph = self.table.graph("denoiser")
        self.standard = standard
        self.folder = folder

    def export(self) -> tuple[Path, Any]:
        file = self.folder / "denoiser.onnx"
        network = fuse_identity_attention(NetworkFactory(self.checkpoint, folded=True)("denoiser"))
        record = export_graph(
            self.graph, self.table, network, file, dtype=torch.float32, translations=identity_translations()
        )
        return file, record


@pytest.fixture(scope="module")
def denoisers(parity: Path, parity_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Denoisers:
    standard = Bundle.open(parity_bundle).onnx_file("denoiser")
    return Denoisers(parity / "checkpoint", standard, tmp_path_factory.mktemp("denoisers"))


@pytest.fixture(scope="module")
def fused(denoisers: Denoisers) -> tuple[Path, Any]:
    return denoisers.export()


def nodes_of(file: Path) -> list[Any]:
    return [node for node in onnx.load(str(file)).graph.node if node.domain == "proteus_deploy"]


def attributes_of(node: Any) -> dict[str, Any]:
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def test_every_site_is_one_node_that_the_parser_finds(denoisers: Denoisers, fused: tuple[Path, Any]) -> None:
    file, record = fused
    config = denoisers.checkpoint.transformer
    nodes = nodes_of(file)
    sites = -(-config.backbone.num_layers // config.identity_attention.interval)
    assert len(nodes) == sites == record.operators["FusedIdentityAttention"]
    assert record.custom_operators == (OPERATOR_ID,) == EngineSource.read(file).custom_operators
    for node in nodes:
        found = attributes_of(node)
        assert node.op_type == "FusedIdentityAttention"
        assert len(node.input) == len(INPUTS)
        # TensorRT's parser looks for the plugin by these.
        assert (found["plugin_namespace"], found["plugin_version"], found["aot"]) == (
            b"proteus_deploy",
            b"1",
            1,
        )
        assert list(found["heads"]) == [config.identity_attention.heads]
        assert found["eps"] == pytest.approx([1e-5])


def test_the_query_side_is_not_transposed_back_and_forth(fused: tuple[Path, Any]) -> None:
    model = onnx.load(str(fused[0]))
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in nodes_of(fused[0]):
        assert makers[node.input[INPUTS.index("A")]] == "Mul"  # rows times the norm's weight
        assert makers[node.input[INPUTS.index("sums")]] == "ReduceSum"


def test_the_graph_with_the_node_computes_the_standard_graph(
    denoisers: Denoisers, fused: tuple[Path, Any]
) -> None:
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    calls = []

    class FusedIdentityAttention(OpRun):
        op_domain = "proteus_deploy"

        def _run(self, hidden, A, sums, a0, Bm, gate, heads=None, eps=None, **_):  # type: ignore[no-untyped-def]
            tensors = [torch.from_numpy(x.copy()) for x in (hidden, A, sums, a0, Bm, gate)]
            hidden, A, sums, a0, Bm, gate = tensors
            torch.testing.assert_close(sums, A.sum(-1))
            folded = FoldedIdentity(A.mT, a0, Bm)
            result = folded_identity_attention(hidden, folded, gate=gate, heads=heads[0], eps=eps[0])
            calls.append(tuple(hidden.shape))
            return (result.numpy(),)

    evaluator = ReferenceEvaluator(onnx.load(str(fused[0])), new_ops=[FusedIdentityAttention])
    standard = OnnxRuntimeGraph(denoisers.graph, open_session(denoisers.standard))
    sizes = denoisers.table.sizes("min")
    inputs = sample_inputs(denoisers.graph, sizes)
    inputs["identity_gate"] = torch.tensor([0.6])
    (got,) = evaluator.run(None, {name: value.numpy() for name, value in inputs.items()})
    (want,) = standard(**inputs).values()
    assert_close("velocity", torch.from_numpy(got), want, TOLERANCES["bundle", "graph", "fp32"])
    assert len(calls) == len(nodes_of(fused[0]))
    # The comparison would not see a gate that is left out if the update were lost in the rest.
    inputs["identity_gate"] = torch.zeros(1)
    (closed,) = standard(**inputs).values()
    assert (closed - want).norm() > 1e-3 * want.norm()


class Site(nn.Module):
    """One identity attention by itself, as small as it can be."""

    def __init__(self) -> None:
        super().__init__()
        config = IdentityAttentionConfig(interval=2, heads=3, head_dim=8, face_dim=24, scale=1.0)
        self.attention = IdentityAttention(48, config, form="folded")

    def forward(self, video: torch.Tensor, face_tokens: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.attention(video, face_tokens, gate)  # type: ignore[no-any-return]


@pytest.mark.parametrize("identities", ["B", 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes_and_types_of_the_inputs(dtype: torch.dtype, identities: str | int, tmp_path: Path) -> None:
    """At every precision, for one face of the batch as for one each, and with a batch that may be one."""
    inputs = (
        TensorSpec("video", ("B", "N", 48)),
        TensorSpec("face_tokens", (identities, 5, 24)),
        TensorSpec("gate", (1,), "float32", "gate"),
    )
    graph = Graph("site", "site", inputs, (TensorSpec("result", ("B", "N", 48)),))
    table = StageTable({"B": AxisRange(1, 2, 4), "N": AxisRange(1, 6, 100)}, (graph,))
    with torch.device("meta"):
        site = Site()
    shapes = {name: tuple(value.shape) for name, value in site.state_dict().items()}
    network = Network(site, "transformer", str, RandomWeights(shapes, seed=0))
    file = tmp_path / "site.onnx"
    translations = identity_translations()
    export_graph(graph, table, fuse_identity_attention(network), file, dtype=dtype, translations=translations)
    model = onnx.load(str(file))
    values = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.input)}
    (node,) = nodes_of(file)
    found = {name: values[value] for name, value in zip(INPUTS, node.input, strict=True)}
    narrow = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
    }[dtype]
    for name, value in found.items():
        wide = name in {"sums", "gate"}
        assert value.elem_type == (onnx.TensorProto.FLOAT if wide else narrow), name
    sizes = {
        name: tuple(axis.dim_param or axis.dim_value for axis in value.shape.dim)
        for name, value in found.items()
    }
    assert sizes == {
        "hidden": ("B", "N", 48), "A": (identities, 15, 48), "sums": (identities, 15),
        "a0": (identities, 1, 15), "Bm": (identities, 15, 48), "gate": (1,),
    }  # fmt: skip


def test_a_network_without_identity_attention_is_refused(denoisers: Denoisers) -> None:
    with pytest.raises(InputError, match="no identity attention to fuse"):
        fuse_identity_attention(NetworkFactory(denoisers.checkpoint, folded=True)("vae_encoder"))


@pytest.fixture
def plugin_bundle(
    parity: Path,
    tmp_path: Path,
    fused: tuple[Path, Any],
    instant_export: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The parity checkpoint exported by the command, with the graph of `fused` as its denoiser."""
    import shutil

    instant = export.__dict__["export_graph"]

    def take(graph: Any, table: Any, network: Any, destination: Path, **options: Any) -> Any:
        if options["translations"] is None:
            return instant(graph, table, network, destination, **options)
        assert graph.name == "denoiser"
        shutil.copyfile(fused[0], destination)
        return type(fused[1])((destination.name,), 20, fused[1].operators, 0, fused[1].custom_operators)

    monkeypatch.setattr(export, "export_graph", take)
    bundle = tmp_path / "bundle"
    command = ["export", str(parity / "checkpoint"), "--output-dir", str(bundle), "--identity-plugin"]
    assert main([*command, "--reference", "stages"]) == 0
    return bundle


def test_a_bundle_with_the_node_says_so_and_runs_on_tensorrt_alone(
    plugin_bundle: Path, parity_bundle: Path
) -> None:
    bundle = Bundle.open(plugin_bundle)
    assert bundle.manifest["parity"] == {
        "status": "not measured",
        "reason": "ONNX Runtime has no kernels for the custom operators of denoiser",
    }
    assert bundle.manifest["graphs"]["denoiser"]["custom_operators"] == [OPERATOR_ID]
    for name, graph in bundle.manifest["graphs"].items():
        assert ("custom_operators" in graph) == (name == "denoiser")
    # The default export is what it was: no new field, no new node.
    standard = Bundle.open(parity_bundle)
    assert all("custom_operators" not in graph for graph in standard.manifest["graphs"].values())
    wanted = rf"denoiser \({OPERATOR_ID}\).*--identity-plugin.*backend tensorrt"
    with pytest.raises(BackendError, match=f"ONNX Runtime has no kernels .*{wanted}"):
        OnnxRuntimeBackend(bundle)
    with pytest.raises(BackendError, match=f"OpenVINO has no kernels .*{wanted}"):
        OpenVinoBackend(bundle)
    refuse_custom_operators(standard, "ONNX Runtime")


def fake_api(flavour: str = "tensorrt", version: str = "10.9.0") -> TensorRT:
    module = SimpleNamespace(__version__=version, ILogger=type("ILogger", (), {}))
    return TensorRT(flavour, module)


def test_packages_without_ahead_of_time_plugins_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", types.ModuleType("tensorrt.plugin"))
    with pytest.raises(BackendError, match=r"tensorrt 10.7.0 can't build .* no ahead-of-time plugins.*10\.9"):
        identity_plugin.plugin_module(fake_api(version="10.7.0"))
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    with pytest.raises(
        BackendError, match=r"can't be imported .*proteus-deploy\[tensorrt\].*--flavour tensorrt"
    ):
        identity_plugin.plugin_module(fake_api())


def test_tensorrt_rtx_is_refused_before_it_parses(
    denoisers: Denoisers, fused: tuple[Path, Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    api = TensorRT.load("tensorrt_rtx")
    with pytest.raises(BackendError, match=rf"tensorrt_rtx .* can't build {OPERATOR_ID}: its module"):
        tensorrt_engine.build_engine(
            fused[0], denoisers.graph, denoisers.table, "sm89",
            api=api, destination=tmp_path / "denoiser.engine", dtype="fp32",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_operators_of_others_are_refused(
    denoisers: Denoisers, fused: tuple[Path, Any], tmp_path: Path
) -> None:
    model = onnx.load(str(fused[0]))
    for node in model.graph.node:
        node.op_type = "Other" if node.domain else node.op_type
    onnx.save(model, str(tmp_path / "other.onnx"))
    source = EngineSource.read(tmp_path / "other.onnx")
    with pytest.raises(BundleError, match="has the operators proteus_deploy::Other, which no plugin runs"):
        tensorrt_engine._add_plugins(source, fake_api(), "sm90")


def test_the_plugin_is_part_of_an_engines_key(
    denoisers: Denoisers, fused: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another Triton, or an edited kernel, must not fetch the engine of the one before."""
    keys = []

    class Cache(EngineCache):
        def fetch(self, key: str, destination: Path) -> Any:
            keys.append(key)
            destination.write_bytes(b"engine")
            return {"contract": {}, "memory": {}}

    api = fake_api()
    monkeypatch.setattr(TensorRT, "resolve_target", lambda self, target: target)
    registered = []
    monkeypatch.setattr(
        identity_plugin, "register_identity_plugin", lambda api, target: registered.append(target)
    )
    for triton in ("3.7.1", "3.7.1", "3.8.0"):
        monkeypatch.setattr(identity_plugin, "plugin_key", lambda triton=triton: {"triton": triton})
        tensorrt_engine.build_engine(
            fused[0], denoisers.graph, denoisers.table, "sm90",
            api=api, destination=tmp_path / "denoiser.engine", dtype="fp32", cache=Cache(tmp_path / "cache"),
        )  # fmt: skip
    assert registered == ["sm90"] * 3
    assert keys[0] == keys[1] != keys[2]


def test_heads_that_share_no_columns_are_refused() -> None:
    def desc(*shape: int) -> Any:
        sizes = [SimpleNamespace(is_constant=True, constant_value=lambda size=size: size) for size in shape]
        return SimpleNamespace(shape_expr=sizes)

    with pytest.raises(BackendError, match="15 columns can't be shared by 2 heads"):
        identity_plugin._problem(desc(2, 7, 64), desc(2, 15, 64), [2], [1e-5], "bf16")
    problem = identity_plugin._problem(desc(2, 7, 64), desc(2, 15, 64), [3], [1e-5], "bf16")
    assert (problem.width, problem.heads, problem.queries, problem.dtype) == (64, 3, 5, "bf16")
