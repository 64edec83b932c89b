"""What is measured of the tiny model: which videos are asked for, and the pictures made of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proteus_deploy.benchmarks import tiny_model_pictures as pictures
from proteus_deploy.benchmarks import tiny_model_quality as quality
from proteus_deploy.training.avatars import HELD_OUT_SEEDS, MOTIONS


@pytest.fixture(scope="module")
def cases() -> list[quality.Case]:
    return quality.cases(HELD_OUT_SEEDS, quality.SEEDS)


def test_every_person_with_every_seed_and_every_movement_as_often(cases: list[quality.Case]) -> None:
    assert len({(case.person, case.seed) for case in cases}) == 90 == len(cases)
    counts = Counter(case.drawn.motion for case in cases)
    assert set(counts) == set(MOTIONS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({case.drawn.prompt for case in cases}) > 85


def test_pictures_show_the_videos_and_the_logs(tmp_path: Path, cases: list[quality.Case]) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, case in enumerate(cases):
        np.save(videos / f"{case.name}.npy", np.full((17, 96, 96, 3), number, dtype=np.uint8))
    logs = {
        "work/vae/vae_pictures.log.jsonl": [
            {"cpu_seconds": 6.0 * k, "absolute": 1 / k} for k in range(1, 90)
        ],
        "work/vae/vae.log.jsonl": [{"cpu_seconds": 6.0 * k, "absolute": 2 / k} for k in range(1, 9)],
        "transformer/log.jsonl": [{"step": 20.0 * k, "unweighted_loss": 1 / k} for k in range(1, 50)],
    }
    for name, lines in logs.items():
        file = tmp_path / "run" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "images"
    words = [str(tmp_path / "run"), str(videos), "--output-dir", str(out), "--readme", "7"]
    assert pictures.main(words) == 0
    assert {file.name for file in out.iterdir()} == {
        "tiny-model.png",
        "tiny-model-held-out.png",
        "tiny-model-motions.png",
        "tiny-model-transformer.svg",
        "tiny-model-vae.svg",
    }
    with Image.open(out / "tiny-model.png") as strip:
        colours = {colour for _, colour in strip.getcolors(1 << 20) or ()}
    assert (7, 7, 7) in colours, "frames of case 7"
    assert (out / "tiny-model-vae.svg").read_text().count("<path") > 3


def test_means_of_consecutive_lines() -> None:
    lines = [{"step": float(k), "loss": float(k % 2)} for k in range(1, 101)]
    points = pictures._means(lines, "step", "loss")
    assert len(points) == 20  # five lines each, the fewest that give at most 24 points
    assert points[0] == (5.0, 3 / 5)
    assert points[-1] == (100.0, 2 / 5)
    assert pictures._means(lines[:3], "step", "loss") == [(1.0, 1.0), (2.0, 0.0), (3.0, 1.0)]
