"""The examples, as somebody would run them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proteus_deploy.provenance import GENERATED, source_type
from proteus_deploy.video import read_video

if TYPE_CHECKING:
    from tests.serving.conftest import Server

pytestmark = pytest.mark.slow

CLIENTS = ("curl.sh", "open_inference.py", "openai_client.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_process: type[Server]) -> Iterator[Server]:
    started = serve_process(tmp_path_factory.mktemp("server"))
    yield started
    started.kill()


@pytest.mark.parametrize("name", CLIENTS)
def test_clients(server: Server, drawn_photo: bytes, repository: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "photo.png").write_bytes(drawn_photo)
    interpreter = "sh" if name.endswith(".sh") else sys.executable
    command = [interpreter, str(repository / "examples" / name), server.url, "photo.png", "out.mp4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_video(tmp_path / "out.mp4").metadata["seed"] == 42
    assert source_type(tmp_path / "out.mp4") == GENERATED


def test_every_example_is_run(repository: Path) -> None:
    """test_demo.py runs library.py, which needs a bundle; test_triton_server.py and test_ray.py their own.

    drawn_prompts.txt is tests/personalize/test_prompts.py's.
    """
    names = {file.name for file in (repository / "examples").iterdir()}
    assert names == {"drawn_prompts.txt", "library.py", "ray_servers.py", "triton_client.py", *CLIENTS}
