"""Ten thousand requests that nobody should send, over real sockets: no 5xx, no hang, bounded memory."""

from __future__ import annotations

import contextlib
import io
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvicorn

from proteus_deploy.serving.app import create_app

if TYPE_CHECKING:
    from proteus_deploy.serving.service import Service

COUNT, SEED = 10_000, 20261128
TIMEOUT_S = 20.0
GROWTH_BYTES = 200 << 20
ROUTES = ("/v1/videos", "/v1/videos/sync", "/v1/characters", "/v1/adapters")
FIELDS = (
    "prompt", "model", "seconds", "size", "input_reference", "identity_prompt", "negative_prompt", "width",
    "height", "num_frames", "character", "fps", "num_inference_steps", "guidance_scale", "use_dynamic_cfg",
    "dynamic_cfg", "seed", "scheduler", "face_index", "identity_scale", "plan", "timeout_s", "name",
    "adapters", "file",
)  # fmt: skip
ODD = (
    "", " ", "nan", "NaN", "inf", "-1", "0", "1e999", "9" * 400, "0x10", "true", "null", "[]", "{}", "٣",
    "\ud800", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/", "a\0b",
    "𝔘" * 50, "-8x16", "99999x99999", "{" * 3000, "%00", "\r\nX: y", "'; DROP TABLE jobs; --",
    "char_" + "0" * 32, '[{"id": "adapter_0"}]',
)  # fmt: skip


@pytest.fixture
def address(service: Service) -> Iterator[tuple[str, int]]:
    """A real server without workers, with small limits."""
    service.settings = replace(service.settings, max_body_bytes=1 << 20)
    config = uvicorn.Config(create_app(service), log_config=None, access_log=False, lifespan="off")
    config.h11_max_incomplete_event_size = 64 << 10
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()
    service.stopping.set()  # who waits for a video is answered
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()


def _head(method: str, target: str, headers: dict[str, str], length: int | None) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogatepass")


def _odd_value(rng: random.Random) -> object:
    return rng.choice(
        [*ODD, None, True, -1, 0, 2**63, 2**70, -(2**70), 1.5, 1e308, [], [[[]]], {}, {"a": 1}, {"kind": "x"}]
    )


def _odd_json(rng: random.Random) -> tuple[dict[str, str], bytes]:
    fields = {rng.choice(FIELDS): _odd_value(rng) for _ in range(rng.randint(0, 8))}
    document: object = {"prompt": "a person waves", **fields}
    if rng.random() < 0.1:
        document = rng.choice([[], 5, "x", None, [document]])
    body = json.dumps(document).encode()
    if rng.random() < 0.3:  # damage
        at = rng.randrange(len(body) + 1)
        body = body[:at] + rng.randbytes(rng.randint(0, 20)) + body[at + rng.randint(0, 20) :]
    return {"Content-Type": "application/json"}, body


def _odd_form(rng: random.Random, photos: tuple[bytes, ...]) -> tuple[dict[str, str], bytes]:
    boundary = rng.choice(["b", "x" * 70, "b" * 300, '"', "a b"])
    parts = []
    for _ in range(rng.randint(0, 6)):
        name, value = rng.choice(FIELDS), str(_odd_value(rng)).encode("utf-8", "surrogatepass")
        extra = ""
        if rng.random() < 0.4:
            name, value = rng.choice(["input_reference", name]), rng.choice(photos)
            file = rng.choice(["a.png", "../../../etc/passwd", "", "\\\\x\\y", "a" * 500])
            extra = f'; filename="{file}"\r\nContent-Type: {rng.choice(["image/png", "text/html", "x", ""])}'
        head = f'Content-Disposition: form-data; name="{name}"{extra}'
        parts.append(f"--{boundary}\r\n{head}\r\n\r\n".encode() + value + b"\r\n")
    body = b"".join(parts) + rng.choice([f"--{boundary}--\r\n".encode(), b"", b"--"])
    if rng.random() < 0.3:
        at = rng.randrange(len(body) + 1)
        body = body[:at] + rng.randbytes(rng.randint(0, 50)) + body[at + rng.randint(0, 50) :]
    kind = rng.choice(["multipart/form-data", "multipart/form-data", "application/x-www-form-urlencoded"])
    with_boundary = rng.choice([f"{kind}; boundary={boundary}", kind, f"{kind}; boundary="])
    return {"Content-Type": with_boundary}, body


def _odd_target(rng: random.Random) -> bytes:
    odd = rng.choice(ODD).replace(" ", "%20").replace("\0", "%00").replace("\r\n", "%0D%0A")
    ids = [odd, "video_" + "0" * 32, "..%2f..%2fetc%2fpasswd", "%ff", "a" * 5000]
    tail = rng.choice(["", "/content", "/events", "/cancel", "/nothing", "/content?variant=" + odd])
    query = rng.choice(["", f"?limit={odd}", f"?after={odd}&order=up", "?" + "a=1&" * 2000])
    kind = rng.choice(["videos", "characters", "adapters", "models", "x"])
    target = f"/v1/{kind}/{rng.choice(ids)}{tail}{query}"
    method = rng.choice(["GET", "DELETE", "POST", "PUT", "PATCH", "HEAD", "OPTIONS", "get", "BREW"])
    return _head(method, target, {"Range": rng.choice(["bytes=9-1", "bytes=-", "lines=1-2"])}, 0)


def _odd_headers(rng: random.Random) -> bytes:
    headers = rng.choice(
        [
            {"Authorization": "Bearer " + rng.choice(ODD).replace("\r\n", "").replace("\0", "")},
            {"X-Much": "y" * rng.choice([10_000, 100_000, 1_000_000])},
            {f"X-{index}": "z" for index in range(5000)},
            {"Idempotency-Key": "k" * rng.choice([0, 255, 256, 5000]), "Content-Type": "application/json"},
            {"Content-Type": "application/json", "Transfer-Encoding": "chunked"},
            {"Content-Type": rng.choice(["", "image/png", "x" * 3000, "application/json; charset=utf-7"])},
        ]
    )
    body = rng.choice([b"", b"{}", b"5\r\nhello\r\nzz\r\n", rng.randbytes(100)])
    length = rng.choice([len(body), None, 5, -1, 10**15])
    return _head("POST", rng.choice(ROUTES), headers, length) + body


def _photos() -> tuple[bytes, ...]:
    from PIL import Image

    def picture(size: tuple[int, int], kind: str, mode: str = "1") -> bytes:
        stream = io.BytesIO()
        Image.new(mode, size).save(stream, kind)
        return stream.getvalue()

    whole = picture((64, 64), "png", "RGB")
    bomb = picture((12_000, 12_000), "png")
    assert len(bomb) < 30_000
    return (bomb, whole, whole[:40], b"", b"\xff\xd8\xff\xe0" + b"\0" * 64, b"GIF89a" + b"\xff" * 64,
            b"<svg onload='x'/>", picture((9000, 1), "gif"), picture((1, 9000), "tiff"))  # fmt: skip


def _send(address: tuple[str, int], request: bytes) -> bytes:
    """The beginning of the answer; empty where the server hung up on what is no HTTP."""
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            return connection.recv(4096)
    return b""


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_what_nobody_should_send(address: tuple[str, int], service: Service) -> None:
    rng, photos = random.Random(SEED), _photos()
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: _posted(rng, _odd_json(rng)),
        lambda: _posted(rng, _odd_form(rng, photos)),
        lambda: _odd_target(rng),
        lambda: _odd_headers(rng),
        lambda: rng.randbytes(rng.randint(0, 500)),
    )
    answers: Counter[str] = Counter()
    start = 0
    for index in range(COUNT):
        if index == COUNT // 10:  # what Python loads on the way is loaded by then
            start = _resident_bytes()
        request = rng.choices(makers, weights=(4, 4, 2, 2, 1))[0]()
        answer = _send(address, request)  # raises TimeoutError where the server hangs
        status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"
        answers[status] += 1
        assert not status.startswith("5"), (index, request[:2000], answer)
        assert status == "closed" or status.isdigit(), (index, answer)
    assert _resident_bytes() - start < GROWTH_BYTES
    assert {"400", "404", "405", "415"} <= set(answers), answers
    assert _send(address, _head("GET", "/healthz", {}, None)).startswith(b"HTTP/1.1 200")
    # Nothing was fetched, written or opened besides what the service itself keeps.
    kept = {path.name for path in service.settings.data_dir.rglob("*") if path.is_file()}
    assert kept <= {"lock", "node", "jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"}, kept


def _posted(rng: random.Random, content: tuple[dict[str, str], bytes]) -> bytes:
    headers, body = content
    return _head("POST", rng.choice(ROUTES), headers, len(body)) + body
