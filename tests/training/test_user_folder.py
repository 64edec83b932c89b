"""A user's own folder of clips, good and bad, through the command: rejected by name, trained, served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proteus_deploy import GenerateRequest, Pipeline
from proteus_deploy.cli.main import main
from proteus_deploy.training.avatars import make_clip, make_photo, training_seed
from proteus_deploy.video import Video

pytest.importorskip("accelerate")
pytest.importorskip("cv2")
pytest.importorskip("insightface")
pytest.importorskip("tensorboard")

_GOOD = 9
_BAD = {
    "corrupt": "unreadable video",
    "no caption": "no caption",
    "nobody": "no face",
}
_OPTIONS = """
[train]
batch_size = 2
learning_rate = 1e-3
warmup = 5
mixed_precision = "no"
gradient_checkpointing = false
text_dropout = 0.1

[video]
num_frames = 9
height = 64
width = 64
frame_stride = 1
skip_start = 1
skip_end = 1
references = 1
min_confidence = 0.5
faces_looked_at = 1

[prepare]
noise_variants = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen small mp4 of drawn people: nine good ones, one torn, one without caption, one of nobody."""
    folder = tmp_path_factory.mktemp("clips")

    def write(name: str, frames: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Path:
        path = folder / f"{name}.mp4"
        Video(torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255, 8).save(path)
        return path

    for index in range(3):
        seed = training_seed(index)
        clip = make_clip(seed, index, motion="nod", num_frames=14, size=128)
        first = write(f"clip {index}", clip.frames)
        Image.fromarray(make_photo(seed, 1, 256).image).save(folder / f"clip {index}.reference.png")
        for copy in range(index + 3, _GOOD, 3):
            shutil.copyfile(first, folder / f"clip {copy}.mp4")
            shutil.copyfile(folder / f"clip {index}.reference.png", folder / f"clip {copy}.reference.png")
    (folder / "corrupt.mp4").write_bytes(first.read_bytes()[:3000])
    shutil.copyfile(first, folder / "no caption.mp4")
    wall = np.full((14, 128, 128, 3), 128, np.uint8)
    write("nobody", wall)
    for path in folder.glob("*.mp4"):
        if path.stem != "no caption":
            path.with_suffix(".txt").write_text(f"a person nods in {path.stem}", encoding="utf-8")
        path.with_suffix(".identity.txt").write_text("a person", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_folder_of_clips_becomes_a_checkpoint(
    folder: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, settings = tmp_path / "run", tmp_path / "run.toml"
    settings.write_text(_OPTIONS)
    words = ["train", str(tiny_checkpoint), "--data", str(folder), "--steps", "20"]
    words += ["--output-dir", str(output), "--settings", str(settings)]
    assert main(words) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "9 of 12 clips accepted, 9 encoded now, 0 before"
    for name, reason in _BAD.items():
        assert f"  left out: 1 x {reason}" in lines
        assert [line for line in lines if line.startswith(f"    {name}: {reason}: ")], name
    checkpoint = output / "checkpoints" / "step-000020"
    assert lines[-1] == str(checkpoint)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 10, 20]
    assert list((output / "tensorboard").iterdir())
    with Pipeline.from_checkpoint(checkpoint) as pipeline:
        video = pipeline.generate(
            GenerateRequest(
                prompt="a person nods",
                identity_prompt="a person",
                photo=folder / "clip 0.reference.png",
                num_inference_steps=2,
                num_frames=9,
                height=64,
                width=64,
            )
        )
    assert bool(torch.isfinite(video.frames).all())
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["checkpoint"] == str(checkpoint)
    assert (document["clips"], document["data"]["reused"]) == (9, 9)
    assert document["data"]["counts"] == dict.fromkeys(
        sorted(_BAD.values(), key=list(document["data"]["counts"]).index), 1
    )
