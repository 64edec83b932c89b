"""The queue: states only go forward, one attempt at a time, nothing accepted is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.serving.database import database_url, migrate, open_database
from proteus_deploy.serving.jobs import (
    NEXT_STATES,
    Claim,
    IdempotencyConflict,
    Job,
    JobFailure,
    JobNotFound,
    JobResult,
    JobState,
    LostClaim,
    NotCancellable,
    QueueFull,
)
from proteus_deploy.serving.pace import Pace
from proteus_deploy.serving.store import JobStore

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

LEASE_S = 10.0
RESULT = JobResult("video_0-1.mp4", 100, "0" * 64, {"frames": 5})


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(database: str, tmp_path: Path) -> Iterator[Engine]:
    opened = open_database(database_url(database, tmp_path))
    yield opened
    opened.dispose()


@pytest.fixture
def store(engine: Engine, clock: Clock) -> JobStore:
    return JobStore(engine, clock=clock, max_queued=50)


def _claim(store: JobStore, worker: str = "w") -> Claim:
    claim = store.claim(worker, lease_s=LEASE_S)
    assert claim is not None
    return claim


def test_a_job_from_end_to_end(store: JobStore) -> None:
    job, new = store.submit("anna", {"prompt": "wave 👋"}, photo=b"\x00\xff", cost=3)
    assert new
    assert job.state is JobState.QUEUED
    claim = _claim(store)
    assert claim.job.id == job.id
    assert (claim.job.state, claim.attempt) == (JobState.RUNNING, 1)
    assert claim.job.request == {"prompt": "wave 👋"}
    assert store.photo(claim) == b"\x00\xff"
    assert store.claim("other", lease_s=LEASE_S) is None
    assert store.renew(claim, lease_s=LEASE_S, progress={"step": 1}) is False
    assert store.get(job.id).progress == {"step": 1}
    assert store.complete(claim, RESULT) is JobState.COMPLETED
    done = store.get(job.id)
    assert done.state is JobState.COMPLETED
    assert done.result == RESULT
    assert store.photo(claim) is None, "a photo of a person is kept no longer than needed"
    assert store.result_names() == {RESULT.name}


def test_migrating_again_changes_nothing(engine: Engine, store: JobStore) -> None:
    job, _ = store.submit("anna", {})
    migrate(engine)
    assert store.get(job.id) == job


def test_an_old_attempt_can_store_nothing(store: JobStore, clock: Clock) -> None:
    store.submit("anna", {})
    old = _claim(store, "old")
    clock.now += LEASE_S + 1
    new = _claim(store, "new")
    assert (new.attempt, new.job.crashes) == (2, 1)
    calls: list[Callable[[], object]] = [
        lambda: store.complete(old, RESULT),
        lambda: store.fail(old, JobFailure("x", "y")),
        lambda: store.stopped(old),
        lambda: store.give_back(old),
        lambda: store.renew(old, lease_s=LEASE_S),
    ]
    for call in calls:
        with pytest.raises(LostClaim):
            call()
    store.complete(new, RESULT)
    with pytest.raises(LostClaim):
        store.complete(new, RESULT)


def test_a_job_that_kills_its_workers_is_given_up_with_the_reason(store: JobStore) -> None:
    job, _ = store.submit("anna", {})
    for attempt in (1, 2, 3):
        assert _claim(store).attempt == attempt
        store.worker_died("w", f"killed by signal {attempt}")
    assert store.claim("w", lease_s=LEASE_S) is None
    failed = store.get(job.id)
    assert failed.state is JobState.FAILED
    assert failed.failure is not None
    assert failed.failure.code == "worker_crashed"
    assert "after 3 attempts" in failed.failure.message
    assert "killed by signal 3" in failed.failure.message


def test_giving_back_counts_no_crash(store: JobStore) -> None:
    store.submit("anna", {})
    for _ in range(5):
        store.give_back(_claim(store))
    assert _claim(store).job.crashes == 0


def test_workers_of_one_machine_are_named_by_their_beginning(store: JobStore) -> None:
    store.submit("anna", {})
    store.submit("anna", {})
    _claim(store, "node_1-a")
    _claim(store, "nodex1-a")
    store.worker_died("node_1-*", "the machine was switched off")
    assert _claim(store).worker == "w"
    assert store.claim("w", lease_s=LEASE_S) is None


def test_cancelling(store: JobStore) -> None:
    waiting, running = (store.submit("anna", {"n": n})[0] for n in (1, 0))
    claim = _claim(store)
    waiting, running = running, claim.job
    assert store.cancel(waiting.id).state is JobState.CANCELLED
    asked = store.cancel(running.id)
    assert (asked.state, asked.cancel_requested) == (JobState.RUNNING, True)
    assert store.renew(claim, lease_s=LEASE_S) is True
    assert store.complete(claim, RESULT) is JobState.CANCELLED
    assert store.get(running.id).result is None
    with pytest.raises(NotCancellable, match="is cancelled"):
        store.cancel(running.id)


def test_cancelled_while_its_worker_was_dead(store: JobStore) -> None:
    job, _ = store.submit("anna", {})
    _claim(store)
    store.cancel(job.id)
    store.worker_died("w", "gone")
    assert store.get(job.id).state is JobState.CANCELLED


def test_deadline_of_a_waiting_job(store: JobStore, clock: Clock) -> None:
    job, _ = store.submit("anna", {}, deadline_s=5)
    clock.now += 6
    assert store.claim("w", lease_s=LEASE_S) is None
    failure = store.get(job.id).failure
    assert failure is not None
    assert failure.code == "deadline_exceeded"


def test_idempotency(store: JobStore) -> None:
    first, new = store.submit("anna", {"prompt": "a"}, photo=b"1", idempotency_key="k")
    again, new_again = store.submit("anna", {"prompt": "a"}, photo=b"1", idempotency_key="k")
    assert (new, new_again) == (True, False)
    assert first.id == again.id
    for request, photo in (({"prompt": "b"}, b"1"), ({"prompt": "a"}, b"2"), ({"prompt": "a"}, None)):
        with pytest.raises(IdempotencyConflict):
            store.submit("anna", request, photo=photo, idempotency_key="k")
    other, _ = store.submit("otto", {"prompt": "b"}, idempotency_key="k")
    assert other.id != first.id, "keys are the owner's own"


def test_the_queue_is_bounded(engine: Engine) -> None:
    store = JobStore(engine, max_queued=2)
    for number in range(2):
        store.submit("anna", {"n": number}, idempotency_key=str(number))
    with pytest.raises(QueueFull, match="2 jobs are waiting"):
        store.submit("anna", {})
    assert store.submit("anna", {"n": 0}, idempotency_key="0")[1] is False


def test_who_asks_for_little_waits_little(store: JobStore) -> None:
    for _ in range(6):
        store.submit("greedy", {}, cost=10)
    store.submit("modest", {}, cost=10)
    order = [_claim(store).job.owner for _ in range(7)]
    assert order.index("modest") == 1
    store.submit("greedy", {}, cost=10)
    late, _ = store.submit("late", {}, cost=10)
    assert store.position(late) == 0, "an absence saves nothing up, and costs nothing"


def test_large_jobs_count_as_large(store: JobStore) -> None:
    for _ in range(4):
        store.submit("large", {}, cost=30)
        store.submit("small", {}, cost=10)
    order = [_claim(store).job.owner for _ in range(8)]
    assert order[:5].count("small") == 4 - order[5:].count("small") >= 3


def test_pages(store: JobStore) -> None:
    ids = [store.submit("anna", {"n": number})[0].id for number in range(5)]
    store.submit("otto", {})
    page, more = store.page("anna", limit=2)
    assert ([job.id for job in page], more) == (ids[:2:-1], True)
    page, more = store.page("anna", after=page[-1].id, limit=3)
    assert ([job.id for job in page], more) == (ids[2::-1], False)
    page, more = store.page("anna", after=ids[0], limit=10, order="asc")
    assert ([job.id for job in page], more) == (ids[1:], False)
    with pytest.raises(JobNotFound):
        store.page("otto", after=ids[0])


def test_deleting(store: JobStore) -> None:
    done, waiting, running = (store.submit("anna", {"n": n})[0] for n in range(3))
    store.complete(_claim(store), RESULT)
    assert store.delete(done.id) == RESULT.name
    assert store.delete(waiting.id) is None
    claim = _claim(store)
    assert claim.job.id == running.id
    assert store.delete(running.id) is None
    for job in (done, waiting, running):
        with pytest.raises(JobNotFound):
            store.get(job.id)
    assert store.page("anna") == ([], False)
    assert store.renew(claim, lease_s=LEASE_S) is True
    store.stopped(claim)
    assert store.retain() == []
    assert store.counts()["cancelled"] == (0, 0.0)


def test_jobs_of_others_do_not_exist(store: JobStore) -> None:
    job, _ = store.submit("anna", {})
    for call in (store.get, store.cancel, store.delete):
        with pytest.raises(JobNotFound):
            call(job.id, "otto")


def test_retention(store: JobStore, clock: Clock) -> None:
    for number in range(4):
        store.submit("anna", {"n": number})
        result = JobResult(f"{number}.mp4", 100, "0" * 64, {})
        store.complete(_claim(store), result)
        clock.now += 100
    assert store.retain(max_age_s=350, max_bytes=1000) == ["0.mp4"]
    assert store.retain(max_bytes=250) == ["1.mp4"]
    assert store.result_names() == {"2.mp4", "3.mp4"}


def test_retention_counts_the_files_of_portraits(store: JobStore, clock: Clock) -> None:
    for number, facts in enumerate(({}, {"portrait_bytes": 60}, {"portrait_bytes": 60})):
        store.submit("anna", {"n": number})
        store.complete(_claim(store), JobResult(f"{number}.mp4", 100, "0" * 64, facts))
        clock.now += 100
    assert store.retain(max_bytes=420) == []
    assert store.retain(max_bytes=419) == ["0.mp4"]
    assert store.retain(max_bytes=319) == ["1.mp4"]


def test_claimers_never_share_a_job(store: JobStore) -> None:
    total = 24
    for number in range(total):
        store.submit(f"owner {number % 3}", {})
    taken: list[str] = []

    def take(worker: str) -> None:
        while (claim := store.claim(worker, lease_s=LEASE_S)) is not None:
            taken.append(claim.job.id)

    threads = [threading.Thread(target=take, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == total


def test_one_key_submitted_by_many_at_once_is_one_job(store: JobStore) -> None:
    found: list[tuple[Job, bool]] = []

    def submit() -> None:
        found.append(store.submit("anna", {"prompt": "x"}, idempotency_key="k"))

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.id for job, _ in found}) == 1
    assert [new for _, new in found].count(True) == 1


class _Play:
    """A queue in which anything may happen, at any time, in any order."""

    def __init__(self, store: JobStore, clock: Clock) -> None:
        self.store, self.clock = store, clock
        self.ids: list[str] = []
        self.claims: list[Claim] = []
        self.answers: dict[str, int] = {}

    def submit(self, number: int) -> None:
        self.ids.append(self.store.submit(f"owner {number % 2}", {"n": len(self.ids)})[0].id)

    def claim(self, number: int) -> None:
        if (claim := self.store.claim(f"w{number % 2}", lease_s=LEASE_S)) is not None:
            self.claims.append(claim)

    def die(self, number: int) -> None:
        self.store.worker_died(f"w{number % 2}", "died")

    def late(self, _number: int) -> None:
        self.clock.now += LEASE_S
        self.store.settle()

    def cancel(self, number: int) -> None:
        if self.ids:
            self.store.cancel(self.ids[number % len(self.ids)])

    def renew(self, number: int) -> None:
        self._with_a_claim(number, lambda claim: self.store.renew(claim, lease_s=LEASE_S))

    def give_back(self, number: int) -> None:
        self._with_a_claim(number, self.store.give_back)

    def complete(self, number: int) -> None:
        self._with_a_claim(number, lambda claim: self.store.complete(claim, RESULT), ends=True)

    def fail(self, number: int) -> None:
        self._with_a_claim(number, lambda claim: self.store.fail(claim, JobFailure("x", "y")), ends=True)

    def stop(self, number: int) -> None:
        self._with_a_claim(number, self.store.stopped, ends=True)

    def _with_a_claim(self, number: int, call: Callable[[Claim], object], *, ends: bool = False) -> None:
        if self.claims:
            claim = self.claims[number % len(self.claims)]
            call(claim)
            if ends:
                self.answers[claim.job.id] = self.answers.get(claim.job.id, 0) + 1


_ACTIONS = (
    _Play.submit, _Play.claim, _Play.renew, _Play.complete, _Play.fail, _Play.stop, _Play.give_back,
    _Play.die, _Play.late, _Play.cancel,
)  # fmt: skip


def _check_step(before: Job | None, job: Job) -> None:
    assert job.state is not JobState.RUNNING or job.attempt >= 1
    if before is None or job == before:
        return
    assert not before.state.finished
    assert job.attempt >= before.attempt
    # One action may free a job and end it.
    reachable = NEXT_STATES[before.state]
    two_steps = {end for middle in reachable for end in NEXT_STATES[middle]}
    assert job.state is before.state or job.state in reachable | two_steps


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.tuples(st.sampled_from(_ACTIONS), st.integers(0, 5)), max_size=30))
def test_states_only_go_forward(
    tmp_path_factory: pytest.TempPathFactory,
    actions: list[tuple[Callable[[_Play, int], None], int]],
) -> None:
    clock = Clock()
    engine = open_database(database_url(None, tmp_path_factory.mktemp("states")))
    play = _Play(JobStore(engine, clock=clock, max_attempts=2), clock)
    seen: dict[str, Job] = {}
    for action, number in actions:
        clock.now += 1
        with suppress(LostClaim, NotCancellable):
            action(play, number)
        for job_id in play.ids:
            job = play.store.get(job_id)
            _check_step(seen.get(job_id), job)
            seen[job_id] = job
    assert all(count == 1 for count in play.answers.values())
    engine.dispose()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "can't be read"),
        ("sqlite://", "in memory"),
        ("mysql://host/name", "sqlite or postgresql"),
    ],
)
def test_refused_databases(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        database_url(text, tmp_path)


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    url = database_url(f"postgresql://me:secret@/jobs?host={tmp_path}", tmp_path)
    with pytest.raises(BackendError, match="doesn't answer") as caught:
        open_database(url)
    assert "secret" not in str(caught.value)


def test_tables_of_a_later_release_are_refused(tmp_path: Path) -> None:
    import sqlalchemy as sa

    engine = open_database(database_url(None, tmp_path))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(InputError, match="not of this release"):
        open_database(database_url(None, tmp_path))


def test_a_batch_is_of_one_kind_and_in_order(store: JobStore) -> None:
    keys = ("a", "b", "a", None, "a", "b")
    jobs = [store.submit("anna", {}, batch_key=key)[0] for key in keys]

    def take(limit: int, like: str | None = None) -> list[str]:
        claims = store.claim_batch("w", lease_s=LEASE_S, limit=limit, like=like)
        assert all(claim.job.state is JobState.RUNNING for claim in claims)
        return [claim.job.id for claim in claims]

    ids = [job.id for job in jobs]
    assert take(2) == [ids[0], ids[2]]
    assert take(9, "a") == [ids[4]]
    assert take(9, "a") == []
    assert take(9) == [ids[1], ids[5]]
    assert take(9) == [ids[3]], "one without a key is alone"


def test_what_comes_along_moves_no_clock(store: JobStore) -> None:
    """A's second job is taken for A's batch; who comes later doesn't wait behind its turn."""
    for _ in range(2):
        store.submit("anna", {}, cost=1000.0, batch_key="a")
    bert = [store.submit("bert", {}, cost=10.0)[0] for _ in range(3)]
    assert len(store.claim_batch("w", lease_s=LEASE_S, limit=1)) == 1
    assert len(store.claim_batch("w", lease_s=LEASE_S, limit=1, like="a")) == 1
    carl, _ = store.submit("carl", {}, cost=1.0)
    order = [_claim(store).job.id for _ in range(4)]
    assert order.index(carl.id) == 1, "behind bert's first, as their turns are equal"
    assert [one for one in order if one != carl.id] == [job.id for job in bert]


def test_a_batch_that_killed_its_worker_is_made_one_by_one(store: JobStore, clock: Clock) -> None:
    for _ in range(2):
        store.submit("anna", {}, batch_key="a")
    store.claim_batch("w", lease_s=LEASE_S, limit=2)
    clock.now += LEASE_S + 1
    assert [len(store.claim_batch("w", lease_s=LEASE_S, limit=2)) for _ in range(3)] == [1, 1, 0]


def test_put_back_to_be_alone(store: JobStore) -> None:
    for _ in range(2):
        store.submit("anna", {}, batch_key="a")
    for claim in store.claim_batch("w", lease_s=LEASE_S, limit=2):
        store.give_back(claim, alone=True)
    assert [len(store.claim_batch("w", lease_s=LEASE_S, limit=2)) for _ in range(3)] == [1, 1, 0]
    assert [job.crashes for job in store.page()[0]] == [0, 0]


def test_waiting_cost_is_bounded(store: JobStore) -> None:
    pace = Pace(job_s=1.0, cost_s=2.0)
    store.submit("anna", {}, cost=5.0, max_wait=(pace, 0.0))  # nothing waits yet
    store.submit("anna", {}, cost=5.0, max_wait=(pace, 11.0))
    with pytest.raises(QueueFull, match="2 jobs are waiting, and what they cost") as caught:
        store.submit("anna", {}, cost=1.0, max_wait=(pace, 21.9))
    assert caught.value.by_cost


def test_portraits_that_wait_are_part_of_the_waiting_cost(store: JobStore) -> None:
    pace = Pace(job_s=1.0, cost_s=2.0, portrait_s=4.0)
    assert store.waiting_portraits() == 0
    for request in ({}, {"portrait_prompt": "a woman"}, {"portrait_prompt": "é"}, {"portrait_prompt": None}):
        store.submit("anna", request, cost=1.0)
    assert store.waiting_portraits() == 2
    with pytest.raises(QueueFull, match="4 jobs are waiting, and what they cost"):
        store.submit("anna", {}, cost=1.0, max_wait=(pace, 19.9))
    store.submit("anna", {}, cost=1.0, max_wait=(pace, 20.0))
    _claim(store), _claim(store)
    assert store.waiting_portraits() == 1


def test_the_pace_is_of_the_last_videos(store: JobStore, clock: Clock) -> None:
    assert store.pace() is None
    loop = {"stage_seconds": {"identity": 0.5, "denoise": 3.0, "decode": 1.5}}
    several = {"stage_seconds": {"denoise": 6.0}, "seconds": 10.0, "batch": 2}
    for index, facts in enumerate(({"seconds": 5.0, **loop}, several, {"seconds": 5.0, **loop})):
        store.submit("anna", {}, cost=3.0)
        clock.now += 1
        store.complete(_claim(store), replace(RESULT, name=f"video_{index}-1.mp4", facts=facts))
    pace = store.pace()
    assert pace == Pace(job_s=2.0, cost_s=1.0)
    assert pace.seconds(2, 7.0) == 11.0
    assert replace(pace, portrait_s=3.0).seconds(2, 7.0, 1) == 14.0
    # One during which the machine stood still changes nothing.
    store.submit("anna", {}, cost=3.0)
    clock.now += 1
    store.complete(_claim(store), replace(RESULT, name="video_9-1.mp4", facts={"seconds": 500.0}))
    assert store.pace() == pace
