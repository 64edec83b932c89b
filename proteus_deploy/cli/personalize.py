"""`proteus-deploy personalize`: an adapter that makes videos more like the one person in a photo."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.output import print_json, print_table
from proteus_deploy.cli.progress import PhaseProgress
from proteus_deploy.cli.video_progress import cancel_on_interrupt
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.personalize.model import PersonalModel
    from proteus_deploy.personalize.settings import PersonalizeSettings

NAME = "personalize"
HELP = "train an adapter for one person from one photo"

_FLAGS: dict[str, tuple[type, str]] = {
    "rank": (int, "of the adapter (16)"),
    "projections": (str, "comma between to_q, to_k, to_v, to_out.0 (all of them)"),
    "recognisers": (str, "of the identity reward: glint, curricular (both)"),
    "videos": (int, "videos it is trained on, each of its own prompt and seed (8)"),
    "num_inference_steps": (int, "of all videos (50)"),
    "guidance_scale": (float, "of all videos (6)"),
    "gradient_steps": (int, "last denoising steps that carry gradients (1)"),
    "steps": (int, "optimiser steps (40)"),
    "learning_rate": (float, "falls to 0 over the steps (1e-4)"),
    "held_out": (int, "videos that training is judged by (4)"),
    "evaluate_every": (int, "steps between two judgements (10)"),
    "seed": (int, "of everything that is drawn (0)"),
}
_METAVARS = {int: "N", float: "X", str: "LIST"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, metavar="DIR")
    model.add_argument(
        "--bundle", type=Path, metavar="DIR", help="exported with --max-lora-rank, not quantised"
    )
    parser.add_argument("--image", type=Path, required=True, metavar="PHOTO", help="photo of the person")
    parser.add_argument(
        "--person", required=True, metavar="TEXT", help='what the person looks like, "a man with a red beard"'
    )
    parser.add_argument("--name", default="person", help="of the adapter, in messages (default: person)")
    parser.add_argument(
        "--encoders", type=Path, required=True, metavar="DIR", help="as for evaluate; docs/personalize.md"
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the run; it can go on")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts with {person} in them, one a line (default: the bank that ships)",
    )
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="TOML with a table [personalize] of any setting"
    )
    parser.add_argument("--gate", metavar="LOW-HIGH", help="timesteps at which it acts (0-250)")
    for name, (kind, text) in _FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=_METAVARS[kind], help=text)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for activations, more time"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Train, write adapter, report and previews, print what was gained."""
    with cancel_on_interrupt() as cancel, PhaseProgress() as progress:
        settings = _settings(arguments)
        if not arguments.image.is_file():
            raise InputError(f"{arguments.image} is not a file; --image takes the photo of the person")
        from proteus_deploy.evaluate.encoders import load_encoders
        from proteus_deploy.personalize.prompts import GENERAL, read_prompts
        from proteus_deploy.personalize.run import Person, personalize
        from proteus_deploy.runtime.eager import resolve_device

        resolve_device(arguments.device)  # whatever opens first would say it less plainly
        templates = read_prompts(GENERAL if arguments.prompts is None else arguments.prompts)
        encoders = load_encoders(arguments.encoders, device=arguments.device)
        with _open(arguments) as model:
            outcome = personalize(
                model,
                Person(arguments.image, arguments.person, arguments.name),
                templates,
                encoders,
                arguments.output_dir,
                settings=settings,
                report=progress,
                cancel=cancel,
            )
    document = {"name": arguments.name, **outcome.document, **_surroundings()}
    _write(arguments.output_dir, document)
    if arguments.json:
        print_json(document)
        return 0
    frozen, best = document["frozen"], document["best"]
    rows = [
        ("reward, held-out videos", f"{frozen['reward']:.3f} -> {best['reward']:.3f}"),
        ("motion", f"{frozen['motion']:.3f} -> {best['motion']:.3f}"),
        ("best step", f"{best['step']} of {document['steps']}, stopped: {document['stopped']}"),
        ("seconds", f"{document['seconds']:.0f}"),
        ("report", str(arguments.output_dir / "report.html")),
    ]
    print_table(("adapter", str(outcome.file)), rows)
    return 0


def _settings(arguments: argparse.Namespace) -> PersonalizeSettings:
    from proteus_deploy.personalize.settings import PersonalizeSettings
    from proteus_deploy.training.run import read_run_file
    from proteus_deploy.training.settings import read_settings

    document: Mapping[str, Any] = {}
    if arguments.settings is not None:
        document = read_run_file(arguments.settings, (NAME,))
    settings = read_settings(
        document.get(NAME, {}), PersonalizeSettings(), f"{arguments.settings} [personalize]"
    )
    given = {name: getattr(arguments, name) for name in _FLAGS if getattr(arguments, name) is not None}
    if arguments.gate is not None:
        found = re.fullmatch(r"(\d{1,4})-(\d{1,4})", arguments.gate)
        if found is None:
            raise InputError(f"--gate is {arguments.gate!r}; write LOW-HIGH, as 0-250")
        given |= {"gate_low": int(found[1]), "gate_high": int(found[2])}
    return read_settings(given, settings, "command line")


def _open(arguments: argparse.Namespace) -> PersonalModel:
    from proteus_deploy.personalize.model import PersonalModel
    from proteus_deploy.runtime.backend import resolve_dtype

    options: dict[str, Any] = {
        "device": arguments.device,
        "dtype": resolve_dtype(arguments.dtype),
        "gradient_checkpointing": arguments.gradient_checkpointing,
    }
    if arguments.bundle is not None:
        from proteus_deploy.cli.paths import open_bundle

        return PersonalModel.from_bundle(open_bundle(arguments.bundle), **options)
    return PersonalModel.from_checkpoint(arguments.checkpoint, **options)


def _surroundings() -> dict[str, Any]:
    from proteus_deploy.benchmarks.machine import describe_machine, describe_versions

    return {"machine": describe_machine(), "versions": describe_versions()}


def _write(folder: Path, document: Mapping[str, Any]) -> None:
    from proteus_deploy._files import write_json
    from proteus_deploy.personalize.report import write_report

    write_json(folder / "report.json", document)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    preview = folder / "previews" / f"step-{document['best']['step']:05d}.png"
    write_report(folder / "report.html", document, [json.loads(line) for line in lines], preview)
