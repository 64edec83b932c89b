"""AOTInductor packages of a small denoiser and text encoder: compiled once, opened, run and refused."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy import BackendError, BundleError, InputError
from proteus_deploy.bundle import Bundle, write_manifest
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.export import aot_package
from proteus_deploy.export.aot_package import TARGET, build_packages
from proteus_deploy.export.parity import graph_error
from proteus_deploy.export.reference import record_stages
from proteus_deploy.reporting import no_report
from proteus_deploy.runtime import aotinductor_backend, open_bundle_backend
from proteus_deploy.runtime.aotinductor_backend import AotInductorBackend
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.stage_table import build_stage_table
from proteus_deploy.stages import StageTable, sample_inputs
from proteus_deploy.testing import TOLERANCES, Tolerance, assert_close

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="packages are compiled by a C++ compiler, and none is here",
)

GRAPHS = ("text_encoder", "denoiser")
# Same arithmetic in another order, over networks of a few layers.
CLOSE = Tolerance(1e-5, "relative", "fp32 sums in another order")


@pytest.fixture(scope="module")
def checkpoint(parity: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The parity checkpoint with a denoiser of one block: compiling takes as long as there are blocks."""
    helpers = runpy.run_path(str(repository / "tests/conftest.py"))
    from proteus_deploy.model.config import read_transformer_config
    from proteus_deploy.model.networks import transformer_networks

    folder, published = tmp_path_factory.mktemp("aot") / "checkpoint", parity / "checkpoint"
    for part in ("text_encoder", "tokenizer", "scheduler", "vae", "model_index.json"):
        helpers["_link"](published / part, folder / part)
    config = json.loads((published / "transformer/config.json").read_text()) | {"num_layers": 1}
    networks = transformer_networks(read_transformer_config(config), folded=False)
    shapes = {key: value.shape for net in networks.values() for key, value in net.state_dict().items()}
    helpers["write_transformer"](folder, config, helpers["random_weights"](shapes))
    return Checkpoint.open(folder)


def write_bundle(folder: Path, checkpoint: Checkpoint, **changes: Any) -> Bundle:
    """A bundle of two graphs whose ONNX files are never read."""
    table = build_stage_table(checkpoint)
    table = StageTable(table.axes, tuple(table.graph(name) for name in GRAPHS))
    (folder / "onnx").mkdir(parents=True)
    for name in GRAPHS:
        (folder / f"onnx/{name}.onnx").write_bytes(b"not read")
    document = {
        "checkpoint": {"hash": checkpoint.hash},
        "dtype": "fp32",
        "stage_table": table.to_json(),
        "graphs": {
            name: {"file": f"onnx/{name}.onnx", "files": [f"onnx/{name}.onnx"], "operators": {}}
            for name in GRAPHS
        },
        "versions": {},
        "parity": {},
    }
    write_manifest(folder, {**document, **changes})
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def built(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with packages. Read it, don't write into it."""
    bundle = write_bundle(tmp_path_factory.mktemp("aot") / "bundle", checkpoint)
    build_packages(bundle, checkpoint)
    return bundle


@pytest.fixture
def bundle(built: Bundle, tmp_path: Path) -> Bundle:
    """A copy to spoil."""
    shutil.copytree(built.folder, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def change_manifest(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    file = bundle.folder / "engines" / TARGET / "manifest.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("which", ["min", "opt", "max"])
def test_every_size_of_the_table_gives_the_reference(
    built: Bundle, checkpoint: Checkpoint, graph: str, which: Any
) -> None:
    backend = open_bundle_backend(built, "aotinductor")
    assert (backend.name, backend.checks_ranges, backend.dtype) == ("aotinductor", True, torch.float32)
    contract = backend.table.graph(graph)
    inputs = sample_inputs(contract, backend.table.sizes(which), seed=3)
    outputs = backend.runner(graph)(**inputs)
    wanted = EagerBackend(checkpoint, table=built.table).runner(graph)(**inputs)
    assert list(outputs) == list(wanted)
    for name, want in wanted.items():
        assert_close(f"{graph} {name}", outputs[name], want, CLOSE)


def test_it_passes_what_verify_compares(built: Bundle, checkpoint: Checkpoint) -> None:
    backend = AotInductorBackend(built)
    bound = TOLERANCES["bundle", "graph", "fp32"].bound
    references = list(record_stages(built.table, EagerBackend(checkpoint, table=built.table), no_report))
    assert {reference.graph.name for reference in references} == set(GRAPHS)
    for reference in references:
        assert graph_error(backend.runner(reference.graph.name), reference, torch.float32).worst < bound


def test_strided_inputs_and_calls_that_follow_each_other(built: Bundle, checkpoint: Checkpoint) -> None:
    run = AotInductorBackend(built).runner("denoiser")
    eager = EagerBackend(checkpoint, table=built.table).runner("denoiser")
    inputs = sample_inputs(run.graph, built.table.sizes("opt"))
    inputs["latents"] = inputs["latents"].transpose(3, 4).contiguous().transpose(3, 4)
    first = run(**inputs)["velocity"]
    kept = first.clone()
    assert_close("velocity", first, eager(**inputs)["velocity"], CLOSE)
    run(**(inputs | {"latents": inputs["latents"] + 1}))
    assert torch.equal(first, kept), "the next call wrote into what the last one returned"


def test_inputs_that_compiled_code_would_misread_are_refused(built: Bundle) -> None:
    run = AotInductorBackend(built).runner("denoiser")
    sizes = built.table.sizes("opt")
    inputs = sample_inputs(run.graph, sizes)
    with pytest.raises(
        InputError, match=r"denoiser: input 'text' is torch.float64 on cpu; the package takes"
    ):
        run(**(inputs | {"text": inputs["text"].double()}))
    with pytest.raises(InputError, match="input 'text' is missing"):
        run(**{name: value for name, value in inputs.items() if name != "text"})
    longest = built.table.axes["f"].max
    with pytest.raises(InputError, match=rf"token frames \(f\) is {longest + 1}; the declared range is"):
        run(**sample_inputs(run.graph, sizes | {"f": longest + 1}))


def test_manifest_says_what_was_compiled_for_what(built: Bundle) -> None:
    document = built.engines(TARGET).document
    assert document["version"] == torch.__version__.split("+")[0]
    capabilities = torch.cpu.get_capabilities()
    assert document["cpu"]["needs"]
    assert all(capabilities[name] for name in document["cpu"]["needs"])
    files = {f"{graph}.{kind}" for graph in GRAPHS for kind in ("pt2", "safetensors")}
    assert set(document["files"]) == files
    for graph in GRAPHS:
        sizes = [document["files"][f"{graph}.{kind}"]["bytes"] for kind in ("pt2", "safetensors")]
        assert document["graphs"][graph]["bytes"] == sum(sizes)


def test_code_is_for_any_number_of_threads_and_holds_no_pickle(built: Bundle) -> None:
    """Inductor writes the builder's number of threads into loops unless it is told not to."""
    with zipfile.ZipFile(built.engines(TARGET).file("denoiser")) as archive:
        names = archive.namelist()
        source = "".join(archive.read(name).decode() for name in names if name.endswith(".cpp"))
    assert "#pragma omp parallel" in source
    assert "num_threads(" not in source
    assert not [name for name in names if name.endswith((".pkl", ".pt"))]


def test_packages_run_without_a_compiler_and_without_the_networks(built: Bundle) -> None:
    program = """
import sys
for name in ("diffusers", "transformers", "onnx", "onnxruntime", "proteus_deploy.model.transformer"):
    sys.modules[name] = None
from proteus_deploy.bundle import Bundle
from proteus_deploy.runtime import open_bundle_backend
from proteus_deploy.stages import sample_inputs
bundle = Bundle.open(sys.argv[1])
run = open_bundle_backend(bundle, "aotinductor").runner("text_encoder")
print(*run(**sample_inputs(run.graph, bundle.table.sizes("opt")))["text"].shape)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("PATH", "CXX")}
    command = [sys.executable, "-c", program, str(built.folder)]
    done = subprocess.run(
        command, env=environment | {"PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3


@pytest.mark.parametrize("file", ["denoiser.pt2", "denoiser.safetensors"])
def test_altered_file_is_refused_before_it_is_loaded(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    path = bundle.folder / "engines" / TARGET / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(aotinductor_backend, "load_package", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BundleError, match=rf"{file} differs from the manifest \(sha256\)"):
        AotInductorBackend(bundle)


def test_packages_of_another_export_are_refused(
    built: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = write_bundle(tmp_path / "other", checkpoint, versions={"torch": "another"})
    shutil.copytree(built.folder / "engines", other.folder / "engines")
    with pytest.raises(BundleError, match="was built from another export of this bundle; build it again"):
        AotInductorBackend(other)


def test_packages_of_another_pytorch_are_refused(bundle: Bundle) -> None:
    change_manifest(bundle, lambda document: document.update(version="2.9.1"))
    with pytest.raises(BackendError, match=r"was compiled with PyTorch 2\.9\.1, installed is \d"):
        AotInductorBackend(bundle)


def test_packages_of_another_cpu_are_refused(bundle: Bundle) -> None:
    change_manifest(bundle, lambda document: document["cpu"]["needs"].append("avx1024"))
    with pytest.raises(BackendError, match="this CPU lacks avx1024: build it again here"):
        AotInductorBackend(bundle)
    change_manifest(bundle, lambda document: document["cpu"].update(machine="s390x"))
    with pytest.raises(BackendError, match=r"was compiled for s390x with .*; this CPU lacks s390x"):
        AotInductorBackend(bundle)
    change_manifest(bundle, lambda document: document.pop("cpu"))
    with pytest.raises(BundleError, match="the manifest does not say which CPU it is for"):
        AotInductorBackend(bundle)


def test_missing_packages_name_the_command(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bare = write_bundle(tmp_path / "bare", checkpoint)
    with pytest.raises(BackendError, match=r"build .*bare --target aotinductor-cpu --checkpoint DIR"):
        AotInductorBackend(bare)
    with pytest.raises(BackendError, match="run on the CPU, not on 'cuda'"):
        AotInductorBackend(bare, device="cuda")


def test_file_that_is_no_package_is_named(bundle: Bundle) -> None:
    engines = bundle.engines(TARGET)
    engines.file("denoiser").write_bytes(b"PK no package")
    with pytest.raises(BackendError, match=r"PyTorch can't load .*denoiser\.pt2: "):
        aotinductor_backend.load_package(engines.file("denoiser"), None)


def test_graphs_are_kept_until_they_are_released(built: Bundle) -> None:
    backend = AotInductorBackend(built)
    first = backend.runner("text_encoder")
    assert backend.runner("text_encoder") is first
    backend.release("text_encoder")
    backend.release("denoiser")
    again = backend.runner("text_encoder")
    assert again is not first
    backend.close()
    assert backend.runner("text_encoder") is not again
    with pytest.raises(InputError, match="no graph 'unet'; the table has text_encoder, denoiser"):
        backend.runner("unet")


def test_foreign_checkpoint_is_refused(bundle: Bundle, parity: Path) -> None:
    with pytest.raises(InputError, match=r"is not the checkpoint that .* was exported from"):
        build_packages(bundle, Checkpoint.open(parity / "checkpoint"))


def test_missing_compiler_is_named(
    bundle: Bundle, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler, and none was found; install g\+\+"):
        build_packages(bundle, checkpoint)


def test_other_stages_stay_and_a_failed_build_changes_nothing(
    bundle: Bundle, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bundle.engines(TARGET).document["files"]

    def fail(graph: Any, table: Any, module: Any, dtype: Any, settings: Any, folder: Path) -> Any:
        (folder / f"{graph.name}.pt2").write_bytes(b"half")
        raise RuntimeError("stop here")

    monkeypatch.setattr(aot_package, "_package", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        build_packages(bundle, checkpoint, stages=["denoiser"])
    assert bundle.engines(TARGET).document["files"] == before

    def instant(graph: Any, table: Any, module: Any, dtype: Any, settings: Any, folder: Path) -> Any:
        for kind in ("pt2", "safetensors"):
            (folder / f"{graph.name}.{kind}").write_bytes(b"new")
        return {"file": f"{graph.name}.pt2", "weights": f"{graph.name}.safetensors"}

    monkeypatch.setattr(aot_package, "_package", instant)
    after = build_packages(bundle, checkpoint, stages=["denoiser"]).document["files"]
    assert after["denoiser.pt2"]["bytes"] == 3
    for name in ("text_encoder.pt2", "text_encoder.safetensors"):
        assert after[name] == before[name]
    assert not list((bundle.folder / "engines").glob(".*"))
