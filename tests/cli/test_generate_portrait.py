"""`generate --portrait-prompt`: a portrait takes the photo's place, whichever model drew it."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proteus_deploy.cli import portrait_flags, video_progress
from proteus_deploy.cli.main import main
from proteus_deploy.cli.progress import PhaseProgress
from proteus_deploy.pipeline import StepEvent
from proteus_deploy.portrait.plan import CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.tiny.portrait import draw_portrait
from proteus_deploy.tiny.portrait_checkpoint import write_random_portrait
from proteus_deploy.video import read_video

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

SMALL = ["--height", "64", "--width", "64", "--num-frames", "9", "--num-inference-steps", "2"]
WHO = "a person with short dark hair"


class Drawing:
    """A painter that draws a face for some seeds and a meadow for the others."""

    sampling, cache = Sampling(), CacheSettings()

    def __init__(self, faces: Sequence[int]) -> None:
        self.faces, self.asked = faces, list[tuple[str, int]]()

    def draw(self, captions: Sequence[str], *, seeds: Sequence[int], report: Any, **_: Any) -> list[Any]:
        (caption,), (seed,) = captions, seeds
        self.asked.append((caption, seed))
        for done in (1, 2):
            report("portrait", done, 2)
        meadow = Image.new("RGB", (256, 256), "green")
        return [np.asarray(draw_portrait(seed, 256) if seed in self.faces else meadow)]


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, int]]]:
    """painter(*seeds with a face) replaces what opens portrait models; returns what it is asked to draw."""

    def use(*faces: int) -> list[tuple[str, int]]:
        one = Drawing(faces)
        monkeypatch.setattr("proteus_deploy.portrait.opening.open_painter", lambda *_, **__: one)
        return one.asked

    return use


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_portrait(tmp_path_factory.mktemp("portrait") / "model")


def _words(source: Path, output: Path, *more: str) -> list[str]:
    words = ["generate", str(source), "--output", str(output), *SMALL, "--prompt", "a person reads a letter"]
    return [*words, "--portrait-prompt", WHO, *more]


def test_the_video_is_that_of_the_saved_portrait(
    tiny_checkpoint: Path,
    model: Path,
    painter: Callable[..., list[tuple[str, int]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = painter(7)
    video, portrait = tmp_path / "out.mp4", tmp_path / "portraits" / "who.png"
    words = _words(tiny_checkpoint, video, "--portrait", str(model), "--seed", "5", "--json")
    assert main([*words, "--portrait-output", str(portrait)]) == 0
    assert asked == [(WHO, 5), (WHO, 6), (WHO, 7)]
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["portrait"] == {"prompt": WHO, "seed": 7, "attempts": 3, "file": str(portrait)}
    assert document["seed"] == 5
    assert "no --identity-prompt: the portrait prompt stands for it" in printed.err
    retries = re.findall(
        r"the portrait of seed (\d) won't do \(no face was found in the photo\)", printed.err
    )
    assert retries == ["5", "6"]
    assert "portrait, attempt 3: done, 2 tokens" in printed.err
    made = read_video(video)
    assert made.metadata["request"]["portrait"] == {"prompt": WHO, "seed": 7}
    assert made.metadata["request"]["identity_prompt"] == WHO
    words = ["generate", str(tiny_checkpoint), "--output", str(tmp_path / "again.mp4"), *SMALL]
    words += ["--prompt", "a person reads a letter", "--photo", str(portrait), "--seed", "5"]
    assert main([*words, "--identity-prompt", WHO]) == 0
    assert (read_video(tmp_path / "again.mp4").frames == made.frames).all()


def test_own_words_and_a_random_seed(
    tiny_checkpoint: Path,
    model: Path,
    painter: Callable[..., list[tuple[str, int]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = painter(31)
    monkeypatch.setattr("secrets.randbits", lambda _: 31)
    more = ["--portrait", str(model), "--identity-prompt", "someone", "--seed", "random"]
    assert main(_words(tiny_checkpoint, tmp_path / "out.mp4", *more)) == 0
    printed = capsys.readouterr()
    assert re.search(r"portrait +seed 31\n", printed.out)
    assert "stands for it" not in printed.err
    made = read_video(tmp_path / "out.mp4").metadata
    assert (made["seed"], made["request"]["identity_prompt"]) == (31, "someone")
    assert asked == [(WHO, 31)]


def test_no_face_in_any_portrait(
    tiny_checkpoint: Path,
    model: Path,
    painter: Callable[..., list[tuple[str, int]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = painter()
    assert main(_words(tiny_checkpoint, tmp_path / "out.mp4", "--portrait", str(model))) == 2
    assert [seed for _, seed in asked] == [42, 43, 44, 45]
    printed = capsys.readouterr().err
    assert f"no portrait of '{WHO}' shows a face that can be used: seeds 42 to 45 were tried" in printed
    assert "choose another seed" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_random_model_draws_no_face(
    tiny_checkpoint: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way through a real painter."""
    assert main(_words(tiny_checkpoint, tmp_path / "out.mp4", "--portrait", str(model))) == 2
    printed = capsys.readouterr().err
    assert "portrait, attempt 3: done, 64 tokens" in printed
    assert "seeds 42 to 45 were tried" in printed


def test_a_bundle_with_a_portrait_model(
    tiny_bundle: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from proteus_deploy.bundle import MANIFEST, list_files

    one, hashed = Drawing([42]), list[bool]()

    def opened(*_: Any, hashes: bool, **__: Any) -> Drawing:
        hashed.append(hashes)
        return one

    monkeypatch.setattr("proteus_deploy.portrait.opening.open_painter", opened)
    assert main(_words(tiny_bundle, tmp_path / "out.mp4")) == 2
    assert f"needs a portrait model, and the bundle {tiny_bundle} has none" in capsys.readouterr().err
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle, copy_function=os.link)
    shutil.copytree(model, bundle / "portrait")
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).unlink()  # it is a link to the shared one's
    manifest |= {"portrait": {"hash": "0"}, "files": list_files(bundle)}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert main(_words(bundle, tmp_path / "out.mp4")) == 0
    assert one.asked == [(WHO, 42)]
    assert read_video(tmp_path / "out.mp4").metadata["backend"] == "onnxruntime"
    assert main(_words(bundle, tmp_path / "out.mp4", "--portrait", str(model))) == 0
    assert hashed == [False, True], "the bundle's own files are checked with it"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--portrait-output", "x.jpg"], r"--portrait-output is x\.jpg; portraits are .*try x\.png"),
        (["--portrait-prompt", " "], "a caption is ' '"),
        (["--portrait", "absent"], "absent has no portrait.json"),
        (["--height", "90"], "height is 90; it must be a multiple of 16"),
        (["--num-frames", "10"], "num_frames is 10; .*: try 9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_refused_before_a_portrait_is_drawn(
    tiny_checkpoint: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main(_words(tiny_checkpoint, tmp_path / "out.mp4", "--portrait", str(model), *more)) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert "tokens" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_has_no_portrait_model(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_words(tiny_checkpoint, tmp_path / "out.mp4")) == 2
    printed = capsys.readouterr().err
    assert f"the checkpoint {tiny_checkpoint} has none; pass the folder of one with --portrait" in printed


@pytest.mark.parametrize(
    ("person", "message"),
    [
        ([], "one of the arguments --photo --portrait-prompt is required"),
        (["--photo", "x.png", "--portrait-prompt", "someone"], "not allowed with argument --photo"),
    ],
)
def test_one_person(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    person: list[str],
    message: str,
) -> None:
    words = ["generate", str(tiny_checkpoint), "--prompt", "x", "--output", str(tmp_path / "out.mp4")]
    with pytest.raises(SystemExit) as stopped:
        main([*words, *person])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--portrait", "--portrait-output"])
def test_flags_of_a_portrait_beside_a_photo(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    photo = tmp_path / "photo.png"
    draw_portrait(0).save(photo)
    words = ["generate", str(tiny_checkpoint), "--prompt", "x", "--output", str(tmp_path / "out.mp4")]
    assert main([*words, "--photo", str(photo), flag, "x.png"]) == 2
    assert f"{flag} belongs to a portrait that is drawn; add --portrait-prompt" in capsys.readouterr().err


def test_the_portrait_model_is_gone_when_the_loop_runs(
    tiny_checkpoint: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proteus_deploy.portrait.painter import TorchPainter

    real, painters, alive = TorchPainter.open, list[Any](), list[bool]()

    def face(painter: TorchPainter, *_: Any, **named: Any) -> list[Any]:
        painter.draw_tokens(*_, **named)
        return [np.asarray(draw_portrait(0))]

    def opened(*arguments: Any, **named: Any) -> TorchPainter:
        painter = real(*arguments, **named)
        painters.extend(weakref.ref(part) for part in (painter, painter.gpt, painter.vq, painter.captions))
        return painter

    def look(_: video_progress.VideoProgress, event: StepEvent) -> None:
        alive.extend(reference() is not None for reference in painters)

    monkeypatch.setattr(TorchPainter, "open", opened)
    monkeypatch.setattr(TorchPainter, "draw", face)
    monkeypatch.setattr(video_progress.VideoProgress, "on_step", look)
    gc.collect()
    gc.disable()
    try:
        assert main(_words(tiny_checkpoint, tmp_path / "out.mp4", "--portrait", str(model))) == 0
    finally:
        gc.enable()
    assert alive == [False] * 8


def test_interrupt_stops_between_tokens(
    tiny_checkpoint: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    class Interrupting(PhaseProgress):
        def __call__(self, phase: str, done: int, total: int) -> None:
            seen.append(done)
            if done == 3:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(portrait_flags, "PhaseProgress", Interrupting)
    assert main(_words(tiny_checkpoint, tmp_path / "out.mp4", "--portrait", str(model))) == 130
    assert seen == [1, 2, 3]
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_where_a_portrait_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On the pipeline's GPU, if what runs the portrait model can use one."""
    import onnxruntime
    import torch

    from proteus_deploy.reference_portrait import painter_device

    document = {"kind": "portrait bundle"} if kind == "bundle" else {}
    (tmp_path / "portrait.json").write_text(json.dumps(document))
    able: list[bool] = [True]
    others = ["CPUExecutionProvider"]
    if kind == "bundle":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: not able[0])
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"] * able[0] + others
        )
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: able[0])
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"] * (not able[0]) + others
        )
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert painter_device(tmp_path, None, cpu) == "cpu"
    assert painter_device(tmp_path, "CPU", cpu) == "cpu"
    assert painter_device(tmp_path, "cuda", cpu) == "cuda", "ONNX Runtime's tensors are the CPU's"
    assert painter_device(tmp_path, None, cuda) == "cuda:0"
    second = "cpu" if kind == "bundle" else "cuda:1"
    assert painter_device(tmp_path, "cuda:1", cpu) == second
    assert painter_device(tmp_path, None, torch.device("cuda", 1)) == second
    able[0] = False
    assert painter_device(tmp_path, "cuda", cuda) == "cpu"
