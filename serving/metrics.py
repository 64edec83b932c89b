"""Prometheus metrics, read from the queue and the workers when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proteus_deploy.serving.measures import Measures, resident_bytes

if TYPE_CHECKING:
    from proteus_deploy.serving.service import Service

__all__ = ["metrics_text"]


class _Queue(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        counts, board = self._service.store.counts(), self._service.board
        jobs = GaugeMetricFamily("proteus_jobs", "Jobs in the database, by state", labels=["state"])
        cost = GaugeMetricFamily(
            "proteus_jobs_cost", "Sum of the jobs' cost (10^6 pixel evaluations), by state", labels=["state"]
        )
        for state, (count, total) in counts.items():
            jobs.add_metric([state], count)
            cost.add_metric([state], total)
        attempts = CounterMetricFamily(
            "proteus_attempts", "Attempts that ended, by outcome", labels=["outcome"]
        )
        seconds = CounterMetricFamily(
            "proteus_attempt_seconds", "Wall seconds of attempts that ended, by outcome", labels=["outcome"]
        )
        for outcome in sorted(board.outcomes):
            attempts.add_metric([outcome], board.outcomes[outcome])
            seconds.add_metric([outcome], board.seconds[outcome])
        yield from (jobs, cost, attempts, seconds)
        supervisor = self._service.supervisor
        yield GaugeMetricFamily(
            "proteus_workers_ready", "Workers with a pipeline in memory", supervisor.ready
        )
        yield CounterMetricFamily("proteus_worker_restarts", "Workers started again", supervisor.restarts)
        wait_s = self._service.wait_s()
        if wait_s is not None:
            yield GaugeMetricFamily(
                "proteus_wait_seconds",
                "How long a job that comes now waits, by cost and measured rate",
                wait_s,
            )
        yield from _made(board.measures)
        yield from _processes(board.measures)


def _made(measures: Measures) -> Iterator[Metric]:
    stages = CounterMetricFamily("proteus_stage_seconds", "Wall seconds of each stage", labels=["stage"])
    for stage, total in sorted(measures.stage_seconds.items()):
        stages.add_metric([stage], total)
    yield stages
    for name, words, value in (
        ("proteus_steps", "Denoising steps, one for a whole batch", measures.steps),
        ("proteus_videos", "Videos that were made; over the batches, their mean size", measures.videos),
        ("proteus_batches", "Batches that were made", measures.batches),
        ("proteus_video_seconds", "Seconds that the videos last; over the attempts', the realtime factor",
         measures.video_seconds),
    ):  # fmt: skip
        yield CounterMetricFamily(name, words, value)


def _processes(measures: Measures) -> Iterator[Metric]:
    memory = GaugeMetricFamily("proteus_resident_bytes", "Main memory of a process", labels=["process"])
    memory.add_metric(["web"], resident_bytes())
    hits = CounterMetricFamily("proteus_cache_hits", "Text and identity results found", labels=["worker"])
    misses = CounterMetricFamily("proteus_cache_misses", "Those that were computed", labels=["worker"])
    kept = GaugeMetricFamily("proteus_cache_bytes", "Those that are kept in memory", labels=["worker"])
    for number, said in sorted(measures.of_worker.items()):
        memory.add_metric([f"worker {number}"], said["resident_bytes"])
        if "cache_hits" in said:
            hits.add_metric([str(number)], said["cache_hits"])
            misses.add_metric([str(number)], said["cache_misses"])
            kept.add_metric([str(number)], said["cache_bytes"])
    yield from (memory, hits, misses, kept)


def metrics_text(service: Service) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Queue(service))
    return generate_latest(registry)
