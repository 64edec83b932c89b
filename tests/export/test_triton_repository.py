"""A bundle as a model repository of Triton: its configs by Triton's own schema, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy._files import write_json
from proteus_deploy.bundle import MANIFEST, Bundle, write_engine_manifest
from proteus_deploy.cli.main import main
from proteus_deploy.errors import BackendError, BundleError, InputError
from proteus_deploy.export import triton_repository
from proteus_deploy.export.triton_config import (
    VIDEO_INPUTS,
    VIDEO_OUTPUTS,
    ModelConfig,
    TritonTensor,
    stage_tensors,
    video_config,
)
from proteus_deploy.export.triton_repository import check_repository, write_repository
from proteus_deploy.request import GenerateRequest

pytest.importorskip("onnxruntime")


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, hashes=False)


@pytest.fixture
def built(bundle: Bundle, tmp_path: Path) -> Callable[..., Bundle]:
    """built("sm89", flavour=…) -> a copy of the bundle with engines that are text."""

    def make(*targets: str, without: str = "", **document: Any) -> Bundle:
        folder = tmp_path / "built"
        if not folder.exists():
            shutil.copytree(bundle.folder, folder, copy_function=os.link)
        copy = Bundle.open(folder, hashes=False)
        for target in targets:
            engines = folder / "engines" / target
            engines.mkdir(parents=True)
            graphs = {}
            for graph in copy.table.graphs:
                if graph.name != without:
                    (engines / f"{graph.name}.engine").write_text(f"{graph.name} for {target}")
                    graphs[graph.name] = {"file": f"{graph.name}.engine"}
            facts = {"target": target, "flavour": "tensorrt", "version": "10.9", "options": {}, **document}
            write_engine_manifest(engines, copy, {**facts, "graphs": graphs})
        return copy

    return make


READER = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
read = [text_format.Parse(open(file).read(), ModelConfig()) for file in sys.argv[1:]]
print(json.dumps([json_format.MessageToDict(one, preserving_proto_field_name=True) for one in read]))
"""


def _parsed(interpreter: Path, *files: Path) -> list[dict[str, Any]]:
    """The configs, read by Triton's schema: an unknown word or a wrong type is an error there."""
    command = [str(interpreter), "-c", READER, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _tensors(config: dict[str, Any], word: str) -> dict[str, tuple[str, list[int], bool]]:
    """{name: (type, sizes, optional)}; protobuf's JSON has 64-bit numbers as text."""
    return {
        one["name"]: (one["data_type"], [int(size) for size in one["dims"]], one.get("optional", False))
        for one in config[word]
    }


@pytest.mark.parametrize("stages", ["python", "onnxruntime", "tensorrt"])
def test_configs_by_tritons_schema(
    built: Callable[..., Bundle], triton_client: Path, tmp_path: Path, stages: Any
) -> None:
    bundle = built("sm89", "sm120")
    models = write_repository(bundle, tmp_path / "models", stages=stages)
    names = sorted(child.name for child in (tmp_path / "models").iterdir())
    assert names == sorted(["proteus", *(f"proteus_{graph.name}" for graph in bundle.table.graphs)])
    assert models[0].name == "proteus"
    folders = [tmp_path / "models" / f"proteus_{graph.name}" for graph in bundle.table.graphs]
    configs = _parsed(triton_client, *(folder / "config.pbtxt" for folder in folders))
    for graph, folder, config in zip(bundle.table.graphs, folders, configs, strict=True):
        assert (config["name"], config["backend"]) == (folder.name, stages)
        assert "max_batch_size" not in config  # 0, which JSON leaves out
        kind = "KIND_GPU" if stages == "tensorrt" else "KIND_CPU"
        assert config["instance_group"] == [{"count": 1, "kind": kind}]
        for word, specs in (("input", graph.inputs), ("output", graph.outputs)):
            assert _tensors(config, word) == {
                spec.name: (
                    "TYPE_INT64" if spec.dtype == "int64" else "TYPE_FP32",
                    bundle.table.dims(spec),
                    False,
                )
                for spec in specs
            }
        files = {file.name for file in (folder / "1").iterdir()}
        if stages == "tensorrt":
            assert config["cc_model_filenames"] == {"8.9": "model.sm89.plan", "12.0": "model.sm120.plan"}
            assert files == set(config["cc_model_filenames"].values())
            assert (folder / "1" / "model.sm120.plan").read_text() == f"{graph.name} for sm120"
        else:
            assert files == {"model.onnx"} | ({"model.py"} if stages == "python" else set())
            assert (folder / "1" / "model.onnx").read_bytes() == bundle.onnx_file(graph.name).read_bytes()


def test_the_loops_config(bundle: Bundle, triton_client: Path, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "models", name="faces", files="link")
    folder = tmp_path / "models" / "faces"
    (config,) = _parsed(triton_client, folder / "config.pbtxt")
    assert (config["name"], config["backend"]) == ("faces", "python")
    assert config["model_transaction_policy"] == {"decoupled": True}
    inputs, outputs = _tensors(config, "input"), _tensors(config, "output")
    assert {name: kind for name, (kind, _, _) in inputs.items()} == VIDEO_INPUTS
    assert {name: kind for name, (kind, _, _) in outputs.items()} == VIDEO_OUTPUTS
    assert all(dims == [1] for _, dims, _ in (*inputs.values(), *outputs.values()))
    assert [name for name, (_, _, optional) in inputs.items() if not optional] == ["prompt", "photo"]
    code = (folder / "1" / "model.py").read_text()
    assert "from proteus_deploy.serving.triton_loop import TritonPythonModel" in code
    compile(code, "model.py", "exec")


def test_inputs_are_fields_of_a_request() -> None:
    assert set(VIDEO_INPUTS) <= {field.name for field in fields(GenerateRequest)}


def test_the_loop_has_what_the_pipeline_reads_and_no_graph(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "models")
    folder = tmp_path / "models" / "proteus" / "1" / "bundle"
    assert sorted(child.name for child in folder.iterdir()) == [
        "config", "face_encoder", "manifest.json", "tokenizer",
    ]  # fmt: skip
    copy = Bundle.open(folder, graphs=False)
    assert copy.hash == bundle.hash
    assert copy.transformer == bundle.transformer
    with pytest.raises(BundleError, match=r"onnx.* is missing; the manifest lists it"):
        Bundle.open(folder)
    (folder / "config" / "vae.json").write_text("{}")
    with pytest.raises(BundleError, match=r"vae\.json has 2 bytes"):
        Bundle.open(folder, graphs=False)


def test_a_quantised_graph_says_so_to_its_process(
    bundle: Bundle, triton_client: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        triton_repository,
        "quantised_formats",
        lambda manifest, graph: ("int8", "int4") if graph == "denoiser" else (),
    )
    write_repository(bundle, tmp_path / "models", files="link")
    folder = tmp_path / "models"
    files = (folder / f"proteus_{graph}" / "config.pbtxt" for graph in ("denoiser", "vae_encoder"))
    quantised, other = _parsed(triton_client, *files)
    assert quantised["parameters"] == {"formats": {"string_value": "int8,int4"}}
    assert "parameters" not in other
    with pytest.raises(
        BackendError, match=r"denoiser: quantised graphs need settings .* choose python stages"
    ):
        write_repository(bundle, tmp_path / "other", stages="onnxruntime")
    assert not (tmp_path / "other").exists()


def test_data_beside_a_graph_keeps_its_name(bundle: Bundle, tmp_path: Path) -> None:
    """The graph asks for its weights by the name of their file."""
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    (folder / "onnx" / "denoiser.onnx.data").write_bytes(b"weights")
    document = json.loads((folder / MANIFEST).read_text())
    document["files"]["onnx/denoiser.onnx.data"] = {"bytes": 7, "sha256": ""}
    document["graphs"]["denoiser"]["files"].append("onnx/denoiser.onnx.data")
    write_json(folder / MANIFEST, document)
    write_repository(Bundle.open(folder, hashes=False), tmp_path / "models", stages="onnxruntime")
    files = {file.name for file in (tmp_path / "models" / "proteus_denoiser" / "1").iterdir()}
    assert files == {"model.onnx", "denoiser.onnx.data"}


def test_links_take_no_space_and_are_refused_where_there_are_none(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(bundle, tmp_path / "linked", files="link")
    model = tmp_path / "linked" / "proteus_denoiser" / "1" / "model.onnx"
    assert model.samefile(bundle.onnx_file("denoiser"))
    write_repository(bundle, tmp_path / "copied")
    assert not (tmp_path / "copied" / "proteus_denoiser" / "1" / "model.onnx").samefile(model)

    def refuse(_source: Any, _destination: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match=r"can't be linked into .*Invalid cross-device link.*choose copies"):
        write_repository(bundle, tmp_path / "other", files="link")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"stages": "openvino"}, "stages are 'openvino'; choose from tensorrt, onnxruntime, python"),
        ({"device": "tpu"}, "device is 'tpu'; choose from cpu, cuda"),
        ({"stages": "tensorrt", "device": "cpu"}, "TensorRT runs on 'cuda'"),
        ({"name": "a/b"}, "the model's name is 'a/b'"),
        ({"dtype": "bf16"}, "the bundle is bf16, which python stages can't take"),
        ({"dtype": "bf16", "stages": "onnxruntime"}, "choose tensorrt stages, or export with --dtype"),
    ],
)
def test_choices_that_no_bundle_can_fulfil(tmp_path: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_repository(tmp_path / "models", **{"dtype": "fp32", **choices})


def test_nothing_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(InputError, match="already exists and is not empty"):
        write_repository(bundle, tmp_path / "models")
    assert [child.name for child in (tmp_path / "models").iterdir()] == ["mine"]
    with pytest.raises(InputError, match="files is 'move'; choose from copy, link"):
        write_repository(bundle, tmp_path / "other", files="move")  # type: ignore[arg-type]


def test_engines_that_triton_does_not_load(built: Callable[..., Bundle], tmp_path: Path) -> None:
    place = tmp_path / "models"
    with pytest.raises(BundleError, match=r"\(built: none\); .*--flavour tensorrt.*or python stages"):
        write_repository(built(), place, stages="tensorrt")
    with pytest.raises(BundleError, match=r"\(built: sm89 with tensorrt_rtx\)"):
        write_repository(built("sm89", flavour="tensorrt_rtx"), place, stages="tensorrt")
    with pytest.raises(BundleError, match="sm90 has no engine for denoiser; build all stages"):
        write_repository(built("sm90", without="denoiser"), place, stages="tensorrt")
    assert not place.exists()


def test_engines_without_weights(built: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = built("sm90", options={"strip_weights": True})
    with pytest.raises(BundleError, match="sm90 was built with --strip-weights"):
        write_repository(bundle, tmp_path / "models", stages="tensorrt")


def test_a_bundle_without_a_face_encoder(bundle: Bundle, tmp_path: Path) -> None:
    files = {name: record for name, record in bundle.manifest["files"].items() if "face_encoder" not in name}
    without = replace(bundle, manifest={**bundle.manifest, "files": files})
    with pytest.raises(BundleError, match="came without face_encoder/"):
        write_repository(without, tmp_path / "models")


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", "TYPE_FP16"), ("bf16", "TYPE_BF16")])
def test_types_follow_the_bundles_precision(bundle: Bundle, dtype: str, expected: str) -> None:
    inputs, outputs = stage_tensors(bundle.table.graph("denoiser"), bundle.table, dtype)
    kinds = {tensor.name: tensor.data_type for tensor in (*inputs, *outputs)}
    assert kinds["latents"] == kinds["velocity"] == expected
    assert (kinds["timestep"], kinds["identity_gate"]) == ("TYPE_INT64", "TYPE_FP32")


def test_names_are_quoted(triton_client: Path, tmp_path: Path) -> None:
    """Whatever stands in a parameter is text to the parser."""
    tensor = TritonTensor("x", "TYPE_FP32", (-1, 3))
    parameters = {'a "b"\n': "\\ }"}
    config = ModelConfig("m", "python", (tensor,), (tensor,), "KIND_CPU", parameters=parameters)
    (tmp_path / "config.pbtxt").write_text(config.to_text())
    (parsed,) = _parsed(triton_client, tmp_path / "config.pbtxt")
    assert {key: value["string_value"] for key, value in parsed["parameters"].items()} == parameters
    assert video_config("m").decoupled


def test_command_on_a_bundle(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(bundle.folder), "--triton", str(tmp_path / "models")]
    assert main([*words, "--triton-files", "link"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Triton", "model", "backend", "instances"]
    assert lines[2].split() == ["proteus", "python", "KIND_CPU"]
    assert lines[-1].startswith(f"tritonserver --model-repository {tmp_path / 'models'} ")
    assert main([*words[:-1], str(tmp_path / "more"), "--triton-stages", "onnxruntime", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["triton"]["models"][1]["backend"] == "onnxruntime"
    assert "bundle" not in document


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "is a bundle already; pass --triton DIR"),
        (["--triton", "models", "--dtype", "fp32"], "--dtype is for exporting a checkpoint"),
        (["--triton", "models", "--random-weights", "0"], "--random-weights is for exporting a checkpoint"),
        (["--triton", "models", "--overwrite"], "--overwrite is for exporting a checkpoint"),
        (["--triton", "models", "--output-dir", "b"], "--output-dir is for exporting a checkpoint"),
        (["--triton", "models", "--triton-stages", "tensorrt"], "has no engine that Triton's TensorRT"),
    ],
)
def test_flags_that_a_bundle_refuses(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(bundle.folder), *more]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_flags_are_checked_before_the_export(
    parity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(parity / "checkpoint"), "--output-dir", str(tmp_path / "bundle")]
    assert main([*words, "--triton", str(tmp_path / "models"), "--dtype", "bf16"]) == 2
    assert "the bundle is bf16" in capsys.readouterr().err
    assert main([*words, "--triton-name", "faces"]) == 2
    assert "--triton-name is for a repository; add --triton DIR" in capsys.readouterr().err
    assert main([*words, "--triton", str(tmp_path / "models")]) == 2
    assert "came without face_encoder/" in capsys.readouterr().err
    assert main([*words, "--triton", str(tmp_path / "models"), "--triton-stages", "tensorrt"]) == 2
    assert "engines are built from a finished bundle" in capsys.readouterr().err
    assert main(words[:2]) == 2
    assert "--output-dir is missing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
