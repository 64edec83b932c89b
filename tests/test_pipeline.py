"""The denoising loop: events, cancelling, batches, determinism, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from proteus_deploy import (
    BackendError,
    Cancelled,
    CheckpointError,
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
