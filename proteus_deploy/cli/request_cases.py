"""Requests that `tune` and `calibrate` run: from a file of photos and prompts, or drawn people."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.plan_trials import TuningCase

_TEXTS = ("name", "person", "photo", "prompt", "identity_prompt")


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say what is run."""
    parser.add_argument("--cases", type=Path, metavar="FILE", help="JSON list of photos and prompts")
    parser.add_argument("--num-inference-steps", type=int, metavar="N", help="(default: 50; tiny model 25)")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="W", help="(default: 6; for the tiny model its own)"
    )
    parser.add_argument("--people", type=int, default=4, metavar="N", help="drawn people (default: 4)")


def cases_of(arguments: argparse.Namespace) -> list[TuningCase]:
    """Of the file that was named, or of drawn people for the tiny model. Raises InputError."""
    return drawn_cases(arguments) if arguments.cases is None else read_cases(arguments)


def drawn_cases(arguments: argparse.Namespace) -> list[TuningCase]:
    """People who were neither trained on nor held out for the measures, each with another movement."""
    from proteus_deploy.benchmarks.tiny_model_plan import drawn_requests
    from proteus_deploy.benchmarks.tiny_model_quality import VALIDATION
    from proteus_deploy.tiny.trained import GUIDANCE_SCALE, NUM_INFERENCE_STEPS

    if not 1 <= arguments.people <= len(VALIDATION):
        raise InputError(f"--people is {arguments.people}; choose 1 to {len(VALIDATION)}")
    return drawn_requests(
        VALIDATION[: arguments.people],
        steps=_given(arguments.num_inference_steps, NUM_INFERENCE_STEPS),
        guidance_scale=_given(arguments.guidance_scale, GUIDANCE_SCALE),
    )


def read_cases(arguments: argparse.Namespace) -> list[TuningCase]:
    """Of a JSON list of {photo, prompt, identity_prompt, seed, person, name}; paths relative to the file."""
    from proteus_deploy.benchmarks.plan_trials import TuningCase
    from proteus_deploy.cli.evaluate_cases import read_case_list
    from proteus_deploy.request import GenerateRequest

    file: Path = arguments.cases
    document = read_case_list(file, example='[{"photo": "a.jpg", "prompt": "…"}]')
    found = []
    for number, entry in enumerate(document, 1):
        _check_entry(f"{file}, case {number}", entry)
        photo = file.parent / entry["photo"]
        if not photo.is_file():
            raise InputError(f"{file}, case {number}: {photo} is not a file")
        name = entry.get("name") or f"{number} {photo.stem}"
        request = GenerateRequest(
            prompt=entry["prompt"],
            identity_prompt=entry.get("identity_prompt") or "",
            photo=photo,
            num_inference_steps=_given(arguments.num_inference_steps, 50),
            guidance_scale=_given(arguments.guidance_scale, 6.0),
            seed=entry.get("seed", 42),
        )
        found.append(TuningCase(name, entry.get("person") or name, request))
    return found


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is {entry!r}; a case is an object with the keys photo and prompt")
    unknown = sorted(set(entry) - {*_TEXTS, "seed"})
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join((*_TEXTS, 'seed'))}")
    for key in _TEXTS:
        value = entry.get(key)
        if (value is None and key in ("photo", "prompt")) or not isinstance(value, str | None):
            raise InputError(f"{where}: {key} is {value!r}; it is text")
    if type(entry.get("seed", 0)) is not int:
        raise InputError(f"{where}: seed is {entry['seed']!r}; it is a whole number")
