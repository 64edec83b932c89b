"""The one command for a GPU: what it says when time runs out, and its claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks import denoising_loop, gpu_run, opened_candidate
from proteus_deploy.benchmarks.bench import BenchSettings, run_bench
from proteus_deploy.benchmarks.candidates import parse_candidate
from proteus_deploy.benchmarks.gpu_claims import claims_of
from proteus_deploy.benchmarks.timing import Deadline, interleave
from proteus_deploy.checkpoint import Checkpoint

LOOP = "the exact loop over the published form"


def loop_row(case: str, median: float) -> dict[str, Any]:
    return {"case": case, "status": "ok", "reason": "", "latency_ms": {"median": median}}


def verdict(results: dict[str, Any], claim: str) -> tuple[str, str]:
    (found,) = [one for one in claims_of(results) if one["claim"] == claim]
    return found["verdict"], found["measured"]


def test_claims_are_held_against_what_was_measured() -> None:
    rows = [loop_row("published:eager:bf16", 32.0), loop_row("exact:compiled:bf16", 20.0)]
    assert verdict({"loop": {"rows": rows}}, LOOP) == ("holds", "1.60x, 1.6x claimed")
    rows[1]["latency_ms"]["median"] = 40.0
    assert verdict({"loop": {"rows": rows}}, LOOP) == ("FAILS", "0.80x, 1.6x claimed")


def test_claims_of_a_kernel() -> None:
    row = {"kernel": "decode attention", "speedup": {"published": 1.4}, "share_of_floor": 0.65}
    results = {"kernels": {"rows": [row, {**row, "kernel": "decode attention, one image", "speedup": {}}]}}
    assert verdict(results, "decode attention over the eager form") == ("holds", "1.40x, 1x claimed")
    assert verdict(results, "decode attention, share of its floor") == ("FAILS", "0.65, 0.7 claimed")


def test_a_claim_without_a_figure_says_why() -> None:
    assert verdict({}, LOOP) == ("not known", "not measured: the part 'loop' was not reached")
    ended = {"loop": {"status": "ended", "reason": "it was not done in time"}}
    assert verdict(ended, LOOP)[1] == "not measured: ended: it was not done in time"
    rows = [
        loop_row("published:eager:bf16", 32.0),
        {"case": "exact:compiled:bf16", "status": "not measured", "reason": "left out: 3 s were left"},
    ]
    assert verdict({"loop": {"rows": rows}}, LOOP)[1] == (
        "not measured: exact:compiled:bf16: left out: 3 s were left"
    )
    failed = {"kernels": {"rows": [{"kernel": "modulated norm", "status": "failed", "reason": "no"}]}}
    assert verdict(failed, "modulated norm, share of its floor")[1] == "not measured: modulated norm: no"


def test_rounds_end_at_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round takes 10 s, so 35 have room for three; the first is run whatever is left."""
    now = 0.0

    def work() -> None:
        nonlocal now
        now += 10

    monkeypatch.setattr("time.monotonic", lambda: now)
    seconds = interleave({"a": work}, 9, deadline=Deadline(35))
    assert len(seconds["a"]) == 3
    assert len(interleave({"a": work}, 9, deadline=Deadline(-1))["a"]) == 1


@pytest.mark.usefixtures("small_copies")
def test_candidates_that_do_not_fit_keep_a_row(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening takes 100 s each time; 150 are enough for one, and the second isn't begun."""
    now = 0.0
    measured = denoising_loop.run_loop

    def slow(*arguments: Any, **named: Any) -> Any:
        nonlocal now
        now += 100
        return measured(*arguments, **named)

    monkeypatch.setattr(opened_candidate, "run_loop", slow)
    monkeypatch.setattr("time.monotonic", lambda: now)
    candidates = [parse_candidate(case) for case in ("published:eager:fp32", "exact:eager:fp32")]
    settings = BenchSettings("small", steps=1, rounds=3, memory=False, deadline=Deadline(150))
    rows = run_bench(Checkpoint.open(tiny_checkpoint), None, candidates, settings, tmp_path)["rows"]
    assert [row["status"] for row in rows] == ["ok", "not measured"]
    assert rows[0]["latency_ms"]["n"] == 1
    assert rows[1]["reason"].startswith("left out: 50 s were left")


def test_a_call_that_hangs_is_ended_with_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[tuple[float, Any]] = []
    ended: list[int] = []

    class Timer:
        daemon = False

        def __init__(self, seconds: float, end: Any) -> None:
            timers.append((seconds, end))

        def start(self) -> None:
            pass

        def cancel(self) -> None:
            pass

    def hang(*_: Any) -> dict[str, Any]:
        (seconds, end) = timers[0]
        assert seconds == 70
        end()
        document = json.loads((tmp_path / "claims.json").read_text())
        known = {claim["claim"]: claim["measured"] for claim in document["claims"]}
        assert known[LOOP] == "not measured: ended: it was not done in time"
        assert document["rehearsal"] is True
        raise RuntimeError("a real process would be gone")

    monkeypatch.setattr(gpu_run, "Timer", Timer)
    monkeypatch.setattr(gpu_run, "_kernels", lambda _: {"rows": []})
    monkeypatch.setattr(gpu_run, "_loop", hang)
    monkeypatch.setattr("os._exit", ended.append)
    gpu_run.main(["--output-dir", str(tmp_path), "--rehearse", "--seconds", "50"])
    assert ended == [1]
    assert json.loads((tmp_path / "loop.json").read_text())["reason"] == "a real process would be gone"
