"""What can be measured against what: a form of the loop, on a backend, in a precision or by a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from proteus_deploy.benchmarks.requirements import require_packages
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.recipe import Recipe
    from proteus_deploy.export.torch_quantizer import TorchQuantizer
    from proteus_deploy.runtime.backend import Backend
    from proteus_deploy.runtime.eager import EagerBackend

__all__ = [
    "BASELINES",
    "Candidate",
    "Opener",
    "default_candidates",
    "parse_candidate",
    "quantised_candidates",
    "with_baselines",
]

Form = Literal["published", "exact", "plan"]
FORMS: tuple[Form, ...] = ("published", "exact", "plan")
PRECISIONS = ("fp32", "bf16", "fp16")
_TORCH = ("eager", "compiled", "compiled-cpu", "eager-triton", "compiled-triton")
BACKENDS = (*_TORCH, "onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True)
class Candidate:
    """form: "published" repeats identity work in every step, "exact" does it once, "plan" leaves out more.
    recipe: a ready recipe or a JSON file, whose layers have fewer bits than `precision`; "" for none.

    Raises InputError for a word that isn't known, or the published form on another backend than eager or
    with a recipe: it is what the authors' code does, and nothing exports it.
    """

    form: Form
    backend: str
    precision: str
    recipe: str = ""

    def __post_init__(self) -> None:
        for name, known in (("form", FORMS), ("backend", BACKENDS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(known)}")
        if self.form == "published" and (self.backend != "eager" or self.recipe):
            raise InputError(
                f"{self.name} is not a candidate; the published form runs in eager PyTorch, without a recipe"
            )
        if self.recipe:
            self.read_recipe()

    @property
    def name(self) -> str:
        """form:backend:precision[+recipe]"""
        return f"{self.form}:{self.backend}:{self.precision}" + (f"+{self.recipe}" if self.recipe else "")

    def read_recipe(self) -> Recipe:
        """Raises InputError where `recipe` is neither a ready one nor a readable file."""
        from proteus_deploy.export.recipe import Recipe

        return Recipe.load(self.recipe)


BASELINES = (Candidate("published", "eager", "fp32"), Candidate("published", "eager", "bf16"))


def parse_candidate(text: str) -> Candidate:
    """The candidate that "form:backend:precision[+recipe]" names. Raises InputError."""
    parts = text.split(":", maxsplit=2)
    if len(parts) != 3:
        raise InputError(
            f"candidate {text!r} is not form:backend:precision[+recipe], such as exact:compiled:bf16 or "
            "exact:openvino:fp32+int8"
        )
    precision, _, recipe = parts[2].partition("+")
    if "+" in parts[2] and not recipe:
        raise InputError(f"candidate {text!r} names no recipe after the +; leave it out, or name one")
    return Candidate(parts[0], parts[1], precision, recipe)  # type: ignore[arg-type]


def default_candidates(device: str, *, planned: bool) -> list[Candidate]:
    """Baselines and what is usual on the device. planned: a plan was given, so it is measured as well."""
    chosen = [*BASELINES, Candidate("exact", "eager", "bf16"), Candidate("exact", "compiled", "bf16")]
    if device == "cpu":
        chosen += [
            Candidate("exact", "compiled-cpu", "bf16"),
            Candidate("exact", "eager", "fp32"),
            Candidate("exact", "onnxruntime", "fp32"),
            Candidate("exact", "openvino", "bf16"),
        ]
    else:
        chosen += [
            Candidate("exact", "eager-triton", "bf16"),
            Candidate("exact", "compiled-triton", "bf16"),
            Candidate("exact", "tensorrt", "bf16"),
        ]
    if planned:
        chosen.append(Candidate("plan", "compiled-cpu" if device == "cpu" else "compiled", "bf16"))
    return chosen


def quantised_candidates(recipe: str, device: str) -> list[Candidate]:
    """A recipe on every backend that might run it on the device. Raises InputError for an unknown one."""
    backends = ("compiled", "onnxruntime", "openvino") if device == "cpu" else ("compiled", "tensorrt")
    return [Candidate("exact", name, "fp32" if device == "cpu" else "bf16", recipe) for name in backends]


class Opener:
    """Opens the backend of a candidate; exports a checkpoint below `work` when one needs a bundle."""

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        bundle: Bundle | None,
        work: Path,
        *,
        device: str = "cpu",
        videos: int = 1,
        calibration: Path | None = None,
        report: Report = no_report,
    ) -> None:
        """videos: that a loop makes at once. calibration: folder of what `calibrate` recorded, for recipes
        that need it; made-up weights have made-up statistics.
        """
        self._calibration = calibration
        self._checkpoint, self._bundle, self._work = checkpoint, bundle, work
        self._device, self._videos, self._report = device, videos, report
        self._first: dict[str, EagerBackend] = {}  # of each precision: the others share its weights

    def __call__(self, candidate: Candidate) -> Backend:
        """Raises BackendError naming what is missing and how to get it."""
        require_packages(candidate.backend, self._device)
        if candidate.backend in _TORCH:
            return self._torch(candidate)
        if candidate.backend == "tensorrt" and self._bundle is None:
            raise BackendError("tensorrt runs engines; pass a bundle that `proteus-deploy build` was run on")
        from proteus_deploy.runtime import open_bundle_backend

        bundle = self._bundle_of(candidate)
        return open_bundle_backend(bundle, candidate.backend, device=self._device)

    def _torch(self, candidate: Candidate) -> Backend:
        from proteus_deploy.runtime.backend import resolve_dtype
        from proteus_deploy.runtime.eager import EagerBackend

        if self._checkpoint is None:
            raise BackendError(
                f"{candidate.backend} runs a checkpoint, and only a bundle was given; add --checkpoint DIR"
            )
        backend = EagerBackend(
            self._checkpoint,
            dtype=resolve_dtype(candidate.precision),
            device=self._device,
            compiled=candidate.backend.startswith("compiled"),
            frozen=candidate.backend == "compiled-cpu" and not candidate.recipe,
            kernels="triton" if candidate.backend.endswith("-triton") else "reference",
            attention="cpu-bf16" if candidate.backend == "compiled-cpu" else "torch",
            folded=candidate.form != "published",
            weights_of=None if candidate.recipe else self._first.get(candidate.precision),
            quantize=self._quantizer(candidate) if candidate.recipe else None,
        )
        if not candidate.recipe:
            self._first.setdefault(candidate.precision, backend)
        return backend

    def _quantizer(self, candidate: Candidate) -> TorchQuantizer:
        from proteus_deploy.export.quantised_export import prepare_quantisation
        from proteus_deploy.export.torch_quantizer import TorchQuantizer
        from proteus_deploy.stage_table import build_stage_table

        assert self._checkpoint is not None
        table, recipe = build_stage_table(self._checkpoint), candidate.read_recipe()
        found = prepare_quantisation(recipe, self._checkpoint, table, self._statistics())
        return TorchQuantizer(recipe, found.statistics)

    def _statistics(self) -> ActivationStatistics | None:
        from proteus_deploy.export.activation_statistics import ActivationStatistics

        return None if self._calibration is None else ActivationStatistics.load(self._calibration)

    def _bundle_of(self, candidate: Candidate) -> Bundle:
        from proteus_deploy.bundle import Bundle
        from proteus_deploy.export.export import export_bundle
        from proteus_deploy.export.quantised_export import recipe_of
        from proteus_deploy.stage_table import ExportRanges

        recipe = candidate.read_recipe() if candidate.recipe else None
        if self._bundle is not None:
            own = recipe_of(self._bundle.manifest)
            wanted, found = (None if one is None else one.hash for one in (recipe, own))
            if (self._bundle.dtype, found) != (candidate.precision, wanted):
                exported = self._bundle.dtype + ("" if own is None else f"+{own.name}")
                raise BackendError(
                    f"the bundle was exported in {exported}, not "
                    f"{candidate.name.split(':', maxsplit=2)[2]}; export another one"
                )
            return self._bundle
        assert self._checkpoint is not None
        statistics = self._statistics() if recipe is not None and recipe.needs_statistics else None
        parts = [self._checkpoint.hash[:12], candidate.precision]
        parts += [] if recipe is None else [recipe.name, recipe.hash[:12]]
        parts += [] if statistics is None else [statistics.hash[:12]]
        parts += [f"{self._videos}-videos"] if self._videos > 1 else []
        folder = self._work / "-".join(("bundle", *parts))
        if folder.is_dir():
            return Bundle.open(folder, hashes=False)
        return export_bundle(
            self._checkpoint,
            folder,
            dtype=candidate.precision,
            recipe=recipe,
            statistics=statistics,
            ranges=ExportRanges(max_videos=self._videos),
            reference="none",
            report=self._report,
        )


def with_baselines(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The same in their order, behind the baselines, none twice."""
    return list(dict.fromkeys((*BASELINES, *candidates)))
