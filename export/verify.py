"""Is a bundle still the model? Every graph and the whole video against the recorded PyTorch reference."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import BackendError, ComputationError, InputError
from proteus_deploy.export.export import versions
from proteus_deploy.export.parity import graph_error
from proteus_deploy.export.quantize import coarsest
from proteus_deploy.export.reference import (
    StageReference,
    VideoReference,
    eager_pipeline,
    load_stages,
    load_video,
    record_stages,
    record_video,
)
from proteus_deploy.kernels.joint_attention.choices import check_attention_runs_on
from proteus_deploy.pipeline import Pipeline
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.runtime import BUNDLE_BACKENDS, CHECKPOINT_BACKENDS
from proteus_deploy.runtime.backend import resolve_dtype
from proteus_deploy.runtime.onnxruntime_backend import quantised_formats
from proteus_deploy.testing import TOLERANCES, Tolerance, error_order, measured_error, relative_error

if TYPE_CHECKING:
    from proteus_deploy.runtime.backend import Backend

Status = Literal["ok", "failed", "not run"]
# Called with the backend's name, as in the rows, the recorded reference and the backend's frames, float32
# [1, F, 3, H, W].
OnVideo = Callable[[str, VideoReference, torch.Tensor], None]

VIDEO_CHECKS = ("latents", "frames")
HEADERS = ("backend", "check", "error", "tolerance", "kind", "status", "detail")


@dataclass(frozen=True)
class Row:
    """One comparison. `kind` says what error and tolerance are: relative L2 error, or largest difference."""

    backend: str
    check: str
    error: float | None
    tolerance: float
    status: Status
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class VerificationReport:
    bundle: str
    dtype: str
    rows: tuple[Row, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> tuple[str, ...]:
        """Names of the columns of `table`."""
        return HEADERS

    @property
    def passed(self) -> bool:
        """Something was compared, and nothing is outside its tolerance."""
        return any(row.status == "ok" for row in self.rows) and all(
            row.status != "failed" for row in self.rows
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def to_markdown(self) -> str:
        """A table for a report or a pull request."""
        lines = [f"# Verification of {self.bundle} ({self.dtype})", ""]
        lines += ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
        lines += [f"| {' | '.join(cells)} |" for cells in self.table()]
        lines += ["", f"{'Passed' if self.passed else 'FAILED'}. Tolerances:", ""]
        lines += [f"- {check}: {reason}" for check, reason in self.reasons.items()]
        return "\n".join(lines) + "\n"

    def table(self) -> list[list[str]]:
        return [
            [
                row.backend,
                row.check,
                "" if row.error is None else f"{row.error:.1e}",
                f"{row.tolerance:.0e}",
                row.kind,
                row.status,
                row.detail,
            ]
            for row in self.rows
        ]


def verify_bundle(
    bundle: Bundle,
    backends: Sequence[str],
    *,
    checkpoint: Path | None = None,
    controlnet: Path | None = None,
    attention: str = "torch",
    frozen: bool = False,
    budget: Path | None = None,
    on_video: OnVideo | None = None,
    report: Report = no_report,
) -> VerificationReport:
    """Compare each backend with the reference.

    The reference is the one recorded in the bundle, or, given `checkpoint`, computed from it now. The
    backends eager and compiled run the checkpoint at the bundle's precision, so they need it; attention
    (of both) and frozen (of compiled) are those of `Pipeline.from_checkpoint`, and rows name them.
    A portrait in the bundle is compared with its own record where onnxruntime is among the backends.
    budget: JSON {check: tolerance} that replaces entries of the tolerance table.
    on_video: sees each backend's whole video; not called where none was recorded or the run ended in NaN.
    Raises BundleError, InputError or BackendError; figures outside their bounds are rows, not errors.
    """
    if not backends:
        raise InputError(
            f"no backend to verify; choose from {', '.join((*BUNDLE_BACKENDS, *CHECKPOINT_BACKENDS))}"
        )
    _check_form(bundle, backends, checkpoint, attention, frozen=frozen)
    source = None
    if checkpoint is not None:
        source = Checkpoint.open(checkpoint, controlnet=controlnet)
        _check_source(bundle, source)
    elif controlnet is not None:
        raise InputError(f"controlnet is {controlnet}, which goes with a checkpoint; pass --checkpoint, too")
    tolerances = _tolerances(bundle, budget)
    # Once for all backends; samples and results are small beside the networks.
    stages, video = list(_stages(bundle, source, report)), _video(bundle, source, report)
    rows: list[Row] = []
    for name in backends:
        with _open(bundle, name, source, attention, frozen=frozen) as pipeline:
            form = pipeline.backend.name if name in CHECKPOINT_BACKENDS else name
            seen = None if on_video is None else partial(on_video, form)
            rows += _verify_stages(pipeline.backend, form, stages, tolerances, report)
            rows += _verify_video(pipeline, form, video, tolerances, seen, report)
    portrait = bundle.portrait if "onnxruntime" in backends else None
    if portrait is not None:
        from proteus_deploy.export.portrait_verify import verify_portrait

        rows += verify_portrait(portrait, tolerances=tolerances, hashes=False, report=report)
    reasons = {
        check: entry.reason
        for check, entry in tolerances.items()
        if portrait is not None or not check.startswith("portrait ")
    }
    return VerificationReport(
        bundle=bundle.folder.name,
        dtype=bundle.dtype,
        rows=tuple(rows),
        versions=versions() | _backend_versions(backends),
        machine={"processor": platform.processor() or platform.machine(), "system": platform.system()},
        reasons=reasons,
    )


def _check_source(bundle: Bundle, source: Checkpoint) -> None:
    if source.hash != bundle.manifest["checkpoint"]["hash"]:
        raise InputError(
            f"{source.folder} is not the checkpoint this bundle was exported from (hashes differ)"
        )
    if source.controlnet_hash != bundle.controlnet_hash:
        given = "none was given" if source.controlnet is None else f"{source.controlnet.folder} was given"
        wanted = "no control network" if bundle.controlnet_hash is None else "another control network"
        raise InputError(
            f"the bundle was exported with {wanted}, and {given}; pass its own with --controlnet, or leave "
            "that out for a bundle without one"
        )


def _check_form(
    bundle: Bundle, backends: Sequence[str], checkpoint: Path | None, attention: str, *, frozen: bool
) -> None:
    """What can be refused before any work.

    Raises InputError for a choice that no backend listens to, BackendError for one that can't run here.
    """
    asked = ", ".join(backends)
    run_checkpoints = [name for name in backends if name in CHECKPOINT_BACKENDS]
    if attention != "torch" and not run_checkpoints:
        raise InputError(
            f"attention is {attention!r}, which the backends {' and '.join(CHECKPOINT_BACKENDS)} listen to, "
            f"and {asked} was asked for: add --backend compiled --checkpoint FOLDER, or leave --attention out"
        )
    if frozen and "compiled" not in backends:
        raise InputError(
            f"frozen is for the backend compiled, and {asked} was asked for: add --backend compiled "
            "--checkpoint FOLDER, or leave --frozen out"
        )
    if run_checkpoints and checkpoint is None:
        raise BackendError(
            f"backend {run_checkpoints[0]!r} runs the checkpoint; pass it with --checkpoint FOLDER"
        )
    if attention != "torch":
        check_attention_runs_on(attention, torch.device("cpu"), resolve_dtype(bundle.dtype))


def _open(
    bundle: Bundle, name: str, checkpoint: Checkpoint | None, attention: str, *, frozen: bool
) -> Pipeline:
    if name not in CHECKPOINT_BACKENDS:
        return Pipeline.from_bundle(bundle, backend=name)
    assert checkpoint is not None  # _check_form asked for it
    controlnet = checkpoint.controlnet
    return Pipeline.from_checkpoint(
        checkpoint.folder,
        dtype=bundle.dtype,
        compiled=name == "compiled",
        frozen=frozen and name == "compiled",
        attention=attention,
        controlnet=None if controlnet is None else controlnet.folder,
    )


def _stages(bundle: Bundle, checkpoint: Checkpoint | None, say: Report) -> Iterator[StageReference]:
    if checkpoint is None:
        yield from load_stages(bundle.folder / "reference", bundle.table)
        return
    from proteus_deploy.runtime.eager import EagerBackend

    with torch.inference_mode():
        yield from record_stages(bundle.table, EagerBackend(checkpoint, table=bundle.table), say)


def _video(bundle: Bundle, checkpoint: Checkpoint | None, say: Report) -> VideoReference | None:
    if checkpoint is None:
        return load_video(bundle.folder / "reference")
    with eager_pipeline(checkpoint) as pipeline:
        return record_video(bundle.table, pipeline, say)


def _verify_stages(
    backend: Backend,
    name: str,
    references: Iterable[StageReference],
    tolerances: Mapping[str, Tolerance],
    say: Report,
) -> Iterator[Row]:
    worst: dict[str, tuple[float, str]] = {}
    graphs = [graph.name for graph in backend.table.graphs]
    for stage in references:
        graph = stage.graph.name
        error = graph_error(backend.runner(graph), stage, backend.dtype)
        if graph not in worst or error_order(error.worst) > error_order(worst[graph][0]):
            worst[graph] = error.worst, f"{error.worst_output} at the {stage.sizes} sizes"
        say(f"verify {name}", graphs.index(graph) + 1, len(graphs))
    for graph, (error_value, detail) in worst.items():
        yield _row(name, graph, error_value, tolerances.get(graph, tolerances["graph"]), detail)


def _verify_video(
    pipeline: Pipeline,
    name: str,
    reference: VideoReference | None,
    tolerances: Mapping[str, Tolerance],
    on_video: Callable[[VideoReference, torch.Tensor], None] | None,
    say: Report,
) -> Iterator[Row]:
    if reference is None:
        for check in VIDEO_CHECKS:
            yield _row(name, f"video {check}", None, tolerances[check], "no reference video was recorded")
        return
    errors: list[float] = []

    def compare(index: int, latents: torch.Tensor) -> None:
        errors.append(relative_error(latents, reference.latents[index]))
        say(f"video {name}", index + 1, len(reference.latents))

    frames, note = None, ""
    try:
        video = pipeline.generate(
            reference.request,
            initial_latents=reference.initial_latents,
            on_step=lambda event: compare(event.index, event.latents),
        )
        frames = video.frames
    except ComputationError as failure:
        errors.append(math.nan)  # latents that are not numbers end the run
        note = str(failure)
    except InputError as refusal:
        if not errors:
            raise
        note = str(refusal)  # frames that are not numbers make no Video
    worst = max(errors, key=error_order)
    detail = f"worst of {len(errors)} steps: step {errors.index(worst) + 1}"
    yield _row(name, "video latents", worst, tolerances["latents"], detail)
    if frames is None:
        yield _row(name, "video frames", math.nan, tolerances["frames"], note)
        return
    shape = "x".join(map(str, frames.shape[1:]))
    error = measured_error(frames, reference.frames, tolerances["frames"])
    yield _row(name, "video frames", error, tolerances["frames"], f"{shape} values in 0..1")
    if on_video is not None:
        on_video(reference, frames)


def _row(backend: str, check: str, error: float | None, tolerance: Tolerance, detail: str) -> Row:
    status: Status = "not run"
    if error is not None:
        # NaN compares false with everything, so it fails here.
        status = "ok" if error <= tolerance.bound else "failed"
    return Row(backend, check, error, tolerance.bound, status, tolerance.kind, detail)


def _tolerances(bundle: Bundle, budget: Path | None) -> dict[str, Tolerance]:
    """Bounds for the bundle's precision, with the budget's entries in place of the table's."""
    found = {check: TOLERANCES["bundle", check, bundle.dtype] for check in ("graph", *VIDEO_CHECKS)}
    quantised, missing = _quantised_tolerances(bundle, found)
    found |= quantised
    portrait: tuple[str, ...] = ()
    if bundle.portrait is not None:
        from proteus_deploy.export.portrait_verify import GRAPH_CHECKS, TOLERANCES_OF

        found |= TOLERANCES_OF
        portrait = GRAPH_CHECKS
    if budget is not None:
        graphs = [graph.name for graph in bundle.table.graphs]
        bounds = _read_budget(budget)
        if "graph" in bounds:  # the portrait's graphs have entries of their own, which it replaces, too
            bounds = dict.fromkeys(portrait, bounds["graph"]) | bounds
        for check, bound in bounds.items():
            if check not in found and check not in graphs:
                known = ", ".join(dict.fromkeys((*found, *graphs)))
                raise InputError(f"{budget}: {check!r} is not a check; known are {known}")
            kind = found[check if check in found else "graph"].kind
            found[check] = Tolerance(bound, kind, f"from {budget.name}")
            missing.pop(check, None)
    for graph, coded in missing.items():
        raise InputError(
            f"no tolerance is known for {coded} in {graph}; give one with --budget FILE, for instance "
            f'{{"{graph}": 0.1}}'
        )
    return found


def _quantised_tolerances(
    bundle: Bundle, plain: Mapping[str, Tolerance]
) -> tuple[dict[str, Tolerance], dict[str, str]]:
    """Bounds of quantised graphs and of the video, and {graph: format} of those that the table has none for.

    A graph of 16 bits has the rounding of its dtype on top of that of its codes.
    """
    found: dict[str, Tolerance] = {}
    missing: dict[str, str] = {}
    worst = []

    def widened(check: str, entry: Tolerance) -> Tolerance:
        if bundle.dtype == "fp32":
            return entry
        own = plain[check if check in plain else "graph"]
        return Tolerance(entry.bound + own.bound, entry.kind, f"{entry.reason}; and {own.reason}")

    for graph in bundle.table.graphs:
        kind = coarsest(quantised_formats(bundle.manifest, graph.name))
        if not kind:
            continue
        worst.append(kind)
        entry = TOLERANCES.get(("quantised", graph.name, kind))
        if entry is None:
            missing[graph.name] = kind
        else:
            found[graph.name] = widened(graph.name, entry)
    for check in VIDEO_CHECKS if worst else ():
        found[check] = widened(check, TOLERANCES["quantised", check, coarsest(worst)])
    return found, missing


def _read_budget(file: Path) -> dict[str, float]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"budget {file} is not readable JSON ({error})") from error
    is_bounds = isinstance(document, dict) and all(
        isinstance(bound, int | float) and not isinstance(bound, bool) and 0 < bound < math.inf
        for bound in document.values()
    )
    if not is_bounds:
        raise InputError(
            f'budget {file} must be a JSON object of checks and positive bounds, like {{"denoiser": 1e-4}}'
        )
    return {check: float(bound) for check, bound in document.items()}


def _backend_versions(backends: Sequence[str]) -> dict[str, str]:
    import importlib.metadata

    packages = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}
    found = {}
    for name in backends:
        if name in packages:
            try:
                found[packages[name]] = importlib.metadata.version(packages[name])
            except importlib.metadata.PackageNotFoundError:
                found[packages[name]] = "absent"
    return found
