"""Videos from the checkpoints of a run, and how much the people in them look like their photos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_directory
from proteus_deploy.errors import InputError
from proteus_deploy.reporting import no_report
from proteus_deploy.weights import read_json

if TYPE_CHECKING:
    from proteus_deploy.evaluate.encoders import Encoders

__all__ = ["SampleCase", "make_samples", "read_cases"]


@dataclass(frozen=True)
class SampleCase:
    """What is asked of each checkpoint. photo: a file. name: of the video that is written."""

    name: str
    photo: Path
    prompt: str
    identity_prompt: str = ""
    seed: int = 42


def read_cases(file: Path) -> tuple[SampleCase, ...]:
    """Cases from JSON, {"cases": [{"photo", "prompt", "identity_prompt", "seed"}]}; photos beside the file.

    Raises InputError naming the entry that doesn't fit.
    """
    entries: Any = read_json(file, error=InputError).get("cases")
    if not isinstance(entries, list) or not entries:
        raise InputError(f'{file} holds no cases; expected {{"cases": [{{"photo": …, "prompt": …}}]}}')
    cases = []
    for index, entry in enumerate(entries):
        try:
            photo = file.parent / str(entry["photo"])
            case = SampleCase(
                name=f"{index:02d}-{photo.stem}",
                photo=photo,
                prompt=str(entry["prompt"]),
                identity_prompt=str(entry.get("identity_prompt", "")),
                seed=int(entry.get("seed", 42)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: case {index} is {entry!r}; photo and prompt are needed") from error
        if not photo.is_file():
            raise InputError(f"{file}: case {index} names {photo}, which isn't there")
        cases.append(case)
    return tuple(cases)


def make_samples(
    checkpoint: Path,
    cases: Sequence[SampleCase],
    folder: Path,
    *,
    steps: int,
    guidance_scale: float,
    encoders: Encoders | None,
    device: str = "cpu",
    report: Callable[[int, int], object] = no_report,
) -> dict[str, float | None]:
    """Write `folder/NAME.mp4` for each case; return the FaceSim-Arc of each, None where it wasn't measured.

    encoders: of the measures; without them nothing is measured. report(done, total) counts videos. The folder
    is whole or absent; an old one is replaced.
    """
    from proteus_deploy.evaluate.frames import frames_from_video
    from proteus_deploy.evaluate.measure import measure_video
    from proteus_deploy.pipeline import GenerateRequest, Pipeline

    scores: dict[str, float | None] = {}
    report(0, len(cases))
    with (
        atomic_directory(folder, replace=True) as new,
        Pipeline.from_checkpoint(checkpoint, device=device) as pipeline,
    ):
        for case in cases:
            video = pipeline.generate(
                GenerateRequest(
                    prompt=case.prompt,
                    identity_prompt=case.identity_prompt,
                    photo=case.photo,
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    seed=case.seed,
                )
            )
            video.save(new / f"{case.name}.mp4")
            scores[case.name] = None
            if encoders is not None and encoders.faces is not None:
                measured = measure_video(
                    frames_from_video(video), photo=case.photo, encoders=encoders, metrics=("face_sim_arc",)
                )
                scores[case.name] = measured["face_sim_arc"]
            report(len(scores), len(cases))
    return scores
