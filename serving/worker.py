"""A worker: one process with a pipeline in memory that takes jobs from the queue, one or one batch at a time.

Started by the supervisor as `python -m proteus_deploy.serving.worker FD`, where FD is its end of a socket.
It is a process of its own so that a native crash or a killed process takes neither queue nor server along.
When the other end of the socket goes away it stops within one step and puts its job back.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from proteus_deploy.errors import Cancelled, InputError, ProteusError
from proteus_deploy.provenance import mark_generated
from proteus_deploy.serving.adapter_store import AdapterMemory, AdapterStore
from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.jobs import Claim, JobFailure, JobState, LostClaim
from proteus_deploy.serving.logs import write_logs
from proteus_deploy.serving.measures import resident_bytes
from proteus_deploy.serving.messages import Channel, WorkerSettings
from proteus_deploy.serving.portraits import (
    Drawn,
    Portraits,
    PortraitUnavailable,
    drawn_facts,
    portrait_model,
    portrait_of,
)
from proteus_deploy.serving.previews import Previews
from proteus_deploy.serving.progress import JobProgress, PortraitProgress, StageTimes
from proteus_deploy.serving.results import video_name
from proteus_deploy.serving.shared_results import open_results
from proteus_deploy.serving.side_by_side import run_side_by_side, split
from proteus_deploy.serving.work import Work
from proteus_deploy.serving.work_queue import WorkQueue
from proteus_deploy.serving.worker_pipeline import open_pipeline, request_fields, warm_up

if TYPE_CHECKING:
    from proteus_deploy.pipeline import Pipeline, StepEvent
    from proteus_deploy.request import GenerateRequest
    from proteus_deploy.stage_cache import StageCache
    from proteus_deploy.video import Video

__all__ = ["Worker", "main"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Part:
    """Jobs whose videos were made as one batch, the seconds that it took, those of each stage, its steps."""

    claims: Sequence[Claim]
    videos: Sequence[Video]
    seconds: float
    stages: dict[str, float]
    steps: int


class Worker:
    """Takes jobs until it is told to stop."""

    def __init__(
        self,
        settings: WorkerSettings,
        pipeline: Pipeline,
        channel: Channel,
        cache: StageCache | None = None,
        portraits: Portraits | None = None,
    ) -> None:
        """cache: the pipeline's, where it has one, for its counts. portraits: for jobs without a photo."""
        self._settings, self._pipeline, self._channel = settings, pipeline, channel
        self._cache, self._portraits = cache, portraits
        folder = Path(settings.data_dir)
        self._engine = open_database(database_url(settings.database_url, folder))
        self._queue = WorkQueue(self._engine, max_attempts=settings.max_attempts)
        self._adapters = AdapterMemory(AdapterStore(self._engine), settings.adapter_cache_bytes)
        self._results = open_results(settings.results_url, folder / "results")
        self._times = StageTimes()
        self._wake = threading.Event()  # something may have changed: look
        self._stopping = False
        self._current: Work | None = None

    def listen(self, messages: Iterator[dict[str, Any]]) -> None:
        """Hear the supervisor until it is gone; run in a thread of its own."""
        for message in messages:
            work = self._current
            for row, claim in enumerate(work.claims if work is not None else ()):
                assert work is not None
                if message.get("cancel") == claim.job.id:
                    work.drop(claim, "cancelled")
                if message.get("watch") == claim.job.id and work.previews is not None:
                    work.previews.watch(row)
                if message.get("unwatch") == claim.job.id and work.previews is not None:
                    work.previews.unwatch(row)
            if message.get("stop"):
                self.stop(at_once=message["stop"] == "now")
            self._wake.set()
        self.stop(at_once=True)

    def stop(self, *, at_once: bool) -> None:
        """Take no more jobs; at_once: also put the jobs at hand back."""
        self._stopping = True
        work = self._current
        if at_once and work is not None:
            work.drop_all("server stopped")
        self._wake.set()

    def run(self) -> None:
        """Take jobs until told to stop."""
        while not self._stopping:
            self._wake.clear()
            claims = self._take()
            if not claims:
                self._wake.wait(self._settings.poll_s)
                continue
            started_s = time.monotonic()
            states = self._do(claims)
            seconds = (time.monotonic() - started_s) / len(claims)
            for claim, state in zip(claims, states, strict=True):
                self._channel.send(ended=claim.job.id, state=state, seconds=seconds)
        self._engine.dispose()

    def _take(self) -> list[Claim]:
        """The next job, with those that can share its batch; a batch that isn't full waits for more."""
        settings = self._settings
        claims = self._queue.claim_batch(settings.name, lease_s=settings.lease_s, limit=settings.max_batch)
        missing = settings.max_batch - len(claims)
        if claims and missing and settings.batch_wait_s and claims[0].job.batch_key is not None:
            time.sleep(settings.batch_wait_s)
            claims += self._queue.claim_batch(
                settings.name, lease_s=settings.lease_s, limit=missing, like=claims[0].job.batch_key
            )
        return claims

    def _do(self, claims: Sequence[Claim]) -> list[str]:
        """How each job ended. Those of a batch that failed are put back, to be done alone."""
        work = Work(claims)
        if claims[0].job.kind == "video" and not self._settings.pipeline.low_memory:
            work.previews = Previews(self._pipeline.preview, partial(self._send_preview, work))
        self._current = work
        if self._stopping:  # told between claim and this line
            work.drop_all("server stopped")
        for claim in claims:
            self._channel.send(started=claim.job.id, attempt=claim.attempt, worker=self._settings.name)
        heart = threading.Thread(target=self._beat, args=(work,), daemon=True)
        heart.start()
        try:
            if claims[0].job.kind == "character":
                try:
                    work.end(claims[0], self._encode(claims[0]))
                except LostClaim:
                    work.end(claims[0], "lost")
            else:
                self._make(work)
        except Cancelled:
            pass  # each has its reason
        except ProteusError as error:
            left = work.left
            if len(left) == 1:
                work.end(left[0], self._failed(left[0], error))
            for claim in work.left:
                work.drop(claim, "to be alone")
        finally:
            work.done.set()
            heart.join()
            self._current = None
            self._channel.send(measures=self._measures(work))
        return [work.states.get(claim.job.id) or self._stopped(claim, work) for claim in claims]

    def _encode(self, claim: Claim) -> str:
        """A character's photo: refused here, or in the cache from now on."""
        photo = self._queue.photo(claim)
        assert photo is not None
        self._pipeline.encode_photo(photo, face_index=claim.job.request["face_index"])
        return self._queue.complete(claim).value

    def _make(self, work: Work) -> None:
        """The videos of the jobs at hand, together, but for those that end before: their portraits failed."""
        drawn = self._draw_portraits(work)
        for claim in work.left:
            if work.reason(claim):
                work.end(claim, self._stopped(claim, work))
        if not work.left:
            return
        started_s = time.monotonic()
        parts = split(work.left, self._settings.batch_parts)
        # Here, as neither the queue nor the memory of adapters is for several threads.
        asked = [[self._request(claim, drawn.get(claim.job.id)) for claim in part] for part in parts]
        outcomes = run_side_by_side(
            [partial(self._make_part, work, *both) for both in zip(parts, asked, strict=True)]
        )
        made = [outcome for outcome in outcomes if isinstance(outcome, _Part)]
        videos = [video for part in made for video in part.videos]
        portraits_s = sum(one.seconds for one in drawn.values())
        if made:
            stages = {
                name: max(part.stages.get(name, 0.0) for part in made)
                for name in dict.fromkeys(name for part in made for name in part.stages)
            }
            work.measures = {
                "seconds": round(time.monotonic() - started_s, 4) + portraits_s,
                "batch": len(videos),
                "stage_seconds": stages | ({"portrait": portraits_s} if drawn else {}),
                "steps": max(part.steps for part in made),
                "video_seconds": sum(video.frames.shape[1] / video.fps for video in videos),
            }
        for part in made:
            for claim, video in zip(part.claims, part.videos, strict=True):
                if work.reason(claim):
                    work.end(claim, self._stopped(claim, work))
                    continue
                portrait = drawn.get(claim.job.id)
                own_s = 0.0 if portrait is None else portrait.seconds
                facts: dict[str, object] = {"seconds": round(part.seconds + own_s, 4), "batch": len(videos)}
                facts["stage_seconds"] = part.stages | ({} if portrait is None else {"portrait": own_s})
                work.end(claim, self._publish(claim, video, facts, portrait))
        errors = [one for one in outcomes if isinstance(one, Exception) and not isinstance(one, Cancelled)]
        if errors:  # the worst first: others than the library's own end the worker
            raise min(errors, key=lambda one: isinstance(one, ProteusError))

    def _make_part(self, work: Work, claims: Sequence[Claim], requests: Sequence[GenerateRequest]) -> _Part:
        """The videos of some of the jobs at hand, as one batch of the pipeline."""
        started_s = time.monotonic()
        size = tuple(claims[0].job.request.get(name) for name in ("height", "width", "num_frames"))
        progress = JobProgress(partial(self._tell, work, claims), self._times, size)
        rows = [work.claims.index(claim) for claim in claims]
        videos = self._pipeline.generate_batch(
            requests,
            on_step=partial(self._on_step, work, progress, rows),
            on_progress=progress.on_progress,
            cancel=work.stop_of(*claims),
        )
        seconds = round(time.monotonic() - started_s, 4)
        return _Part(claims, videos, seconds, dict(progress.seconds), progress.steps)

    def _draw_portraits(self, work: Work) -> dict[str, Drawn]:
        """By job, of those that came without a photo; a job whose portrait can't be drawn fails here."""
        drawn: dict[str, Drawn] = {}
        for claim in work.claims:
            if work.reason(claim):
                continue
            report = PortraitProgress(partial(self._tell_one, work, claim))
            try:
                one = portrait_of(self._portraits, claim.job.request, report, work.stop_of(claim))
            except Cancelled:
                continue  # it has its reason
            except ProteusError as error:
                work.end(claim, self._failed(claim, error))
            else:
                drawn |= {} if one is None else {claim.job.id: one}
        return drawn

    def _request(self, claim: Claim, drawn: Drawn | None) -> GenerateRequest:
        from proteus_deploy.request import GenerateRequest

        request = claim.job.request
        return GenerateRequest(
            **request_fields(request),
            photo=self._queue.photo(claim) if drawn is None else drawn.portrait.image,
            adapters=self._adapters.uses(request.get("adapters")),
            metadata={} if drawn is None else {"portrait": drawn_facts(request, drawn.portrait)},
        )

    def _measures(self, work: Work) -> dict[str, Any]:
        """For the server's metrics: of the work, and of this process."""
        found = {**work.measures, "resident_bytes": resident_bytes()}
        if self._cache is not None:
            counts = self._cache.counts
            found |= {"cache_hits": counts.hits, "cache_misses": counts.misses, "cache_bytes": counts.bytes}
        return found

    def _on_step(self, work: Work, progress: JobProgress, rows: Sequence[int], event: StepEvent) -> None:
        progress.on_step(event)
        if work.previews is not None:
            work.previews.on_step(event, rows)

    def _send_preview(self, work: Work, row: int, picture: str) -> None:
        self._channel.send(job=work.claims[row].job.id, preview=picture)

    def _publish(self, claim: Claim, video: Video, facts: Mapping[str, object], drawn: Drawn | None) -> str:
        from proteus_deploy.reference_portrait import portrait_png

        _, frames, _, height, width = video.frames.shape
        own: dict[str, object] = {"frames": frames, "height": height, "width": width, "fps": video.fps}
        own |= {"seed": video.metadata.get("seed"), "backend": video.metadata.get("backend"), **facts}
        try:
            if drawn is not None:
                said = drawn_facts(claim.job.request, drawn.portrait)
                png = portrait_png(drawn.portrait.image, said, mark=self._settings.provenance)
                self._results.write_portrait(claim, png)
                own |= {"portrait_seed": drawn.portrait.seed, "portrait_bytes": len(png)}
            result = self._results.write(claim, partial(self._save, video), own)
        except BaseException:
            with contextlib.suppress(Exception):  # a later sweep removes what is left, if anything
                self._results.remove([video_name(claim)])
            raise
        try:
            state = self._queue.complete(claim, result)
        except LostClaim:
            self._results.remove([result.name])
            return "lost"
        if state is not JobState.COMPLETED:
            self._results.remove([result.name])
        return state.value

    def _save(self, video: Video, path: Path) -> None:
        video.save(path)
        if self._settings.provenance:
            mark_generated(path)

    def _tell(self, work: Work, claims: Sequence[Claim], news: dict[str, Any]) -> None:
        for claim in claims:
            self._tell_one(work, claim, news)

    def _tell_one(self, work: Work, claim: Claim, news: dict[str, Any]) -> None:
        if work.reason(claim) is None:
            work.news[claim.job.id] = news
            self._channel.send(job=claim.job.id, attempt=claim.attempt, progress=news)

    def _beat(self, work: Work) -> None:
        """Renew the leases, and see which jobs have to stop.

        A cancellation comes over the socket, unless another server on the same database was asked for it.
        """
        settings = self._settings
        shared = self._engine.dialect.name != "sqlite"
        renew_s = min(settings.lease_s / 3, 5.0)
        last_s = time.monotonic()
        while not work.done.wait(min(settings.poll_s, renew_s)):
            for claim in work.claims:
                if claim.job.deadline_at is not None and time.time() > claim.job.deadline_at:
                    work.drop(claim, "deadline")
            if shared:
                self._look_for_cancellations(work)
            if time.monotonic() - last_s < renew_s:
                continue
            last_s = time.monotonic()
            for claim in work.left:
                if work.reason(claim) != "lost":
                    self._renew(work, claim)

    def _look_for_cancellations(self, work: Work) -> None:
        with contextlib.suppress(sa.exc.OperationalError):  # the renewal says so
            asked = self._queue.cancellations(work.claims)
            for claim in work.claims:
                if claim.job.id in asked:
                    work.drop(claim, "cancelled")

    def _renew(self, work: Work, claim: Claim) -> None:
        news = work.news.get(claim.job.id)
        try:
            if self._queue.renew(claim, lease_s=self._settings.lease_s, progress=news):
                work.drop(claim, "cancelled")
        except LostClaim:
            work.drop(claim, "lost")
        except sa.exc.OperationalError as error:
            # The lease may still hold when the database is back; if not, the next renewal says so.
            _log.warning("the lease of job %s is not renewed: %s", claim.job.id, error.orig)

    def _stopped(self, claim: Claim, work: Work) -> str:
        reason = work.reason(claim)
        try:
            if reason == "cancelled":
                self._queue.stopped(claim)
                return JobState.CANCELLED.value
            if reason == "deadline":
                text = "the deadline passed before the video was finished"
                self._queue.fail(claim, JobFailure("deadline_exceeded", text))
                return JobState.FAILED.value
            if reason in ("server stopped", "to be alone"):
                self._queue.give_back(claim, alone=reason == "to be alone")
                return "given back"
        except LostClaim:
            return "lost"
        return "lost"

    def _failed(self, claim: Claim, error: ProteusError) -> str:
        code = "invalid_request" if isinstance(error, InputError) else "computation_error"
        if isinstance(error, PortraitUnavailable):
            code = "portrait_unavailable"
        try:
            self._queue.fail(claim, JobFailure(code, str(error)))
        except LostClaim:
            return "lost"
        return JobState.FAILED.value


def main(descriptor: int) -> int:
    """The process: settings come as the first message; says `ready`, `refused` or `died` and why."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server says what to do
    channel = Channel(socket.socket(fileno=descriptor))
    messages = iter(channel)
    first = next(messages, None)
    if first is None:
        return 1
    from proteus_deploy.stage_cache import StageCache

    settings = WorkerSettings.from_json(first)
    write_logs(as_json=settings.log_json)
    try:
        cache = StageCache(settings.cache_bytes) if settings.cache_bytes else None
        with open_pipeline(settings.pipeline, cache) as pipeline:
            if settings.warm_up:
                warm_up(pipeline)
            wanted = portrait_model(settings.pipeline) is not None
            portraits = Portraits(settings.pipeline, pipeline, cache) if wanted else None
            worker = Worker(settings, pipeline, channel, cache, portraits)
            threading.Thread(target=worker.listen, args=(messages,), daemon=True).start()
            channel.send(ready=settings.name, backend=pipeline.backend.name)
            worker.run()
    except ProteusError as error:
        channel.send(refused=str(error))
        return error.exit_code
    except BaseException as error:
        channel.send(died=f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
