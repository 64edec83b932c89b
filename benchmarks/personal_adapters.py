"""Does an adapter trained from one photo make the tiny model's videos more like the person, and at what cost?

    python -m proteus_deploy.benchmarks.personal_adapters --work DIR --json FILE [--people 10]

For each of the first held-out people and their one photo, three adapters of the same size: PersonalVideo's
(rewards, the last quarter of the steps), the same at all steps, and one tuned to reconstruct the photo. Each
is measured on a video of every movement, with prompts and seeds that its training had not, beside the frozen
model:

    identity   FaceSim by ArcFace; the rewards' recogniser is another one
    ceiling    the same between the photo and drawn clips of the person
    motion     mean length of the optical flow
    prompt     CLIPScore, and whether clothes and background have the colours asked for

All three have the rate and the number of steps that were chosen for the first, on other people. Adapters and
videos are kept in --work, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_deploy._files import atomic_file, check_writable, write_json
from proteus_deploy.adapters import Adapter, AdapterUse, read_adapter
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.reconstruction_tuning import reconstruction
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.encoders import Encoders, load_encoders
from proteus_deploy.evaluate.face_similarity import face_embeddings, face_similarity, photo_embeddings
from proteus_deploy.evaluate.frames import frames_from_video
from proteus_deploy.evaluate.motion import estimate_flow, mean_motion
from proteus_deploy.evaluate.statistics import estimate
from proteus_deploy.optical_flow import DisFlow
from proteus_deploy.personalize.model import PersonalModel
from proteus_deploy.personalize.objective import ObjectiveOf, rewards
from proteus_deploy.personalize.prompts import PERSON
from proteus_deploy.personalize.run import ADAPTER_FILE, NoImprovementError, Person, personalize
from proteus_deploy.personalize.settings import PersonalizeSettings
from proteus_deploy.pipeline import GenerateRequest
from proteus_deploy.tiny.trained import ENCODERS, GUIDANCE_SCALE, MODEL, NUM_INFERENCE_STEPS
from proteus_deploy.training.avatars import (
    HELD_OUT_SEEDS,
    MOTIONS,
    Clip,
    background_colour,
    clothes_colour,
    make_clip,
    make_photo,
)
from proteus_deploy.weights import read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["main"]

SETTINGS = PersonalizeSettings(
    rank=8,
    num_inference_steps=NUM_INFERENCE_STEPS,
    guidance_scale=GUIDANCE_SCALE,
    learning_rate=1.5e-3,
    steps=40,
    videos=8,
    held_out=4,
    evaluate_every=8,
)
# For choosing settings before measuring: neither held out nor trained on.
_VALIDATION = (33, 38, 40, 32, 36, 37, 41, 34, 39, 43)
_TEMPLATE_CLIPS, _TEST_CLIPS = range(300, 324), 100
_TEST_SEEDS = 2_000_000  # away from those of training and of its held-out videos: a seed is a video's noise
_MEASURES = ("face_sim_arc", "face_sim_cur", "motion", "clip_score", "clothes_right", "background_right")
_FROZEN = "frozen"


@dataclass(frozen=True)
class Method:
    """A row of the table. settings: what differs from SETTINGS."""

    name: str
    objective: ObjectiveOf = rewards
    settings: Mapping[str, Any] | None = None


METHODS = (
    Method("rewards, last quarter"),
    Method("rewards, all steps", settings={"gate_high": 1000}),
    Method("reconstruction", reconstruction, {"gate_high": 1000, "semantic_weight": 0.0}),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write the result file."""
    parser = argparse.ArgumentParser(prog="personal_adapters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where adapters are kept")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--people", type=int, default=10)
    parser.add_argument("--person", type=int, action="append", help="these people only, by seed")
    parser.add_argument("--validation", action="store_true", help="people for choosing settings")
    parser.add_argument("--method", choices=[one.name for one in METHODS], action="append")
    parser.add_argument("--learning-rate", type=float, default=SETTINGS.learning_rate)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--recognisers", default=SETTINGS.recognisers)
    given = parser.parse_args(arguments)
    check_writable(given.json)
    settings = replace(
        SETTINGS, learning_rate=given.learning_rate, steps=given.steps, recognisers=given.recognisers
    )
    people = given.person or (_VALIDATION if given.validation else HELD_OUT_SEEDS)[: given.people]
    methods = [one for one in METHODS if not given.method or one.name in given.method]
    encoders = load_encoders(ENCODERS)
    rows = []
    with PersonalModel.from_checkpoint(MODEL) as model:
        for number, person in enumerate(people, start=1):
            print(f"person {person}, {number} of {len(people)}", file=sys.stderr, flush=True)
            rows += _measure_person(person, methods, settings, encoders, model, given.work)
    document = {
        "what": "adapters of one person each, trained from one photo on the tiny model",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "people": [int(person) for person in people],
        "settings": asdict(settings),
        "methods": {one.name: dict(one.settings or {}) for one in methods},
        "table": summary(rows),
        "rows": rows,
    }
    write_json(given.json, document)
    for name, figures in summary(rows).items():
        print(name, {key: round(value["mean"], 4) for key, value in figures.items()})
    return 0


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each method the mean over people, with an interval over people; and what it gained.

    gap_closed: share of the distance between the frozen model and drawn clips. motion_kept, prompt_kept:
    ratios of the means with and without the adapter.
    """
    table: dict[str, Any] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        frozen = [_frozen_of(row, rows) for row in own]
        persons = [str(row["person"]) for row in own]

        def over(values: Sequence[float], persons: Sequence[str] = persons) -> dict[str, float | None]:
            found = estimate(list(values), list(persons))
            return {"mean": found.mean, "ci_low": found.ci_low, "ci_high": found.ci_high}

        table[name] = {key: over([row[key] for row in own]) for key in _MEASURES}
        table[name]["ceiling"] = over([row["ceiling"] for row in own])
        gains = [row["face_sim_arc"] - base["face_sim_arc"] for row, base in zip(own, frozen, strict=True)]
        table[name]["gain"] = over(gains)
        means = {key: value["mean"] for key, value in table[name].items()}
        before = {key: float(np.mean([base[key] for base in frozen])) for key in _MEASURES}
        distance = means["ceiling"] - before["face_sim_arc"]
        table[name]["gap_closed"] = {"mean": means["gain"] / distance}
        table[name]["motion_kept"] = {"mean": means["motion"] / before["motion"]}
        table[name]["prompt_kept"] = {"mean": means["clip_score"] / before["clip_score"]}
        if name != _FROZEN:
            table[name]["seconds"] = over([row["training"]["seconds"] for row in own])
    return table


def _frozen_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(one for one in rows if one["method"] == _FROZEN and one["person"] == row["person"])


def _measure_person(
    person: int,
    methods: Sequence[Method],
    settings: PersonalizeSettings,
    encoders: Encoders,
    model: PersonalModel,
    work: Path,
) -> list[dict[str, Any]]:
    wishes = [make_clip(person, _TEST_CLIPS + k, motion=motion) for k, motion in enumerate(MOTIONS)]
    tested = {one.prompt for one in wishes}
    rows = [_row(person, _FROZEN, None, {}, wishes, encoders, model, work)]
    for method in methods:
        own = replace(settings, **(method.settings or {}))
        folder = work / f"person-{person:02d}" / method.name.replace(",", "").replace(" ", "-")
        adapter, training = _adapter(person, method, own, encoders, folder, tested, model.base)
        rows.append(_row(person, method.name, adapter, training, wishes, encoders, model, work))
    return rows


def _adapter(
    person: int,
    method: Method,
    settings: PersonalizeSettings,
    encoders: Encoders,
    folder: Path,
    tested: set[str],
    base: str,
) -> tuple[Adapter | None, dict[str, Any]]:
    """None where no evaluation was better than the frozen model: then that is what would be used."""
    record = folder / "training.json"
    motions = list(MOTIONS)
    clips = [make_clip(person, seed, motion=motions[seed % len(motions)]) for seed in _TEMPLATE_CLIPS]
    prompts = list(dict.fromkeys(clip.prompt for clip in clips if clip.prompt not in tested))
    look = clips[0].identity_prompt
    templates = [prompt.replace(look, PERSON, 1) for prompt in prompts]
    asked = {**asdict(settings), "objective": method.objective.__name__, "base": base, "templates": templates}
    if record.exists():
        training = read_json(record, error=InputError)
        if training["asked"] != asked:
            raise InputError(f"{record} is of other settings or another model; choose another --work")
        return (read_adapter(folder / ADAPTER_FILE) if training["improved"] else None), training
    with PersonalModel.from_checkpoint(MODEL) as model:
        try:
            outcome = personalize(
                model,
                Person(make_photo(person, 0).image, look, f"person-{person:02d}"),
                templates,
                encoders,
                folder,
                settings=settings,
                objective_of=method.objective,
                report=_report,
            )
            adapter, training = outcome.adapter, {"improved": True, **outcome.document}
        except NoImprovementError as error:
            adapter, training = None, {"improved": False, "why": str(error), "seconds": error.seconds}
    training["asked"] = asked
    write_json(record, training)
    return adapter, training


def _row(
    person: int,
    name: str,
    adapter: Adapter | None,
    training: Mapping[str, Any],
    wishes: Sequence[Clip],
    encoders: Encoders,
    model: PersonalModel,
    work: Path,
) -> dict[str, Any]:
    photo = make_photo(person, 0).image
    assert encoders.faces is not None
    assert encoders.clip is not None
    own = photo_embeddings(photo, encoders.faces, encoders.curricular)
    found: dict[str, list[float]] = {key: [] for key in (*_MEASURES, "ceiling", "face_detection_rate")}
    for seed, wish in enumerate(wishes, start=_TEST_SEEDS):
        frames = _video(person, name, adapter, wish, seed, photo, model, work)
        faces = face_embeddings(frames, encoders.faces, encoders.curricular)
        drawn = face_embeddings(wish.frames, encoders.faces)
        text = encoders.clip.text_features(wish.prompt)[0]
        values = {
            "face_sim_arc": face_similarity(own.arc, faces.arc),
            "face_sim_cur": face_similarity(_given(own.cur), _given(faces.cur)),
            "motion": mean_motion(estimate_flow(frames, DisFlow())) or 0.0,
            "clip_score": float(100 * (encoders.clip.image_features(frames) @ text).mean()),
            "clothes_right": float(clothes_colour(frames) == wish.scene.clothes_name),
            "background_right": float(background_colour(frames) == wish.scene.background_name),
            "ceiling": face_similarity(own.arc, drawn.arc),
            "face_detection_rate": faces.detection_rate,
        }
        for key, value in values.items():
            found[key].append(value)
    means = {key: float(np.mean(values)) for key, values in found.items()}
    print(name, {key: round(value, 3) for key, value in means.items()}, file=sys.stderr, flush=True)
    return {"person": person, "method": name, **means, "videos": found, "training": dict(training)}


def _video(
    person: int,
    name: str,
    adapter: Adapter | None,
    wish: Clip,
    seed: int,
    photo: NDArray[np.uint8],
    model: PersonalModel,
    work: Path,
) -> NDArray[np.uint8]:
    request = GenerateRequest(
        prompt=wish.prompt,
        identity_prompt=wish.identity_prompt,
        photo=photo,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        seed=seed,
        adapters=() if adapter is None else (AdapterUse(adapter),),
    )
    asked = f"{model.base} {request.prompt} {seed} {adapter and adapter.hash}"
    digest = hashlib.sha256(asked.encode()).hexdigest()[:24]
    file = work / f"person-{person:02d}" / "videos" / f"{digest}.npy"
    if not file.exists():
        video = model.pipeline.generate(request)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as new, new.open("wb") as stream:
            np.save(stream, frames_from_video(video))
        print(f"  {name}: {wish.prompt}", file=sys.stderr, flush=True)
    frames: NDArray[np.uint8] = np.load(file)
    return frames


def _given(vectors: NDArray[np.float32] | None) -> NDArray[np.float32]:
    assert vectors is not None
    return vectors


def _report(phase: str, done: int, total: int) -> None:
    print(f"  {phase} {done}/{total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
