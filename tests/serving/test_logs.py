"""Lines of the log: whose request they are of, as JSON, and what they never hold."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from proteus_deploy.serving.logs import write_logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_job_is_told_with_its_request(create: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_logs(as_json=True)
    answer = create({"X-Request-Id": "mine-1", "Authorization": "Bearer secret"})
    assert answer.headers["x-request-id"] == "mine-1"
    (line,) = [one for one in _lines(capsys) if one["logger"].startswith("proteus_deploy")]
    assert (line["request_id"], line["job"], line["owner"]) == ("mine-1", answer.json()["id"], "anonymous")
    assert line["level"] == "info"
    assert "secret" not in json.dumps(line)


@pytest.mark.parametrize("sent", [None, "", "a b", "x" * 65, "new\tline"])
def test_an_id_is_drawn(client: TestClient, sent: str | None) -> None:
    headers = {} if sent is None else {"X-Request-Id": sent}
    drawn = [client.get("/healthz", headers=headers).headers["x-request-id"] for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert all(len(one) == 16 for one in drawn)


def test_an_exception_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    write_logs(as_json=True)
    try:
        int("broken")
    except ValueError:
        logging.getLogger("proteus_deploy.test").exception("it failed")
    (line,) = _lines(capsys)
    assert line["message"] == "it failed"
    assert "ValueError: invalid literal" in line["exception"]
