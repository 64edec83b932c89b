"""`proteus-deploy generate`: a video from the command line, and every way to ask for it wrongly."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from proteus_deploy.cli import generate, video_progress
from proteus_deploy.cli.main import main
from proteus_deploy.pipeline import StepEvent
from proteus_deploy.request import GenerateRequest
from proteus_deploy.tiny.portrait import draw_portrait
from proteus_deploy.video import read_video

SMALL = ["--height", "64", "--width", "64", "--num-frames", "9", "--num-inference-steps", "2"]


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    draw_portrait(0).save(path)
    return path


def _words(source: Path, photo: Path, output: Path, *more: str) -> list[str]:
    words = ["generate", str(source), "--photo", str(photo), "--output", str(output), *SMALL]
    words += ["--prompt", "a person reads a letter", "--identity-prompt", "a person with short dark hair"]
    return [*words, *more]


def test_video_from_a_checkpoint(
    tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new folder" / "out.mp4"
    assert main(_words(tiny_checkpoint, photo, output, "--seed", "0", "--fps", "12.5")) == 0
    video = read_video(output)
    assert video.frames.shape == (1, 9, 3, 64, 64)
    assert video.fps == 12.5
    assert video.metadata["seed"] == 0
    assert video.metadata["request"]["prompt"] == "a person reads a letter"
    printed = capsys.readouterr()
    for pattern in (r"frames +9", r"size +64x64", r"fps +12\.5", r"seed +0", r"seconds +\d+\.\d"):
        assert re.search(pattern, printed.out), pattern
    assert str(output) in printed.out
    assert "eager, fp32 (default for a checkpoint)" in printed.out
    steps = re.findall(r"denoising: (\d)/2 steps after .*, this step \d+\.\d\d s", printed.err)
    assert steps == ["1", "2"]


def test_json_is_the_only_thing_on_standard_output(
    tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, frames = tmp_path / "out.mp4", tmp_path / "frames"
    words = _words(tiny_checkpoint, photo, output, "--json", "--frames-dir", str(frames), "--seed", "random")
    assert main([*words, "--scheduler", "ddim", "--use-dynamic-cfg", "--vae-tiling"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["output"] == str(output)
    assert (document["frames"], document["width"], document["height"]) == (9, 64, 64)
    assert document["seed"] == read_video(output).metadata["seed"]
    assert document["seconds"] > 0
    assert len(list(frames.glob("frame_*.png"))) == 9


def test_a_plan_is_followed_and_recorded(
    tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plan = tmp_path / "out.mp4", tmp_path / "plan.json"
    cache = {"kind": "magcache", "threshold": 1, "ratios": [1, 1], "warmup": 1, "last": 0}
    plan.write_text(json.dumps({"step_cache": cache}))
    assert main(_words(tiny_checkpoint, photo, output, "--plan", str(plan))) == 0
    assert re.search(r"steps +2, 1 of them computed", capsys.readouterr().out)
    metadata = read_video(output).metadata
    assert metadata["steps"] == {"computed": [0], "skipped": [1], "both_prompts": [0]}
    assert metadata["request"]["plan"]["step_cache"]["kind"] == "magcache"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_video_from_a_bundle(
    tiny_bundle: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    backend: str,
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    chosen = [] if backend == "onnxruntime" else ["--backend", backend]
    output = tmp_path / "out.mp4"
    assert main(_words(tiny_bundle, photo, output, *chosen)) == 0
    assert read_video(output).frames.shape == (1, 9, 3, 64, 64)
    printed = capsys.readouterr().out
    assert f"{backend}, fp32" in printed
    assert ("(default for a bundle)" in printed) == (not chosen)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--height", "90"], "height is 90; it must be a multiple of 16"),
        (["--num-frames", "10"], "num_frames is 10; .*: try 9"),
        (["--num-inference-steps", "0"], "num_inference_steps is 0"),
        (["--fps", "0"], "fps is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--prompt", "  "], "prompt is empty"),
        (["--backend", "onnxruntime"], "backend 'onnxruntime' runs a bundle.*proteus-deploy export"),
        (["--dynamic-cfg", "corrected"], "add --use-dynamic-cfg"),
        (["--quantize", "int3"], "no recipe 'int3'; ready ones are .*int8"),
        (["--quantize", "int8"], "needs statistics of activations.*proteus-deploy calibrate"),
        (["--quantize", "int8", "--calibration", "absent"], r"absent/statistics\.json is missing"),
        (["--simulate"], "--simulate belongs to a recipe; add --quantize"),
        (["--face-index", "5"], "5"),
        (["--plan", "absent.json"], r"absent\.json is missing"),
        (["--photo", "absent.png"], r"absent\.png is not a file"),
        (["--output", "video.avi"], r"--output is video\.avi.*try video\.mp4"),
        (["--output", "video"], r"--output is video; .*try video\.mp4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_refused_with_the_way_out(
    tiny_checkpoint: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main(_words(tiny_checkpoint, photo, tmp_path / "out.mp4", *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more", [["--backend", "magic"], ["--seed", "many"], ["--scheduler", "euler"]], ids=" ".join
)
def test_word_that_is_no_choice_is_refused(
    tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(_words(tiny_checkpoint, photo, tmp_path / "out.mp4", *more))
    assert stopped.value.code == 2
    assert more[1] in capsys.readouterr().err


def test_frozen_weights_are_for_what_is_compiled(
    tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_words(tiny_checkpoint, photo, tmp_path / "out.mp4", "--frozen")) == 2
    assert "here compiled is False and the device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype", "fp16"], "a bundle runs in the precision"),
        (["--attention", "cpu-bf16"], "a bundle's graphs have theirs"),
        (["--frozen"], "--frozen is for checkpoints on --backend compiled"),
        (["--backend", "eager"], "backend 'eager' runs a checkpoint"),
        (["--height", "960"], "this bundle was exported for 32 to 96"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_bundle_cannot_do(
    tiny_bundle: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main(_words(tiny_bundle, photo, tmp_path / "out.mp4", *more)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_photo_without_a_face(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (320, 320), "green").save(tmp_path / "meadow.png")
    assert main(_words(tiny_checkpoint, tmp_path / "meadow.png", tmp_path / "out.mp4")) == 2
    assert "no face was found" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


def test_frames_folder_with_files_is_refused_before_the_work(
    tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "old.png").touch()
    words = _words(tiny_checkpoint, photo, tmp_path / "out.mp4", "--frames-dir", str(tmp_path / "frames"))
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "isn't empty" in printed
    assert "preparing" not in printed


def test_output_that_is_a_folder(
    tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    assert main(_words(tiny_checkpoint, photo, tmp_path / "folder.mp4")) == 2
    assert "which is a folder" in capsys.readouterr().err


def test_path_that_is_neither(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_words(tmp_path, photo, tmp_path / "out.mp4")) == 2
    assert "neither a checkpoint nor a bundle" in capsys.readouterr().err


def test_interrupt_stops_between_steps_and_leaves_no_file(
    tiny_checkpoint: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def interrupt(_: video_progress.VideoProgress, event: StepEvent) -> None:
        seen.append(event.index)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(video_progress.VideoProgress, "on_step", interrupt)
    before = signal.getsignal(signal.SIGINT)
    frames = tmp_path / "frames"
    words = _words(tiny_checkpoint, photo, tmp_path / "out.mp4", "--frames-dir", str(frames))
    assert main(words) == 130
    assert seen == [0], "no second step after Ctrl-C"
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_while_the_networks_are_opened(
    tiny_checkpoint: Path,
    photo: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = generate._request

    def interrupt(arguments: argparse.Namespace) -> GenerateRequest:
        os.kill(os.getpid(), signal.SIGINT)
        return real(arguments)

    monkeypatch.setattr(generate, "_request", interrupt)
    assert main(_words(tiny_checkpoint, photo, tmp_path / "out.mp4")) == 130
    printed = capfd.readouterr().err
    assert printed.count("stopping…\n") == 1
    assert "denoising" not in printed
    assert "Traceback" not in printed


def test_second_interrupt_may_kill_for_work_in_cpp_code() -> None:
    program = (
        "import os, signal\n"
        "from proteus_deploy.cli.video_progress import cancel_on_interrupt\n"
        "with cancel_on_interrupt(second='kill') as cancel:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert cancel.is_set()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.decode() == "stopping…\n"


def test_second_interrupt_does_not_wait() -> None:
    with video_progress.cancel_on_interrupt() as cancel:
        os.kill(os.getpid(), signal.SIGINT)
        assert cancel.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_output_that_can_not_be_written_is_known_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, blocked = tmp_path / "photo.png", tmp_path / "file"
    photo.write_bytes(b"never read")
    blocked.write_text("x")
    words = ["generate", str(tiny_checkpoint), "--photo", str(photo), "--prompt", "a"]
    assert main([*words, "--identity-prompt", "b", "--output", str(blocked / "out.mp4")]) == 2
    assert "can't write" in capsys.readouterr().err
