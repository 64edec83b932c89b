"""Verification: a good bundle passes, one wrong number anywhere fails and is named."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from proteus_deploy import BackendError, BundleError, InputError
from proteus_deploy.bundle import Bundle, write_manifest
from proteus_deploy.export import verify
from proteus_deploy.export.parity import GraphError, graph_error
from proteus_deploy.export.reference import load_stages
from proteus_deploy.export.verify import Row, VerificationReport, verify_bundle
from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeBackend
from proteus_deploy.testing import TOLERANCES

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture
def bundle(parity_bundle: Path) -> Bundle:
    return Bundle.open(parity_bundle)


@pytest.fixture
def altered(parity_bundle: Path, tmp_path: Path) -> Callable[..., Bundle]:
    """altered(change) -> a copy of the bundle after change(folder), with a manifest that fits again."""

    def make(change: Callable[[Path], Any]) -> Bundle:
        folder = tmp_path / "altered"
        shutil.copytree(parity_bundle, folder, copy_function=os.link)
        document = json.loads((folder / "manifest.json").read_text())
        change(folder)
        (folder / "manifest.json").unlink()
        write_manifest(
            folder, {k: v for k, v in document.items() if k not in ("files", "kind", "schema_version")}
        )
        return Bundle.open(folder)

    return make


def change_weight(folder: Path, graph: str, name: str, change: Callable[[Any], Any]) -> None:
    file = folder / "onnx" / f"{graph}.onnx"
    model = onnx.load(str(file))
    tensor = next(entry for entry in model.graph.initializer if entry.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), name))
    file.unlink()  # the other copy keeps its own
    onnx.save(model, str(file))


def failed(report: VerificationReport) -> list[str]:
    return [row.check for row in report.rows if row.status == "failed"]


def test_good_bundle_passes(bundle: Bundle) -> None:
    said: list[tuple[str, int, int]] = []
    report = verify_bundle(bundle, ["onnxruntime"], report=lambda *words: said.append(words))
    assert report.passed
    assert failed(report) == []
    checks = [graph.name for graph in bundle.table.graphs] + ["video latents", "video frames"]
    assert [row.check for row in report.rows] == checks
    for row in report.rows:
        assert row.status == "ok"
        assert row.error is not None
        assert 0 <= row.error <= row.tolerance
    assert report.versions["onnxruntime"] != "absent"
    assert {phase for phase, _, _ in said} == {"verify onnxruntime", "video onnxruntime"}


@pytest.mark.slow
def test_openvino_passes(bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    report = verify_bundle(bundle, ["openvino"])
    assert report.passed, report.table()
    assert "openvino" in report.versions


@pytest.mark.parametrize(
    ("graph", "weight"),
    [
        ("denoiser", "proj_out.weight"),
        ("denoiser", "transformer_blocks.1.attn1.to_q.bias"),
        ("identity_fusion", None),
        ("vae_decoder_next", None),
        ("vae_encoder", None),
        ("text_encoder", None),
    ],
)
def test_one_weight_ten_percent_off_fails(
    altered: Callable[..., Bundle], graph: str, weight: str | None
) -> None:
    def spoil(folder: Path) -> None:
        model = onnx.load(str(folder / "onnx" / f"{graph}.onnx"))
        matrices = [entry.name for entry in model.graph.initializer if len(entry.dims) > 1]
        name = weight or matrices[len(matrices) // 2]
        change_weight(folder, graph, name, lambda numbers: numbers * numbers.dtype.type(1.1))

    report = verify_bundle(altered(spoil), ["onnxruntime"])
    assert not report.passed
    assert [check for check in failed(report) if not check.startswith("video")] == [graph]


@pytest.mark.parametrize("graph", ["denoiser", "vae_decoder_first_3"])
def test_output_that_is_not_a_number_fails(
    altered: Callable[..., Bundle], tmp_path: Path, graph: str
) -> None:
    def spoil(folder: Path) -> None:
        name = {"denoiser": "proj_out.bias", "vae_decoder_first_3": "decoder.conv_out.conv.bias"}[graph]
        change_weight(folder, graph, name, lambda numbers: numbers * numbers.dtype.type("nan"))

    report = verify_bundle(altered(spoil), ["onnxruntime"])
    assert not report.passed
    assert graph in failed(report)
    assert "video frames" in failed(report)
    row = next(row for row in report.rows if row.check == graph)
    assert row.error is not None
    assert math.isnan(row.error)
    assert "nan" in report.to_markdown()


def test_nan_in_any_place_is_the_worst(bundle: Bundle) -> None:
    """In the second output, at the second size, in a later step: where `max` would pass over it."""
    assert math.isnan(GraphError({"a": 0.1, "b": math.nan}).worst)
    assert GraphError({"a": 0.1, "b": math.nan, "c": math.inf}).worst_output in ("b", "c")
    stages = [
        s for s in load_stages(bundle.folder / "reference", bundle.table) if s.graph.name == "vae_encoder"
    ]

    class Second:
        """Right at the smallest sizes, not a number at the tuned ones."""

        table = bundle.table
        dtype = torch.float32

        def runner(self, graph: str) -> Callable[..., dict[str, Tensor]]:
            def run(**inputs: Tensor) -> dict[str, Tensor]:
                outputs = OnnxRuntimeBackend(bundle).runner(graph)(**inputs)
                small = inputs["image"].shape == stages[0].inputs["image"].shape
                return outputs if small else {name: value * math.nan for name, value in outputs.items()}

            return run

    backend: Any = Second()
    assert graph_error(backend.runner("vae_encoder"), stages[0], torch.float32).worst < 1e-4
    tolerances = {"graph": TOLERANCES["bundle", "graph", "fp32"]}
    (row,) = verify._verify_stages(backend, "fake", iter(stages), tolerances, lambda *_: None)
    assert row.status == "failed"
    assert "at the opt sizes" in row.detail


def test_altered_reference_fails(altered: Callable[..., Bundle]) -> None:
    """Both sides are compared: a reference of another checkpoint doesn't pass either."""

    def spoil(folder: Path) -> None:
        file = folder / "reference" / "video.safetensors"
        tensors = load_file(file)
        tensors["latents.2"] *= 1.01
        file.unlink()
        save_file(tensors, file)

    report = verify_bundle(altered(spoil), ["onnxruntime"])
    assert failed(report) == ["video latents"]
    assert next(row for row in report.rows if row.check == "video latents").detail.endswith("step 3")


def budget(folder: Path, document: object) -> Path:
    file = folder / "budget.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def test_budget_replaces_bounds(bundle: Bundle, tmp_path: Path) -> None:
    tight = verify_bundle(bundle, ["onnxruntime"], budget=budget(tmp_path, {"denoiser": 1e-12}))
    assert failed(tight) == ["denoiser"]
    assert tight.reasons["denoiser"] == "from budget.json"
    both = {"latents": 1e-12, "frames": 1e-12, "graph": 1.0}
    tight = verify_bundle(bundle, ["onnxruntime"], budget=budget(tmp_path, both))
    assert failed(tight) == ["video latents", "video frames"]
    assert verify_bundle(bundle, ["onnxruntime"], budget=budget(tmp_path, {})).passed


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "is not readable JSON"),
        ("[1e-4]", "must be a JSON object of checks and positive bounds"),
        ({"denoiser": 0}, "positive bounds"),
        ({"denoiser": -1e-4}, "positive bounds"),
        ({"denoiser": "1e-4"}, "positive bounds"),
        ({"denoiser": True}, "positive bounds"),
        ({"denoiser": None}, "positive bounds"),
        ('{"denoiser": NaN}', "positive bounds"),
        ('{"denoiser": Infinity}', "positive bounds"),
        ({"unet": 1e-4}, "'unet' is not a check; known are graph, latents, frames, text_encoder"),
    ],
)
def test_bad_budget(bundle: Bundle, tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"budget\.json.*{message}"):
        verify_bundle(bundle, ["onnxruntime"], budget=budget(tmp_path, document))


def test_absent_budget(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json is not readable JSON"):
        verify_bundle(bundle, ["onnxruntime"], budget=tmp_path / "absent.json")


def test_reference_computed_from_the_checkpoint(altered: Callable[..., Bundle], parity: Path) -> None:
    """A bundle without a recorded reference, and the PyTorch backends."""
    bundle = altered(lambda folder: shutil.rmtree(folder / "reference"))
    report = verify_bundle(bundle, ["eager", "onnxruntime"], checkpoint=parity / "checkpoint")
    assert report.passed, report.table()
    assert {row.backend for row in report.rows} == {"eager", "onnxruntime"}
    assert all(row.status == "ok" for row in report.rows)
    assert len(report.rows) == 2 * (len(bundle.table.graphs) + 2)
    with pytest.raises(
        BundleError, match=r"exported with --reference none, so verifying it needs .*--checkpo"
    ):
        verify_bundle(bundle, ["onnxruntime"])


def test_stages_without_a_video(altered: Callable[..., Bundle]) -> None:
    bundle = altered(lambda folder: [file.unlink() for file in (folder / "reference").glob("video.*")])
    report = verify_bundle(bundle, ["onnxruntime"])
    assert report.passed
    assert [row.check for row in report.rows if row.status == "not run"] == ["video latents", "video frames"]


def test_checkpoint_backends_need_the_checkpoint(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="backend 'eager' runs the checkpoint; pass it with --checkpoint"):
        verify_bundle(bundle, ["eager"])


def test_the_frozen_form(bundle: Bundle, parity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler hears of it, and rows say it; what it computes: tests/runtime/test_frozen.py."""
    asked: list[Any] = []

    def compile_nothing(module: Any, **settings: Any) -> Any:
        asked.append(settings["options"])
        return module

    monkeypatch.setattr(torch, "compile", compile_nothing)
    seen: list[str] = []
    report = verify_bundle(
        bundle,
        ["compiled"],
        checkpoint=parity / "checkpoint",
        frozen=True,
        on_video=lambda name, _reference, _frames: seen.append(name),
    )
    assert report.passed, report.table()
    assert {row.backend for row in report.rows} == {"compiled-frozen"}
    assert asked.count({"freezing": True}) == len(bundle.table.graphs) - 1, "all but the text encoder"
    assert asked.count(None) == 1
    assert seen == ["compiled-frozen"]


@pytest.mark.parametrize(
    ("backends", "form", "message"),
    [
        (["onnxruntime"], {"attention": "cpu-bf16"}, "attention is 'cpu-bf16', .* add --backend compiled"),
        (
            ["onnxruntime", "eager"],
            {"frozen": True},
            "frozen is for the backend compiled, and onnxruntime, eager",
        ),
    ],
)
def test_a_form_that_nothing_listens_to(
    bundle: Bundle, parity: Path, backends: list[str], form: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        verify_bundle(bundle, backends, checkpoint=parity / "checkpoint", **form)


def test_attention_in_a_precision_that_it_has_not(
    bundle: Bundle, parity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is run in its place, and nothing before it is refused."""
    monkeypatch.setattr(verify, "_stages", lambda *_: pytest.fail("the reference was computed first"))
    with pytest.raises(BackendError, match="cpu-bf16"):
        verify_bundle(bundle, ["eager"], checkpoint=parity / "checkpoint", attention="cpu-bf16")


def test_another_checkpoint_is_refused(bundle: Bundle, make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="is not the checkpoint this bundle was exported from"):
        verify_bundle(bundle, ["onnxruntime"], checkpoint=make_checkpoint())


def test_something_has_to_be_compared(bundle: Bundle) -> None:
    with pytest.raises(
        InputError, match="no backend to verify; choose from onnxruntime, openvino, tensorrt, aotinductor"
    ):
        verify_bundle(bundle, [])
    empty = VerificationReport("b", "fp32", (), {}, {})
    assert not empty.passed
    skipped = Row("onnxruntime", "video frames", None, 1e-3, "not run", "absolute")
    assert not VerificationReport("b", "fp32", (skipped,), {}, {}).passed


def test_documents(bundle: Bundle) -> None:
    report = verify_bundle(bundle, ["onnxruntime"])
    document: Mapping[str, Any] = json.loads(json.dumps(report.to_json()))
    assert document["passed"] is True
    assert (document["bundle"], document["dtype"]) == (bundle.folder.name, "fp32")
    row = document["rows"][0]
    assert row["check"] == bundle.table.graphs[0].name
    assert row["tolerance"] == TOLERANCES["bundle", "graph", "fp32"].bound
    assert {"torch", "onnxruntime", "proteus-deploy"} <= set(document["versions"])
    assert document["machine"]["system"]
    lines = report.to_markdown().splitlines()
    assert lines[0] == f"# Verification of {bundle.folder.name} (fp32)"
    assert "| backend | check | error | tolerance | kind | status | detail |" in lines
    assert sum(line.startswith("| onnxruntime |") for line in lines) == len(report.rows)
    assert "Passed. Tolerances:" in lines
    assert any(line.startswith("- graph: ") for line in lines)
