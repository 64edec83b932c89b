"""Calibration: real requests run their whole denoising loops; what enters each layer is kept as statistics.

Every case is written as soon as it is done, under a key of the checkpoint, the case and the settings. A run
that was killed goes on after the last finished case, and its result has the same bytes as that of one that
wasn't: the statistics of each case are computed by themselves and merged in the order of the cases.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import Cancelled, InputError
from proteus_deploy.export.activation_statistics import FORMAT, ActivationStatistics
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    import torch
    from torch import nn

    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.request import GenerateRequest

__all__ = ["CALIBRATED_GRAPHS", "CalibrationCase", "calibrate", "case_key", "cases_folder", "equal_groups"]

_log = logging.getLogger(__name__)

CALIBRATED_GRAPHS = ("denoiser", "text_encoder", "image_tower")
DEFAULT_GROUPS = 5
_TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class CalibrationCase:
    """A request without a plan; the name is what messages and the statistics' provenance say."""

    name: str
    request: GenerateRequest


def calibrate(
    checkpoint: Checkpoint,
    cases: Sequence[CalibrationCase],
    folder: Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    groups: int = DEFAULT_GROUPS,
    overwrite: bool = False,
    cancel: Event | None = None,
    report: Report = no_report,
) -> ActivationStatistics:
    """Run the cases on the eager reference, write their statistics to `folder`, and return them.

    Finished cases lie in `cases_folder(folder)` until all are done. groups: how many equal ones the 1000
    timesteps are cut into. overwrite: replace statistics of other cases or settings that lie there.
    Raises InputError for cases that can't be calibrated with and for an occupied folder, ComputationError
    for NaN or infinity in a layer's input, Cancelled when `cancel` was set.
    """
    from proteus_deploy.pipeline import Pipeline

    _check_cases(cases)
    lowest = equal_groups(groups)
    report("hashing the checkpoint", 0, 1)
    settings = _settings(dtype, device, lowest)
    keys = [case_key(checkpoint.hash, settings, case) for case in cases]
    report("hashing the checkpoint", 1, 1)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        done = _earlier(folder, keys, settings)
        if done is not None:
            shutil.rmtree(cases_folder(folder), ignore_errors=True)
            return done
        if not overwrite:
            raise InputError(
                f"{folder} already exists and holds no statistics of these cases and settings; choose "
                "another folder, or pass overwrite (--overwrite)"
            )
    places = [cases_folder(folder) / key for key in keys]
    missing = [index for index, place in enumerate(places) if not _is_finished(place)]
    if missing:
        with Pipeline.from_checkpoint(checkpoint.folder, dtype=dtype, device=device) as pipeline:
            for index in missing:
                layers = _run_case(pipeline, cases[index], lowest, cancel, report)
                about = {"name": cases[index].name, "key": keys[index]}
                provenance = {"checkpoint": checkpoint.hash, "settings": settings, "cases": [about]}
                part = ActivationStatistics(layers, lowest, provenance)
                part.save(places[index], overwrite=True)
    merged = ActivationStatistics.load(places[0])
    for place in places[1:]:  # two at a time: memory doesn't grow with the cases
        merged = ActivationStatistics.merge([merged, ActivationStatistics.load(place)])
    merged.save(folder, overwrite=overwrite)
    shutil.rmtree(cases_folder(folder), ignore_errors=True)
    return merged


def cases_folder(folder: Path) -> Path:
    """Beside `folder`: where finished cases lie until the last one is done."""
    return folder.with_name(f"{folder.name}.cases")


def equal_groups(count: int) -> tuple[int, ...]:
    """The lowest timestep of each of `count` equal groups. Raises InputError outside 1 to 1000."""
    if not 1 <= count <= _TIMESTEPS:
        raise InputError(f"{count} timestep groups were asked for; choose 1 to {_TIMESTEPS}")
    return tuple(-(-number * _TIMESTEPS // count) for number in range(count))


def _check_cases(cases: Sequence[CalibrationCase]) -> None:
    if not cases:
        raise InputError("there are no cases; calibration needs at least one request")
    for case in cases:
        if case.request.plan is not None:
            raise InputError(
                f"case {case.name} has a plan; calibration sees every step only without one: take it out"
            )
        if case.request.photo is None and case.request.condition_image is None:
            raise InputError(f"case {case.name} has neither photo nor identity and condition_image; pass one")
        if case.request.seed is None:
            raise InputError(
                f"case {case.name} has no seed; calibration is repeatable: choose a whole number"
            )


def _settings(
    dtype: str | torch.dtype, device: str | torch.device, groups: tuple[int, ...]
) -> dict[str, Any]:
    import torch

    from proteus_deploy.runtime.backend import resolve_dtype, short_dtype

    return {
        "dtype": short_dtype(resolve_dtype(dtype)),
        "device": torch.device(device).type,
        "groups": list(groups),
        "graphs": list(CALIBRATED_GRAPHS),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),  # the order of sums, hence their last bits, depends on it
        "format": FORMAT,
    }


def case_key(checkpoint: str, settings: dict[str, Any], case: CalibrationCase) -> str:
    """sha256 (hex) of everything that the statistics of a case depend on."""
    request = case.request.to_json() | {"photo": _photo_key(case.request)}
    document = {"name": case.name, "checkpoint": checkpoint, "settings": settings, "request": request}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _photo_key(request: GenerateRequest) -> list[Any]:
    """Shape and hash of the photo's pixels, or of the features and the image that stand in its place."""
    from proteus_deploy.identity.photo import open_photo

    picture = request.photo if request.photo is not None else request.condition_image
    assert picture is not None, "cases are checked first"
    pixels = open_photo(picture)
    digest = hashlib.sha256(pixels.tobytes())
    if request.photo is None and request.identity is not None:
        for tensor in (request.identity.id_cond, *request.identity.id_vit_hidden):
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return [list(pixels.shape), digest.hexdigest()]


def _earlier(folder: Path, keys: Sequence[str], settings: dict[str, Any]) -> ActivationStatistics | None:
    """What lies in `folder`, if it is the result of these very cases."""
    try:
        found = ActivationStatistics.load(folder)
    except InputError as error:
        _log.warning("%s", error)
        return None
    same = [case.get("key") for case in found.provenance.get("cases", [])] == list(keys)
    return found if same and found.provenance.get("settings") == settings else None


def _is_finished(folder: Path) -> bool:
    """A damaged file is named in a warning, and its case runs again."""
    if not folder.exists():
        return False
    try:
        ActivationStatistics.load(folder)
    except InputError as error:
        _log.warning("%s; its case runs again", error)
        return False
    return True


def _run_case(
    pipeline: Pipeline,
    case: CalibrationCase,
    groups: tuple[int, ...],
    cancel: Event | None,
    report: Report,
) -> dict[str, Any]:
    """Statistics of each layer over the whole loop of one request; the video isn't decoded."""
    from proteus_deploy.export.activation_recorder import ActivationRecorder

    recorder, stop = ActivationRecorder(groups), Event()
    here = [graph for graph in CALIBRATED_GRAPHS if graph in pipeline.stages]
    networks = {graph: _module(pipeline, graph) for graph in here}
    finished = False

    def on_step(event: Any) -> None:
        nonlocal finished
        report(f"case {case.name}", event.index + 1, event.total)
        finished = event.index + 1 == event.total
        if finished or (cancel is not None and cancel.is_set()):
            stop.set()  # after the last step too: what follows is the VAE, which isn't looked at

    report(f"case {case.name}", 0, case.request.num_inference_steps)
    with recorder.watch(networks):
        try:
            pipeline.generate(case.request, on_step=on_step, cancel=stop)
        except Cancelled:
            if not finished:
                raise
    return recorder.layers()


def _module(pipeline: Pipeline, graph: str) -> nn.Module:
    from proteus_deploy.runtime.eager import EagerGraph

    runner = pipeline.backend.runner(graph)
    assert isinstance(runner, EagerGraph), "calibration opens the eager backend itself"
    return runner.module
