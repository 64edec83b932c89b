"""`proteus-deploy verify`: is a bundle still the model it came from?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy.cli.control_flags import add_controlnet_argument
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.evaluate.gate import Budget, GateResult
    from proteus_deploy.evaluate.measurements import VideoMeasurement
    from proteus_deploy.export.reference import VideoReference

NAME = "verify"
HELP = "compare each graph and the whole video with the PyTorch reference; exit code 1 past a tolerance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that `export` wrote")
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="onnxruntime (default), openvino, tensorrt, aotinductor; with --checkpoint eager, compiled; "
        "repeatable",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="compute the reference from this checkpoint now"
    )
    parser.add_argument(
        "--attention",
        default="torch",
        metavar="NAME",
        help="of the backends eager and compiled, as for generate (default: torch)",
    )
    parser.add_argument("--frozen", action="store_true", help="of the backend compiled, as for generate")
    add_controlnet_argument(parser, "with --checkpoint: what the bundle was exported with")
    parser.add_argument(
        "--budget",
        type=Path,
        action="append",
        metavar="FILE",
        help="JSON of bounds that replace the built-in tolerances, or TOML of bounds on the video's quality; "
        "one of each may be given",
    )
    parser.add_argument(
        "--encoders", type=Path, metavar="DIR", help="networks that measure quality, for a TOML budget"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report as Markdown")


def run(arguments: argparse.Namespace) -> int:
    from proteus_deploy._files import atomic_file, check_writable, write_json
    from proteus_deploy.cli.output import print_table
    from proteus_deploy.cli.paths import open_bundle
    from proteus_deploy.cli.progress import PhaseProgress
    from proteus_deploy.export.verify import verify_bundle

    for file in (arguments.json, arguments.markdown):
        if file is not None:
            check_writable(file)
    tolerances, quality = _budgets(arguments)
    backends = list(dict.fromkeys(arguments.backend or ["onnxruntime"]))
    bundle = open_bundle(arguments.bundle)
    with PhaseProgress() as progress:
        report = verify_bundle(
            bundle,
            backends,
            checkpoint=arguments.checkpoint,
            controlnet=arguments.controlnet,
            attention=arguments.attention,
            frozen=arguments.frozen,
            budget=tolerances,
            on_video=None if quality is None else quality.measure,
            report=progress,
        )
    forms = list(dict.fromkeys(row.backend for row in report.rows))
    gates = {} if quality is None else quality.check(forms)
    print_table(report.headers, report.table())
    print("passed" if report.passed else "FAILED: figures above are outside their tolerance")
    for name, gate in gates.items():
        print(f"\nquality, {name}:")
        print_table(gate.headers(), gate.table())
        print(gate.verdict)
    if arguments.json is not None:
        found = {name: gate.to_json() for name, gate in gates.items()}
        write_json(arguments.json, {**report.to_json(), **({"quality": found} if found else {})})
    if arguments.markdown is not None:
        with atomic_file(arguments.markdown) as temporary:
            temporary.write_text(report.to_markdown() + _markdown(gates), encoding="utf-8")
    return 0 if report.passed and all(gate.passed for gate in gates.values()) else 1


def _budgets(arguments: argparse.Namespace) -> tuple[Path | None, _Quality | None]:
    """The file of tolerances and the quality budget among --budget. Raises InputError for two of a kind."""
    files: Sequence[Path] = arguments.budget or []
    bounds = [file for file in files if file.suffix.lower() == ".toml"]
    tolerances = [file for file in files if file not in bounds]
    for kind, found in (("tolerances (JSON)", tolerances), ("quality bounds (TOML)", bounds)):
        if len(found) > 1:
            raise InputError(f"--budget names two files of {kind}, {found[0]} and {found[1]}; pass one")
    if arguments.encoders is not None and not bounds:
        raise InputError("--encoders measure quality, which only a TOML --budget asks for; add one")
    quality = _Quality.read(bounds[0], arguments.encoders) if bounds else None
    return (tolerances[0] if tolerances else None), quality


class _Quality:
    """A quality budget over the backends' videos; the baseline is the reference's own video."""

    def __init__(self, budget: Budget, encoders: Encoders) -> None:
        self._budget = budget
        self._encoders = encoders
        self._videos: dict[str, tuple[VideoMeasurement, VideoMeasurement]] = {}

    @classmethod
    def read(cls, file: Path, encoders: Path | None) -> _Quality:
        from proteus_deploy.evaluate.encoders import Encoders, load_encoders
        from proteus_deploy.evaluate.gate import read_budget
        from proteus_deploy.evaluate.metrics import METRICS

        budget = read_budget(file, METRICS)
        networks = Encoders() if encoders is None else load_encoders(encoders)
        for name in budget.metrics:
            row = METRICS[name]
            for need in row.needs:
                if need in ("photo", "person_mask"):
                    raise InputError(
                        f"budget {file}: {name} needs a {need.replace('_', ' ')}, and a bundle's recorded "
                        "request has none; use `proteus-deploy evaluate` on videos that `generate` made"
                    )
            for part in row.parts:
                if getattr(networks, part) is None:
                    why = "pass --encoders DIR" if encoders is None else networks.reason(part)
                    raise InputError(f"budget {file}: {name} is measured by networks: {why}")
        return cls(budget, networks)

    def measure(self, backend: str, reference: VideoReference, frames: Tensor) -> None:
        """Measure a backend's video, and the reference's in the same way. Raises InputError."""
        from proteus_deploy.evaluate.frames import frames_from_video
        from proteus_deploy.evaluate.measure import measure_with_reasons
        from proteus_deploy.evaluate.measurements import VideoMeasurement
        from proteus_deploy.video import Video

        request = reference.request
        ours, theirs = (frames_from_video(Video(video, request.fps)) for video in (frames, reference.frames))
        ours_found, theirs_found = (
            measure_with_reasons(
                video,
                prompt=request.prompt,
                reference=theirs,
                encoders=self._encoders,
                metrics=self._budget.metrics,
            )
            for video in (ours, theirs)
        )
        self._videos[backend] = (
            VideoMeasurement(backend, ours_found.values, seed=request.seed, reasons=ours_found.reasons),
            VideoMeasurement(backend, theirs_found.values, seed=request.seed, reasons=theirs_found.reasons),
        )

    def check(self, backends: Sequence[str]) -> dict[str, GateResult]:
        """A result for each backend: a mean over them would let one hide behind the others."""
        from proteus_deploy.evaluate.gate import check
        from proteus_deploy.evaluate.metrics import METRICS

        results = {}
        for name in backends:
            video, reference = self._videos.get(name, (None, None))
            ours, theirs = [video] if video else [], [reference] if reference else []
            results[name] = check(self._budget, ours, theirs, known=METRICS)
        return results


def _markdown(gates: Mapping[str, GateResult]) -> str:
    """A section for each backend; empty without gates."""
    lines = []
    for name, gate in gates.items():
        lines += ["", f"## Quality, {name}", "", "| " + " | ".join(gate.headers()) + " |"]
        lines.append("|---" * len(gate.headers()) + "|")
        lines += [f"| {' | '.join(map(str, row))} |" for row in gate.table()]
        lines += ["", "Passed." if gate.passed else "FAILED."]
    return "\n".join(lines) + "\n" if lines else ""
