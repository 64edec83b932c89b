"""What workers say, kept and told on: who looks on, who is ready to hear."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.serving.messages import Channel, PipelineChoice, WorkerSettings
from proteus_deploy.serving.previews import Previews
from proteus_deploy.serving.supervisor import Board, Supervisor


def test_looking_on_ends_with_the_last() -> None:
    board = Board()
    board.watch("a")
    board.watch("a")
    assert not board.unwatch("a")
    assert board.watched("a")
    assert board.unwatch("a")
    assert not board.watched("a")


def test_news_are_told_until_nobody_listens() -> None:
    board, told = Board(), list[str]()
    with board.listening("a", lambda: told.append("a")), board.listening("a", lambda: told.append("too")):
        board.post("a", {"percent": 1})
        board.post("b", {"percent": 1})
        board.post_preview("a", "data:")
    board.ended("a", "completed", 1.0)
    assert told == ["a", "too", "a", "too"]
    assert board.progress("a") is None
    assert board.preview("a") is None
    assert board._listeners == {}


def test_a_worker_that_opens_its_model_is_told_nothing(tmp_path: Path) -> None:
    """It doesn't read yet: a socket that fills up would block whoever asks for a video."""
    settings = WorkerSettings("node-", PipelineChoice("checkpoint", "none"), "sqlite://", str(tmp_path))
    supervisor = Supervisor(settings, None, Board())  # type: ignore[arg-type]
    (keeper,) = supervisor._keepers
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(0.05)
        keeper._channel = Channel(ours)
        supervisor.wake()
        supervisor.cancel("video_0")
        supervisor.watch("video_0")
        with pytest.raises(TimeoutError):
            theirs.recv(1)
        keeper.ready = True
        supervisor.wake()
        assert theirs.recv(100) == b'{"wake": true}\n'
    assert supervisor._board.watched("video_0"), "told with the start of the job"


class _Event:
    index, total = 0, 10


def test_a_picture_that_cannot_be_drawn_ends_no_video(caplog: pytest.LogCaptureFixture) -> None:
    drawn: list[int] = []

    def draw(_event: Any, row: int) -> Any:
        drawn.append(row)
        raise RuntimeError("out of memory")

    previews = Previews(draw, lambda *_: pytest.fail("nothing was drawn"), clock=lambda: 0.0)
    previews.on_step(_Event(), [0, 1])  # type: ignore[arg-type]
    assert drawn == [], "nobody looks"
    previews.watch(1)
    for _ in range(3):
        previews.on_step(_Event(), [0, 1])  # type: ignore[arg-type]
    assert drawn == [1], "it isn't tried again"


def test_pictures_take_a_tenth_of_the_time() -> None:
    import numpy as np

    now, sent = [0.0], list[tuple[int, str]]()

    def draw(_event: Any, _row: int) -> Any:
        now[0] += 0.5
        return np.zeros((400, 800, 3), np.uint8)

    previews = Previews(draw, lambda row, picture: sent.append((row, picture)), clock=lambda: now[0])
    previews.watch(0)
    for _ in range(200):
        previews.on_step(_Event(), [0, 1])  # type: ignore[arg-type]
        now[0] += 0.1
    assert 3 <= len(sent) <= 5, "20 s of steps"
    assert sent[0][1].startswith("data:image/jpeg;base64,")
    previews.unwatch(0)
    now[0] += 100
    previews.on_step(_Event(), [0, 1])  # type: ignore[arg-type]
    assert len(sent) <= 5


def test_pictures_of_a_batch_that_some_jobs_have_left() -> None:
    """The first of three ended before; the second video of the batch is the third job's."""
    import numpy as np

    drawn, sent = list[int](), list[int]()

    def draw(_event: Any, place: int) -> Any:
        drawn.append(place)
        return np.zeros((8, 8, 3), np.uint8)

    previews = Previews(draw, lambda row, _: sent.append(row), clock=lambda: 0.0)
    for row in (0, 2):
        previews.watch(row)
    previews.on_step(_Event(), [1, 2])  # type: ignore[arg-type]
    assert (drawn, sent) == ([1], [2])


def test_pictures_of_batches_side_by_side() -> None:
    """Each batch has its own time: one that is looked at often doesn't take the other's turns."""
    import numpy as np

    sent = list[int]()
    previews = Previews(
        lambda _event, _place: np.zeros((8, 8, 3), np.uint8),
        lambda row, _: sent.append(row),
        clock=lambda: 0.0,
    )
    for row in (0, 3):
        previews.watch(row)
    for rows in ([0, 1], [2, 3], [0, 1]):
        previews.on_step(_Event(), rows)  # type: ignore[arg-type]
    assert sent == [0, 3]
