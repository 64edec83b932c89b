"""`export --quantize`: a bundle that says what was done to it, verifies, and is the same bytes each time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from proteus_deploy import GenerateRequest
from proteus_deploy.benchmarks.candidates import Candidate, Opener
from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.cli.main import main
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.export import export
from proteus_deploy.export.activation_statistics import ActivationStatistics
from proteus_deploy.export.calibrate import CalibrationCase, calibrate
from proteus_deploy.export.recipe import Recipe
from proteus_deploy.export.verify import verify_bundle
from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeBackend

RUINED = {
    "schema_version": 1,
    "name": "ruined",
    "graphs": {
        "denoiser": {
            "keep": [{"layers": "perceiver_cross_attention.*", "reason": "its weights are folded"}],
            "rules": [
                {"layers": "*", "weight": "int4", "granularity": "block", "block_size": 16},
            ],
        }
    },
}


@pytest.fixture(scope="module")
def checkpoint(parity: Path) -> Checkpoint:
    return Checkpoint.open(parity / "checkpoint")


@pytest.fixture(scope="module")
def traces(parity_bundle: Path, export_traced_once: Callable[[Path], Any]) -> Any:
    return export_traced_once(parity_bundle)


@pytest.fixture(autouse=True)
def _trace_once(traces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "export_graph", traces)


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one request on the parity checkpoint, in a folder."""
    from proteus_deploy import IdentityFeatures

    generator = torch.Generator().manual_seed(3)
    states = tuple(torch.randn(1, 10, 16, generator=generator) for _ in range(5))
    request = GenerateRequest(
        prompt="A woman waves",
        identity_prompt="A woman",
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=3,
        seed=7,
        identity=IdentityFeatures(torch.randn(1, 1, 40, generator=generator), states),
        condition_image=Image.new("RGB", (48, 32), (90, 120, 60)),
    )
    folder = tmp_path_factory.mktemp("calibration") / "statistics"
    calibrate(checkpoint, [CalibrationCase("one", request)], folder, groups=2)
    return folder


@pytest.fixture
def run(checkpoint: Checkpoint, statistics: Path, tmp_path: Path) -> Callable[..., Bundle]:
    """run(recipe, name) -> the bundle tmp_path/name."""

    def make(recipe: Recipe | str, name: str = "bundle", **settings: Any) -> Bundle:
        loaded = Recipe.load(recipe) if isinstance(recipe, str) else recipe
        settings.setdefault("statistics", ActivationStatistics.load(statistics))
        return export.export_bundle(checkpoint, tmp_path / name, recipe=loaded, **settings)

    return make


def test_manifest_says_what_was_done(run: Callable[..., Bundle], statistics: Path) -> None:
    bundle = run("int8")
    field = bundle.manifest["quantization"]
    recipe = Recipe.load("int8")
    assert Recipe.from_json(field["recipe"]) == recipe
    assert field["recipe_hash"] == recipe.hash
    loaded = ActivationStatistics.load(statistics)
    assert field["statistics"] == {"hash": loaded.hash, "made_up": False}
    assert field["absent_graphs"] == ["image_tower"]
    assert ActivationStatistics.load(bundle.folder / "calibration").hash == loaded.hash
    layers = bundle.manifest["graphs"]["denoiser"]["quantization"]["layers"]
    assert layers["transformer_blocks.1.attn1.to_q"]["precision"] == "int8 x int8"
    assert layers["transformer_blocks.0.attn1.to_q"]["precision"] == "int8", "its activations stay high"
    assert layers["proj_out"] == {"precision": "as exported", "reason": "its rounding is the velocity's own"}
    assert "quantization" not in bundle.manifest["graphs"]["vae_encoder"]
    assert bundle.manifest["parity"]["status"] == "measured"


def test_quantised_bundle_verifies(run: Callable[..., Bundle]) -> None:
    report = verify_bundle(run("int8"), ["onnxruntime"])
    assert report.passed, report.to_markdown()
    tolerances = {row.check: row.tolerance for row in report.rows}
    assert tolerances["denoiser"] > 1e-3 > tolerances["identity_fusion"], "graphs left alone keep their bound"
    assert any("frames" in row.check for row in report.rows)


def test_reference_stays_the_unquantised_one(run: Callable[..., Bundle], parity_bundle: Path) -> None:
    bundle = run("int8-weight")
    for file in sorted((parity_bundle / "reference").rglob("*")):
        if file.is_file():
            copy = bundle.folder / "reference" / file.relative_to(parity_bundle / "reference")
            assert copy.read_bytes() == file.read_bytes(), file.name


def test_same_input_same_bytes(run: Callable[..., Bundle]) -> None:
    for recipe in ("int8", "int4-weight"):
        one, two = run(recipe, f"{recipe}-1", reference="none"), run(recipe, f"{recipe}-2", reference="none")
        assert one.hash == two.hash
        assert one.manifest["files"] == two.manifest["files"]


def test_graphs_of_an_earlier_export_are_copied(
    run: Callable[..., Bundle], parity_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what the recipe changes is traced, and the bytes are those of a whole export."""
    traced = []
    original = export.__dict__["export_graph"]

    def trace(graph: Any, *rest: Any, **settings: Any) -> Any:
        traced.append(graph.name)
        return original(graph, *rest, **settings)

    whole = run("int8", "whole", reference="none")
    monkeypatch.setattr(export, "export_graph", trace)
    plain = Bundle.open(parity_bundle)
    copied = run("int8", "copied", reference="none", graphs_from=plain)
    assert sorted(traced) == ["denoiser", "text_encoder"]
    assert copied.manifest["files"] == whole.manifest["files"]
    assert copied.manifest["graphs"] == whole.manifest["graphs"]
    traced.clear()
    run("int8-weight", "again", reference="none", graphs_from=copied)
    assert sorted(traced) == ["denoiser", "text_encoder"], "quantised graphs of another recipe stay there"
    with pytest.raises(
        InputError, match=r"it has another dtype \(fp32, here bf16\); leave --graphs-from out"
    ):
        run("int8-weight", "other", reference="none", graphs_from=plain, dtype="bf16")
    foreign = {**plain.manifest, "versions": {"torch": "1.0"}}
    with pytest.raises(InputError, match="it has other versions"):
        run("int8", "old", graphs_from=replace(plain, manifest=foreign))


def test_a_ruined_recipe_fails_its_budget(run: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = run(Recipe.from_json(RUINED), statistics=None)
    assert bundle.manifest["quantization"]["statistics"] is None
    assert not (bundle.folder / "calibration").exists()
    budget = tmp_path / "budget.json"
    budget.write_text(json.dumps({"denoiser": 3e-2}))
    report = verify_bundle(bundle, ["onnxruntime"], budget=budget)
    assert not report.passed
    assert next(row for row in report.rows if row.check == "denoiser").status == "failed"


def test_a_bench_candidate_has_the_bundle_of_its_recipe(
    checkpoint: Checkpoint, statistics: Path, tmp_path: Path
) -> None:
    """Made when it is first asked for; a bundle of another recipe is refused."""
    candidates = [Candidate("exact", "onnxruntime", "fp32", name) for name in ("int8", "int8-weight")]
    opener = Opener(checkpoint, None, tmp_path, calibration=statistics)
    for candidate in (*candidates, candidates[0]):
        backend = opener(candidate)
        backend.close()
    bundles = [Bundle.open(folder) for folder in sorted(tmp_path.iterdir())]
    assert {bundle.manifest["quantization"]["recipe"]["name"] for bundle in bundles} == {
        "int8",
        "int8-weight",
    }
    assert len(bundles) == 2
    given = Opener(None, bundles[0], tmp_path)
    for candidate in (*candidates, Candidate("exact", "onnxruntime", "fp32")):
        name = bundles[0].manifest["quantization"]["recipe"]["name"]
        if candidate.recipe == name:
            given(candidate).close()
        else:
            wanted = candidate.name.split(":")[-1]
            with pytest.raises(
                BackendError, match=re.escape(f"in fp32+{name}, not {wanted}; export another")
            ):
                given(candidate)


def test_formats_without_a_tolerance_ask_for_one(run: Callable[..., Bundle], tmp_path: Path) -> None:
    rule = {"layers": "*", "weight": "int4", "granularity": "block", "block_size": 32}
    graphs = {"text_encoder": {"rules": [rule]}}
    recipe = Recipe.from_json({"schema_version": 1, "name": "mine", "graphs": graphs})
    bundle = run(recipe, statistics=None)
    with pytest.raises(
        InputError, match="no tolerance is known for int4 in text_encoder; give one with --bu"
    ):
        verify_bundle(bundle, ["onnxruntime"])
    budget = tmp_path / "budget.json"
    budget.write_text(json.dumps({"text_encoder": 2.0}))
    rows = verify_bundle(bundle, ["onnxruntime"], budget=budget).rows
    assert next(row for row in rows if row.check == "text_encoder").tolerance == 2.0


def test_nvfp4_is_refused_by_name(run: Callable[..., Bundle]) -> None:
    bundle = run("nvfp4-weight")
    assert (
        bundle.manifest["parity"]["reason"] == "ONNX Runtime has no kernel for the nvfp4 weights of denoiser"
    )
    with pytest.raises(
        BackendError, match="no kernel for the nvfp4 weights of denoiser; run this bundle with"
    ):
        OnnxRuntimeBackend(bundle)
    pytest.importorskip("openvino")
    rows = verify_bundle(bundle, ["openvino"]).rows
    assert all(row.status == "ok" for row in rows), rows


def test_engines_of_other_targets_are_refused(run: Callable[..., Bundle]) -> None:
    pytest.importorskip("tensorrt_rtx")
    from proteus_deploy.export.build import build_bundle

    for recipe, target, reason in (
        ("fp8", "sm86", "fp8_e4m3 needs sm89"),
        ("nvfp4-weight", "sm89", "nvfp4 needs sm100"),
        ("int4-weight", "sm75", "int4 needs sm80"),
    ):
        bundle = run(recipe, recipe, reference="none")
        with pytest.raises(InputError, match=f"is quantised for what {target} can't run: .*{reason}"):
            build_bundle(bundle, target)
        assert not (bundle.folder / "engines" / target).exists()


@pytest.mark.slow
def test_made_up_weights_have_made_up_statistics(parity: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(parity / "checkpoint", random_weights_seed=1)
    bundle = export.export_bundle(
        checkpoint, tmp_path / "bundle", recipe=Recipe.load("fp8-attention"), reference="none"
    )
    assert bundle.manifest["quantization"]["statistics"]["made_up"] is True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "targets"),
    [
        ("int8", ("sm89", "sm120")),
        ("fp8", ("sm89", "sm120")),
        ("fp8-attention", ("sm89", "sm120")),
        ("int4-weight", ("sm89", "sm120")),
        ("nvfp4-weight", ("sm120",)),
    ],
)
def test_engines_are_built(run: Callable[..., Bundle], recipe: str, targets: tuple[str, ...]) -> None:
    """Built, not run: there is no GPU to run them on."""
    pytest.importorskip("tensorrt_rtx")
    from proteus_deploy.export.build import build_bundle

    bundle = run(recipe, reference="none")
    for target in targets:
        engines = build_bundle(bundle, target, stages=["denoiser", "text_encoder"])
        assert engines.file("denoiser").stat().st_size > 0


def test_statistics_of_another_checkpoint(
    run: Callable[..., Bundle], statistics: Path, tmp_path: Path
) -> None:
    foreign = replace(ActivationStatistics.load(statistics), provenance={"checkpoint": "another"})
    with pytest.raises(InputError, match=r"recorded on another checkpoint \(hash 'another'"):
        run("int8", statistics=foreign)
    with pytest.raises(InputError, match=r"needs statistics of activations; .* proteus-deploy calibrate"):
        run("int8", statistics=None)
    assert not (tmp_path / "bundle").exists()


def test_command_line(
    parity: Path, statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, place = str(parity / "checkpoint"), str(tmp_path / "bundle")
    common = ["export", source, "--output-dir", place, "--reference", "none"]
    assert main([*common, "--quantize", "int8"]) == 2
    assert "proteus-deploy calibrate" in capsys.readouterr().err
    assert main([*common, "--quantize", "int9"]) == 2
    assert "no recipe 'int9'" in capsys.readouterr().err
    assert main([*common, "--calibration", str(statistics)]) == 2
    assert "add --quantize RECIPE" in capsys.readouterr().err
    assert main([*common, "--quantize", "int8", "--calibration", str(statistics)]) == 0
    assert "quantised by int8" in capsys.readouterr().out
    assert main(["inspect", place, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["quantization"]["recipe"] == "int8"
    assert document["quantization"]["layers"]["denoiser"]["int8 x int8"] == 12
    assert main(["inspect", place]) == 0
    assert "int8 x int8" in capsys.readouterr().out
