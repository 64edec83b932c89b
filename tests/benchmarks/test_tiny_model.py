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


def test_the_documents_say_what_the_result_file_says(repository: Path) -> None:
    file = repository / "benchmarks" / "results" / "tiny_model" / "quality.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    assert len(found["videos"]) == 90
    page = (repository / "docs" / "tiny-model.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip(): cells[1].strip()
        for line in page.splitlines()
        if line.startswith("| ") and len(cells := line.strip("|").split("|")) >= 3
    }
    shares = {
        "share of that which videos reach": "own_relative_to_drawn_clips",
        "nearest of the 30 photos is the person's": "nearest_is_right",
        "colour of the clothes is the one asked for": "clothes_colour_is_right",
        "colour of the background is the one asked for": "background_colour_is_right",
        "sampled frames in which a face is found": "face_detection_rate",
    }
    for label, key in shares.items():
        assert rows[label] == f"{found[key]:.0%}", label
    drawn = f"{found['motion_of_drawn_clips_is_right']:.0%}"
    motion = f"{found['motion_is_right']:.0%}"
    assert rows[f"movement is the one asked for (drawn clips: {drawn})"] == motion
    assert rows["difference, in its standard errors"] == (
        f"{found['own_minus_others_in_standard_errors']:.0f}"
    )
    for label, key in (
        ("FaceSim with the photo of the person", "own"),
        ("FaceSim with photos of the 29 others", "others"),
        ("FaceSim between two drawn clips of one person", "two_drawn_clips_of_one_person"),
    ):
        numbers = [f"{found[key][name]:.3f}" for name in ("mean", "ci_low", "ci_high")]
        assert rows[label] == "{} (95% interval {} to {})".format(*numbers), label
    shown = {
        cells[1].strip(): cells[2].strip()
        for line in (repository / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and len(cells := line.split("|")) == 4
    }
    (nearest,) = (value for what, value in shown.items() if what.startswith("the tiny model, videos of 30"))
    assert nearest.startswith(f"{found['nearest_is_right']:.0%} (")
    (others,) = (value for what, value in shown.items() if what.startswith("the same videos: FaceSim"))
    colours = {f"{found[f'{what}_colour_is_right']:.0%}" for what in ("clothes", "background")}
    assert len(colours) == 1, "the README says one figure for clothes and background"
    assert others == f"{found['own_relative_to_drawn_clips']:.0%}; {colours.pop()}; {motion}"
