"""A batch that a worker makes in parts, side by side: the same videos, and each part has its own end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy.errors import Cancelled, ComputationError
from proteus_deploy.pipeline import Pipeline, StepEvent
from proteus_deploy.request import GenerateRequest
from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.jobs import Claim, Job, JobState
from proteus_deploy.serving.messages import Channel, PipelineChoice, WorkerSettings
from proteus_deploy.serving.results import ResultFolder
from proteus_deploy.serving.store import JobStore
from proteus_deploy.serving.worker import Worker
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.tiny.trained import MODEL
from proteus_deploy.video import Video

FRAMES = Tolerance(1e-4, "absolute", "rows of a batch, and fewer threads, add up in another order")
REQUEST: dict[str, Any] = {"prompt": "a person waves", "num_inference_steps": 2}


class Making:
    """In the place of a pipeline: five steps for each batch, which `on_step` sees with the batch's seeds."""

    def __init__(self, on_step: Callable[[list[int], int], None]) -> None:
        self._on_step = on_step
        self.batches: list[list[int]] = []

    def generate_batch(
        self,
        requests: Sequence[GenerateRequest],
        *,
        cancel: threading.Event,
        on_step: Callable[[StepEvent], None],
        **_: Any,
    ) -> list[Video]:
        seeds = [request.seed or 0 for request in requests]
        self.batches.append(seeds)
        latents = torch.zeros(1)
        for index in range(5):
            on_step(StepEvent(index, 5, 0, latents, 0.1))
            self._on_step(seeds, index)
            if cancel.is_set():
                raise Cancelled("nobody wants them")
        return [Video(torch.zeros(1, 2, 3, 16, 16), 8, {"seed": seed}) for seed in seeds]

    def preview(self, event: StepEvent, row: int) -> Any:
        pytest.fail("nobody looks on")


class Working:
    """A worker in this process, which makes batches in parts."""

    def __init__(self, folder: Path, pipeline: Any, batch_parts: int) -> None:
        self.engine = open_database(database_url(None, folder))
        self.store = JobStore(self.engine)
        self.results = ResultFolder(folder / "results")
        ours, self.theirs = socket.socketpair()
        self.channel = Channel(ours)
        url = database_url(None, folder).render_as_string(hide_password=False)
        choice = PipelineChoice("checkpoint", str(MODEL))
        settings = WorkerSettings("w", choice, url, str(folder), max_batch=8, batch_parts=batch_parts)
        self.worker = Worker(settings, pipeline, self.channel)
        self.told: list[dict[str, Any]] = []
        self.ear = threading.Thread(target=lambda: self.told.extend(Channel(self.theirs)), daemon=True)
        self.ear.start()

    def claims(self, photo: bytes, seeds: Sequence[int]) -> list[Claim]:
        for seed in seeds:
            self.store.submit("anna", {**REQUEST, "seed": seed}, photo=photo, batch_key="x")
        return self.store.claim_batch("w", lease_s=60, limit=8)

    def do(self, claims: Sequence[Claim]) -> list[Job]:
        self.worker._do(claims)
        return [self.store.get(claim.job.id) for claim in claims]

    def close(self) -> None:
        self.worker._engine.dispose()
        self.engine.dispose()
        self.channel.close()
        self.ear.join()
        self.theirs.close()


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Callable[..., Working]]:
    made: list[Working] = []

    def start(pipeline: Any, batch_parts: int = 2) -> Working:
        made.append(Working(tmp_path, pipeline, batch_parts))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.mark.slow
def test_the_videos_are_those_of_one_by_one(
    work: Callable[..., Working], drawn_photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[int, Video] = {}
    sizes: list[int] = []
    with Pipeline.from_checkpoint(MODEL) as pipeline:
        generate = pipeline.generate_batch

        def noted(requests: Sequence[GenerateRequest], **options: Any) -> list[Video]:
            sizes.append(len(requests))
            videos = generate(requests, **options)
            made.update({request.seed or 0: video for request, video in zip(requests, videos, strict=True)})
            return videos

        monkeypatch.setattr(pipeline, "generate_batch", noted)
        worker = work(pipeline)
        jobs = worker.do(worker.claims(drawn_photo, (3, 4, 5)))
        assert sorted(sizes) == [1, 2]
        assert [job.result is not None and job.result.facts["batch"] for job in jobs] == [3, 3, 3]
        for seed, video in tuple(made.items()):
            alone = pipeline.generate(GenerateRequest(**REQUEST, seed=seed, photo=drawn_photo))
            assert_close(f"video {seed}", video.frames, alone.frames, FRAMES)


def test_parts_are_neighbours_and_all_end(work: Callable[..., Working], drawn_photo: bytes) -> None:
    together = threading.Barrier(2, timeout=30)

    def meet(_: list[int], index: int) -> None:
        if index == 0:
            together.wait()

    making = Making(meet)
    worker = work(making)
    jobs = worker.do(worker.claims(drawn_photo, (3, 4, 5, 6)))
    assert sorted(making.batches) == [[3, 4], [5, 6]]
    facts = [job.result.facts for job in jobs if job.result is not None]
    assert [(one["seed"], one["batch"]) for one in facts] == [(3, 4), (4, 4), (5, 4), (6, 4)]
    worker.close()
    (measured,) = [message["measures"] for message in worker.told if "measures" in message]
    assert (measured["batch"], measured["steps"]) == (4, 5), "a step counts once, however many parts take it"


def test_a_part_that_fails_takes_nothing_along(work: Callable[..., Working], drawn_photo: bytes) -> None:
    def fail(seeds: list[int], index: int) -> None:
        if 5 in seeds and index == 2:
            raise ComputationError("the latents hold NaN")

    making = Making(fail)
    worker = work(making)
    first, second, *others = worker.do(worker.claims(drawn_photo, (3, 4, 5, 6)))
    assert [job.state for job in (first, second)] == [JobState.COMPLETED] * 2
    assert not any(job.state.finished for job in others), "put back"
    for _ in others:  # now each is alone
        worker.do(worker.store.claim_batch("w", lease_s=60, limit=8))
    failed, made = (worker.store.get(job.id) for job in others)
    assert failed.failure is not None
    assert (failed.failure.code, failed.failure.message) == ("computation_error", "the latents hold NaN")
    assert made.state is JobState.COMPLETED
    assert making.batches[2:] == [[5], [6]]


def test_a_part_that_breaks_the_worker_takes_no_finished_videos_along(
    work: Callable[..., Working], drawn_photo: bytes
) -> None:
    def fail(seeds: list[int], index: int) -> None:
        if index == 2:
            raise ComputationError("NaN") if 7 in seeds else RuntimeError("out of memory")

    making = Making(lambda seeds, index: fail(seeds, index) if 3 not in seeds else None)
    worker = work(making, batch_parts=3)
    claims = worker.claims(drawn_photo, (3, 4, 7, 8, 5, 6))
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.do(claims)
    jobs = [worker.store.get(claim.job.id) for claim in claims]
    assert [job.state.finished for job in jobs] == [True] * 2 + [False] * 4


def test_a_part_that_nobody_wants_ends_early(work: Callable[..., Working], drawn_photo: bytes) -> None:
    steps: dict[int, list[int]] = {3: [], 5: []}
    stopped = threading.Event()

    def step(seeds: list[int], index: int) -> None:
        steps[seeds[0]].append(index)
        if seeds[0] == 5 and index == 1:
            current = worker.worker._current
            assert current is not None
            for claim in claims[2:]:
                worker.store.cancel(claim.job.id)
                current.drop(claim, "cancelled")
            stopped.set()
        if seeds[0] == 3 and index == 1:
            assert stopped.wait(30)

    worker = work(Making(step))
    claims = worker.claims(drawn_photo, (3, 4, 5, 6))
    jobs = worker.do(claims)
    assert steps == {3: [0, 1, 2, 3, 4], 5: [0, 1]}
    assert [job.state for job in jobs] == [JobState.COMPLETED] * 2 + [JobState.CANCELLED] * 2
