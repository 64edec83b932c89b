"""Plans in the pipeline: exact where they should be, apart where requests meet, recorded in the video."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy import GenerateRequest, IdentityFeatures, InputError, Pipeline, StepEvent, Video
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.policies import (
    EasyCache,
    GuidanceInterval,
    GuidanceReuse,
    IdentityGate,
    MagCache,
    Plan,
    TeaCache,
    plan_from_json,
)
from proteus_deploy.policies.calibration import MagnitudeRecorder, time_embedding_changes
from proteus_deploy.policies.reuse import REUSES, Reuse, keep
from proteus_deploy.schedulers import Stepper
from proteus_deploy.testing import TOLERANCES, assert_close

SmallRequest = Callable[..., GenerateRequest]
STEPS = 6
FLAT = (1.0,) * STEPS


@contextmanager
def denoiser_calls(pipeline: Pipeline) -> Iterator[list[dict[str, Tensor]]]:
    """The inputs of every denoiser call while the block runs."""
    calls: list[dict[str, Tensor]] = []
    real: Any = pipeline.stages["denoiser"]

    def watched(**inputs: Tensor) -> dict[str, Tensor]:
        calls.append(inputs)
        return real(**inputs)  # type: ignore[no-any-return]

    pipeline.stages["denoiser"] = watched  # type: ignore[assignment]
    try:
        yield calls
    finally:
        pipeline.stages["denoiser"] = real


NOTHING_LEFT_OUT = [
    Plan(),
    Plan(step_cache=EasyCache(threshold=0, warmup=1, last=0)),
    Plan(step_cache=MagCache(threshold=0, warmup=1, last=0, ratios=FLAT)),
    Plan(step_cache=TeaCache(threshold=0, warmup=1, last=0, changes=(0.0,) * STEPS)),
]
ALL_GUIDED = Plan(
    guidance_interval=GuidanceInterval(),
    guidance_reuse=GuidanceReuse(every=1, warmup=1, last=0),
    identity_gate=IdentityGate(bands=((0, 1.0),)),
)


@pytest.mark.parametrize(
    ("plan", "guidance_scale"),
    [*((plan, scale) for plan in NOTHING_LEFT_OUT for scale in (6.0, 1.0)), (ALL_GUIDED, 6.0)],
    ids=range(2 * len(NOTHING_LEFT_OUT) + 1),
)
def test_a_plan_that_leaves_nothing_out_gives_the_same_bytes(
    parity_pipeline: Pipeline, small_request: SmallRequest, plan: Plan, guidance_scale: float
) -> None:
    request = small_request(num_inference_steps=STEPS, guidance_scale=guidance_scale)
    want = parity_pipeline.generate(request).frames
    video = parity_pipeline.generate(replace(request, plan=plan))
    assert torch.equal(video.frames, want)
    assert video.metadata["steps"]["computed"] == list(range(STEPS))


def test_skipped_steps_cost_no_call_and_are_recorded(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    plan = Plan(step_cache=MagCache(threshold=1, warmup=2, last=1, max_skips=1, ratios=FLAT))
    events: list[StepEvent] = []
    with denoiser_calls(parity_pipeline) as calls:
        video = parity_pipeline.generate(
            small_request(num_inference_steps=STEPS, plan=plan), on_step=events.append
        )
    assert len(calls) == 4
    assert [event.computed for event in events] == [True, True, False, True, False, True]
    found = json.loads(json.dumps(video.metadata))
    assert found["steps"] == {"computed": [0, 1, 3, 5], "skipped": [2, 4], "both_prompts": [0, 1, 3, 5]}
    assert plan_from_json(found["request"]["plan"]) == plan
    exact = parity_pipeline.generate(small_request(num_inference_steps=STEPS))
    assert "steps" not in exact.metadata
    assert not torch.equal(exact.frames, video.frames)


@pytest.mark.parametrize("reuse", REUSES)
def test_a_skipped_step_reuses_what_the_last_computed_one_left(
    parity_pipeline: Pipeline, small_request: SmallRequest, reuse: Reuse
) -> None:
    cache = MagCache(threshold=1, warmup=1, max_skips=1, ratios=(1.0,) * 4, reuse=reuse)
    events: list[StepEvent] = []
    parity_pipeline.generate(
        small_request(num_inference_steps=4, plan=Plan(step_cache=cache)), on_step=events.append
    )
    assert [event.computed for event in events] == [True, False, True, True]
    kept = [
        keep(reuse, part, event.prediction.latents, event.prediction.levels)
        for event in events[:2]
        if event.prediction is not None and event.prediction.negative is not None
        for part in (event.prediction.positive, event.prediction.negative)
    ]
    assert len(kept) == 4
    torch.testing.assert_close(kept[2:], kept[:2], rtol=1e-4, atol=1e-4)


def test_with_ddim_and_the_clean_video_kept_two_steps_are_one_longer_one(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    """Steps at 999, 749, 499, 249, every second one skipped, are the steps at 999 and 499."""
    cache = MagCache(threshold=1, warmup=1, last=0, max_skips=1, ratios=(1.0,) * 4, reuse="clean")
    skipping = small_request(num_inference_steps=4, scheduler="ddim", plan=Plan(step_cache=cache))
    longer = small_request(num_inference_steps=2, scheduler="ddim")
    got, want = (parity_pipeline.generate(request).frames for request in (skipping, longer))
    assert_close("frames", got, want, TOLERANCES["parity", "frames"])


def test_guidance_off_outside_its_interval_halves_the_batch(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    first = GuidanceInterval(lowest=600)  # timesteps 999, 833, 666, 499, 333, 166
    events: list[StepEvent] = []
    request = small_request(num_inference_steps=STEPS, plan=Plan(guidance_interval=first))
    with denoiser_calls(parity_pipeline) as calls:
        video = parity_pipeline.generate(request, on_step=events.append)
    assert [len(call["latents"]) for call in calls] == [2, 2, 2, 1, 1, 1]
    assert [len(call["text"]) for call in calls] == [2, 2, 2, 1, 1, 1]
    assert video.metadata["steps"]["both_prompts"] == [0, 1, 2]
    assert [event.prediction is not None and event.prediction.negative is None for event in events] == [
        *[False] * 3,
        *[True] * 3,
    ]


def test_an_interval_that_holds_no_step_is_guidance_off(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    nowhere = Plan(guidance_interval=GuidanceInterval(lowest=1, highest=2))
    got = parity_pipeline.generate(small_request(plan=nowhere)).frames
    assert torch.equal(got, parity_pipeline.generate(small_request(guidance_scale=1.0)).frames)


def test_guidance_reuse_runs_one_prompt_in_between(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    plan = Plan(guidance_reuse=GuidanceReuse(every=2, warmup=1, last=1))
    with denoiser_calls(parity_pipeline) as calls:
        parity_pipeline.generate(small_request(num_inference_steps=STEPS, plan=plan))
    assert [len(call["latents"]) for call in calls] == [2, 1, 2, 1, 2, 2]


def test_the_identity_gate_reaches_the_denoiser(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    plan = Plan(identity_gate=IdentityGate(bands=((500, 0.0), (300, 0.5), (0, 1.0))))
    request = small_request(num_inference_steps=STEPS, identity_scale=0.8, plan=plan)
    with denoiser_calls(parity_pipeline) as calls:
        parity_pipeline.generate(request)
    gates = [float(call["identity_gate"]) for call in calls]
    assert gates == pytest.approx([0.0, 0.0, 0.0, 0.4, 0.4, 0.8])
    off, none = Plan(identity_gate=IdentityGate(bands=((0, 0.0),))), small_request(identity_scale=0.0)
    got = parity_pipeline.generate(small_request(plan=off)).frames
    assert torch.equal(got, parity_pipeline.generate(none).frames)


def test_interleaved_requests_give_the_same_bytes_as_alone(
    parity_pipeline: Pipeline, small_request: SmallRequest, identity: Callable[..., IdentityFeatures]
) -> None:
    """Each step of one request waits for the same step of the others, on one pipeline."""
    changes: list[dict[str, Any]] = [
        {"plan": Plan(step_cache=EasyCache(threshold=5.0, warmup=2, max_skips=1))},
        {
            "plan": Plan(step_cache=MagCache(threshold=1, warmup=1, max_skips=2, ratios=FLAT)),
            "prompt": "A man runs",
            "identity": identity(9),
            "seed": 3,
        },
        {
            "plan": Plan(guidance_reuse=GuidanceReuse(every=3, warmup=1)),
            "identity_prompt": "A man",
            "identity": identity(5),
        },
    ]
    requests = [small_request(num_inference_steps=STEPS, **change) for change in changes]
    alone = [parity_pipeline.generate(request) for request in requests]
    assert [bool(video.metadata["steps"]["skipped"]) for video in alone] == [True, True, False]
    together = Barrier(len(requests), timeout=300)

    def wait(event: StepEvent) -> None:
        together.wait()

    def run(request: GenerateRequest) -> Video:
        return parity_pipeline.generate(request, on_step=wait)

    with ThreadPoolExecutor(len(requests)) as pool:
        videos = list(pool.map(run, requests))
    for got, want in zip(videos, alone, strict=True):
        assert torch.equal(got.frames, want.frames)
        assert got.metadata == want.metadata


def test_one_plan_serves_a_batch(
    parity_pipeline: Pipeline, small_request: SmallRequest, identity: Callable[..., IdentityFeatures]
) -> None:
    plan = Plan(
        step_cache=MagCache(threshold=1, warmup=1, max_skips=1, ratios=FLAT),
        guidance_interval=GuidanceInterval(lowest=400),
    )
    requests = [
        small_request(num_inference_steps=STEPS, plan=plan),
        small_request(num_inference_steps=STEPS, plan=plan, identity=identity(9), prompt="A man", seed=1),
    ]
    batch = parity_pipeline.generate_batch(requests)
    for video, request in zip(batch, requests, strict=True):
        want = parity_pipeline.generate(request)
        assert video.metadata["steps"] == want.metadata["steps"]
        assert_close("frames", video.frames, want.frames, TOLERANCES["parity", "frames"])


def test_a_batch_refuses_what_its_videos_cannot_share(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    easy = small_request(plan=Plan(step_cache=EasyCache(threshold=0.1)))
    with pytest.raises(
        InputError, match=r"easycache chooses steps by a video's own latents, so 2 videos can't"
    ):
        parity_pipeline.generate_batch([easy, easy])
    with pytest.raises(InputError, match="requests in one batch must agree in plan"):
        parity_pipeline.generate_batch([easy, small_request()])


def test_magnitudes_are_recorded_on_exact_runs(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    recorder, events = MagnitudeRecorder(), []

    def watch(event: StepEvent) -> None:
        recorder(event)
        events.append(event)

    for seed in (1, 2):
        parity_pipeline.generate(small_request(num_inference_steps=3, seed=seed), on_step=watch)
    norms = [
        float((event.prediction.positive - event.prediction.latents).norm())
        for event in events
        if event.prediction is not None
    ]
    want = [1.0] + [(norms[t] / norms[t - 1] + norms[t + 3] / norms[t + 2]) / 2 for t in (1, 2)]
    assert recorder.ratios == pytest.approx(want)
    plan = Plan(step_cache=MagCache(threshold=9, warmup=1, ratios=recorder.ratios))
    parity_pipeline.generate(small_request(num_inference_steps=3, plan=plan))


def test_a_recorder_refuses_runs_that_say_nothing(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    recorder = MagnitudeRecorder()
    with pytest.raises(InputError, match="no run was recorded; pass the recorder as on_step"):
        _ = recorder.ratios
    plan = Plan(step_cache=MagCache(threshold=9, warmup=1, ratios=(1.0,) * 3))
    with pytest.raises(InputError, match="step 2 of 3 was not computed"):
        parity_pipeline.generate(small_request(num_inference_steps=3, plan=plan), on_step=recorder)
    with pytest.raises(InputError, match="a run of 2 steps after one of 1; ratios belong to one schedule"):
        parity_pipeline.generate(small_request(), on_step=recorder)


def test_changes_of_the_time_embedding_are_the_networks_own(
    parity_pipeline: Pipeline, parity: Path, small_request: SmallRequest
) -> None:
    checkpoint = Checkpoint.open(parity / "checkpoint")
    timesteps = Stepper(checkpoint.scheduler, None, STEPS).timesteps
    changes = time_embedding_changes(checkpoint, timesteps)
    runner: Any = parity_pipeline.backend.runner("denoiser")
    with torch.inference_mode():
        embedding = runner.module.time_vector(timesteps, torch.float32)
    want = [
        float((embedding[t] - embedding[t - 1]).abs().mean() / embedding[t - 1].abs().mean())
        for t in range(1, STEPS)
    ]
    assert changes == pytest.approx((0.0, *want), rel=1e-5)
    plan = Plan(step_cache=TeaCache(threshold=0.1, warmup=1, changes=changes))
    parity_pipeline.generate(small_request(num_inference_steps=STEPS, plan=plan))
