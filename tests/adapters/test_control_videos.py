"""Control videos: alone and with adapters, in PyTorch and in a bundle."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from proteus_deploy import GenerateRequest, Pipeline
from proteus_deploy.adapters import AdapterUse, TimestepGate, read_adapter, save_adapter
from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.conditioning import Conditioner
from proteus_deploy.control import Control, control_pixels
from proteus_deploy.errors import BackendError, BundleError, InputError
from proteus_deploy.policies.plan import Plan
from proteus_deploy.policies.step_schedule import StepSchedule
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.video import Video

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def eager(parity: Path, controlnet: Path) -> Iterator[Pipeline]:
    with Pipeline.from_checkpoint(parity / "checkpoint", controlnet=controlnet) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def bundle(control_bundle: Path) -> Iterator[Pipeline]:
    pytest.importorskip("onnxruntime")
    with Pipeline.from_bundle(control_bundle) as pipeline:
        yield pipeline


def poses(frames: int = 5, height: int = 32, width: int = 48, *, seed: int = 0) -> np.ndarray[Any, Any]:
    """A control video: a bright square that wanders over noise."""
    video = np.random.default_rng(seed).integers(0, 60, (frames, height, width, 3), dtype=np.uint8)
    for index, frame in enumerate(video):
        frame[4 : 4 + height // 2, 2 * index : 2 * index + height // 2] = 255
    return video


@pytest.fixture
def composed(make_adapter: Make, small_request: Make, tmp_path: Path) -> GenerateRequest:
    """A style LoRA in diffusers' format, a person's adapter in the last quarter, and a control video."""
    from safetensors.torch import save_file

    style = {
        f"transformer.{module}.lora_{side}.weight": value.contiguous()
        for module, factors in make_adapter(2, 5).factors.items()
        for side, value in (("A", factors.down), ("B", factors.up))
    }
    save_file(style, tmp_path / "style.safetensors")
    save_adapter(make_adapter(1, 3, gate=TimestepGate(0, 250)), tmp_path / "anna.safetensors")
    uses = (
        AdapterUse(read_adapter(tmp_path / "style.safetensors"), 0.5),
        AdapterUse(read_adapter(tmp_path / "anna.safetensors")),
    )
    request = small_request(num_inference_steps=4, adapters=uses, control=Control(poses(), 0.6, end=0.75))
    assert isinstance(request, GenerateRequest)
    return request


def test_with_a_style_and_a_person(
    eager: Pipeline, bundle: Pipeline, control_bundle: Path, composed: GenerateRequest
) -> None:
    """In one request, each of them to an effect, and the bundle's video is the reference's."""
    expected = eager.generate(composed)
    for less in ({"control": None}, {"adapters": composed.adapters[:1]}, {"adapters": composed.adapters[1:]}):
        assert (eager.generate(replace(composed, **less)).frames - expected.frames).abs().max() > 0.01
    assert (bundle.generate(composed).frames - expected.frames).abs().max() < 1e-4
    told = expected.metadata["request"]
    digest = hashlib.sha256(poses().tobytes()).hexdigest()
    acting = {"scale": 0.6, "start": 0.0, "end": 0.75}
    assert told["control"] == {"video": None, "sha256": digest, **acting}
    network = Bundle.open(control_bundle).controlnet_hash
    assert expected.metadata["controlnet"] == bundle.generate(composed).metadata["controlnet"] == network
    assert len(network or "") == 64
    assert len(told["adapters"]) == 2


def test_without_a_control_video(
    parity_pipeline: Pipeline, eager: Pipeline, bundle: Pipeline, composed: GenerateRequest
) -> None:
    """A pipeline with a control network makes the videos that it makes without one."""
    request = replace(composed, control=None)
    plain = parity_pipeline.generate(request).frames
    assert torch.equal(eager.generate(request).frames, plain)
    assert torch.equal(eager.generate(replace(request, control=Control(poses(), 0.0))).frames, plain)
    assert (bundle.generate(request).frames - plain).abs().max() < 1e-4


def test_it_acts_in_its_steps(eager: Pipeline, bundle: Pipeline, small_request: Make) -> None:
    request = small_request(num_inference_steps=5)

    def latents_of(pipeline: Pipeline, control: Control | None) -> list[Tensor]:
        steps: list[Tensor] = []
        pipeline.generate(
            replace(request, control=control), on_step=lambda event: steps.append(event.latents)
        )
        return steps

    calls: list[int] = []
    for pipeline in (eager, bundle):
        plain, stages = latents_of(pipeline, None), pipeline.stages
        network: Any = stages["controlnet"]

        def counted(network: Any = network, **inputs: Tensor) -> Any:
            calls.append(int(inputs["timestep"][0]))
            return network(**inputs)

        stages["controlnet"] = counted  # type: ignore[assignment]
        try:
            steps = latents_of(pipeline, Control(poses(), start=0.4, end=0.8))  # steps 2 and 3 of 0 to 4
        finally:
            stages["controlnet"] = network
        changed = [bool((one - other).abs().max() > 1e-3) for one, other in zip(steps, plain, strict=True)]
        assert changed == [False, False, True, True, True]
    assert len(calls) == 4, "two steps on each pipeline"


def test_the_scale_is_of_the_residuals(eager: Pipeline, small_request: Make) -> None:
    """The denoiser gets the network's residuals times the scale, for both rows of guidance."""
    seen: list[Tensor] = []
    denoiser: Any = eager.stages["denoiser"]

    def watched(**inputs: Tensor) -> Any:
        seen.append(torch.stack([inputs["control_00"], inputs["control_01"]], dim=1))
        return denoiser(**inputs)

    eager.stages["denoiser"] = watched  # type: ignore[assignment]
    try:
        for scale in (1.0, -0.5):
            eager.generate(small_request(num_inference_steps=1, control=Control(poses(), scale)))
    finally:
        eager.stages["denoiser"] = denoiser
    assert seen[0].shape == (2, 2, 2, 2, 3, 96)  # rows, blocks, token frames, rows, columns, width
    assert torch.equal(seen[1], -0.5 * seen[0])
    assert (seen[0][0] - seen[0][1]).abs().max() > 1e-3, "the prompts differ"


def test_one_with_and_one_without_in_a_batch(eager: Pipeline, small_request: Make) -> None:
    requests = [
        small_request(seed=1, control=Control(poses(seed=1))),
        small_request(seed=2),
        small_request(seed=3, control=Control(poses(seed=3), 0.5, end=0.5)),
    ]
    for video, request in zip(eager.generate_batch(requests), requests, strict=True):
        assert (video.frames - eager.generate(request).frames).abs().max() < 1e-4


def test_frames_of_another_size_and_length(tmp_path: Path) -> None:
    """Scaled to cover, cut in the middle; what is too long loses its end; files and arrays are alike."""
    video = np.zeros((7, 40, 40, 3), dtype=np.uint8)
    video[:, 10:30] = 255  # stays in the middle: a half of the height, which 48 x 48 cuts to three quarters
    video[5:] = 127
    pixels = control_pixels(Control(video), 5, 32, 48)
    assert pixels.shape == (1, 8, 3, 32, 48)
    assert torch.equal(pixels[:, 0], pixels[:, 3])
    assert torch.equal(pixels[:, :4], pixels[:, 4:])
    column = pixels[0, 0, 0, :, 24]
    assert [float(column[row]) for row in (0, 16, 31)] == [-1.0, 1.0, -1.0]
    assert 23 <= int((column > 0).sum()) <= 25
    frames = torch.from_numpy(video).permute(0, 3, 1, 2)[None].float() / 255
    Video(frames, 8, {}).save(tmp_path / "poses.mp4")
    from_file = control_pixels(Control(tmp_path / "poses.mp4"), 5, 32, 48)
    assert (from_file - pixels).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("poses.mp4", r"control is 'poses.mp4'; pass Control\(video, scale\)"),
        (Control(poses(), float("nan")), "control.scale is nan"),
        (Control(poses(), True), "control.scale is True"),
        (Control(poses(), start=0.5, end=0.5), "control acts from 0.5 to 0.5"),
        (Control(poses(), end=1.5), "control acts from 0.0 to 1.5"),
        (Control(poses(4)), "has 4 frames, and the video is to have 5"),
        (Control(poses()[..., 0]), r"control.video is uint8 \[5, 32, 48\]; pass a video file"),
        (Control(poses().astype(np.float32)), "control.video is float32"),
        (Control("absent.mp4"), "absent.mp4"),
        (Control(poses()[:, :0]), r"control.video is uint8 \[5, 0, 48, 3\]"),
        (Control(poses(), 10**400), "control.scale is 1000"),
    ],
)
def test_wrong_ones(
    eager: Pipeline, small_request: Make, monkeypatch: pytest.MonkeyPatch, control: Any, message: str
) -> None:
    """Refused before any network runs."""
    monkeypatch.setattr(Conditioner, "_identity", lambda *_: pytest.fail("work was done first"))
    with pytest.raises(InputError, match=message):
        eager.generate(small_request(control=control))


def test_what_numpy_has(eager: Pipeline, small_request: Make) -> None:
    """Numbers of its types, and arrays that are views or can't be written to."""
    video = poses()
    video.setflags(write=False)
    plain = eager.generate(small_request(control=Control(video, 0.5))).frames
    turned = Control(video[::-1, :, :, ::-1][::-1, :, :, ::-1], np.float32(0.5), start=np.int64(0))  # type: ignore[arg-type]
    made = eager.generate(small_request(control=turned))
    assert torch.equal(made.frames, plain)
    assert json.dumps(made.metadata["request"]["control"])
    other = eager.generate(small_request(control=Control(video[..., ::-1], 0.5))).frames
    assert not torch.equal(other, plain)


def test_a_step_cache_keeps_to_its_side(eager: Pipeline, make_adapter: Make, small_request: Make) -> None:
    """Where a control video or an adapter begins or ends to act, nothing of before is used."""
    plan = Plan(step_cache=StepSchedule(total=8, steps=(0,)))
    request = small_request(num_inference_steps=8, plan=plan)

    def computed(**fields: Any) -> list[int]:
        return eager.generate(replace(request, **fields)).metadata["steps"]["computed"]  # type: ignore[no-any-return]

    assert computed() == [0]
    assert computed(control=Control(poses())) == [0]
    assert computed(control=Control(poses(), start=1 / 8, end=3 / 8)) == [0, 1, 3]
    gate = TimestepGate(0, 999 - 3 * 125 + 1)  # from the fourth step on
    assert computed(adapters=(AdapterUse(make_adapter(1), gate=gate),)) == [0, 3]


def test_a_bundle_goes_into_no_source(parity: Path, controlnet: Path) -> None:
    from proteus_deploy.export.export import export_bundle

    checkpoint = Checkpoint.open(parity / "checkpoint", controlnet=controlnet)
    with pytest.raises(InputError, match="are in one another"):
        export_bundle(checkpoint, controlnet / "bundle")


def test_no_control_network(
    parity: Path, parity_pipeline: Pipeline, control_bundle: Path, small_request: Make
) -> None:
    with pytest.raises(
        InputError, match=r"open the checkpoint with controlnet=FOLDER, or export .*--controlnet"
    ):
        parity_pipeline.generate(small_request(control=Control(poses())))
    with pytest.raises(
        BackendError, match=r"only one of the checkpoint .* and the bundle has a control network"
    ):
        EagerBackend(Checkpoint.open(parity / "checkpoint"), table=Bundle.open(control_bundle).table)


def test_where_it_can_not_go(
    parity: Path, control_bundle: Path, parity_bundle: Path, controlnet: Path
) -> None:
    """Said before any work: packages, training, and reuse by another export."""
    from proteus_deploy.export.aot_package import build_packages
    from proteus_deploy.export.reused_graphs import check_reusable
    from proteus_deploy.personalize.networks import DifferentiableBackend

    bundle, checkpoint = Bundle.open(control_bundle), Checkpoint.open(parity / "checkpoint")
    with pytest.raises(InputError, match="AOTInductor packages don't hold yet"):
        build_packages(bundle, checkpoint)
    with pytest.raises(BundleError, match="train on the checkpoint or a bundle without --controlnet"):
        DifferentiableBackend.of_bundle(bundle, others=None)  # type: ignore[arg-type]
    for source, ours in (
        (control_bundle, checkpoint),
        (parity_bundle, Checkpoint.open(checkpoint.folder, controlnet=controlnet)),
    ):
        given = Bundle.open(source)
        with pytest.raises(InputError, match="it has another control network"):
            check_reusable(given, ours, given.table, given.dtype, given.manifest["versions"])


def test_verify_holds_the_whole_chain(parity: Path, controlnet: Path, control_bundle: Path) -> None:
    """The recorded video was made with a control video, and each of its graphs has recorded outputs."""
    from proteus_deploy.export.reference import load_video
    from proteus_deploy.export.verify import verify_bundle

    recorded = load_video(control_bundle / "reference")
    assert recorded is not None
    assert isinstance(recorded.request.control, Control)
    bundle, checkpoint = Bundle.open(control_bundle), parity / "checkpoint"
    report = verify_bundle(bundle, ["onnxruntime"])
    assert report.passed
    found = " ".join(row.check for row in report.rows)
    assert all(name in found for name in ("control_encoder", "controlnet", "denoiser", "video"))
    assert verify_bundle(bundle, ["eager"], checkpoint=checkpoint, controlnet=controlnet).passed
    with pytest.raises(InputError, match="with another control network, and none was given; pass its own"):
        verify_bundle(bundle, ["eager"], checkpoint=checkpoint)


def test_openvino(control_bundle: Path, eager: Pipeline, composed: GenerateRequest) -> None:
    pytest.importorskip("openvino")
    with Pipeline.from_bundle(control_bundle, backend="openvino") as pipeline:
        assert (pipeline.generate(composed).frames - eager.generate(composed).frames).abs().max() < 1e-4


def test_low_memory(parity: Path, controlnet: Path, eager: Pipeline, composed: GenerateRequest) -> None:
    folder = parity / "checkpoint"
    with Pipeline.from_checkpoint(folder, controlnet=controlnet, low_memory=True) as pipeline:
        held: list[set[str]] = []
        frames = pipeline.generate(
            composed,
            on_step=lambda _: held.append(set(pipeline.backend._runners)),  # type: ignore[attr-defined]
        ).frames
        assert held == [{"denoiser", "controlnet"}] * 4
        assert not pipeline.backend._runners  # type: ignore[attr-defined]
        assert torch.equal(frames, eager.generate(composed).frames)


def test_compiled(make_checkpoint: Make, tmp_path: Path) -> None:
    """A denoiser of one block, which compiles fast; with residuals and without."""
    from proteus_deploy.stage_calls import DenoiserStage
    from proteus_deploy.tiny.controlnet import write_tiny_controlnet

    folder = make_checkpoint(num_layers=1)
    network = write_tiny_controlnet(tmp_path / "controlnet", folder, layers=1)
    checkpoint = Checkpoint.open(folder, controlnet=network)
    config = checkpoint.transformer
    plain, compiled = EagerBackend(checkpoint), EagerBackend(checkpoint, compiled=True, folded=True)
    inputs = {
        "latents": torch.randn(2, 2, 32, 4, 6),
        "text": torch.randn(2, 40, 64),
        "timestep": torch.tensor([100, 100]),
        "face_tokens": torch.randn(2, config.face_tokens, config.identity_attention.face_dim),
    }
    control = torch.randn(2, 2, 2, 3, 96)
    found = [
        DenoiserStage(backend, config)(**inputs, control_00=control)["velocity"]
        for backend in (plain, compiled)
    ]
    assert (found[0] - found[1]).abs().max() < 1e-4
    without = [DenoiserStage(backend, config)(**inputs)["velocity"] for backend in (plain, compiled)]
    assert (without[0] - without[1]).abs().max() < 1e-4
    assert (without[0] - found[0]).abs().max() > 0.01


def test_a_graph_without_room_for_adapters(parity: Path, controlnet: Path, tmp_path: Path) -> None:
    """The residuals are the denoiser's last input then."""
    pytest.importorskip("onnxruntime")
    from proteus_deploy.export.onnx_graph import export_graph
    from proteus_deploy.network_factory import NetworkFactory
    from proteus_deploy.onnxruntime_session import PROVIDERS, open_session
    from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeGraph
    from proteus_deploy.stage_table import build_stage_table
    from proteus_deploy.stages import sample_inputs

    checkpoint = Checkpoint.open(parity / "checkpoint", controlnet=controlnet)
    table = build_stage_table(checkpoint)
    graph = table.graph("denoiser")
    assert graph.inputs[-1].name == "control_01"
    file = tmp_path / "denoiser.onnx"
    export_graph(graph, table, NetworkFactory(checkpoint, folded=True)("denoiser"), file, dtype=torch.float32)
    inputs = sample_inputs(graph, table.sizes("opt"))
    found = OnnxRuntimeGraph(graph, open_session(file, PROVIDERS["cpu"], None))(**inputs)["velocity"]
    expected = EagerBackend(checkpoint, table=table).runner("denoiser")(**inputs)["velocity"]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_shared_sequence_takes_none(eager: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from proteus_deploy import sequence_parallel

    monkeypatch.setattr(sequence_parallel, "check_process_group", lambda *_: None)
    with pytest.raises(BackendError, match="can't share its sequence; open it without controlnet"):
        sequence_parallel.use_sequence_parallel(eager)


def test_the_memory_plan_and_the_servers_first_video(control_bundle: Path) -> None:
    """With --low-memory its network is beside the denoiser; a server, which takes none, doesn't load it."""
    from proteus_deploy.memory_plan import _DENOISE, StageMemory, _phase
    from proteus_deploy.serving.worker_pipeline import warm_up

    assert _phase(StageMemory("controlnet", (), {}, 0, 0, "", 0, 0)) == _DENOISE
    with Pipeline.from_bundle(control_bundle) as pipeline:
        warm_up(pipeline)
        opened = set(pipeline.backend._runners)  # type: ignore[attr-defined]
        assert "denoiser" in opened
        assert not opened & {"controlnet", "control_encoder"}


def test_an_engine(control_bundle: Path, tmp_path: Path) -> None:
    """Built, not run."""
    pytest.importorskip("tensorrt_rtx")
    from proteus_deploy.export.build import build_bundle

    copy = Bundle.open(shutil.copytree(control_bundle, tmp_path / "bundle"))
    stages = ["control_encoder", "controlnet", "denoiser"]
    engines = build_bundle(copy, "sm89", stages=stages)
    assert set(engines.document["graphs"]) == set(stages)
    inputs = engines.document["graphs"]["denoiser"]["contract"]["inputs"]
    assert {"control_00", "control_01", "adapter_up"} <= {spec["name"] for spec in inputs}


def test_the_command(
    parity: Path, controlnet: Path, parity_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from proteus_deploy.cli.main import main
    from proteus_deploy.tiny.controlnet import write_tiny_controlnet
    from proteus_deploy.tiny.trained import MODEL
    from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_clip, make_photo
    from proteus_deploy.video import read_video

    Image.fromarray(make_photo(HELD_OUT_SEEDS[0], 0).image).save(tmp_path / "photo.png")
    clip = torch.from_numpy(make_clip(HELD_OUT_SEEDS[1], 0).frames).permute(0, 3, 1, 2)[None] / 255
    Video(clip, 8, {}).save(tmp_path / "poses.mp4")
    network = write_tiny_controlnet(tmp_path / "controlnet", MODEL)
    words = ["generate", str(MODEL), "--photo", str(tmp_path / "photo.png"), "--prompt", "a person waves"]
    words += ["--num-inference-steps", "1", "--output", str(tmp_path / "video.mp4")]
    control = ["--control-video", str(tmp_path / "poses.mp4"), "--control-scale", "0.2"]
    assert main([*words, *control, "--controlnet", str(network)]) == 0
    made = read_video(tmp_path / "video.mp4").metadata["request"]["control"]
    digest = hashlib.sha256((tmp_path / "poses.mp4").read_bytes()).hexdigest()
    told = {"video": str(tmp_path / "poses.mp4"), "sha256": digest, "scale": 0.2, "start": 0.0, "end": 1.0}
    assert made == told
    bundle = [words[0], str(parity_bundle), *words[2:]]
    for wrong, message in (
        (
            [*words, "--control-scale", "1"],
            "--control-scale says how a control video acts; add --control-video",
        ),
        ([*words, "--control-video", "absent.mp4"], "absent.mp4 is not a file"),
        ([*words, *control, "--control-end", "0"], "control acts from 0.0 to 0.0"),
        ([*words, *control], "open the checkpoint with controlnet=FOLDER"),
        (
            [*words, *control, "--controlnet", str(controlnet)],
            "attention_head_dim|vae_channels|text_embed_dim",
        ),
        ([*bundle, "--controlnet", str(network)], "leave the flag out, or export again with it"),
    ):
        capsys.readouterr()
        assert main(wrong) == 2
        assert re.search(message, capsys.readouterr().err), message
