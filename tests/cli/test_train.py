"""`proteus-deploy train`: samples and events, Ctrl-C, and every way to ask for it wrongly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from proteus_deploy.cli.main import main
from proteus_deploy.tiny.portrait import draw_portrait
from proteus_deploy.training.data.avatar_clips import AvatarClips
from proteus_deploy.training.data.encoding import PrepareSettings
from proteus_deploy.training.data.networks import EncodingNetworks
from proteus_deploy.training.data.prepare import prepare
from proteus_deploy.video import read_video

pytest.importorskip("accelerate")
pytest.importorskip("cv2")
pytest.importorskip("insightface")
pytest.importorskip("tensorboard")

_RECIPE = "[train]\nsteps = 2\nbatch_size = 2\nmixed_precision = 'no'\ngradient_checkpointing = false\n"


@pytest.fixture(scope="session")
def clips(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drawn clips of 9 frames, 64x64, encoded. Read the folder, don't write into it."""
    folder = tmp_path_factory.mktemp("encoded")
    settings = PrepareSettings(noise_variants=1)
    prepare(
        AvatarClips(2, num_frames=9, size=64), EncodingNetworks(tiny_checkpoint), folder, settings=settings
    )
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(_RECIPE)
    return file


@pytest.fixture
def prepared(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes these clips, however it was asked for others."""
    from proteus_deploy.cli import train
    from proteus_deploy.training.data.cache import PreparedSet

    def take(*_: Any, **__: Any) -> PreparedSet:
        return PreparedSet.open(clips)

    monkeypatch.setattr(train, "_prepare", take)


def words_of(checkpoint: Path, output: Path, recipe: Path, *more: str) -> list[str]:
    words = ["train", str(checkpoint), "--data", "clips", "--output-dir", str(output)]
    return [*words, "--settings", str(recipe), *more]


def test_log_events_and_samples(
    tiny_checkpoint: Path,
    prepared: None,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A video and a FaceSim number for each case of each checkpoint; removed samples are made again."""
    from proteus_deploy.evaluate import measure

    draw_portrait(0).save(tmp_path / "ann.png")
    cases = {"cases": [{"photo": "ann.png", "prompt": "a person waves", "seed": 3}]}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "models").mkdir()
    asked: list[Any] = []

    class Faces:
        faces = object()

    def similarity(frames: Any, **arguments: Any) -> dict[str, float]:
        asked.append((frames.shape, arguments["photo"], arguments["metrics"]))
        return {"face_sim_arc": 0.25}

    monkeypatch.setattr("proteus_deploy.evaluate.encoders.load_encoders", lambda _folder: Faces())
    monkeypatch.setattr(measure, "measure_video", similarity)
    output = tmp_path / "run"
    words = words_of(tiny_checkpoint, output, recipe, "--samples", str(tmp_path / "cases.json"))
    words += ["--encoders", str(tmp_path / "models"), "--num-inference-steps", "1", "--dtype", "fp32"]
    assert main(words) == 0
    assert "samples of step 2: done, 1 part" in capsys.readouterr().err
    video = read_video(output / "samples/step-000002/00-ann.mp4")
    assert video.metadata["seed"] == 3
    assert asked == [((17, 96, 96, 3), tmp_path / "ann.png", ("face_sim_arc",))]
    score = {"step": 2, "face_sim_arc": {"00-ann": 0.25}}
    assert [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()] == [score]
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    assert set(log[0]) >= {"loss", "unweighted_loss", "norm", "rate", "step_seconds", "seconds"}
    events = _events(output / "tensorboard")
    assert events["train/loss"] == pytest.approx([line["loss"] for line in log], rel=1e-5)
    assert events["face_sim_arc/00-ann"] == events["face_sim_arc/mean"] == [0.25]
    shutil.rmtree(output / "samples")
    assert main(words) == 0
    assert (output / "samples/step-000002/00-ann.mp4").is_file()


def _events(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    accumulator = event_accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [one.value for one in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_interrupted_and_gone_on(tiny_checkpoint: Path, clips: Path, recipe: Path, tmp_path: Path) -> None:
    """Ctrl-C in a process of its own: exit code 130, a state, no checkpoint."""
    recipe.write_text(_RECIPE.replace("steps = 2", "steps = 500"))
    output = tmp_path / "run"
    words = words_of(tiny_checkpoint, output, recipe, "--cache-dir", str(clips))
    code = (
        "import sys; from proteus_deploy.cli import train, main;"
        "from proteus_deploy.training.data.cache import PreparedSet;"
        f"train._prepare = lambda *_: PreparedSet.open({str(clips)!r});"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        seen = next(line for line in process.stderr if line.startswith("training: "))
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130, (seen, errors)
    assert "stopping…" in errors
    assert (output / "state.safetensors").is_file()
    assert not (output / "checkpoints").exists()


def test_another_recipe_is_refused(
    tiny_checkpoint: Path, prepared: None, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tiny_checkpoint, tmp_path / "run", recipe)
    assert main([*words, "--steps", "1"]) == 0
    assert main([*words, "--steps", "1", "--seed", "7"]) == 2
    assert "state.safetensors was trained with seed = 42, now it is 7; go on with" in capsys.readouterr().err
    assert main([*words, "--steps", "1", "--from-scratch"]) == 2
    error = capsys.readouterr().err
    assert "was trained with" in error
    assert "choose another folder" in error


@pytest.mark.parametrize(
    ("more", "toml", "message"),
    [
        (["--batch-size", "3", "--micro-batch", "2"], "", "micro_batch 2 doesn't divide the 3 clips"),
        (["--steps", "0"], "", "steps is 0; choose at least 1"),
        (["--save-every", "-1"], "", r"save_every_s is -1.0; choose 0 (never) or more"),
        ([], "[train]\nstepz = 3\n", "run.toml [train]: 'stepz' is no setting; known are"),
        ([], "[train]\nsteps = 'many'\n", "run.toml [train]: steps is 'many'; expected a whole number"),
        ([], "train = 3\n", "run.toml [train] is 3; expected a table of settings"),
        ([], "[training]\nsteps = 3\n", "[training] is no table of a run; known are [train], [video]"),
        ([], "steps = = 3\n", "run.toml can't be read as TOML"),
        ([], "[video]\nframes = 9\n", "run.toml [video]: 'frames' is no setting; known are"),
        ([], "[prepare]\nnoise_variants = 1.5\n", "noise_variants is 1.5; expected a whole number"),
        ([], "", "absent is not a folder; give one that holds NAME.mp4 and NAME.txt"),
        (["--encoders", "models"], "", "--encoders models measures sample videos, and there are none; say"),
        (["--samples", "absent.json"], "", "absent.json"),
    ],
)
def test_wrong_input(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    toml: str,
    message: str,
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(toml)
    words = ["train", str(tiny_checkpoint), "--data", str(tmp_path / "absent")]
    assert main([*words, "--output-dir", str(tmp_path / "run"), "--settings", str(file), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "state.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a CHECKPOINT and --data, or --preset tiny"),
        (["CHECKPOINT"], "give a CHECKPOINT and --data, or --preset tiny"),
        (["--preset", "tiny", "--data", "x"], "leave --data out"),
        (["--preset", "tiny", "--steps", "9", "--dtype", "fp32"], "leave --steps, --dtype out"),
        (["CHECKPOINT", "--preset", "tiny"], "leave CHECKPOINT out"),
        (["absent", "--data", "x"], "absent is not a folder"),
    ],
)
def test_wrong_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["train", *words, "--output-dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_processes_need_clips_that_are_encoded(
    tiny_checkpoint: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = words_of(tiny_checkpoint, tmp_path / "run", recipe)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "has no prepared set 'train'" in error
    assert "run the same command once, alone, with --prepare-only" in error
    assert main([*words, "--batch-size", "3"]) == 2
    assert "batch_size 3 can't be shared by 2 processes; choose a multiple" in capsys.readouterr().err


def test_cases_that_do_not_fit(tmp_path: Path) -> None:
    from proteus_deploy.errors import InputError
    from proteus_deploy.training.samples import read_cases

    file = tmp_path / "cases.json"
    for document, message in (
        ({"cases": []}, "holds no cases; expected"),
        ({"cases": [{"prompt": "x"}]}, "case 0 is .* photo and prompt are needed"),
        ({"cases": [{"photo": "no.png", "prompt": "x"}]}, r"case 0 names .*no\.png, which isn't there"),
        ({"cases": [3]}, "case 0 is 3; photo and prompt are needed"),
    ):
        file.write_text(json.dumps(document))
        with pytest.raises(InputError, match=message):
            read_cases(file)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file.write_text(json.dumps({"cases": [{"photo": "a.png", "prompt": "x", "seed": "four"}]}))
    with pytest.raises(InputError, match="case 0 is"):
        read_cases(file)
