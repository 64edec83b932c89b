"""Whole requests: every second belongs to one stage, and each form does its own work in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy.benchmarks.bench import BenchSettings, run_bench
from proteus_deploy.benchmarks.candidates import parse_candidate
from proteus_deploy.benchmarks.whole_request import STAGES, TimedRequests, usual_request
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.pipeline import GenerateRequest, Pipeline
from proteus_deploy.tiny.trained import MODEL

STEPS = 3


SECONDS = {
    "vae_encoder": 1.0,
    "text_encoder": 10.0,
    "identity_fusion": 100.0,
    "identity_schedule": 1e3,
    "denoiser": 1e4,
}


class Clock:
    """Stands still but for the ticks that stages add: so many seconds for each call of one."""

    def __init__(self) -> None:
        self.now = 0.0

    def slow(self, pipeline: Pipeline) -> None:
        stages: Any = pipeline.stages
        for name, seconds in SECONDS.items():
            stages[name] = self._slowed(stages[name], seconds)

    def _slowed(self, stage: Any, seconds: float) -> Any:
        clock = self

        class Slow:
            inputs = stage.inputs

            def __call__(self, **inputs: Any) -> Any:
                clock.now += seconds
                return stage(**inputs)

        return Slow()


@pytest.mark.parametrize(("published", "identity_runs"), [(False, 1), (True, 1 + STEPS)])
def test_every_second_belongs_to_a_stage(
    parity: Path,
    small_request: Callable[..., GenerateRequest],
    monkeypatch: pytest.MonkeyPatch,
    *,
    published: bool,
    identity_runs: int,
) -> None:
    clock = Clock()
    with Pipeline.from_checkpoint(parity / "checkpoint") as pipeline:
        clock.slow(pipeline)
        own = TimedRequests(pipeline, small_request(num_inference_steps=STEPS), published=published)
        decoded = pipeline.backend.runner

        def slow_chunks(graph: str) -> Any:
            if graph.startswith("vae_decoder"):
                clock.now += 1e5
            return decoded(graph)

        monkeypatch.setattr(pipeline.backend, "runner", slow_chunks)
        monkeypatch.setattr("time.perf_counter", lambda: clock.now)
        own.run()
    (times,) = own.times
    assert times.stages == {
        "photo": 0.0,
        "vae_encoder": 1.0,
        "text_encoder": 30.0,  # identity prompt, negative prompt, prompt
        "identity": 1100.0 * identity_runs,
        "denoiser": 1e4 * STEPS,
        "vae_decoder": 1e5,
        "other": 0.0,
    }
    assert times.total == sum(times.stages.values())
    assert times.first_frame == times.total
    assert own.frames is not None
    assert own.frames.shape == (8, 32, 48, 3)


def test_the_first_frame_is_there_before_the_last(
    parity: Path, small_request: Callable[..., GenerateRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """17 frames are two chunks: the first is there one chunk earlier."""
    clock = Clock()
    with Pipeline.from_checkpoint(parity / "checkpoint") as pipeline:
        own = TimedRequests(pipeline, small_request(num_frames=17), published=False)
        decoded = pipeline.backend.runner

        def slow_chunks(graph: str) -> Any:
            clock.now += 7.0 if graph.startswith("vae_decoder") else 0.0
            return decoded(graph)

        monkeypatch.setattr(pipeline.backend, "runner", slow_chunks)
        monkeypatch.setattr("time.perf_counter", lambda: clock.now)
        own.run()
    (times,) = own.times
    assert (times.first_frame, times.total) == (7.0, 14.0)


@pytest.mark.usefixtures("small_copies")
def test_rows_of_whole_requests(parity: Path, tmp_path: Path) -> None:
    cases = ("published:eager:fp32", "exact:eager:fp32", "exact:eager:bf16")
    settings = BenchSettings("small", steps=1, rounds=2, memory=False, end_to_end=True)
    candidates = [parse_candidate(case) for case in cases]
    document = run_bench(Checkpoint.open(parity / "checkpoint"), None, candidates, settings, tmp_path)
    rows = {row["case"]: row for row in document["rows"]}
    for row in rows.values():
        assert row["request_ms"]["n"] == row["first_frame_ms"]["n"] == 2
        assert set(row["stages_ms"]) == set(STAGES)
        assert row["first_frame_ms"]["median"] <= row["request_ms"]["median"]
    published, exact, half = (rows[case] for case in cases)
    assert published["psnr_db"] == 100
    assert published["request_speedup_vs_published_fp32"] == 1
    assert exact["psnr_to"] == half["psnr_to"] == "published:eager:fp32"
    assert exact["psnr_db"] > half["psnr_db"] > 10
    assert exact["psnr_db"] > 60
    assert document["what"].endswith("from photo and prompt to decoded frames")


def test_without_face_networks_features_are_made_up(parity_pipeline: Pipeline) -> None:
    request, source = usual_request(parity_pipeline, 2)
    assert source.startswith("made-up identity features, as no photo can be read: ")
    assert request.identity is not None
    assert parity_pipeline.generate(request).frames.shape[1] > 1
    again, _ = usual_request(parity_pipeline, 2)
    assert again.identity is not None
    assert torch.equal(request.identity.id_cond, again.identity.id_cond)


def test_a_drawn_person_where_photos_can_be_read() -> None:
    pytest.importorskip("insightface")
    with Pipeline.from_checkpoint(MODEL) as pipeline:
        request, source = usual_request(pipeline, 2)
    assert source == "the photo of a drawn person"
    assert request.photo is not None
    assert request.num_inference_steps == 2


@pytest.mark.usefixtures("small_copies")
def test_a_candidate_that_makes_no_video_keeps_its_loop(
    parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise InputError("no decoder here")

    monkeypatch.setattr("proteus_deploy.pipeline.decode", refuse)
    settings = BenchSettings("small", steps=1, rounds=1, memory=False, end_to_end=True)
    candidates = [parse_candidate("exact:eager:fp32")]
    (row,) = run_bench(Checkpoint.open(parity / "checkpoint"), None, candidates, settings, tmp_path)["rows"]
    assert row["status"] == "ok"
    assert row["latency_ms"]["n"] == 1
    assert row["request_reason"] == "no decoder here"
    assert "request_ms" not in row
