"""Do videos from drawn-up portraits show the person of the portrait? Text to portrait to video, no photo.

    python -m proteus_deploy.benchmarks.portrait_videos --work DIR --json FILE [--picture FILE.png]

For the caption of each held-out person, whom neither model was trained on: a portrait, then a video of it in
25 steps with a prompt of that person. FaceSim, by a recogniser that neither model has, of the video with its
own portrait and with the 29 others, beside that of two drawn clips of one person; the aims are those
of videos from photos (docs/tiny-model.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from proteus_deploy._files import atomic_file, check_writable, write_json
from proteus_deploy.benchmarks import tiny_model_quality as quality
from proteus_deploy.benchmarks.machine import (
    describe_code,
    describe_commit,
    describe_machine,
    describe_versions,
)
from proteus_deploy.evaluate.encoders import Encoders, load_encoders
from proteus_deploy.evaluate.face_similarity import face_embeddings, face_similarity, photo_embeddings
from proteus_deploy.evaluate.film_strip import StripRow, film_strip, frame_indices
from proteus_deploy.evaluate.frames import frames_from_video
from proteus_deploy.evaluate.statistics import estimate
from proteus_deploy.pipeline import GenerateRequest, Pipeline
from proteus_deploy.portrait.painter import TorchPainter
from proteus_deploy.reference_portrait import Portrait, draw_reference
from proteus_deploy.tiny.trained import ENCODERS, GUIDANCE_SCALE, MODEL, NUM_INFERENCE_STEPS, PORTRAIT
from proteus_deploy.training.avatars import HELD_OUT_SEEDS
from proteus_deploy.training.tiny_model.descriptions import describe_photo

__all__ = ["main"]

_SEED = 7
_SHOWN = 4  # rows of the picture
_FRAMES = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, film, measure, write the result file."""
    parser = argparse.ArgumentParser(prog="portrait_videos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where portraits and videos are kept")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--people", type=int, default=len(HELD_OUT_SEEDS))
    parser.add_argument("--picture", type=Path, help="a film strip of the first ones, PNG")
    given = parser.parse_args(arguments)
    check_writable(given.json)
    painter = TorchPainter.open(PORTRAIT)
    repository = Path(__file__).resolve().parents[1]
    folder = given.work / f"videos-{painter.checkpoint.hash[:12]}-{describe_code(repository)}"
    folder.mkdir(parents=True, exist_ok=True)
    cases = quality.cases(HELD_OUT_SEEDS[: given.people], 1)
    made = []
    with Pipeline.from_checkpoint(MODEL) as pipeline:
        for number, case in enumerate(cases, start=1):
            made.append((case, *_make(painter, pipeline, case, folder)))
            print(f"{number} of {len(cases)}: {case.drawn.prompt}", file=sys.stderr, flush=True)
    figures = _measure(made, load_encoders(ENCODERS))
    document = {
        "what": "videos of people who were drawn from text: likeness with the portrait",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(repository),
        "settings": {
            "portrait_weights": painter.checkpoint.hash,
            "people": [int(case.person) for case in cases],
            "num_inference_steps": NUM_INFERENCE_STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "seed": _SEED,
        },
        **figures,
    }
    write_json(given.json, document)
    if given.picture is not None:
        with atomic_file(given.picture) as new:
            new.write_bytes(_picture(made[:_SHOWN]))
    print(json.dumps({key: value for key, value in figures.items() if key != "videos"}, indent=2))
    return 0


def _make(
    painter: TorchPainter, pipeline: Pipeline, case: quality.Case, folder: Path
) -> tuple[Portrait, NDArray[np.uint8]]:
    """The portrait and the frames uint8 [F, H, W, 3], made or read."""
    file = folder / f"{case.name}.npz"
    if not file.exists():
        caption = describe_photo(case.person, 0).prompt
        portrait = draw_reference(painter, pipeline.identity_encoder, caption, _SEED)
        video = pipeline.generate(
            GenerateRequest(
                prompt=case.drawn.prompt,
                identity_prompt=case.drawn.identity_prompt,
                photo=portrait.image,
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                seed=_SEED,
            )
        )
        with atomic_file(file) as new, new.open("wb") as stream:
            facts = [portrait.seed, portrait.attempts]
            np.savez(stream, image=portrait.image, facts=facts, frames=frames_from_video(video))
    found = np.load(file)
    seed, attempts = (int(value) for value in found["facts"])
    return Portrait(found["image"], seed, attempts), found["frames"]


def _measure(
    made: Sequence[tuple[quality.Case, Portrait, NDArray[np.uint8]]], encoders: Encoders
) -> dict[str, Any]:
    assert encoders.faces is not None
    portraits = {
        case.person: photo_embeddings(portrait.image, encoders.faces).arc for case, portrait, _ in made
    }
    rows: list[dict[str, Any]] = []
    for case, portrait, frames in made:
        faces = face_embeddings(frames, encoders.faces)
        alike = {person: face_similarity(vector, faces.arc) for person, vector in portraits.items()}
        rows.append(
            {
                "person": case.person,
                "prompt": case.drawn.prompt,
                "portrait_attempts": portrait.attempts,
                "own": alike[case.person],
                "others": float(np.mean([one for person, one in alike.items() if person != case.person])),
                "nearest": max(alike, key=lambda person: alike[person]),
                "face_detection_rate": faces.detection_rate,
            }
        )
    own, gap = (
        estimate([float(row["own"]) - less * float(row["others"]) for row in rows]) for less in (0, 1)
    )
    ceiling = estimate([quality.clip_similarity(case, encoders) for case, _, _ in made])
    return {
        "own": quality.numbers(own),
        "others": quality.numbers(estimate([float(row["others"]) for row in rows])),
        "own_minus_others_in_standard_errors": gap.mean / (gap.standard_error or float("nan")),
        "two_drawn_clips_of_one_person": quality.numbers(ceiling),
        "own_relative_to_drawn_clips": own.mean / ceiling.mean,
        "nearest_is_right": float(np.mean([row["person"] == row["nearest"] for row in rows])),
        "face_detection_rate": float(np.mean([row["face_detection_rate"] for row in rows])),
        "portraits_drawn_again": sum(row["portrait_attempts"] > 1 for row in rows),
        "videos": rows,
    }


def _picture(made: Sequence[tuple[quality.Case, Portrait, NDArray[np.uint8]]]) -> bytes:
    """A row for each: the portrait, as large as the frames of its video beside it."""
    rows = []
    for case, portrait, frames in made:
        size = frames.shape[2], frames.shape[1]
        small = np.asarray(Image.fromarray(portrait.image).resize(size, Image.Resampling.LANCZOS))
        shown = [frames[index] for index in frame_indices(len(frames), _FRAMES)]
        rows.append(StripRow(case.drawn.prompt, np.stack([small, *shown])))
    return film_strip(rows, frames=1 + _FRAMES, height=112)


if __name__ == "__main__":
    raise SystemExit(main())
