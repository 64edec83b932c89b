"""`proteus-deploy serve` with the trained tiny model, as a client on the network meets it."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from proteus_deploy.bundle import MANIFEST
from proteus_deploy.cli import serve
from proteus_deploy.cli.main import main
from proteus_deploy.tiny.trained import MODEL

if TYPE_CHECKING:
    from tests.serving.conftest import Server

# The client warns that OpenAI's own server of this API is shut down; vLLM-Omni and SGLang have it too.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_process: type[Server]) -> Iterator[Server]:
    started = serve_process(tmp_path_factory.mktemp("server"))
    yield started
    assert started.end() == 0
    assert "stopped" in started.log.read_text()


@pytest.fixture
def start(serve_process: type[Server]) -> Iterator[Callable[[Path], Server]]:
    """start(folder) -> a server, killed after the test where it still runs."""
    started: list[Server] = []

    def make(folder: Path) -> Server:
        started.append(serve_process(folder))
        return started[-1]

    yield make
    for one in started:
        one.kill()


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.slow
def test_the_openai_client(client: Any, drawn_photo: bytes, tmp_path: Path) -> None:
    """Create, poll, list, download, delete: the official client, unchanged."""
    import openai

    from proteus_deploy.video import read_video

    video = client.videos.create_and_poll(
        prompt="a person waves",
        input_reference=("photo.png", drawn_photo),
        extra_body={"num_inference_steps": 2, "seed": 3},
        poll_interval_ms=50,
    )
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    client.videos.download_content(video.id).write_to_file(tmp_path / "video.mp4")
    assert read_video(tmp_path / "video.mp4").metadata["seed"] == 3
    assert [one.id for one in client.videos.list(limit=1).data] == [video.id]
    assert [model.id for model in client.models.list()] == ["proteus-id"]
    assert client.videos.delete(video.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError, match="input_reference is missing"):
        client.videos.create(prompt="a person waves")


@pytest.mark.slow
@pytest.mark.parametrize("language", ["sh", "python"])
def test_the_examples_of_the_page(
    language: str, server: Server, repository: Path, drawn_photo: bytes, tmp_path: Path
) -> None:
    from proteus_deploy.video import read_video

    page = (repository / "docs" / "serve.md").read_text(encoding="utf-8")
    block = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    program = "bash" if language == "sh" else sys.executable
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("curl is not installed on this machine")
    (tmp_path / "photo.png").write_bytes(drawn_photo)
    command = [program, "-c", block.replace("http://127.0.0.1:8000", server.url)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_video(tmp_path / "video.mp4").metadata["seed"] == 42


@pytest.mark.slow
def test_events_and_cancel(server: Server, client: Any, drawn_photo: bytes) -> None:
    video = client.videos.create(
        prompt="a person waves",
        input_reference=("photo.png", drawn_photo),
        extra_body={"num_inference_steps": 1000},
    )
    shown = []
    with httpx2.stream("GET", f"{server.url}/v1/videos/{video.id}/events", timeout=60) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: "):
                continue
            shown.append(json.loads(line.removeprefix("data: ")))
            if shown[-1].get("stage", {}).get("done", 0) >= 3 and not shown[-1]["cancel_requested"]:
                client.post(f"/videos/{video.id}/cancel", cast_to=object)
    assert shown[-1]["status"] == "cancelled"
    steps = [one["stage"]["done"] for one in shown if one.get("stage", {}).get("stage") == "denoise"]
    assert steps == sorted(steps)
    assert steps[-1] < 1000


@pytest.mark.slow
def test_sync(server: Server, drawn_photo: bytes) -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(drawn_photo).decode()
    document = {"prompt": "a person waves", "num_inference_steps": 2, "input_reference": url}
    answer = httpx2.post(f"{server.url}/v1/videos/sync", json=document, timeout=120)
    assert answer.headers["Content-Type"] == "video/mp4"
    assert answer.headers["X-Video-Id"].startswith("video_")
    assert answer.content[4:8] == b"ftyp"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_an_accepted_video_outlives_the_server(
    start: Callable[[Path], Server], tmp_path: Path, drawn_photo: bytes, number: signal.Signals
) -> None:
    import openai

    server = start(tmp_path)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        video = client.videos.create(
            prompt="a person waves",
            input_reference=("photo.png", drawn_photo),
            extra_body={"num_inference_steps": 30},
        )
        _wait(lambda: client.videos.retrieve(video.id).progress > 4)
    code = server.end(number)
    assert code == (0 if number == signal.SIGTERM else -number)
    again = start(tmp_path)
    _wait(lambda: again.get(f"/v1/videos/{video.id}")["status"] == "completed")
    shown = again.get(f"/v1/videos/{video.id}")
    assert shown["attempt"] == 2
    assert again.end() == 0
    assert len(list((tmp_path / "data" / "results").iterdir())) == 1


def _wait(until: Callable[[], bool]) -> None:
    while not until():
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--backend", "onnxruntime"), "runs a bundle"),
        (("--backend", "compiled", "--low-memory"), "leave one of them out"),
        (("--low-memory", "--workers", "2"), "leave one of them out"),
        (("--frozen",), "--frozen is for --backend compiled"),
        (("--portrait", "absent"), "--portrait is absent, which is no folder"),
        (("--workers", "0"), "--workers is 0"),
        (("--port", "70000"), "--port is 70000"),
        (("--keep-days", "nan"), "--keep-days is nan"),
        (("--database-url", "mysql://host/jobs"), "sqlite or postgresql"),
        (("--batch-wait-ms", "50"), "nothing to wait for; raise --max-batch"),
        (("--max-batch", "2", "--batch-wait-ms", "6000"), "--batch-wait-ms is 6000; at most 5000"),
        (("--batch-parts", "2"), "--batch-parts is 2 and --max-batch 1; raise --max-batch"),
        (
            ("--max-batch", "4", "--batch-parts", "2", "--device", "cuda"),
            "serve a checkpoint with --backend eager",
        ),
        (("--max-batch", "4", "--batch-parts", "2", "--backend", "compiled"), "PyTorch's threads on the CPU"),
        (("--max-batch", "4", "--batch-parts", "2", "--low-memory"), "would release the networks"),
        (("--cache-mib", "-1"), "--cache-mib is -1"),
        (("--max-wait-seconds", "inf"), "--max-wait-seconds is inf"),
        (("--traces", "collector:4318"), "write an OTLP address"),
    ],
)
def test_what_cannot_go_together_is_refused_by_name(
    flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data-dir", str(tmp_path / "data"), "--port", "0"]
    assert main(["serve", str(MODEL), *data, *flags]) == 2
    assert said in capsys.readouterr().err


def test_flags_of_a_compiled_model_reach_the_workers() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    words = ["--backend", "compiled", "--dtype", "bf16", "--attention", "cpu-bf16", "--frozen"]
    choice = serve._settings(parser.parse_args([str(MODEL), *words])).pipeline
    assert (choice.backend, choice.dtype) == ("compiled", "bf16")
    assert (choice.attention, choice.frozen) == ("cpu-bf16", True)


@pytest.mark.parametrize("flags", [("--frozen",), ("--attention", "cpu-bf16")])
def test_compilers_and_attention_are_for_checkpoints(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    assert main(["serve", str(tmp_path), "--data-dir", str(tmp_path / "data"), *flags]) == 2
    assert "--attention and --frozen are for checkpoints" in capsys.readouterr().err


def test_parts_of_batches_are_for_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    words = ["serve", str(tmp_path), "--data-dir", str(tmp_path / "data")]
    assert main([*words, "--max-batch", "4", "--batch-parts", "2"]) == 2
    assert "serve a checkpoint with --backend eager and --device cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_a_portrait_model(serve_process: type[Server], tmp_path: Path) -> None:
    """A random one, so the way ends where no face is found in what it drew."""
    from proteus_deploy.tiny.portrait_checkpoint import write_random_portrait

    portrait = write_random_portrait(tmp_path / "portrait")
    server = serve_process(tmp_path, "--portrait", str(portrait))
    try:
        body = {"prompt": "a person waves", "portrait_prompt": "a woman", "seed": 5}
        answer = httpx2.post(f"{server.url}/v1/videos/sync", json=body, timeout=300)
        assert answer.status_code == 400
        assert "seeds 5 to 8 were tried" in answer.json()["error"]["message"]
    finally:
        server.kill()


def test_a_portrait_model_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The worker says so at the start, and the server ends."""
    words = ["serve", str(MODEL), "--data-dir", str(tmp_path / "data"), "--port", "0"]
    assert main([*words, "--portrait", str(tmp_path)]) == 2
    assert f"{tmp_path} has no portrait.json" in capsys.readouterr().err
