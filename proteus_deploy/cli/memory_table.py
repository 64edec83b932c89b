"""`proteus-deploy inspect BUNDLE --memory`: the memory plan as tables."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from proteus_deploy.cli.output import print_json, print_table
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.memory_plan import MemoryPlan

_MIB = 1 << 20
_FLAGS = ("device_memory", "height", "width", "num_frames", "num_inference_steps", "backend")


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --memory and the flags that belong to it."""
    group = parser.add_argument_group("memory plan (--memory)")
    group.add_argument(
        "--memory", action="store_true", help="predict the peak memory of a request; run nothing"
    )
    group.add_argument("--device-memory", type=float, metavar="GIB", help="say which policies fit into this")
    group.add_argument("--height", type=int, help="of the video, in pixels (default: the checkpoint's)")
    group.add_argument("--width", type=int, help="of the video, in pixels (default: the checkpoint's)")
    group.add_argument("--num-frames", type=int, help="of the video (default: the checkpoint's)")
    group.add_argument("--num-inference-steps", type=int, metavar="N", help="(default: 50)")
    group.add_argument("--backend", help="onnxruntime (default), eager or tensorrt")


def refuse_stray_flags(arguments: argparse.Namespace) -> None:
    """Raises InputError for a flag of the memory plan without --memory."""
    given = [name for name in _FLAGS if getattr(arguments, name) is not None]
    if given and not arguments.memory:
        raise InputError(f"--{given[0].replace('_', '-')} belongs to --memory; add --memory, or leave it out")


def run_memory(bundle: Bundle, arguments: argparse.Namespace) -> int:
    """Print the plan and return 0. Raises InputError for a size or backend that can't be planned."""
    from proteus_deploy.memory_plan import RequestSize, plan_memory

    device = arguments.device_memory
    if device is not None and not 0 < device < float("inf"):
        raise InputError(f"--device-memory is {device}; give GiB above 0")
    steps = 50 if arguments.num_inference_steps is None else arguments.num_inference_steps
    size = RequestSize(arguments.height, arguments.width, arguments.num_frames, steps)
    bytes_there = None if device is None else int(device * 2**30)
    plan = plan_memory(bundle, size, backend=arguments.backend or "onnxruntime", device_bytes=bytes_there)
    if arguments.json:
        print_json(plan.to_json())
    else:
        _print(plan)
    return 0


def _print(plan: MemoryPlan) -> None:
    rows = []
    tiled = [(f"{plan.tiled_decoder.stage}, tiled", plan.tiled_decoder)]
    for name, stage in [*((stage.stage, stage) for stage in plan.stages), *tiled]:
        types = ", ".join(f"{dtype} {_mib(count)}" for dtype, count in stage.weights.items() if count >= _MIB)
        rows.append(
            (name, _mib(stage.weight_bytes), _mib(stage.activations), _mib(stage.peak), types, stage.at)
        )
    print_table(("stage alone, MiB", "weights", "activations", "peak", "weights by type", "widest at"), rows)
    print()
    policies = [
        (
            policy.policy,
            _mib(policy.peak),
            policy.phase,
            _verdict(policy.fits, policy.peak, plan.device_bytes),
        )
        for policy in plan.policies
    ]
    print_table(("policy, MiB", "peak", "reached", "fits"), policies)
    print()
    print(f"predicted for {plan.backend}, not measured: {plan.assumptions}")


def _verdict(fits: bool | None, peak: int, device: int | None) -> str:
    if fits is None or device is None:
        return ""
    apart = abs(device - peak) / _MIB
    return f"yes, {apart:,.0f} MiB left" if fits else f"no, {apart:,.0f} MiB too much"


def _mib(count: int) -> str:
    return f"{count / _MIB:,.1f}"
