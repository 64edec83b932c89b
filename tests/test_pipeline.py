"""The denoising loop: events, cancelling, batches, determinism, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, cast

import numpy as np
import pytest
import torch

from proteus_deploy import (
    BackendError,
    Cancelled,
    CheckpointError,
    ComputationError,
    GenerateRequest,
    IdentityFeatures,
    InputError,
    Pipeline,
    StepEvent,
)
from proteus_deploy.pipeline import ProgressEvent
from proteus_deploy.testing import TOLERANCES, assert_close
from proteus_deploy.vae_decode import Tiling

SmallRequest = Callable[..., GenerateRequest]


def test_one_request_gives_the_same_bytes_twice(
    parity: Path, parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    first = parity_pipeline.generate(small_request()).frames
    torch.manual_seed(99)  # the global generator must not matter
    assert torch.equal(first, parity_pipeline.generate(small_request()).frames)
    with Pipeline.from_checkpoint(parity / "checkpoint") as fresh:
        assert torch.equal(first, fresh.generate(small_request()).frames)


def test_the_video_has_the_size_asked_for(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    video = parity_pipeline.generate(small_request(num_frames=9, height=64, width=32, fps=12))
    assert video.frames.shape == (1, 9, 3, 64, 32)
    assert video.frames.dtype == torch.float32
    assert 0 <= video.frames.min() < video.frames.max() <= 1
    assert video.fps == 12
    assert video.metadata["request"]["prompt"] == "A woman waves"
    assert (video.metadata["seed"], video.metadata["backend"], video.metadata["dtype"]) == (
        7,
        "eager",
        "fp32",
    )


def test_steps_are_reported_in_order(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    steps: list[StepEvent] = []
    parity_pipeline.generate(small_request(num_inference_steps=4), on_step=steps.append)
    assert [event.index for event in steps] == [0, 1, 2, 3]
    assert {event.total for event in steps} == {4}
    assert [event.timestep for event in steps] == [999, 749, 499, 249]
    assert all(event.latents.shape == (1, 2, 16, 4, 6) for event in steps)
    assert all(event.seconds > 0 for event in steps)


def test_progress_goes_through_every_phase(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    seen: list[ProgressEvent] = []
    parity_pipeline.generate(small_request(num_frames=13), on_progress=seen.append)
    assert [(event.phase, event.done, event.total) for event in seen] == [
        ("identity", 1, 1),
        ("text", 1, 1),
        ("schedule", 1, 1),
        ("denoise", 1, 2),
        ("denoise", 2, 2),
        ("decode", 1, 2),
        ("decode", 2, 2),
    ]


@pytest.mark.parametrize("after", [0, 1])
def test_cancelled_between_steps(parity_pipeline: Pipeline, small_request: SmallRequest, after: int) -> None:
    cancel = Event()
    steps: list[int] = []

    def on_step(event: StepEvent) -> None:
        steps.append(event.index)
        if event.index == after:
            cancel.set()

    with pytest.raises(Cancelled):
        parity_pipeline.generate(small_request(num_inference_steps=3), on_step=on_step, cancel=cancel)
    assert steps == list(range(after + 1))


def test_cancelled_before_the_first_step(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    cancel = Event()
    cancel.set()
    steps: list[StepEvent] = []
    with pytest.raises(Cancelled):
        parity_pipeline.generate(small_request(), on_step=steps.append, cancel=cancel)
    assert not steps


@pytest.mark.parametrize("phase", ["identity", "text", "schedule"])
def test_cancelled_between_phases(parity_pipeline: Pipeline, small_request: SmallRequest, phase: str) -> None:
    cancel, seen = Event(), []

    def on_progress(event: ProgressEvent) -> None:
        seen.append(event.phase)
        if event.phase == phase:
            cancel.set()

    with pytest.raises(Cancelled):
        parity_pipeline.generate(small_request(), on_progress=on_progress, cancel=cancel)
    assert seen[-1] == phase


def test_a_finished_video_is_not_cancelled(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    cancel = Event()

    def on_progress(event: ProgressEvent) -> None:
        if event.phase == "decode" and event.done == event.total:
            cancel.set()

    parity_pipeline.generate(small_request(), on_progress=on_progress, cancel=cancel)
    assert cancel.is_set()


def test_changing_the_latents_of_an_event_changes_nothing(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    steps: list[StepEvent] = []

    def spoil(event: StepEvent) -> None:
        steps.append(event)
        event.latents.zero_()

    want = parity_pipeline.generate(small_request()).frames
    assert torch.equal(parity_pipeline.generate(small_request(), on_step=spoil).frames, want)
    assert steps[0] != steps[1]
    steps[0].latents.add_(1)


def test_frames_are_an_ordinary_tensor(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    frames = parity_pipeline.generate(small_request()).frames
    frames.mul_(0.5).requires_grad_()
    frames.square().sum().backward()
    assert frames.grad is not None


def test_latents_that_stop_being_finite_are_named(
    parity: Path, small_request: SmallRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.from_checkpoint(parity / "checkpoint") as pipeline:
        real, calls = pipeline.backend.runner("denoiser"), []

        def overflow(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            calls.append(inputs)
            return {name: out / (len(calls) < 2) for name, out in real(**inputs).items()}

        runner = pipeline.backend.runner
        monkeypatch.setattr(
            pipeline.backend, "runner", lambda name: overflow if name == "denoiser" else runner(name)
        )
        with pytest.raises(ComputationError, match="after step 2 of 3, on backend 'eager' in fp32; use bf16"):
            pipeline.generate(small_request(num_inference_steps=3))


@pytest.mark.parametrize("tiling", [False, Tiling(3, 4)])
def test_cancelled_between_vae_chunks(
    parity: Path, small_request: SmallRequest, tiling: bool | Tiling
) -> None:
    cancel = Event()
    parts: list[int] = []

    def on_progress(event: ProgressEvent) -> None:
        if event.phase == "decode":
            parts.append(event.done)
            if event.done == 2:
                cancel.set()

    with (
        Pipeline.from_checkpoint(parity / "checkpoint", vae_tiling=tiling) as pipeline,
        pytest.raises(Cancelled),
    ):
        pipeline.generate(small_request(num_frames=25), on_progress=on_progress, cancel=cancel)
    assert parts == [1, 2]


def test_an_error_in_a_callback_reaches_the_caller(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    def fail(event: StepEvent) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parity_pipeline.generate(small_request(), on_step=fail)


@pytest.mark.parametrize("shape", [(1, 3, 16, 4, 6), (2, 2, 16, 4, 6), (1, 2, 16, 4), (1, 16, 2, 4, 6)])
def test_initial_latents_of_another_shape_are_refused(
    parity_pipeline: Pipeline, small_request: SmallRequest, shape: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=r"initial_latents have shape .* needs \[1, 2, 16, 4, 6\]"):
        parity_pipeline.generate(small_request(), initial_latents=torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", 64),
        ("width", 64),
        ("num_frames", 9),
        ("num_inference_steps", 3),
        ("guidance_scale", 2.0),
        ("use_dynamic_cfg", True),
        ("dynamic_cfg", "corrected"),
        ("scheduler", "ddim"),
        ("max_sequence_length", 20),
        ("identity_scale", 0.5),
    ],
)
def test_requests_of_a_batch_must_agree(
    parity_pipeline: Pipeline, small_request: SmallRequest, name: str, value: Any
) -> None:
    with pytest.raises(InputError, match=f"must agree in {name}; found"):
        parity_pipeline.generate_batch([small_request(), small_request(**{name: value})])


def test_an_empty_batch_is_refused(parity_pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="no requests"):
        parity_pipeline.generate_batch([])


def test_what_is_no_request_is_refused(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    with pytest.raises(InputError, match="the request is None; pass a GenerateRequest"):
        parity_pipeline.generate(cast(Any, None))
    with pytest.raises(InputError, match="given a GenerateRequest; pass a list of GenerateRequest"):
        parity_pipeline.generate_batch(cast(Any, small_request()))


def test_tensors_of_another_library_are_refused(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    array = cast(Any, np.zeros((1, 2, 16, 4, 6), np.float32))
    with pytest.raises(InputError, match=r"initial_latents are a numpy\.ndarray; pass a torch tensor"):
        parity_pipeline.generate(small_request(), initial_latents=array)
    for name in ("denoiser", "vae_decoder"):
        with pytest.raises(InputError, match=rf"{name}: input 'latents' is a numpy\.ndarray; stages take"):
            parity_pipeline.stages[name](latents=array)
    with pytest.raises(InputError, match=r"'latents' has shape \[2\]; the contract is \[1, C, F, h, w\]"):
        parity_pipeline.stages["vae_decoder"](latents=torch.zeros(2))


@pytest.mark.parametrize("token", [-1, 10**6])
def test_numbers_beyond_a_table_are_refused(parity_pipeline: Pipeline, token: int) -> None:
    ids = torch.tensor([[1, token]])
    with pytest.raises(InputError, match=rf"text_encoder: input 'input_ids' holds {token}; it must be 0 to"):
        parity_pipeline.stages["text_encoder"](input_ids=ids)
    with pytest.raises(InputError, match=rf"'timesteps' holds {token}; it must be 0 to 999"):
        parity_pipeline.stages["identity_schedule"](timesteps=ids[0])


def test_unknown_stage_lists_the_known_ones(parity_pipeline: Pipeline) -> None:
    with pytest.raises(KeyError) as refused:
        parity_pipeline.stages["denoizer"]
    assert str(refused.value).startswith("there is no stage 'denoizer'; the stages are text_encoder, ")
    assert "denoizer" not in parity_pipeline.stages
    assert set(parity_pipeline.stages) == set(parity_pipeline.backend.table.stages)


@pytest.mark.parametrize("tiling", [None, 1, "yes", (3, 4)])
def test_vae_tiling_of_another_type_is_refused(parity: Path, tiling: Any) -> None:
    with pytest.raises(InputError, match=r"vae_tiling is .*; it must be True, False or a Tiling"):
        Pipeline.from_checkpoint(parity / "checkpoint", vae_tiling=tiling)


def test_torch_names_a_device_and_a_dtype(parity: Path) -> None:
    with Pipeline.from_checkpoint(
        parity / "checkpoint", device=torch.device("cpu"), dtype=torch.bfloat16
    ) as pipeline:
        assert (pipeline.backend.device, pipeline.backend.dtype) == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(InputError, match=r"dtype torch\.int8 is unknown; choose from fp32"):
        Pipeline.from_checkpoint(parity / "checkpoint", dtype=torch.int8)


@pytest.mark.parametrize("device", ["meta", "cpu:0", "cuda:-1", "gpu", "", None, 0])
def test_unknown_device_is_refused(parity: Path, device: Any) -> None:
    with pytest.raises(BackendError, match=r"device is .*; PyTorch runs here on 'cpu', 'cuda' or 'cuda:N'"):
        Pipeline.from_checkpoint(parity / "checkpoint", device=device)


def test_image_tokens_outside_the_range_of_a_bundle_are_refused(
    parity_bundle: Path, small_request: SmallRequest, identity: Callable[..., IdentityFeatures]
) -> None:
    pytest.importorskip("onnxruntime")
    with Pipeline.from_bundle(parity_bundle) as pipeline:
        count = pipeline.backend.table.axes["M"].max + 1
        states = tuple(torch.zeros(1, count, 16) for _ in range(5))
        features = IdentityFeatures(identity().id_cond, states)
        with pytest.raises(InputError, match=rf"image tokens \(M\) is {count}; the declared range is"):
            pipeline.generate(small_request(identity=features))


def test_schedulers_can_be_chosen(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    default, dpm, ddim = (
        parity_pipeline.generate(small_request(scheduler=name)).frames for name in (None, "dpm", "ddim")
    )
    assert torch.equal(default, dpm), "the checkpoint's own is dpm"
    assert not torch.allclose(dpm, ddim)


def test_identity_scale_replaces_the_checkpoints_own(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    own, one, none = (
        parity_pipeline.generate(small_request(identity_scale=scale)).frames for scale in (None, 1.0, 0.0)
    )
    assert torch.equal(own, one)
    assert not torch.allclose(own, none)


def test_every_input_matters(
    parity_pipeline: Pipeline,
    small_request: SmallRequest,
    identity: Callable[..., IdentityFeatures],
    parity: Path,
) -> None:
    base = parity_pipeline.generate(small_request()).frames
    other = parity / "case_long_prompt_portrait" / "reference.png"
    changes: list[dict[str, Any]] = [
        {"prompt": "A man runs"},
        {"identity_prompt": "A man"},
        {"negative_prompt": "blurry"},
        {"identity": identity(9)},
        {"condition_image": other},
        {"guidance_scale": 2.0},
        {"seed": 8},
    ]
    for change in changes:
        assert not torch.equal(base, parity_pipeline.generate(small_request(**change)).frames), change


def test_identity_features_of_another_width_are_refused(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    wide = IdentityFeatures(torch.randn(1, 1, 1280), tuple(torch.randn(1, 10, 1024) for _ in range(5)))
    with pytest.raises(InputError, match=r"\(1280, 1024\) wide .* takes \(40, 16\)"):
        parity_pipeline.generate(small_request(identity=wide))


def test_two_photos_in_one_request_are_refused(
    parity_pipeline: Pipeline, small_request: SmallRequest, identity: Callable[..., IdentityFeatures]
) -> None:
    both = IdentityFeatures.stack([identity(0), identity(1)])
    with pytest.raises(InputError, match="use generate_batch"):
        parity_pipeline.generate(small_request(identity=both))


def test_a_photo_needs_the_face_networks(
    parity_pipeline: Pipeline, small_request: SmallRequest, parity: Path
) -> None:
    photo = parity / "case_cfg_dpm" / "reference.png"
    with pytest.raises(InputError, match=r"without face_encoder/.*IdentityFeatures"):
        parity_pipeline.generate(small_request(photo=photo))


def test_tiled_decoding_is_close_to_the_plain_one_where_both_see_the_picture(
    parity: Path, small_request: SmallRequest
) -> None:
    request = small_request(height=64, width=96)
    with Pipeline.from_checkpoint(parity / "checkpoint") as plain:
        want = plain.generate(request).frames
    with Pipeline.from_checkpoint(parity / "checkpoint", vae_tiling=True) as tiled:
        assert tiled.tiling == Tiling(4, 6)
        got = tiled.generate(request).frames
    assert got.shape == want.shape
    assert not torch.equal(got, want)
    with Pipeline.from_checkpoint(parity / "checkpoint", vae_tiling=Tiling(8, 12)) as one_tile:
        assert_close("frames", one_tile.generate(request).frames, want, TOLERANCES["vae", "frames"])


def test_a_closed_pipeline_reads_its_weights_again(parity: Path, small_request: SmallRequest) -> None:
    pipeline = Pipeline.from_checkpoint(parity / "checkpoint")
    first = pipeline.generate(small_request()).frames
    pipeline.close()
    assert torch.equal(first, pipeline.generate(small_request()).frames)
    pipeline.close()


def test_low_memory_holds_one_part_at_a_time(
    parity: Path, parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    with Pipeline.from_checkpoint(parity / "checkpoint", low_memory=True) as pipeline:
        backend: Any = pipeline.backend
        loaded: list[set[str]] = []
        video = pipeline.generate(small_request(), on_step=lambda _: loaded.append(set(backend._runners)))
        assert loaded == [{"denoiser"}, {"denoiser"}]
        assert not backend._runners
        again = pipeline.generate(small_request()).frames
    assert torch.equal(video.frames, parity_pipeline.generate(small_request()).frames)
    assert torch.equal(again, video.frames)


def test_a_pipeline_opens_what_is_there_or_says_what_is_missing(parity: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Pipeline.from_checkpoint(tmp_path / "nothing")
    with pytest.raises(InputError, match="dtype 'int8' is unknown; choose from fp32"):
        Pipeline.from_checkpoint(parity / "checkpoint", dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="sees no CUDA device; use device='cpu'"):
            Pipeline.from_checkpoint(parity / "checkpoint", device="cuda")


@pytest.mark.gpu
def test_a_cuda_device_gives_the_same_video(
    parity: Path, parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    with Pipeline.from_checkpoint(parity / "checkpoint", device="cuda") as pipeline:
        got = pipeline.generate(small_request()).frames
    want = parity_pipeline.generate(small_request()).frames
    assert_close("frames", got, want, TOLERANCES["parity", "frames"])
