"""A real Triton server makes videos of the tiny model, and one of them is cancelled.

The server and its client live in environments of their own below build/, made by the first run.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from proteus_deploy import GenerateRequest, Pipeline
from proteus_deploy.benchmarks.triton_environments import NotInstallable, server_environment
from proteus_deploy.benchmarks.triton_server import TritonServer, triton_server
from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.export.export import export_bundle
from proteus_deploy.export.triton_repository import write_repository
from proteus_deploy.provenance import GENERATED, source_type
from proteus_deploy.testing import TOLERANCES, assert_close
from proteus_deploy.tiny.trained import MODEL
from proteus_deploy.video import read_video

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime")
pytest.importorskip("insightface")

STEPS = 8
CANCEL_AFTER = 3
FIELDS = {
    "prompt": "a woman with curly red hair waves in a park",
    "identity_prompt": "a woman with curly red hair",
    "num_inference_steps": STEPS,
    "guidance_scale": 1.25,
    "seed": 42,
}
LIBRARY = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from proteus_deploy import GenerateRequest, Pipeline
from proteus_deploy.bundle import Bundle
bundle, photo, fields, output = sys.argv[1:]
with Pipeline.from_bundle(Bundle.open(bundle, hashes=False)) as pipeline:
    video = pipeline.generate(GenerateRequest(**json.loads(fields), photo=Path(photo).read_bytes()))
video.save(output + ".mp4")
save_file({"frames": video.frames}, output + ".safetensors")
"""


@pytest.fixture(scope="module")
def environment(repository: Path) -> Path:
    try:
        return server_environment(repository / "build" / "triton" / "server", repository)
    except NotInstallable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(drawn_photo: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, its repository and a photo."""
    folder = tmp_path_factory.mktemp("triton")
    bundle = export_bundle(Checkpoint.open(MODEL), folder / "bundle", reference="none")
    write_repository(bundle, folder / "models", files="link")
    (folder / "photo.png").write_bytes(drawn_photo)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, environment: Path) -> Iterator[TritonServer]:
    with triton_server(folder / "models", environment) as running:
        yield running


@pytest.fixture(scope="module")
def answers(
    server: TritonServer, folder: Path, triton_client: Path, repository: Path
) -> dict[str, dict[str, Any]]:
    """What a client is answered: a video, one that is cancelled, the first again, and wrong requests."""
    wanted = {**FIELDS, "photo": str(folder / "photo.png")}
    requests = {
        "undisturbed": wanted,
        "cancelled": {**wanted, "cancel_after": CANCEL_AFTER},
        "again": wanted,
        "height": {**wanted, "height": 33},
        "scheduler": {**wanted, "scheduler": "euler"},
    }
    driver = repository / "tests" / "serving" / "triton_driver.py"
    command = [str(triton_client), str(driver), server.grpc, json.dumps(list(requests.values()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + server.log.read_text()[-4000:]
    return dict(zip(requests, json.loads(done.stdout), strict=True))


def test_progress_and_video(answers: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    answer = answers["undisturbed"]
    phases = [phase for phase, _, _ in answer["told"]]
    assert list(dict.fromkeys(phases)) == ["identity", "text", "schedule", "denoise", "decode"]
    steps = [[done, total] for phase, done, total in answer["told"] if phase == "denoise"]
    assert steps == [[step + 1, STEPS] for step in range(STEPS)]
    assert (answer["seed"], answer["runs"]) == (42, STEPS)
    (tmp_path / "video.mp4").write_bytes(base64.b64decode(answer["video"]))
    assert source_type(tmp_path / "video.mp4") == GENERATED


def test_the_video_is_the_librarys(
    answers: dict[str, dict[str, Any]], folder: Path, environment: Path, tmp_path: Path
) -> None:
    """Bit for bit with the same packages; with this environment's, frames are as close as other backends'."""
    (tmp_path / "got.mp4").write_bytes(base64.b64decode(answers["undisturbed"]["video"]))
    words = [str(folder / "bundle"), str(folder / "photo.png"), json.dumps(FIELDS), str(tmp_path / "want")]
    command = [str(environment / "bin" / "python"), "-c", LIBRARY, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    got, want = read_video(tmp_path / "got.mp4"), read_video(tmp_path / "want.mp4")
    assert torch.equal(got.frames, want.frames)
    assert got.metadata == {**want.metadata, "backend": "triton"}
    with Pipeline.from_bundle(Bundle.open(folder / "bundle", hashes=False)) as pipeline:
        ours = pipeline.generate(GenerateRequest(**FIELDS, photo=(folder / "photo.png").read_bytes()))  # type: ignore[arg-type]
    theirs = load_file(tmp_path / "want.safetensors")["frames"]
    assert_close("frames", ours.frames, theirs, TOLERANCES["bundle", "frames", "fp32"])


def test_a_cancel_ends_with_the_running_step(answers: dict[str, dict[str, Any]]) -> None:
    answer = answers["cancelled"]
    assert answer["error"]["status"] == "StatusCode.CANCELLED"
    assert "video" not in answer
    assert answer["told"][-1][:2] == ["denoise", CANCEL_AFTER]
    # The step that ran when the client said so is finished, and no other is begun.
    assert answer["runs"] <= answer["runs_when_cancelled"] + 1 < STEPS


def test_a_cancel_leaves_nothing_behind(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["again"]["video"] == answers["undisturbed"]["video"]
    assert answers["again"]["runs"] == STEPS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("height", "height is 33; it must be a multiple of 16, at least 32: try 32"),
        ("scheduler", "scheduler is 'euler'; it must be 'dpm', 'ddim' or None"),
    ],
)
def test_wrong_requests_are_told_why(answers: dict[str, dict[str, Any]], name: str, message: str) -> None:
    assert answers[name]["error"]["message"] == message
    assert (answers[name]["told"], answers[name]["runs"]) == ([], 0)


def test_example(
    server: TritonServer, folder: Path, triton_client: Path, repository: Path, tmp_path: Path
) -> None:
    command = [str(triton_client), str(repository / "examples" / "triton_client.py"), server.grpc]
    command += [str(folder / "photo.png"), "out.mp4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "denoise: 25 of 25" in done.stdout
    assert read_video(tmp_path / "out.mp4").metadata["seed"] == 42
