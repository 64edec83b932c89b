"""All clips of a source -> the cache on disk, once: a second run encodes nothing, an interrupted one goes on.

The name of a clip's file is the hash of everything that decides its content, so nothing else needs to be
remembered: what is there under that name is done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

from proteus_deploy._files import write_json
from proteus_deploy.errors import Cancelled, ComputationError, InputError
from proteus_deploy.optical_flow import FlowEstimator
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.data.cache import (
    CLIP_SUFFIX,
    FORMAT,
    PreparedClip,
    PreparedSet,
    read_clip_facts,
    write_clip,
)
from proteus_deploy.training.data.clips import ClipLoader, ClipSource
from proteus_deploy.training.data.encoding import PrepareSettings, encode_clip, flow_estimator
from proteus_deploy.training.data.networks import EncodingNetworks
from proteus_deploy.training.data.report import ClipRejected, DataReport, Note, Reason, Rejection
from proteus_deploy.weights import read_json

__all__ = ["prepare"]

_PHASE = "preparing clips"
_POLL_S = 0.2
_QUEUED_PER_WORKER = 2  # clips of a shard wait with their bytes in memory


def prepare(
    source: ClipSource,
    checkpoint: str | Path | EncodingNetworks,
    cache_folder: str | Path,
    *,
    settings: PrepareSettings | None = None,
    report: Report = no_report,
    cancel: Event | None = None,
    workers: int = 0,
    name: str = "train",
) -> PreparedSet:
    """Encode every clip of `source` that isn't in the cache yet, and write the set `name` into the folder.

    checkpoint: a folder with vae/, text_encoder/, tokenizer/ and face_encoder/, or networks opened already.
    workers: 0 encodes in this process, n in n new ones with one thread each; those load the networks
    themselves. cancel: looked at between clips. A clip that can't be used is named in the set's report and
    stops nothing.

    Raises Cancelled once `cancel` is set: what is encoded stays, the same call goes on. InputError when no
    clip is accepted, CheckpointError for the networks, ComputationError when a worker dies.
    """
    if workers < 0:
        raise InputError(f"workers is {workers}; choose 0 (this process) or a number of processes")
    settings = settings or PrepareSettings()
    networks = (
        checkpoint
        if isinstance(checkpoint, EncodingNetworks)
        else EncodingNetworks(checkpoint, device=settings.device, dtype=settings.dtype)
    )
    settings = networks.resolve(settings)
    cache = _Cache(Path(cache_folder), settings, networks.hash)
    outcomes: dict[int, _Outcome] = {}
    total = len(source)

    def take(finished: Iterator[tuple[int, _Outcome]]) -> None:
        for index, outcome in finished:
            outcomes[index] = outcome
            report(_PHASE, len(outcomes), total)
        if cancel is not None and cancel.is_set():
            raise Cancelled(f"stopped after {len(outcomes)} of {total} clips; the same call goes on")

    with _Workers(workers, networks, settings, cache.folder) as encoders:
        for index, (clip_name, loader) in enumerate(source):
            found = cache.look_up(clip_name, loader)
            if isinstance(found, _Job):
                encoders.submit(index, found)
            else:
                take(iter([(index, found)]))
            while encoders.full:
                take(encoders.finished())
        while encoders.busy:
            take(encoders.finished())
    return _finish([outcomes[index] for index in sorted(outcomes)], cache, name)


@dataclass(frozen=True)
class _Job:
    name: str
    loader: ClipLoader
    fingerprint: str
    key: str


@dataclass(frozen=True)
class _Outcome:
    """clip or rejection, the other is None."""

    clip: PreparedClip | None
    rejection: Rejection | None
    notes: tuple[Note, ...] = ()
    reused: bool = False


class _Cache:
    """Which file a clip has, and what an earlier run left there."""

    def __init__(self, folder: Path, settings: PrepareSettings, networks: str) -> None:
        self.folder = folder
        self.settings = settings.document()
        self._networks = networks

    def look_up(self, name: str, loader: ClipLoader) -> _Outcome | _Job:
        """The outcome of a clip where that is known already, else what is to be done."""
        try:
            fingerprint = loader.fingerprint()
        except OSError as error:
            return _Outcome(None, Rejection(name, Reason.UNREADABLE_VIDEO, str(error)))
        document = {
            "format": FORMAT,
            "clip": fingerprint,
            "settings": self.settings,
            "networks": self._networks,
        }
        key = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        return _look_for(self.folder, name, key) or _Job(name, loader, fingerprint, key)


def _look_for(folder: Path, name: str, key: str) -> _Outcome | None:
    file = folder / f"{key}{CLIP_SUFFIX}"
    facts = read_clip_facts(file)
    if facts is not None:
        return _Outcome(PreparedClip(name, file, facts[0]), None, facts[1], reused=True)
    left_out = _rejection_file(folder, key)
    if left_out.is_file():
        document = read_json(left_out, error=InputError)
        return _Outcome(None, Rejection(name, Reason(document["reason"]), str(document["message"])))
    return None


def _rejection_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.rejected.json"


@dataclass
class _Encoder:
    """Loads and encodes clips, and writes their files. Networks are loaded with the first clip."""

    networks: EncodingNetworks
    settings: PrepareSettings
    folder: Path

    @cached_property
    def flow(self) -> FlowEstimator:
        return flow_estimator(self.settings)

    def __call__(self, job: _Job) -> _Outcome:
        try:
            return self._encode(job)
        except ClipRejected as error:
            write_json(
                _rejection_file(self.folder, job.key), {"reason": error.reason.value, "message": str(error)}
            )
            return _Outcome(None, Rejection(job.name, error.reason, str(error)))
        except OSError as error:  # the disk may do better next time, so this isn't written down
            return _Outcome(None, Rejection(job.name, Reason.UNREADABLE_VIDEO, str(error)))

    def _encode(self, job: _Job) -> _Outcome:
        clip = job.loader.load(self.networks.find_faces)
        encoded = encode_clip(clip, self.networks, self.settings, self.flow, job.fingerprint)
        file = self.folder / f"{job.key}{CLIP_SUFFIX}"
        write_clip(file, encoded.tensors, encoded.notes)
        return _Outcome(PreparedClip(job.name, file, len(encoded.tensors["condition"])), None, encoded.notes)


class _Workers:
    """Runs jobs here or in spawned processes. Spawned, not forked: this process may hold torch's threads."""

    def __init__(self, count: int, networks: EncodingNetworks, settings: PrepareSettings, folder: Path):
        self._count = count
        self._encoder = _Encoder(networks, settings, folder)
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: dict[Future[_Outcome], tuple[int, str]] = {}
        self._done: list[tuple[int, _Outcome]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._done)

    @property
    def full(self) -> bool:
        return bool(self._done) or len(self._waiting) >= max(1, _QUEUED_PER_WORKER * self._count)

    def submit(self, index: int, job: _Job) -> None:
        if not self._count:
            self._done.append((index, self._encoder(job)))
            return
        if self._pool is None:  # a run that finds everything in the cache starts no process
            networks = self._encoder.networks
            self._pool = ProcessPoolExecutor(
                self._count,
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(
                    networks.folder,
                    str(networks.device),
                    networks.dtype,
                    self._encoder.settings,
                    self._encoder.folder,
                ),
            )
        self._waiting[self._pool.submit(_work, job)] = index, job.name

    def finished(self) -> Iterator[tuple[int, _Outcome]]:
        """What is done by now; waits a moment where nothing is."""
        done, self._done = self._done, []
        yield from done
        if not self._waiting:
            return
        ready, _ = wait(self._waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        names = [name for _, name in self._waiting.values()]
        for future in ready:
            index, _ = self._waiting.pop(future)
            try:
                yield index, future.result()
            except BrokenProcessPool as error:
                raise ComputationError(
                    f"a worker process died while these clips were encoded: {', '.join(names)}; it may have "
                    "run out of memory. The same call goes on, with workers=0 it shows the cause"
                ) from error


_encoder_here: list[_Encoder] = []  # of a worker process: its own, made when it starts


def _start_worker(folder: Path, device: str, dtype: object, settings: PrepareSettings, cache: Path) -> None:
    import torch

    torch.set_num_threads(1)
    networks = EncodingNetworks(folder, device=device, dtype=dtype)  # type: ignore[arg-type]
    _on_one_core(networks)
    _encoder_here.append(_Encoder(networks, settings, cache))


def _on_one_core(networks: EncodingNetworks) -> None:
    """Make the face detector's sessions while this process may use one core only: they get one thread each.

    Otherwise each worker's sessions have a thread for every core, which spin while they wait for work.
    """
    import cv2

    cv2.setNumThreads(1)
    if not hasattr(os, "sched_setaffinity"):  # only Linux has it
        _ = networks.identity
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        _ = networks.identity
    finally:
        os.sched_setaffinity(0, cores)


def _work(job: _Job) -> _Outcome:
    return _encoder_here[0](job)


def _finish(outcomes: list[_Outcome], cache: _Cache, name: str) -> PreparedSet:
    clips = tuple(outcome.clip for outcome in outcomes if outcome.clip is not None)
    reused = sum(outcome.reused for outcome in outcomes)
    notes = Counter(note.value for outcome in outcomes for note in outcome.notes)
    rejections = tuple(outcome.rejection for outcome in outcomes if outcome.rejection is not None)
    report = DataReport(len(clips), reused, rejections, dict(notes))
    if not clips:
        raise InputError(f"no clip can be trained on:\n{report.text()}")
    prepared = PreparedSet(cache.folder, name, clips, report, cache.settings, len(clips) - reused)
    prepared.save()
    return prepared
