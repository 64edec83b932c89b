"""What /metrics says of the queue, the work done, caches and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi.testclient import TestClient

from proteus_deploy.serving.jobs import JobResult
from proteus_deploy.serving.service import Service

MADE = {
    "batch": 2,
    "steps": 25,
    "video_seconds": 4.0,
    "stage_seconds": {"denoise": 5.0, "decode": 1.0},
    "resident_bytes": 1000,
    "cache_hits": 3,
    "cache_misses": 4,
    "cache_bytes": 500,
}


def _read(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}


def test_work_is_added_up(client: TestClient, service: Service) -> None:
    measures = service.board.measures
    measures.add(0, MADE)
    measures.add(1, MADE | {"cache_hits": 9})
    measures.add(1, {"resident_bytes": 2000})  # a job that failed
    found = _read(client)
    assert found['proteus_stage_seconds_total{stage="denoise"}'] == 10.0
    assert found["proteus_steps_total"] == 50
    assert found["proteus_videos_total"] / found["proteus_batches_total"] == 2
    assert found["proteus_video_seconds_total"] == 8.0
    assert found['proteus_cache_hits_total{worker="0"}'] == 3
    assert found['proteus_resident_bytes{process="worker 1"}'] == 2000
    assert found['proteus_resident_bytes{process="web"}'] > 1e7


def test_waiting_is_in_seconds(client: TestClient, service: Service, create: Any) -> None:
    assert "proteus_wait_seconds" not in _read(client), "no rate was measured"
    create()
    claim = service.store.claim("w", lease_s=60)
    assert claim is not None
    service.store.complete(claim, JobResult("video_0-1.mp4", 1, "0", {"seconds": 6.0}))
    create()
    create()
    found = _read(client)
    assert found["proteus_wait_seconds"] == 12.0
    assert found['proteus_jobs{state="queued"}'] == 2
    assert found['proteus_jobs_cost{state="queued"}'] == 2 * claim.job.cost
    service.settings = replace(service.settings, max_wait_s=5.0)
    assert create().status_code == 429
