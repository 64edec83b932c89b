"""Drawn people: the same seed, the same bytes; and everything that is said about a clip is true of it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_deploy.errors import InputError
from proteus_deploy.identity.faces import FaceDetector
from proteus_deploy.tiny.face_pack import write_face_encoder
from proteus_deploy.training import avatars
from proteus_deploy.training.avatars import (
    HELD_OUT_SEEDS,
    MOTIONS,
    Clip,
    Identity,
    Photo,
    background_colour,
    clothes_colour,
    count_looks,
    make_clip,
    make_pair,
    make_photo,
    training_seed,
    training_seeds,
)


def report(*words: object) -> None:
    """Shown with the failure, or with -s."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def test_public_names_are_sorted_and_there() -> None:
    assert sorted(avatars.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)) == list(
        avatars.__all__
    )
    assert all(hasattr(avatars, name) for name in avatars.__all__)


def test_the_same_seeds_give_the_same_bytes() -> None:
    first, again = make_clip(3, 5), make_clip(3, 5)
    for name in ("frames", "person_mask", "head_mask", "face_mask", "flow", "landmarks"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes(), name
    assert first.prompt == again.prompt
    assert make_photo(3, 5, 128).image.tobytes() == make_photo(3, 5, 128).image.tobytes()
    assert make_clip(3, 6).frames.tobytes() != first.frames.tobytes()
    assert make_clip(4, 5).frames.tobytes() != first.frames.tobytes()


def test_the_drawing_is_the_recorded_one() -> None:
    """Changing how people look changes every trained model's data: do it on purpose."""
    clip = make_clip(1, 2, motion="talk", num_frames=3, size=32)
    assert hashlib.sha256(clip.frames.tobytes()).hexdigest()[:16] == "f4e0beca79551957"


@pytest.mark.parametrize("size", [64, 96, 128])
@pytest.mark.parametrize("frames", [1, 9, 17, 49])
def test_sizes_and_lengths(size: int, frames: int) -> None:
    clip = make_clip(2, 1, motion="wave", size=size, num_frames=frames)
    assert clip.frames.shape == (frames, size, size, 3)
    assert clip.frames.dtype == np.uint8
    for mask in (clip.person_mask, clip.head_mask, clip.face_mask):
        assert mask.shape == (frames, size, size)
        assert mask.dtype == np.bool_
    assert clip.flow.shape == (frames - 1, size, size, 2)
    assert clip.flow.dtype == np.float32
    assert clip.landmarks.shape == (frames, 5, 2)
    assert np.isfinite(clip.flow).all()


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="size is 8"):
        make_clip(0, 0, size=8)
    with pytest.raises(InputError, match="num_frames is 0"):
        make_clip(0, 0, num_frames=0)
    with pytest.raises(InputError, match="fps is 0"):
        make_clip(0, 0, fps=0)
    with pytest.raises(InputError, match="no motion 'jump'; choose one of: nod"):
        make_clip(0, 0, motion="jump")


# --- people ---


def test_there_are_many_people() -> None:
    people = [Identity.from_seed(seed) for seed in range(3000)]
    assert len({(who.skin, who.hair, who.iris, who.face_width, who.nose_length) for who in people}) == 3000
    assert count_looks() > 10_000_000
    assert len({who.identity_prompt() for who in people}) > 1000


def test_identity_prompts_are_short_and_about_looks() -> None:
    for seed in range(2000):
        who = Identity.from_seed(seed)
        words = who.identity_prompt()
        assert len(words.split()) <= 12, words
        assert words.startswith((f"a {who.kind} with ", f"an older {who.kind} with ")), words
        assert who.hair_style == "bald" or who.hair_colour in words, words
        assert ("glasses" in words) <= (who.glasses != "none"), words
        assert ("beard" in words) <= (who.facial_hair == "beard"), words
        assert ("cap" in words.split() or "beanie" in words.split()) <= (who.hat != "none"), words


def describe(image: NDArray[np.uint8], landmarks: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean colours of a grid laid over the head by its eyes and mouth: neither clothes nor much wall."""
    left, right = landmarks[0].astype(float), landmarks[1].astype(float)
    mouth = landmarks[3:].mean(axis=0).astype(float)
    across, down = (right - left) / 2, mouth - (left + right) / 2
    cells = []
    for v in np.linspace(-1.0, 1.4, 10):
        for u in np.linspace(-1.9, 1.9, 9):
            x, y = (left + right) / 2 + u * across + v * down
            column, row = (int(np.clip(place, 0, image.shape[1] - 1)) for place in (x, y))
            cells.append(image[row, column].astype(float))
    return np.array(cells).ravel()


def test_people_differ_more_than_clips_of_one_person() -> None:
    described = []
    for seed in HELD_OUT_SEEDS[:12]:
        clips = [make_clip(seed, clip, motion="still", num_frames=1) for clip in range(3)]
        described.append([describe(clip.frames[0], clip.landmarks[0]) for clip in clips])
    same = [np.abs(a - b).mean() for own in described for a in own for b in own if a is not b]
    other = [
        np.abs(a - b).mean()
        for first, one in enumerate(described)
        for second, two in enumerate(described)
        for a in one
        for b in two
        if first != second
    ]
    report(f"same person {np.mean(same):.1f}, other person {np.mean(other):.1f}")
    assert np.mean(other) > 1.7 * np.mean(same)
    right = total = 0
    for person, own in enumerate(described):
        for clip in own:
            rest = [
                (np.abs(clip - view).mean(), name)
                for name, views in enumerate(described)
                for view in views
                if view is not clip
            ]
            right += min(rest)[1] == person
            total += 1
    report(f"nearest clip is of the same person: {right} of {total}")
    assert right / total >= 0.9


def test_held_out_people_are_never_trained_on() -> None:
    assert len(set(HELD_OUT_SEEDS)) == 30
    assert not set(HELD_OUT_SEEDS) & set(training_seeds(100_000))
    assert training_seed(7) == training_seeds(8)[7]
    assert all(avatars.is_held_out(seed) for seed in HELD_OUT_SEEDS)
    assert not avatars.is_held_out(training_seed(0))
    looks = {Identity.from_seed(seed) for seed in HELD_OUT_SEEDS}
    assert len(looks) == 30
    for wrong in (lambda: training_seed(-1), lambda: training_seeds(0)):
        with pytest.raises(InputError):
            wrong()


# --- what is drawn, and what is said about it ---


def test_masks_lie_within_each_other_and_on_the_drawing() -> None:
    for seed in range(8):
        clip = make_clip(seed, seed)
        assert (clip.face_mask <= clip.head_mask).all()
        assert (clip.head_mask <= clip.person_mask).all()
        assert 0.03 < clip.face_mask.mean() < clip.head_mask.mean() < clip.person_mask.mean() < 0.75
        # Landmarks lie on the face: no hair hides eyes or mouth.
        for frame, points in enumerate(clip.landmarks):
            for x, y in points[:2]:
                assert clip.face_mask[frame, int(y), int(x)], (seed, frame)


def test_the_mask_is_what_is_drawn_of_the_person() -> None:
    """Skin colour lies under the face mask, and the wall's colour outside the mask of the person."""
    clip, photo = make_pair(13, 1, motion="still", num_frames=1, size=96, photo_size=96)
    assert clip.scene.clothes_name != photo.scene.clothes_name
    assert clip.scene.background_name != photo.scene.background_name
    assert clip.identity == photo.identity
    skin = np.array(clip.identity.skin)
    face = clip.frames[0][clip.face_mask[0]].astype(float)
    wall = clip.frames[0][~clip.person_mask[0]].astype(float)
    assert np.abs(np.median(face, axis=0) - skin).max() < 40
    assert np.abs(np.median(wall, axis=0) - clip.scene.background).max() < 45


def test_prompts_name_what_is_drawn() -> None:
    walls = clothes = 0
    motions = tuple(MOTIONS)
    for seed in range(120):
        clip = make_clip(seed, 7, motion=motions[seed % len(motions)], num_frames=9)
        assert clip.prompt.startswith(clip.identity_prompt)
        assert MOTIONS[clip.motion].split()[0] in clip.prompt
        assert clip.scene.background_name in clip.prompt
        assert f" {clip.scene.clothes_name} " in clip.prompt
        walls += background_colour(clip.frames) == clip.scene.background_name
        clothes += clothes_colour(clip.frames) == clip.scene.clothes_name
    report(f"background told by its colour: {walls} of 120; clothes: {clothes} of 120")
    assert walls >= 117
    assert clothes >= 117


def test_a_photo_is_of_the_same_person() -> None:
    clip, photo = make_clip(9, 0), make_photo(9, 0, 96)
    assert isinstance(clip, Clip)
    assert isinstance(photo, Photo)
    assert photo.identity == clip.identity
    assert photo.identity_prompt == clip.identity_prompt
    assert photo.prompt.startswith(photo.identity_prompt)
    assert photo.image.shape == (96, 96, 3)


# --- motion ---


def sampled(image: NDArray[np.uint8], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bilinear samples of an image at pixel middles x + 0.5, y + 0.5."""
    height, width = image.shape[:2]
    x, y = x.clip(0, width - 1.001), y.clip(0, height - 1.001)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, down = (x - left)[..., None], (y - top)[..., None]
    values = image.astype(float)
    upper: NDArray[np.float64] = values[top, left] * (1 - right) + values[top, left + 1] * right
    lower: NDArray[np.float64] = values[top + 1, left] * (1 - right) + values[top + 1, left + 1] * right
    mixed: NDArray[np.float64] = upper * (1 - down) + lower * down
    return mixed


def warp_errors(clip: Clip) -> tuple[float, float]:
    """Mean difference of moving pixels to the next frame: taken along the flow, and where they were."""
    size = clip.frames.shape[1]
    rows, columns = np.mgrid[:size, :size]
    along, without = [], []
    for frame, flow in enumerate(clip.flow):
        x, y = columns + flow[..., 0], rows + flow[..., 1]
        moving = (np.abs(flow).max(axis=-1) > 0.3) & (x > 1) & (y > 1) & (x < size - 2) & (y < size - 2)
        if moving.sum() < 20:
            continue
        here = clip.frames[frame].astype(float)
        along.append(np.abs(sampled(clip.frames[frame + 1], x, y) - here).mean(axis=-1)[moving])
        without.append(np.abs(clip.frames[frame + 1].astype(float) - here).mean(axis=-1)[moving])
    return float(np.median(np.concatenate(along))), float(np.mean(np.concatenate(without)))


@pytest.mark.parametrize("motion", ["nod", "shake", "wave", "walk by", "camera drift", "talk", "blink"])
@pytest.mark.parametrize("seed", [0, 3, 11])
def test_flow_leads_to_the_next_frame(motion: str, seed: int) -> None:
    """Forward flow: frame f at (x, y) shows what frame f + 1 shows at (x, y) + flow."""
    # A lid is three pixels high in a small clip, with edges on all of them.
    along, without = warp_errors(make_clip(seed, 3, motion=motion, size=256 if motion == "blink" else 96))
    report(f"{motion}: {along:.2f} along the flow, {without:.2f} without")
    # Half of the pixels differ by about a rounding; the rest lie on edges or become hidden.
    assert along < 3.0
    assert along < 0.35 * without


@pytest.mark.parametrize("motion", list(MOTIONS))
def test_flow_follows_the_landmarks(motion: str) -> None:
    clip = make_clip(4, 2, motion=motion)
    for frame in range(len(clip.flow)):
        for point in (0, 1):  # lids hide the eyes of a blink, which moves the skin and not the head
            x, y = clip.landmarks[frame, point]
            if motion == "blink":
                continue
            moved = clip.flow[frame, int(y), int(x)]
            expected = clip.landmarks[frame + 1, point] - clip.landmarks[frame, point]
            assert np.abs(moved - expected).max() < 0.35, (frame, point, moved, expected)


def motion_statistics(clip: Clip) -> dict[str, float]:
    magnitude = np.sqrt((clip.flow**2).sum(axis=-1))
    head, person = clip.head_mask[:-1], clip.person_mask[:-1]
    body = person & ~head
    return {
        "wall": float(magnitude[~person].mean()),
        "head x": float(np.abs(clip.flow[..., 0][head]).mean()),
        "head y": float(np.abs(clip.flow[..., 1][head]).mean()),
        "body": float(magnitude[body].mean()),
        "body peak": float(np.percentile(magnitude[body], 99)),
        "head": float(magnitude[head].mean()),
    }


def test_motions_can_be_told_apart_by_their_flow() -> None:
    means: dict[str, dict[str, float]] = {}
    for motion in MOTIONS:
        figures = [motion_statistics(make_clip(seed, 1, motion=motion)) for seed in range(4)]
        means[motion] = {key: float(np.mean([figure[key] for figure in figures])) for key in figures[0]}
        report(motion, {key: round(value, 3) for key, value in means[motion].items()})
    assert means["nod"]["head y"] > 2 * means["nod"]["head x"]
    assert means["shake"]["head x"] > 2 * means["shake"]["head y"]
    assert means["camera drift"]["wall"] > 0.2
    assert all(means[motion]["wall"] == 0 for motion in MOTIONS if motion != "camera drift")
    assert means["walk by"]["body"] > 4 * means["still"]["body"] + 1
    assert means["wave"]["body peak"] > 4 * means["nod"]["body peak"] + 1
    assert means["still"]["head"] < 0.1
    for motion in ("talk", "blink"):
        assert means["still"]["head"] < means[motion]["head"] < means["nod"]["head"]


def test_a_longer_clip_shows_more_and_not_slower_nods() -> None:
    speeds = [motion_statistics(make_clip(1, 1, motion="nod", num_frames=n))["head y"] for n in (17, 49)]
    assert speeds[1] == pytest.approx(speeds[0], rel=0.25)


def test_a_blink_closes_the_eyes_and_talking_opens_the_mouth() -> None:
    for motion, region in (("blink", slice(0, 2)), ("talk", slice(3, 5))):
        moving = make_clip(8, 1, motion=motion)
        still = make_clip(8, 1, motion="still")
        difference = (
            np.abs(moving.frames.astype(float) - still.frames.astype(float)).mean(axis=-1).max(axis=0)
        )
        x, y = moving.landmarks[0, region].mean(axis=0) if motion == "talk" else moving.landmarks[0, 0]
        assert difference[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4].max() > 40


# --- the detector of the tiny checkpoint ---


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> FaceDetector:
    return FaceDetector(write_face_encoder(tmp_path_factory.mktemp("pack") / "face_encoder", seed=5))


def test_the_photo_of_each_held_out_person_holds_one_face(detector: FaceDetector) -> None:
    for seed in HELD_OUT_SEEDS:
        photo = make_photo(seed, 0)
        faces = detector.detect(photo.image)
        assert len(faces) == 1, f"{seed}: {photo.prompt}: {[str(face) for face in faces]}"
        (face,) = faces
        error = np.abs(face.landmarks - photo.landmarks).max() / face.width
        assert error < 0.25, f"{seed}: landmarks are off by {error:.0%} of the face's width"


def test_faces_are_found_in_most_photos(detector: FaceDetector) -> None:
    found = [len(detector.detect(make_photo(seed, 0).image)) for seed in training_seeds(60)]
    report(f"exactly one face in {found.count(1)} of 60 photos")
    assert found.count(1) >= 54


def test_links_of_the_page(repository: Path) -> None:
    page = (repository / "docs" / "avatars.md").read_text(encoding="utf-8")
    pictures = sorted((repository / "docs" / "images").glob("avatars-*.png"))
    assert pictures
    for picture in pictures:
        assert f"images/{picture.name}" in page
        assert picture.stat().st_size < 300_000
