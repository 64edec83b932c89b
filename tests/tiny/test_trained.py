"""The tiny model that ships: whole, small, and it shows the person of a photo in what the prompt asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.tiny.trained import ENCODERS, GUIDANCE_SCALE, MODEL, copy_folder

_MOST_BYTES = 25_000_000


def test_it_is_whole_and_small() -> None:
    checkpoint = Checkpoint.open(MODEL)
    assert {path.name for path in MODEL.iterdir() if path.is_dir()} == {
        "face_encoder",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    }
    assert checkpoint.vae["scaling_factor"] != 1.0, "measured on clips, not the placeholder"
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= _MOST_BYTES


def test_a_copy_is_the_same_checkpoint_and_never_lies_on_another(tmp_path: Path) -> None:
    folder = copy_folder(MODEL, tmp_path / "copy")
    assert Checkpoint.open(folder).hash == Checkpoint.open(MODEL).hash
    with pytest.raises(InputError, match="already exists and is not empty"):
        copy_folder(MODEL, folder)


@pytest.mark.slow
def test_it_shows_the_person_of_the_photo_dressed_as_asked() -> None:
    from proteus_deploy.evaluate.encoders import load_encoders
    from proteus_deploy.evaluate.face_similarity import face_embeddings, face_similarity, photo_embeddings
    from proteus_deploy.evaluate.frames import frames_from_video
    from proteus_deploy.pipeline import GenerateRequest, Pipeline
    from proteus_deploy.training.avatars import (
        HELD_OUT_SEEDS,
        background_colour,
        clothes_colour,
        make_clip,
        make_photo,
    )

    faces = load_encoders(ENCODERS).faces
    assert faces is not None
    asked = HELD_OUT_SEEDS[:3]
    photos = {person: make_photo(person, 0).image for person in HELD_OUT_SEEDS[:8]}
    known = {person: photo_embeddings(photo, faces).arc for person, photo in photos.items()}
    right = []
    with Pipeline.from_checkpoint(MODEL, device="cpu", dtype="float32") as pipeline:
        for person in asked:
            drawn = make_clip(person, 400, num_frames=1)
            video = pipeline.generate(
                GenerateRequest(
                    prompt=drawn.prompt,
                    identity_prompt=drawn.identity_prompt,
                    photo=photos[person],
                    num_inference_steps=12,
                    guidance_scale=GUIDANCE_SCALE,
                    seed=0,
                )
            )
            frames = frames_from_video(video)
            seen = face_embeddings(frames, faces)
            assert seen.detection_rate > 0.9
            alike = {other: face_similarity(vector, seen.arc) for other, vector in known.items()}
            right.append(max(alike, key=lambda other: alike[other]) == person)
            right.append(clothes_colour(frames) == drawn.scene.clothes_name)
            right.append(background_colour(frames) == drawn.scene.background_name)
    assert sum(right) >= 7, f"of nine, by chance one or two: {right}"
