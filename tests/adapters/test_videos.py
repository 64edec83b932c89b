"""Videos with adapters: each is what merged weights make, in PyTorch and in a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy import GenerateRequest, Pipeline
from proteus_deploy.adapters import AdapterUse, TimestepGate, save_adapter
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import AdapterError, InputError
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.stage_table import ExportRanges, build_stage_table

Make = Callable[..., Any]
RANK = 8  # that the bundle has room for, as conftest.py exports it


@pytest.fixture(scope="module")
def bundle(adapter_bundle: Path) -> Iterator[Pipeline]:
    pytest.importorskip("onnxruntime")
    with Pipeline.from_bundle(adapter_bundle) as pipeline:
        yield pipeline


class Merged:
    """The reference: a denoiser whose weights have the adapters added that act at a step's timestep."""

    def __init__(self, checkpoint: Path) -> None:
        self.pipeline = Pipeline.from_checkpoint(checkpoint)
        self.module = self.pipeline.backend.runner("denoiser").module  # type: ignore[attr-defined]
        self.weights = {name: value.clone() for name, value in self.module.named_parameters()}

    def set(self, uses: Sequence[AdapterUse]) -> None:
        with torch.no_grad():
            for name, value in self.module.named_parameters():
                value.copy_(self.weights[name])
            for use in uses:
                for module, factors in use.adapter.factors.items():
                    self.module.get_submodule(module).weight += use.scale * (factors.up @ factors.down)

    def frames(self, request: GenerateRequest) -> Tensor:
        """By a stage that sets the weights anew for each timestep."""
        stages: Any = self.pipeline.stages
        plain = stages["denoiser"]

        def denoise(**inputs: Tensor) -> dict[str, Tensor]:
            timestep = int(inputs["timestep"][0])
            self.set([use for use in request.adapters if use.active_gate.active(timestep)])
            return plain(**inputs)  # type: ignore[no-any-return]

        stages["denoiser"] = denoise
        try:
            return self.pipeline.generate(replace(request, adapters=())).frames
        finally:
            stages["denoiser"] = plain


@pytest.fixture(scope="module")
def merged(parity: Path) -> Merged:
    return Merged(parity / "checkpoint")


@pytest.fixture
def requests(make_adapter: Make, small_request: Make) -> list[GenerateRequest]:
    """No adapter, one, two of different gates, and another one. Four steps, at 999, 749, 499 and 249."""
    anna, style = make_adapter(1, 3, gate=TimestepGate(0, 250)), make_adapter(2, 5)
    bert = make_adapter(3, 4, modules=("to_q", "to_out.0"), blocks=2, gate=TimestepGate(249, 500))
    return [
        small_request(num_inference_steps=4, seed=seed, adapters=uses)
        for seed, uses in enumerate(
            (
                (),
                (AdapterUse(anna),),
                (AdapterUse(anna, 0.7), AdapterUse(style, -0.5)),
                (AdapterUse(bert, 2.0),),
            )
        )
    ]


@pytest.mark.parametrize("index", range(4))
def test_as_merged_weights(
    parity_pipeline: Pipeline, bundle: Pipeline, merged: Merged, requests: list[Any], index: int
) -> None:
    expected = merged.frames(requests[index])
    if requests[index].adapters:
        plain = merged.frames(replace(requests[index], adapters=()))
        assert (expected - plain).abs().max() > 0.01, "the adapter does something"
    for pipeline in (parity_pipeline, bundle):
        error = (pipeline.generate(requests[index]).frames - expected).abs().max()
        assert error < 1e-4, pipeline.backend.name


def test_different_ones_in_one_batch(
    parity_pipeline: Pipeline, bundle: Pipeline, merged: Merged, requests: list[GenerateRequest]
) -> None:
    for pair in (requests[1:3], [requests[3], requests[0]]):
        for pipeline in (parity_pipeline, bundle):
            videos = pipeline.generate_batch(pair)
            for video, request in zip(videos, pair, strict=True):
                error = (video.frames - merged.frames(request)).abs().max()
                assert error < 1e-4, (pipeline.backend.name, request.seed)


def _step_inputs(pipeline: Pipeline, rows: int) -> dict[str, Tensor]:
    """Random ones at timestep 100, for 3 latent frames of 4 x 6."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    config, backbone = pipeline.config, pipeline.config.backbone
    return {
        "latents": normal(rows, 3, backbone.in_channels, 4, 6),
        "text": normal(rows, backbone.max_text_seq_length, backbone.text_embed_dim),
        "timestep": torch.full((rows,), 100),
        "face_tokens": normal(rows, config.face_tokens, config.identity_attention.face_dim),
    }


def test_the_velocity_of_a_bundle(bundle: Pipeline, merged: Merged, make_adapter: Make) -> None:
    """One step, row by row: none, one, two and others at once, against merged weights."""
    from proteus_deploy.adapters.inputs import stack_adapters

    anna, style = AdapterUse(make_adapter(1, 3), 0.7), AdapterUse(make_adapter(2, 5))
    rows: list[tuple[AdapterUse, ...]] = [(), (anna,), (anna, style), (style,)]
    inputs = _step_inputs(bundle, 4)
    stacked = stack_adapters(rows, bundle.config.backbone, torch.float32, torch.device("cpu"))
    assert stacked is not None
    found = bundle.stages["denoiser"](**inputs, **stacked.at(100, 4))["velocity"]
    for row, uses in enumerate(rows):
        merged.set(uses)
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        expected = merged.pipeline.stages["denoiser"](**own)["velocity"]
        assert (found[row : row + 1] - expected).abs().max() < 1e-4


def test_the_gate_is_right_to_the_step(
    parity_pipeline: Pipeline, bundle: Pipeline, make_adapter: Make, small_request: Make
) -> None:
    """Latents are the plain ones up to the first step in the gate, and others after it."""

    def latents_of(pipeline: Pipeline, request: GenerateRequest) -> list[tuple[int, Tensor]]:
        steps: list[tuple[int, Tensor]] = []
        pipeline.generate(request, on_step=lambda event: steps.append((event.timestep, event.latents)))
        return steps

    adapter, request = make_adapter(5), small_request(num_inference_steps=5)
    for pipeline in (parity_pipeline, bundle):
        steps = latents_of(pipeline, request)
        plain, timesteps = dict(steps), [timestep for timestep, _ in steps]
        for first in (1, 3):
            gate = TimestepGate(0, timesteps[first] + 1)
            steps = latents_of(pipeline, replace(request, adapters=(AdapterUse(adapter, gate=gate),)))
            changed = [bool((latents - plain[timestep]).abs().max() > 1e-3) for timestep, latents in steps]
            assert changed == [index >= first for index in range(5)]


def test_swapping_leaves_the_graph_alone(bundle: Pipeline, requests: list[GenerateRequest]) -> None:
    runner = bundle.backend.runner("denoiser")
    first = bundle.generate(requests[1]).frames
    bundle.generate(requests[3])
    assert torch.equal(bundle.generate(requests[1]).frames, first)
    assert bundle.backend.runner("denoiser") is runner


def test_a_quantised_bundle(
    parity: Path, adapter_bundle: Path, bundle: Pipeline, make_adapter: Make, tmp_path: Path
) -> None:
    """Codes are the layers' own: the adapter's products stay as precise as they were."""
    import onnx

    from proteus_deploy.adapters.inputs import stack_adapters
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.export.export import export_bundle
    from proteus_deploy.export.recipe import Recipe

    rule = {"layers": "transformer_blocks.*", "weight": "int8", "granularity": "channel"}
    recipe = {"schema_version": 1, "name": "w8", "graphs": {"denoiser": {"rules": [rule]}}}
    exported = export_bundle(
        Checkpoint.open(parity / "checkpoint"),
        tmp_path / "quantised",
        ranges=ExportRanges(max_videos=2, max_lora_rank=RANK),
        reference="none",
        recipe=Recipe.from_json(recipe),
        graphs_from=Bundle.open(adapter_bundle),
    )
    nodes = onnx.load(exported.onnx_file("denoiser")).graph.node
    coded = [node for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(coded) == 12, "six projections of each block but the first and the last"
    assert not any("adapter" in name for node in coded for name in node.input)
    inputs, backbone = _step_inputs(bundle, 2), bundle.config.backbone
    use = AdapterUse(make_adapter(1, 3), 0.7)
    stacked = stack_adapters([(use,)], backbone, torch.float32, torch.device("cpu"))
    assert stacked is not None
    with Pipeline.from_bundle(exported) as quantised:
        velocities = [
            [pipeline.stages["denoiser"](**inputs, **more)["velocity"] for pipeline in (bundle, quantised)]
            for more in ({}, stacked.at(100, 2))
        ]
    idle, active = ((whole - coded).square().mean().sqrt() for whole, coded in velocities)
    assert 0 < active < 2 * idle
    assert (velocities[0][0] - velocities[1][0]).square().mean().sqrt() > 10 * active


def test_an_engine(adapter_bundle: Path, tmp_path: Path) -> None:
    """Built, not run: its profile takes every rank up to the bundle's."""
    pytest.importorskip("tensorrt_rtx")
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.export.build import build_bundle

    copy = Bundle.open(shutil.copytree(adapter_bundle, tmp_path / "bundle"))
    engines = build_bundle(copy, "sm89", stages=["denoiser"])
    found = {spec["name"]: spec for spec in engines.document["graphs"]["denoiser"]["contract"]["inputs"]}
    assert {name: found[name]["shape"] for name in ("adapter_down", "adapter_scale")} == {
        "adapter_down": [-1, 4, 4, -1, 96],
        "adapter_scale": [-1, -1],
    }


def test_openvino(adapter_bundle: Path, merged: Merged, requests: list[GenerateRequest]) -> None:
    pytest.importorskip("openvino")
    with Pipeline.from_bundle(adapter_bundle, backend="openvino") as pipeline:
        for request in (requests[0], requests[2]):
            assert (pipeline.generate(request).frames - merged.frames(request)).abs().max() < 1e-4


def test_compiled(make_checkpoint: Make, make_adapter: Make) -> None:
    """A denoiser of one block, which compiles fast."""
    from proteus_deploy.adapters.inputs import stack_adapters
    from proteus_deploy.stage_calls import DenoiserStage

    checkpoint = Checkpoint.open(make_checkpoint(num_layers=1))
    reference = Merged(checkpoint.folder)
    config = reference.pipeline.config
    stage = DenoiserStage(EagerBackend(checkpoint, compiled=True, folded=True), config)
    use, inputs = AdapterUse(make_adapter(1, blocks=1), 0.7), _step_inputs(reference.pipeline, 2)
    stacked = stack_adapters([(use,)], config.backbone, torch.float32, torch.device("cpu"))
    assert stacked is not None
    reference.set([use])
    expected = reference.pipeline.stages["denoiser"](**inputs)["velocity"]
    assert (stage(**inputs, **stacked.at(100, 2))["velocity"] - expected).abs().max() < 1e-4


def test_metadata_say_which(parity_pipeline: Pipeline, requests: list[GenerateRequest]) -> None:
    metadata = parity_pipeline.generate(requests[1]).metadata["request"]["adapters"]
    use = requests[1].adapters[0]
    assert metadata == [{"name": "adapter", "hash": use.adapter.hash, "scale": 1.0, "gate": [0, 250]}]


def test_another_models(
    parity_pipeline: Pipeline, parity: Path, bundle: Pipeline, make_adapter: Make, small_request: Make
) -> None:
    own = Checkpoint.open(parity / "checkpoint").hash
    for pipeline in (parity_pipeline, bundle):
        pipeline.generate(small_request(adapters=(AdapterUse(make_adapter(base=own)),)))
        for adapter, message in (
            (make_adapter(base="f" * 64), "was trained on the checkpoint ffffffffffff…"),
            (make_adapter(blocks=5), "changes block 4; this denoiser's blocks are 0 to 3"),
            (make_adapter(width=64), "64 wide; this one is 96 wide"),
        ):
            with pytest.raises(AdapterError, match=message):
                pipeline.generate(small_request(adapters=(AdapterUse(adapter),)))


def test_no_room(parity_bundle: Path, bundle: Pipeline, make_adapter: Make, small_request: Make) -> None:
    use = AdapterUse(make_adapter(0, 5))
    with pytest.raises(AdapterError, match=r"sum to 10 = 5 \(adapter\) \+ 5 \(adapter\).*--max-lora-rank 8"):
        bundle.generate(small_request(adapters=(use, use)))
    with (
        Pipeline.from_bundle(parity_bundle) as plain,
        pytest.raises(AdapterError, match="export it again with --max-lora-rank"),
    ):
        plain.generate(small_request(adapters=(use,)))


@pytest.mark.parametrize(
    ("adapters", "message"), [("anna", "pass a tuple of"), (("anna.safetensors",), "read_adapter")]
)
def test_wrong_types(parity_pipeline: Pipeline, small_request: Make, adapters: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parity_pipeline.generate(small_request(adapters=adapters))


@pytest.mark.parametrize("rank", [-1, 513])
def test_ranges(parity: Path, rank: int) -> None:
    with pytest.raises(InputError, match=f"--max-lora-rank is {rank}; it must be 0 to 512"):
        build_stage_table(Checkpoint.open(parity / "checkpoint"), ExportRanges(max_lora_rank=rank))


def test_a_checkpoint_without_rotary_positions(
    make_checkpoint: Make, make_adapter: Make, small_request: Make
) -> None:
    folder = make_checkpoint(use_rotary_positional_embeddings=False)
    with pytest.raises(InputError, match="no rotary positions"):
        build_stage_table(Checkpoint.open(folder), ExportRanges(max_lora_rank=4))
    with Pipeline.from_checkpoint(folder) as pipeline:
        backbone = pipeline.config.backbone
        height, width = 8 * backbone.sample_height, 8 * backbone.sample_width
        size = {"height": height, "width": width, "num_frames": backbone.sample_frames}
        request = small_request(**size, adapters=(AdapterUse(make_adapter()),))
        with pytest.raises(AdapterError, match="no rotary positions"):
            pipeline.generate(request)


def test_the_command(tmp_path: Path, make_adapter: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model's video says with which adapter it was made; what is wrong is said at once."""
    from PIL import Image

    from proteus_deploy.cli.main import main
    from proteus_deploy.tiny.trained import MODEL
    from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_photo
    from proteus_deploy.video import read_video

    adapter = make_adapter(blocks=6, width=192, base=Checkpoint.open(MODEL).hash)
    save_adapter(adapter, tmp_path / "anna.safetensors")
    Image.fromarray(make_photo(HELD_OUT_SEEDS[0], 0).image).save(tmp_path / "photo.png")
    words = ["generate", str(MODEL), "--photo", str(tmp_path / "photo.png"), "--prompt", "a person waves"]
    words += ["--num-inference-steps", "2", "--output", str(tmp_path / "video.mp4"), "--adapter"]
    assert main([*words, f"{tmp_path}/anna.safetensors:0.5@0-600"]) == 0
    made = read_video(tmp_path / "video.mp4").metadata["request"]["adapters"]
    assert made == [{"name": "anna", "hash": adapter.hash, "scale": 0.5, "gate": [0, 600]}]
    capsys.readouterr()
    assert main([*words, f"{tmp_path}/bert.safetensors"]) == 2
    assert "bert.safetensors is not there" in capsys.readouterr().err


def test_training_on_a_bundles_own_weights(
    adapter_bundle: Path, parity: Path, small_request: Callable[..., GenerateRequest]
) -> None:
    """The loop's tail on networks out of the ONNX files is the checkpoint's, with the same gradients."""
    from proteus_deploy.personalize.model import PersonalModel
    from proteus_deploy.personalize.settings import PersonalizeSettings
    from proteus_deploy.personalize.tail import TailSampler
    from proteus_deploy.personalize.trainable import TrainableAdapter

    pytest.importorskip("onnxruntime")
    request = small_request(num_inference_steps=5)
    found = []
    for open_model, folder in (
        (PersonalModel.from_checkpoint, parity / "checkpoint"),
        (PersonalModel.from_bundle, adapter_bundle),
    ):
        model = open_model(folder)
        with model.pipeline as pipeline:
            settings = PersonalizeSettings(rank=2, gate_high=500)
            adapter = TrainableAdapter(pipeline.config.backbone, settings)
            sampler = TailSampler(model.backend, settings.gate)
            head = sampler.head(pipeline.start(request))
            inputs = adapter.at(model.backend.dtype, model.backend.device)
            frames = sampler.frames(head, sampler.finish(head, inputs))
            frames.square().mean().backward()
            assert adapter.up.grad is not None
            found.append((model.base, frames.detach(), adapter.up.grad))
    (base, frames, gradient), (bundle_base, bundle_frames, bundle_gradient) = found
    assert bundle_base == base
    assert torch.allclose(bundle_frames, frames, atol=1e-5)
    assert gradient.abs().max() > 0
    assert torch.allclose(bundle_gradient, gradient, atol=1e-3 * float(gradient.abs().max()))


def test_bundles_that_no_adapter_is_trained_on(parity_bundle: Path, adapter_bundle: Path) -> None:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.errors import BundleError
    from proteus_deploy.personalize.model import PersonalModel
    from proteus_deploy.personalize.networks import DifferentiableBackend

    with pytest.raises(AdapterError, match="exported without room for adapters"):
        PersonalModel.from_bundle(parity_bundle)
    bundle = Bundle.open(adapter_bundle)
    graphs = {**bundle.manifest["graphs"]}
    graphs["denoiser"] = {**graphs["denoiser"], "quantization": {"weights": "int8"}}
    quantised = replace(bundle, manifest={**bundle.manifest, "graphs": graphs})
    with pytest.raises(
        BundleError, match=r"is quantised \(denoiser\), and rounded weights give no gradients"
    ):
        DifferentiableBackend.of_bundle(quantised, None)  # type: ignore[arg-type]


def test_a_bundle_of_half_precision_beside_gradients_in_float32(adapter_bundle: Path) -> None:
    """What needs no gradients runs in the bundle's own precision, and comes back in the network's."""
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.personalize.networks import DifferentiableBackend

    bundle = Bundle.open(adapter_bundle)
    asked: list[torch.dtype] = []

    class Half:
        name, checks_ranges = "half", False
        dtype, device, table = torch.float16, torch.device("cpu"), bundle.table

        def runner(self, _: str) -> Callable[..., dict[str, Tensor]]:
            def run(image: Tensor) -> dict[str, Tensor]:
                asked.append(image.dtype)
                return {"moments": image.mean(dim=(2, 3), keepdim=True)}

            return run

    backend = DifferentiableBackend.of_bundle(bundle, Half())  # type: ignore[arg-type]
    sizes = bundle.table.graph("vae_encoder").input("image").axes
    image = torch.zeros([axis if isinstance(axis, int) else 16 for axis in sizes])
    assert backend.runner("vae_encoder")(image=image)["moments"].dtype == torch.float32
    assert asked == [torch.float16]


class Refitted(EagerBackend):
    """Takes adapters as a refitted engine does: other weights, one set of them."""

    refits = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        # without inputs for adapters
        super().__init__(checkpoint, table=build_stage_table(checkpoint, ExportRanges(max_videos=2)))
        self.exported: dict[str, Tensor] = {}
        self.keys: list[Any] = [()]

    def refit(self, graph: str, key: Any, deltas: Callable[[], Mapping[str, Tensor]]) -> float:
        if key == self.keys[-1]:
            return 0.0
        self.keys.append(key)
        with torch.inference_mode(False), torch.no_grad():
            parameters = dict(self.runner(graph).module.named_parameters())
            for name, value in self.exported.items():
                parameters[name].copy_(value)
            for name, delta in deltas().items():
                self.exported.setdefault(name, parameters[name].clone())
                parameters[name].add_(delta.clone())
        return 0.1


def test_refitted_weights(parity: Path, parity_pipeline: Pipeline, requests: list[GenerateRequest]) -> None:
    """Behind the same call: as with inputs, changed when a gate opens, and taken back for the next video."""
    checkpoint = Checkpoint.open(parity / "checkpoint")
    backend, parts = Refitted(checkpoint), (checkpoint.vae, checkpoint.scheduler, checkpoint.tokenizer)
    with Pipeline(backend, checkpoint.transformer, *parts, checkpoint.face_encoder) as pipeline:
        for request in (*requests, requests[0]):
            expected = parity_pipeline.generate(request).frames
            assert (pipeline.generate(request).frames - expected).abs().max() < 1e-4
        anna, style, bert = requests[1].adapters[0], requests[2].adapters[1], requests[3].adapters[0]
        hashes = [use.adapter.hash for use in (anna, style, bert)]
        assert backend.keys == [
            (),
            ((hashes[0], 1.0),),  # in the last of four steps
            ((hashes[1], -0.5),),
            ((hashes[0], 0.7), (hashes[1], -0.5)),
            (),
            ((hashes[2], 2.0),),  # in the third alone
            (),
        ]
        with pytest.raises(AdapterError, match=r"one set of weights; .*--max-lora-rank"):
            pipeline.generate_batch(requests[:2])
        alike = [requests[1], replace(requests[1], seed=9)]
        for video, request in zip(pipeline.generate_batch(alike), alike, strict=True):
            assert (video.frames - parity_pipeline.generate(request).frames).abs().max() < 1e-4
