"""Does the tiny model show the person of the photo, doing what the prompt says? On people it never saw.

    python -m proteus_deploy.benchmarks.tiny_model_quality MODEL ENCODERS --work DIR --json FILE

For each of the 30 held-out people and each of 3 seeds: a video in 25 steps from the person's photo and a
prompt that no training clip had, then

    identity   FaceSim of the video with each of the 30 photos: with the person's own, with the others',
               and which photo is nearest
    ceiling    the same between two drawn clips of one person
    motion     which movement a classifier sees that was trained on drawn clips
    colours    of clothes and background, read off the frames

Videos are kept in --work, in a folder for each checkpoint and guidance scale, so that an interrupted run goes
on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.tiny.trained import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from proteus_deploy.training.avatars import (
    HELD_OUT_SEEDS,
    MOTIONS,
    Clip,
    background_colour,
    clothes_colour,
    make_clip,
    make_photo,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.training.tiny_model.motion_classifier import MotionClassifier

SEEDS = 3
# Neither held out nor trained on: for choosing settings, such as the guidance scale, before measuring.
VALIDATION = range(31, 61)
# Clip seeds of the prompts and of the ceiling; the photos are photo 0.
_FIRST_CLIP, _OTHER_CLIP = 100, 200


@dataclass(frozen=True)
class Case:
    """One video: a person, a seed, and a drawn clip that shows what the prompt asks for."""

    person: int
    seed: int
    drawn: Clip

    @property
    def name(self) -> str:
        """Names the video's file: another prompt is another video, whatever person and seed."""
        motion = self.drawn.motion.replace(" ", "-")
        return f"person-{self.person:02d}-seed-{self.seed}-{motion}"


def cases(people: Sequence[int], seeds: int) -> list[Case]:
    """Every person with every seed; movements come equally often."""
    motions = list(MOTIONS)
    return [
        Case(person, seed, _drawn(person, seed, motions[(place * seeds + seed) % len(motions)]))
        for place, person in enumerate(people)
        for seed in range(seeds)
    ]


def _drawn(person: int, seed: int, motion: str) -> Clip:
    return make_clip(person, _FIRST_CLIP + seed, motion=motion)


def generate(pipeline: Pipeline, case: Case, guidance_scale: float, work: Path) -> NDArray[np.uint8]:
    """Frames uint8 [F, H, W, 3] of the case, made or read."""
    import numpy as np

    from proteus_deploy.evaluate.frames import frames_from_video
    from proteus_deploy.pipeline import GenerateRequest

    file = work / f"{case.name}.npy"
    if not file.exists():
        video = pipeline.generate(
            GenerateRequest(
                prompt=case.drawn.prompt,
                identity_prompt=case.drawn.identity_prompt,
                photo=make_photo(case.person, 0).image,
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=guidance_scale,
                seed=case.seed,
            )
        )
        np.save(file, frames_from_video(video))
    frames: NDArray[np.uint8] = np.load(file)
    return frames


def measure(
    made: Sequence[tuple[Case, NDArray[np.uint8]]], encoders: Encoders, classifier: MotionClassifier
) -> dict[str, Any]:
    """All figures of the module's text."""
    import numpy as np

    from proteus_deploy.evaluate.statistics import estimate

    people = sorted({case.person for case, _ in made})
    photos = {person: _photo_vector(person, encoders) for person in people}
    rows: list[dict[str, Any]] = []
    real = []
    for case, frames in made:
        alike, rate = _similarities(frames, photos, encoders)
        others = [value for person, value in alike.items() if person != case.person]
        rows.append(
            {
                "person": case.person,
                "seed": case.seed,
                "prompt": case.drawn.prompt,
                "own": alike[case.person],
                "others": float(np.mean(others)),
                "nearest": max(alike, key=lambda person: alike[person]),
                "face_detection_rate": rate,
                "motion": case.drawn.motion,
                "motion_seen": classifier.classify(frames),
                "motion_of_the_drawn_clip": classifier.classify(case.drawn.frames),
                "clothes": case.drawn.scene.clothes_name,
                "clothes_seen": clothes_colour(frames),
                "background": case.drawn.scene.background_name,
                "background_seen": background_colour(frames),
            }
        )
        real.append(clip_similarity(case, encoders))
    persons = [str(row["person"]) for row in rows]

    def share(wanted: str, seen: str) -> float:
        return float(np.mean([row[wanted] == row[seen] for row in rows]))

    gap = estimate([row["own"] - row["others"] for row in rows], persons)
    own = estimate([row["own"] for row in rows], persons)
    ceiling = estimate(real, persons)
    return {
        "own": numbers(own),
        "others": numbers(estimate([row["others"] for row in rows], persons)),
        "own_minus_others": numbers(gap),
        "own_minus_others_in_standard_errors": gap.mean / (gap.standard_error or float("nan")),
        "two_drawn_clips_of_one_person": numbers(ceiling),
        "own_relative_to_drawn_clips": own.mean / ceiling.mean,
        "nearest_is_right": share("person", "nearest"),
        "face_detection_rate": float(np.mean([row["face_detection_rate"] for row in rows])),
        "motion_is_right": share("motion", "motion_seen"),
        "motion_of_drawn_clips_is_right": share("motion", "motion_of_the_drawn_clip"),
        "clothes_colour_is_right": share("clothes", "clothes_seen"),
        "background_colour_is_right": share("background", "background_seen"),
        "videos": rows,
    }


def _photo_vector(person: int, encoders: Encoders) -> NDArray[np.float32]:
    from proteus_deploy.evaluate.face_similarity import photo_embeddings

    assert encoders.faces is not None
    return photo_embeddings(make_photo(person, 0).image, encoders.faces).arc


def _similarities(
    frames: NDArray[np.uint8], photos: dict[int, NDArray[np.float32]], encoders: Encoders
) -> tuple[dict[int, float], float]:
    """FaceSim with every photo, and the share of frames with a face."""
    from proteus_deploy.evaluate.face_similarity import face_embeddings, face_similarity

    assert encoders.faces is not None
    found = face_embeddings(frames, encoders.faces)
    alike = {person: face_similarity(photo, found.arc) for person, photo in photos.items()}
    return alike, found.detection_rate


def clip_similarity(case: Case, encoders: Encoders) -> float:
    """FaceSim between two drawn clips of the person: mean over all pairs of their sampled frames."""
    from proteus_deploy.evaluate.face_similarity import cosine_matrix, face_embeddings

    assert encoders.faces is not None
    other = make_clip(case.person, _OTHER_CLIP + case.seed)
    one, two = (face_embeddings(clip.frames, encoders.faces).arc for clip in (case.drawn, other))
    return float(cosine_matrix(one, two).clip(0).mean())


def numbers(found: Any) -> dict[str, float]:
    return {
        "mean": found.mean,
        "standard_error": found.standard_error,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
        "n": found.n,
        "people": found.groups,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a checkpoint, for PyTorch, or a bundle, for ONNX Runtime")
    parser.add_argument("encoders", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where videos and the classifier are kept")
    parser.add_argument("--people", type=int, default=len(HELD_OUT_SEEDS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument(
        "--validation", action="store_true", help="other people, for choosing settings, not the held-out ones"
    )
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args(arguments)

    from proteus_deploy.evaluate.encoders import load_encoders
    from proteus_deploy.training.tiny_model.motion_classifier import drawn_motion_classifier

    encoders = load_encoders(given.encoders)
    people = VALIDATION if given.validation else HELD_OUT_SEEDS
    asked = cases(people[: given.people], given.seeds)
    backend, checkpoint_hash, pipeline = _open(given.model)
    videos = given.work / f"videos-{checkpoint_hash[:8]}-{backend}-guidance-{given.guidance_scale:g}"
    videos.mkdir(parents=True, exist_ok=True)
    made = []
    with pipeline:
        for number, case in enumerate(asked, start=1):
            made.append((case, generate(pipeline, case, given.guidance_scale, videos)))
            print(f"{number}/{len(asked)} {case.name}", file=sys.stderr, flush=True)
    classifier = drawn_motion_classifier(given.work / "classifier")
    figures = measure(made, encoders, classifier)
    document = {
        "what": "identity, motion and colours of the tiny model's videos of held-out people",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "settings": {
            "checkpoint": checkpoint_hash,
            "backend": backend,
            "people": [int(person) for person in people[: given.people]],
            "seeds": given.seeds,
            "num_inference_steps": NUM_INFERENCE_STEPS,
            "guidance_scale": given.guidance_scale,
        },
        **figures,
    }
    write_json(given.json, document)
    print(json.dumps({key: value for key, value in figures.items() if key != "videos"}, indent=2))
    return 0


def _open(model: Path) -> tuple[str, str, Pipeline]:
    """Backend, hash of the checkpoint, and the pipeline of a checkpoint or a bundle."""
    from proteus_deploy.bundle import MANIFEST, Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.pipeline import Pipeline

    if (model / MANIFEST).exists():
        bundle = Bundle.open(model)
        return "onnxruntime", str(bundle.manifest["checkpoint"]["hash"]), Pipeline.from_bundle(bundle)
    return "eager", Checkpoint.open(model).hash, Pipeline.from_checkpoint(model)


if __name__ == "__main__":
    raise SystemExit(main())
