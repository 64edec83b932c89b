"""One graph -> one ONNX file: what is in it, what it needs to be written, what it computes.

Properties of every graph are checked on the bundle of the parity checkpoint; further graphs are exported
one at a time, and run by ONNX Runtime (bfloat16: OpenVINO) against the eager reference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy import BackendError, InputError
from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.export import onnx_graph
from proteus_deploy.export.onnx_graph import ExportedGraph, export_graph
from proteus_deploy.export.parity import graph_error
from proteus_deploy.export.reference import StageReference
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.backend import short_dtype
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeGraph, open_session
from proteus_deploy.stage_table import ExportRanges, build_stage_table
from proteus_deploy.stages import Graph, StageTable, sample_inputs
from proteus_deploy.testing import TOLERANCES

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

GRAPHS = (
    "text_encoder",
    "identity_fusion",
    "identity_schedule",
    "denoiser",
    "vae_encoder",
    "vae_decoder_first_3",
    "vae_decoder_first_2",
    "vae_decoder_next",
)
MEDIAN = {"B": 2, "f": 4, "y": 5, "x": 3, "L": 23, "N": 17, "P": 3, "M": 11, "T": 7, "h": 5, "w": 9, "I": 1}


# Published weights that no forward pass reads, and the second name of T5's tied embedding.
_TAII = "fuse_facital_attention"
NEVER_READ = {
    f"{_TAII}.latents",
    *(f"{_TAII}.proj_out.{index}.{kind}" for index in (0, 1) for kind in ("weight", "bias")),
    "t5.shared.weight",
}


class Exported:
    """A graph on disk and what is needed to check it."""

    def __init__(self, checkpoint: Path, graph: str, folder: Path, dtype: torch.dtype, **ranges: int) -> None:
        self.checkpoint = Checkpoint.open(checkpoint)
        self.table = build_stage_table(self.checkpoint, ExportRanges(**ranges))
        self.graph = self.table.graph(graph)
        self.dtype = dtype
        self.file = folder / f"{graph}.onnx"
        self.record: ExportedGraph = export_graph(
            self.graph,
            self.table,
            NetworkFactory(self.checkpoint, folded=True)(graph),
            self.file,
            dtype=dtype,
        )

    def references(self, *which: Any) -> Iterator[StageReference]:
        eager = EagerBackend(self.checkpoint, table=self.table)
        for sizes in which or ("min", "opt", "max"):
            yield reference(eager, self.graph, self.table, sizes)

    def check(self, runner: Any = None) -> None:
        """Compare with the eager reference at the smallest, tuned and largest sizes."""
        tolerance = TOLERANCES["bundle", "graph", short_dtype(self.dtype)]
        run = runner or OnnxRuntimeGraph(self.graph, open_session(self.file))
        for stage in self.references():
            error = graph_error(run, stage, self.dtype)
            assert error.worst <= tolerance.bound, (stage.sizes, error.errors)


def reference(eager: EagerBackend, graph: Graph, table: StageTable, sizes: Any) -> StageReference:
    values = {**table.sizes("opt"), **sizes} if isinstance(sizes, dict) else table.sizes(sizes)
    inputs = sample_inputs(graph, values, seed=11)
    return StageReference(graph, str(sizes), inputs, eager.runner(graph.name)(**inputs))


@pytest.fixture
def export(parity: Path, tmp_path: Path) -> Callable[..., Exported]:
    """export(graph, dtype=…, checkpoint=…, **ranges) -> one graph of the parity or another checkpoint."""

    def run(
        graph: str, *, dtype: torch.dtype = torch.float32, checkpoint: Path | None = None, **ranges: int
    ) -> Exported:
        return Exported(checkpoint or parity / "checkpoint", graph, tmp_path, dtype, **ranges)

    return run


def load(file: Path) -> Any:
    return onnx.load(str(file))


# Every graph of one bundle


@pytest.fixture(scope="module")
def bundle(parity_bundle: Path) -> Bundle:
    return Bundle.open(parity_bundle)


@pytest.fixture(scope="module")
def eager(parity: Path, bundle: Bundle) -> EagerBackend:
    return EagerBackend(Checkpoint.open(parity / "checkpoint"), table=bundle.table)


@pytest.mark.parametrize("graph", GRAPHS)
def test_sizes_that_were_never_traced(bundle: Bundle, eager: EagerBackend, graph: str) -> None:
    contract = bundle.table.graph(graph)
    run = OnnxRuntimeGraph(contract, open_session(bundle.onnx_file(graph)))
    for sizes in ("min", "opt", "max", MEDIAN):
        stage = reference(eager, contract, bundle.table, sizes)
        error = graph_error(run, stage, torch.float32)
        assert error.worst <= TOLERANCES["bundle", "graph", "fp32"].bound, (stage.sizes, error.errors)


@pytest.mark.parametrize("graph", GRAPHS)
def test_parameters_keep_their_names_layout_and_values(parity: Path, bundle: Bundle, graph: str) -> None:
    network = NetworkFactory(Checkpoint.open(parity / "checkpoint"), folded=True)(graph)
    found = {tensor.name: tensor for tensor in load(bundle.onnx_file(graph)).graph.initializer}
    names = [name for name, _ in network.module.named_parameters() if name not in NEVER_READ]
    assert not [name for name in names if name not in found]
    for name in names:
        want = network.source.tensor(network.key_of(name))
        assert tuple(found[name].dims) == tuple(want.shape), name
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(found[name]).copy()), want), name


@pytest.mark.parametrize("graph", GRAPHS)
def test_operators_are_standard_and_buildable(bundle: Bundle, graph: str) -> None:
    """TensorRT refuses sequences and nested functions; a scatter is a loop that should not be there."""
    model = load(bundle.onnx_file(graph))
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    operators = {node.op_type for node in model.graph.node}
    assert not {name for name in operators if "Sequence" in name or "Scatter" in name}
    assert not operators & {"Loop", "If", "Scan", "NonZero"}
    record = bundle.manifest["graphs"][graph]
    assert set(record["operators"]) == operators
    assert record["opset"] == next(entry.version for entry in model.opset_import if entry.domain == "")


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_trace_of_the_machine(bundle: Bundle, repository: Path, graph: str) -> None:
    model = load(bundle.onnx_file(graph))
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # weights may hold any bytes
    text = model.SerializeToString()
    for word in (
        "site-packages",
        ".py",
        "stack_trace",
        "pkg.torch",
        str(repository),
        sys.prefix,
        os.sep + "tmp",
    ):
        assert word.encode() not in text, word


def test_contract_names_the_inputs_and_their_axes(bundle: Bundle) -> None:
    for contract in bundle.table.graphs:
        model = load(bundle.onnx_file(contract.name))
        assert [value.name for value in model.graph.input] == [spec.name for spec in contract.inputs]
        assert [value.name for value in model.graph.output] == [spec.name for spec in contract.outputs]
        for value, spec in zip(model.graph.input, contract.inputs, strict=True):
            dims = value.type.tensor_type.shape.dim
            assert len(dims) == len(spec.axes)
            for dim, axis in zip(dims, spec.axes, strict=True):
                if isinstance(axis, int):
                    assert dim.dim_value == axis, (contract.name, spec.name)


def ancestors(model: Any, root: str) -> set[str]:
    """Names of all values that depend on `root`."""
    found = {root}
    for node in model.graph.node:  # in topological order
        if found & set(node.input):
            found |= set(node.output)
    return found


def test_identity_attention_is_folded(bundle: Bundle) -> None:
    """Two matrix products with video tokens a site; the weights meet only the few identity tokens."""
    model = load(bundle.onnx_file("denoiser"))
    of_video, of_faces = ancestors(model, "latents"), ancestors(model, "face_tokens")
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Einsum")]
    sites = [
        t.name for t in model.graph.initializer if t.name.endswith("to_q.weight") and "block" not in t.name
    ]
    assert len(sites) == 2, "four blocks, one identity attention after every second"
    folded = [
        node
        for node in products
        if sum(name in of_video for name in node.input) == 1
        and any(name in of_faces and name not in of_video for name in node.input)
    ]
    assert len(folded) == 2 * len(sites)
    for site in sites:
        for name in (site, site.replace("to_q", "to_out")):
            followers = ancestors(model, name)
            first = next(node for node in products if followers & set(node.input))
            assert not of_video & set(first.input), f"{name} is multiplied with video tokens"


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(
    parity: Path, bundle: Bundle, tmp_path: Path, repository: Path
) -> None:
    """Another hash seed, another folder, nothing exported before: the same file."""
    program = """
import sys, torch
from pathlib import Path
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.export.onnx_graph import export_graph
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.stage_table import build_stage_table
checkpoint = Checkpoint.open(sys.argv[1])
table, factory = build_stage_table(checkpoint), NetworkFactory(checkpoint, folded=True)
for name in ("identity_schedule", "denoiser"):
    export_graph(
        table.graph(name), table, factory(name), Path(f"{name}.onnx"), dtype=torch.float32
    )
"""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(parity / "checkpoint")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "5"},
        check=True,
    )
    for name in ("identity_schedule", "denoiser"):
        assert (tmp_path / f"{name}.onnx").read_bytes() == bundle.onnx_file(name).read_bytes(), name


# Single graphs


class CountingWeights:
    """Weights that know how many of their tensors are alive."""

    def __init__(self, source: Any) -> None:
        self.source = "counted weights"
        self._store = source
        self.alive: list[weakref.ref[Any]] = []
        self.most = 0
        self.reads: list[str] = []

    def keys(self) -> Iterator[str]:
        return iter(self._store.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._store.shape(key)
        return shape

    def tensor(self, key: str) -> Tensor:
        # The array owns the memory and lives as long as any tensor on it; float32, so no cast copies it.
        memory = self._store.tensor(key).float().numpy().copy()
        self.alive = [*(ref for ref in self.alive if ref() is not None), weakref.ref(memory)]
        self.most = max(self.most, len(self.alive))
        self.reads.append(key)
        return torch.from_numpy(memory)


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["embedded", "external"])
def test_weights_are_read_one_at_a_time(
    parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """A real model's weights don't fit into memory, whichever way they are written."""
    monkeypatch.setattr(onnx_graph, "EMBED_LIMIT_BYTES", limit)
    checkpoint = Checkpoint.open(parity / "checkpoint")
    table = build_stage_table(checkpoint)
    network = NetworkFactory(checkpoint, folded=True)("identity_schedule")
    weights = CountingWeights(network.source)
    network = replace(network, source=weights)
    said: list[tuple[int, int]] = []
    graph = table.graph("identity_schedule")
    file = tmp_path / "graph.onnx"
    exported = export_graph(
        graph, table, network, file, dtype=torch.float32, report=lambda *done: said.append(done)
    )
    assert weights.most <= 2, "the one being read and at most the one being written"
    assert sorted(weights.reads) == sorted(set(network.module.state_dict()) - NEVER_READ)
    assert said[-1][0] == said[-1][1]
    if limit:
        assert exported.files == ("graph.onnx",)
        return
    assert exported.files == ("graph.onnx", "graph.onnx.data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.onnx", "graph.onnx.data"]
    assert file.stat().st_size < (tmp_path / "graph.onnx.data").stat().st_size
    stage = reference(EagerBackend(checkpoint, table=table), graph, table, "opt")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in exported.files:
        (tmp_path / name).rename(moved / name)
    error = graph_error(OnnxRuntimeGraph(graph, open_session(moved / "graph.onnx")), stage, torch.float32)
    assert error.worst <= TOLERANCES["bundle", "graph", "fp32"].bound
    where = {
        entry.value
        for tensor in onnx.load(str(moved / "graph.onnx"), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert where == {"graph.onnx.data"}


def test_half_precision(export: Callable[..., Exported]) -> None:
    exported = export("text_encoder", dtype=torch.float16)
    exported.check()
    kinds = {tensor.name: tensor.data_type for tensor in load(exported.file).graph.initializer}
    kept = [name for name in kinds if name.endswith("DenseReluDense.wo.weight")]
    assert kept
    assert {kinds[name] for name in kept} == {onnx.TensorProto.FLOAT}, "T5 overflows there in half precision"
    assert kinds["t5.encoder.embed_tokens.weight"] == onnx.TensorProto.FLOAT16


def test_half_precision_denoiser(
    export: Callable[..., Exported], make_checkpoint: Callable[..., Path]
) -> None:
    exported = export("denoiser", dtype=torch.float16, checkpoint=make_checkpoint(num_layers=1))
    exported.check()
    kinds = {value.name: value.type.tensor_type.elem_type for value in load(exported.file).graph.input}
    assert kinds["latents"] == onnx.TensorProto.FLOAT16
    assert kinds["rotary_cos"] == kinds["identity_gate"] == onnx.TensorProto.FLOAT
    assert kinds["timestep"] == onnx.TensorProto.INT64


@pytest.mark.parametrize("graph", ["denoiser", "vae_decoder_first_2"])
def test_bfloat16_runs_in_openvino(
    export: Callable[..., Exported], make_checkpoint: Callable[..., Path], graph: str
) -> None:
    pytest.importorskip("openvino")
    from proteus_deploy.runtime.openvino_backend import OpenVinoGraph, openvino_core

    exported = export(graph, dtype=torch.bfloat16, checkpoint=make_checkpoint(num_layers=1))
    assert exported.record.opset == 22
    settings = {"INFERENCE_PRECISION_HINT": "bf16"}
    compiled = openvino_core().compile_model(str(exported.file), "CPU", settings)
    exported.check(OpenVinoGraph(exported.graph, compiled))


def test_other_precisions_are_refused(parity: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(parity / "checkpoint")
    table, network = build_stage_table(checkpoint), NetworkFactory(checkpoint, folded=True)("denoiser")
    with pytest.raises(InputError, match=r"torch\.float64 can't be exported; choose float32, float16 or bf"):
        export_graph(table.graph("denoiser"), table, network, tmp_path / "graph.onnx", dtype=torch.float64)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BackendError, match=r'pip install "proteus-deploy\[onnx\]"'):
        onnx_graph.require_onnx()


VARIANTS: dict[str, dict[str, Any]] = {
    "1.5": {
        "patch_size_t": 2,
        "ofs_embed_dim": 48,
        "patch_bias": False,
        "sample_frames": 13,
        "num_layers": 3,
    },
    "keypoints": {"is_kps": True, "num_layers": 1},
    "learned positions": {"use_learned_positional_embeddings": True, "num_layers": 1},
    "sinusoidal positions": {"use_rotary_positional_embeddings": False, "num_layers": 1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_other_denoisers(
    export: Callable[..., Exported], make_checkpoint: Callable[..., Path], changes: dict[str, Any]
) -> None:
    export("denoiser", checkpoint=make_checkpoint(**changes)).check()


def test_several_videos_in_one_batch(
    export: Callable[..., Exported], make_checkpoint: Callable[..., Path]
) -> None:
    exported = export("denoiser", checkpoint=make_checkpoint(num_layers=1), max_videos=3)
    assert exported.graph.input("face_tokens").axes[0] == "B"
    assert exported.table.axes["B"].max == 6
    exported.check()


@pytest.mark.slow
def test_several_identities_in_one_batch(export: Callable[..., Exported]) -> None:
    exported = export("identity_fusion", max_videos=3)
    assert exported.table.axes["I"].max == 3
    exported.check()


CONSISID = {
    "_class_name": "ConsisIDTransformer3DModel",
    "num_layers": 3,
    "is_train_face": True,
    "LFE_depth": 10,
    "LFE_num_id_token": 3,
    "LFE_num_querie": 6,
    "LFE_dim_head": 8,
    "LFE_ff_mult": 2,
    "local_face_scale": 0.7,
}


@pytest.mark.parametrize("graph", ["identity_schedule", "denoiser"])
def test_consisid(
    export: Callable[..., Exported], make_checkpoint: Callable[..., Path], parity: Path, graph: str
) -> None:
    published = json.loads((parity / "checkpoint" / "transformer" / "config.json").read_text())
    absent = {name: None for name in published if name.startswith(("FT_", "FFE_"))}
    folder = make_checkpoint(**CONSISID)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in absent}))
    exported = export(graph, checkpoint=folder)
    assert "identity_fusion" not in exported.table.stages
    exported.check()
