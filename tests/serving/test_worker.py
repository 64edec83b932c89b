"""Workers with the trained tiny model: results, cancelling, deadlines, crashes, stopping."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from proteus_deploy.errors import InputError
from proteus_deploy.serving.characters import CharacterStore
from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.jobs import Job, JobState
from proteus_deploy.serving.messages import Channel, PipelineChoice, WorkerSettings
from proteus_deploy.serving.progress import JobProgress, StageTimes
from proteus_deploy.serving.results import ResultFolder
from proteus_deploy.serving.store import JobStore
from proteus_deploy.serving.supervisor import Board, Supervisor
from proteus_deploy.serving.work_queue import WorkQueue
from proteus_deploy.serving.worker import Worker
from proteus_deploy.tiny.trained import MODEL

BATCHES: dict[str, Any] = {"max_batch": 2, "batch_wait_s": 0.2, "cache_bytes": 1 << 24, "warm_up": True}
REQUEST: dict[str, Any] = {"prompt": "a person waves", "num_inference_steps": 2, "seed": 3}


class Service:
    """A queue and one worker."""

    def __init__(self, folder: Path) -> None:
        self.engine = open_database(database_url(None, folder))
        self.store, self.board = JobStore(self.engine), Board()
        self.results = ResultFolder(folder / "results")
        url = database_url(None, folder).render_as_string(hide_password=False)
        choice = PipelineChoice("checkpoint", str(MODEL))
        self.settings = WorkerSettings("node-", choice, url, str(folder), lease_s=5, poll_s=0.05, **BATCHES)
        self.ends: list[tuple[str, str]] = []
        self.supervisor = self.make()

    def make(self) -> Supervisor:
        return Supervisor(
            self.settings,
            self.store,
            self.board,
            on_end=lambda job_id, state, _: self.ends.append((job_id, state)),
        )

    def start(self) -> None:
        self.supervisor.start()
        self.supervisor.wait_until_ready()

    def wait(self, job: Job, until: Callable[[Job], bool] = lambda job: job.state.finished) -> Job:
        while not until(found := self.store.get(job.id)):
            time.sleep(0.02)
        return found

    def wait_for_steps(self, job: Job) -> None:
        while (news := self.board.progress(job.id)) is None or news["stage"] != "denoise":
            time.sleep(0.005)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("service"))
    made.start()
    yield made
    made.supervisor.stop()
    made.engine.dispose()


@pytest.mark.slow
def test_a_video(service: Service, drawn_photo: bytes) -> None:
    from proteus_deploy.video import read_video

    job, _ = service.store.submit("anna", REQUEST, photo=drawn_photo)
    done = service.wait(job)
    assert done.failure is None
    assert done.result is not None
    assert set(done.result.facts["stage_seconds"]) == {"identity", "text", "schedule", "denoise", "decode"}
    video = read_video(service.results.path(done.result.name))
    assert video.frames.shape[1] == done.result.facts["frames"]
    assert video.metadata["seed"] == REQUEST["seed"]


@pytest.mark.slow
def test_cancelled_within_a_step_and_the_next_result_is_untouched(
    service: Service, drawn_photo: bytes
) -> None:
    first, _ = service.store.submit("anna", REQUEST, photo=drawn_photo)
    long, _ = service.store.submit("anna", {**REQUEST, "num_inference_steps": 1000}, photo=drawn_photo)
    again, _ = service.store.submit("anna", {**REQUEST, "fps": 8}, photo=drawn_photo)
    service.wait_for_steps(long)
    service.store.cancel(long.id)
    service.supervisor.cancel(long.id)
    assert service.wait(long).state is JobState.CANCELLED
    hashes = []
    for job in (first, again):
        result = service.wait(job).result
        assert result is not None
        hashes.append(result.sha256)
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_deadline_of_a_running_job(service: Service, drawn_photo: bytes) -> None:
    request = {**REQUEST, "num_inference_steps": 1000}
    job, _ = service.store.submit("anna", request, photo=drawn_photo, deadline_s=1.5)
    failure = service.wait(job).failure
    assert failure is not None
    assert failure.code == "deadline_exceeded"


@pytest.mark.slow
def test_what_the_pipeline_refuses_is_said_on_the_job(service: Service) -> None:
    for request, photo, said in (
        (REQUEST, b"no photo", "photo"),
        ({**REQUEST, "height": 7}, None, "photo"),
    ):
        job, _ = service.store.submit("anna", request, photo=photo)
        failure = service.wait(job).failure
        assert failure is not None
        assert failure.code == "invalid_request"
        assert said in failure.message


@pytest.mark.slow
def test_a_batch_and_the_one_that_spoils_it(service: Service, drawn_photo: bytes) -> None:
    """Jobs that come together are made together; one that can't be made doesn't take the others along."""
    long, _ = service.store.submit("anna", {**REQUEST, "num_inference_steps": 1000}, photo=drawn_photo)
    service.wait_for_steps(long)
    photos = (drawn_photo, b"no photo", drawn_photo)
    jobs = [service.store.submit("anna", REQUEST, photo=photo, batch_key="x")[0] for photo in photos[:2]]
    alone, _ = service.store.submit("anna", REQUEST, photo=drawn_photo, batch_key="y")
    pair = [
        service.store.submit("anna", {**REQUEST, "seed": seed}, photo=drawn_photo, batch_key="z")[0]
        for seed in (3, 4)
    ]
    service.store.cancel(long.id)  # all the others wait by now
    service.supervisor.cancel(long.id)
    good, bad = (service.wait(job) for job in jobs)
    assert bad.failure is not None
    assert bad.failure.code == "invalid_request"
    assert good.result is not None
    assert (good.attempt, good.crashes, good.result.facts["batch"]) == (2, 0, 1)
    assert service.wait(alone).state is JobState.COMPLETED
    results = [service.wait(job).result for job in pair]
    assert [result.facts["batch"] for result in results if result is not None] == [2, 2]
    assert [result.facts["seed"] for result in results if result is not None] == [3, 4]


@pytest.mark.slow
def test_videos_with_different_adapters_in_one_batch(
    service: Service, drawn_photo: bytes, tmp_path: Path
) -> None:
    """Each is what the library makes of the same request."""
    from proteus_deploy import GenerateRequest, Pipeline
    from proteus_deploy.adapters import Adapter, AdapterUse, TimestepGate, read_adapter, save_adapter
    from proteus_deploy.adapters.adapter import Factors
    from proteus_deploy.serving.adapter_store import AdapterStore
    from proteus_deploy.video import read_video

    generator = torch.Generator().manual_seed(0)
    store, adapters = AdapterStore(service.engine), {}
    for name, gate in (("anna", TimestepGate(0, 600)), ("ink", TimestepGate())):
        factors = {
            f"transformer_blocks.{block}.attn1.to_v": Factors(
                torch.randn(4, 192, generator=generator), 0.2 * torch.randn(192, 4, generator=generator)
            )
            for block in range(6)
        }
        save_adapter(Adapter(factors, gate=gate), file := tmp_path / f"{name}.safetensors")
        adapters[name] = read_adapter(file)
        stored = store.create("anna", file.read_bytes(), adapters[name], name=name)
        adapters[stored.id] = adapters[name]
    ids = [name for name in adapters if name.startswith("adapter_")]
    blocker, _ = service.store.submit("anna", {**REQUEST, "num_inference_steps": 5}, photo=drawn_photo)
    uses: list[list[dict[str, Any]]] = [
        [{"id": ids[0], "scale": 0.7, "gate": None}],
        [{"id": ids[1], "scale": 1.0, "gate": [0, 999]}],
    ]
    pair = [
        service.store.submit("anna", {**REQUEST, "adapters": use}, photo=drawn_photo, batch_key="a")[0]
        for use in uses
    ]
    service.supervisor.wake()
    service.wait(blocker)
    request = GenerateRequest(**REQUEST, photo=drawn_photo)
    own = [
        AdapterUse(adapters[use["id"]], use["scale"], use["gate"] and TimestepGate(*use["gate"]))
        for (use,) in uses
    ]
    with Pipeline.from_checkpoint(MODEL) as pipeline:
        plain = pipeline.generate(request).frames
        videos = pipeline.generate_batch([replace(request, adapters=(use,)) for use in own])
    for job, video in zip(pair, videos, strict=True):
        assert (video.frames - plain).abs().mean() > 0.02, "the adapter does something"
        result = service.wait(job).result
        assert result is not None
        assert result.facts["batch"] == 2
        video.save(tmp_path / "expected.mp4")
        found, expected = service.results.path(result.name), tmp_path / "expected.mp4"
        assert (read_video(found).frames - read_video(expected).frames).abs().mean() < 1e-4


@pytest.mark.slow
def test_a_character_is_encoded_once(service: Service, drawn_photo: bytes) -> None:
    characters = CharacterStore(service.engine)
    made = characters.create("anna", drawn_photo, face_index=None)
    nobody = characters.create("anna", b"no photo", face_index=None)
    service.supervisor.wake()
    while "processing" in (states := [characters.get(one.id, "anna").status for one in (made, nobody)]):
        time.sleep(0.02)
    assert states == ["ready", "failed"]
    failure = characters.get(nobody.id, "anna").failure
    assert failure is not None
    assert "photo" in failure.message


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_job_done_once(service: Service, drawn_photo: bytes) -> None:
    job, _ = service.store.submit("anna", {**REQUEST, "num_inference_steps": 25}, photo=drawn_photo)
    service.wait_for_steps(job)
    restarts = service.supervisor.restarts
    os.kill(service.supervisor.processes[0], signal.SIGKILL)
    done = service.wait(job)
    assert done.state is JobState.COMPLETED
    assert (done.attempt, done.crashes) == (2, 1)
    assert done.last_failure is not None
    assert "SIGKILL" in done.last_failure
    assert service.supervisor.restarts == restarts + 1
    assert [state for job_id, state in service.ends if job_id == job.id] == ["completed"]


@pytest.mark.slow
def test_stopping_puts_back_what_runs(service: Service, drawn_photo: bytes) -> None:
    job, _ = service.store.submit("anna", {**REQUEST, "num_inference_steps": 1000}, photo=drawn_photo)
    service.wait_for_steps(job)
    service.supervisor.stop()
    assert service.supervisor.processes == []
    left = service.store.get(job.id)
    assert (left.state, left.worker, left.crashes) == (JobState.RUNNING, None, 0)
    service.store.cancel(job.id)


def test_a_pipeline_that_cannot_be_opened_is_an_error_of_the_start(tmp_path: Path) -> None:
    service = Service(tmp_path)
    choice = PipelineChoice("checkpoint", str(tmp_path / "nothing"))
    service.settings = replace(service.settings, pipeline=choice)
    supervisor = service.make()
    supervisor.start()
    with pytest.raises(InputError, match="is not a folder"):
        supervisor.wait_until_ready()
    supervisor.stop()
    service.engine.dispose()


def test_progress_is_told_with_time_left() -> None:
    import torch

    from proteus_deploy.pipeline import ProgressEvent, StepEvent

    now, told, times = [0.0], list[dict[str, Any]](), StageTimes()
    times.record((32, 48, 5), 4.0)
    progress = JobProgress(told.append, times, (32, 48, 5), clock=lambda: now[0])
    progress.on_progress(ProgressEvent("text", 1, 1))
    for index, seconds in enumerate((9.0, 2.0, 2.0)):
        now[0] += seconds
        progress.on_step(StepEvent(index, 10, 0, torch.zeros(1), seconds, True, {}))  # type: ignore[arg-type]
        progress.on_progress(ProgressEvent("denoise", index + 1, 10))
    assert told[-1] == {"stage": "denoise", "done": 3, "total": 10, "percent": 30, "eta_s": 18.0}
    now[0] += 3
    progress.on_progress(ProgressEvent("decode", 1, 4))
    assert told[-1]["eta_s"] == 9.0
    percents = [news["percent"] for news in told]
    assert percents == sorted(percents)


def test_quick_steps_are_told_ten_times_a_second() -> None:
    """The first and the last of each stage always."""
    from proteus_deploy.pipeline import ProgressEvent

    now, told = [0.0], list[dict[str, Any]]()
    progress = JobProgress(told.append, StageTimes(), (32, 48, 5), clock=lambda: now[0])
    for phase, total in (("text", 1), ("denoise", 100), ("decode", 2)):
        for done in range(1, total + 1):
            progress.on_progress(ProgressEvent(phase, done, total))  # type: ignore[arg-type]
            now[0] += 0.01
    found = [(news["stage"], news["done"]) for news in told]
    assert [found[0], found[1], found[-3], found[-2], found[-1]] == [
        ("text", 1), ("denoise", 1), ("denoise", 100), ("decode", 1), ("decode", 2),
    ]  # fmt: skip
    assert 10 <= len(found) <= 16


def test_a_database_that_does_not_answer_for_a_while_ends_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is renewed when the database is back."""
    renewed = threading.Event()

    class Pipeline:
        preview = None

        def generate_batch(self, *_: Any, **__: Any) -> None:
            assert renewed.wait(30), "the heartbeat ended with the first error"
            raise InputError("made, as far as this test goes")

    service = Service(tmp_path)
    service.store.submit("anna", REQUEST)
    claim = service.store.claim("w", lease_s=60)
    assert claim is not None
    ours, theirs = socket.socketpair()
    settings = replace(service.settings, name="w", lease_s=0.3)
    worker = Worker(settings, Pipeline(), Channel(ours))  # type: ignore[arg-type]
    renew, failures = WorkQueue.renew, iter([sa.exc.OperationalError("UPDATE", {}, Exception("locked"))])

    def fail_once(store: WorkQueue, *arguments: Any, **named: Any) -> bool:
        for failure in failures:
            raise failure
        answer = renew(store, *arguments, **named)
        renewed.set()
        return answer

    monkeypatch.setattr(WorkQueue, "renew", fail_once)
    with ours, theirs:
        assert worker._do([claim]) == [JobState.FAILED.value]
    failure = service.store.get(claim.job.id).failure
    assert failure is not None
    assert failure.message == "made, as far as this test goes"
