"""`proteus-deploy calibrate`: how large do activations get, over whole denoising loops?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.request_cases import add_case_arguments, cases_of
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.export.activation_statistics import ActivationStatistics

NAME = "calibrate"
HELP = "record how large activations get, for recipes of lower precision"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        metavar="CHECKPOINT",
        help="default: the tiny model that ships, on drawn people",
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the statistics")
    add_case_arguments(parser)
    parser.add_argument(
        "--timestep-groups",
        type=int,
        default=5,
        metavar="G",
        help="equal parts of the schedule with statistics of their own (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="(default: fp32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace statistics that lie in DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Run the cases, write their statistics, print the layers with the widest inputs. Raises InputError."""
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.cli.output import print_json, print_table
    from proteus_deploy.cli.progress import PhaseProgress
    from proteus_deploy.cli.video_progress import cancel_on_interrupt
    from proteus_deploy.export.calibrate import CalibrationCase, calibrate
    from proteus_deploy.tiny.trained import MODEL

    if arguments.checkpoint is not None and arguments.cases is None:
        raise InputError(f"{arguments.checkpoint} needs --cases: only the model that ships brings its own")
    with cancel_on_interrupt() as cancel, PhaseProgress() as progress:
        checkpoint = Checkpoint.open(MODEL if arguments.checkpoint is None else arguments.checkpoint)
        cases = [CalibrationCase(case.name, case.request) for case in cases_of(arguments)]
        statistics = calibrate(
            checkpoint,
            cases,
            arguments.output_dir,
            dtype=arguments.dtype,
            device=arguments.device,
            groups=arguments.timestep_groups,
            overwrite=arguments.overwrite,
            cancel=cancel,
            report=progress,
        )
    if arguments.json:
        print_json(_document(statistics, arguments.output_dir))
        return 0
    print_table(_HEADERS, [_row(statistics, name) for name in _widest(statistics)])
    print(
        f"\n{len(statistics.layers)} inputs, {len(cases)} cases -> {arguments.output_dir}; "
        f"above: those whose largest value stands furthest from their 99.9th percentile"
    )
    return 0


_HEADERS = ("input", "largest", "99.9 %", "ratio", "groups differ by")
_SHOWN, _SHARE = 12, 0.999


def _ratio(statistics: ActivationStatistics, name: str) -> float:
    """The largest |x| by the 99.9th percentile; 1 for an input of zeros."""
    percentile = statistics.percentile(name, _SHARE)
    return float(statistics.amax(name).max()) / percentile if percentile else 1.0


def _widest(statistics: ActivationStatistics) -> list[str]:
    return sorted(statistics.layers, key=lambda name: (-_ratio(statistics, name), name))[:_SHOWN]


def _spread(statistics: ActivationStatistics, name: str) -> float | None:
    """Largest amax of a group that saw rows by the smallest such; None for layers with one group."""
    layer = statistics.layers[name]
    seen = layer.amax[layer.rows > 0].amax(1)
    return float(seen.max() / seen.min()) if len(seen) > 1 and float(seen.min()) > 0 else None


def _row(statistics: ActivationStatistics, name: str) -> list[object]:
    spread = _spread(statistics, name)
    return [
        name,
        f"{float(statistics.amax(name).max()):.4g}",
        f"{statistics.percentile(name, _SHARE):.4g}",
        f"{_ratio(statistics, name):.2f}",
        "" if spread is None else f"{spread:.2f}x",
    ]


def _document(statistics: ActivationStatistics, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "hash": statistics.hash,
        "groups": list(statistics.groups),
        "provenance": dict(statistics.provenance),
        "layers": {
            name: {
                "channels": layer.channels,
                "rows": layer.rows.tolist(),
                "amax": layer.amax.amax(1).tolist(),
                "percentile_99_9": statistics.percentile(name, _SHARE),
            }
            for name, layer in sorted(statistics.layers.items())
        },
    }
