"""Recipes on trial: a checkpoint's bundles of each, their bytes, their error, their speed and their videos.

Each pair of a recipe and a backend is a row. What can't run, or fails, keeps its row with the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from proteus_deploy._files import atomic_file
from proteus_deploy.benchmarks.bench_rows import words
from proteus_deploy.benchmarks.timing import Spread, interleave
from proteus_deploy.benchmarks.video_measures import mean_values, measure_case
from proteus_deploy.errors import BackendError, BundleError, InputError
from proteus_deploy.evaluate.frames import frames_from_video
from proteus_deploy.export.parity import graph_error
from proteus_deploy.export.recipe import Recipe
from proteus_deploy.export.reference import SEED, StageReference, reference_sizes
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.stages import sample_inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from proteus_deploy.benchmarks.plan_trials import TuningCase
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.runtime.backend import Backend

__all__ = ["BACKENDS", "PLAIN", "RecipeTrials"]

PLAIN = "fp32"  # the row's recipe where nothing is quantised
MEASURED_GRAPHS = ("denoiser", "text_encoder", "image_tower")
# eager-simulated: codes and back, then products in float32; only for recipes that eager has no products for.
BACKENDS = ("onnxruntime", "openvino", "eager", "eager-simulated")
_DENOISER = "denoiser"
# Tables that the exporter computed, which no checkpoint holds.
_COMPUTED = ("time_table.table", ".rope_cosines", ".rope_sines")

Row = dict[str, Any]


class RecipeTrials:
    """Rows are filled in by `errors`, `latencies` and `videos`, each of which may be left out.

    bundles and videos are kept in `work`, under hashes of checkpoint, recipe, statistics and request, and
    are not made again. rows: in the order of recipes, then backends; the first recipe is the plain one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: Path,
        recipes: Sequence[str],
        statistics: ActivationStatistics | None,
        *,
        backends: Sequence[str] = BACKENDS,
        report: Report = no_report,
    ) -> None:
        """recipes: names or files, as `Recipe.load` takes them. Raises InputError for unknown ones."""
        self._recipes: dict[str, Recipe | None] = {PLAIN: None}
        for name in recipes:
            recipe = Recipe.load(name)
            self._recipes[recipe.name] = recipe
        if unknown := sorted(set(backends) - set(BACKENDS)):
            raise InputError(f"backend {unknown[0]!r} is unknown; choose from {', '.join(BACKENDS)}")
        self._checkpoint, self._work, self._statistics = checkpoint, work, statistics
        self._report = report
        self._open: dict[tuple[str, str], Backend] = {}
        self.rows: list[Row] = [
            {"recipe": recipe, "backend": backend, "status": "ok", "reason": ""}
            for recipe in self._recipes
            for backend in BACKENDS
            if backend in backends and self._has_row(recipe, backend)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for backend in self._open.values():
            backend.close()
        self._open.clear()

    def bundle(self, recipe: str) -> Bundle:
        """In float32, without a recorded reference; made, or found in `work`. Raises as `export_bundle`."""
        from proteus_deploy.bundle import Bundle
        from proteus_deploy.export.export import export_bundle

        folder = self._work / "bundles" / f"{recipe}-{self._key(recipe)}"
        if folder.is_dir():
            return Bundle.open(folder, hashes=False)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return export_bundle(
            self._checkpoint,
            folder,
            reference="none",
            recipe=self._recipes[recipe],
            statistics=self._statistics,
            graphs_from=None if recipe == PLAIN else self.bundle(PLAIN),
            report=lambda phase, done, total: self._report(f"{recipe}: {phase}", done, total),
        )

    def sizes(self) -> dict[str, Any]:
        """{recipe: {graphs: {graph: {file_bytes, weight_bytes}}, weight_bytes, share_of_fp32}}.

        A recipe that can't be exported has its reason in place of that, and its rows fail.
        """
        found: dict[str, Any] = {}
        for recipe in self._recipes:
            try:
                graphs = _bytes(self.bundle(recipe))
            except Exception as error:  # noqa: BLE001 - exporters raise anything; the rows say it
                found[recipe] = {"reason": words(error)}
                for row in self.rows:
                    if row["recipe"] == recipe:
                        _fail(row, error)
                continue
            total = sum(graph["weight_bytes"] for graph in graphs.values())
            found[recipe] = {"graphs": graphs, "weight_bytes": total}
        plain = found[PLAIN].get("weight_bytes")
        for entry in found.values():
            if plain and "weight_bytes" in entry:
                entry["share_of_fp32"] = entry["weight_bytes"] / plain
        return found

    def errors(self) -> None:
        """Relative L2 error of a step's velocity against eager float32, on inputs of the tuned sizes."""
        stage = self._reference()
        for number, row in enumerate(self.rows):
            self._report("denoisers", number, len(self.rows))
            self._try(row, "relative_error", partial(self._error, row, stage))
        self._report("denoisers", len(self.rows), len(self.rows))

    def latencies(self, rounds: int) -> None:
        """Of one step, all rows interleaved; speed-ups are medians of the ratios within each round."""
        inputs = dict(self._reference().inputs)
        steps = {}
        for row in self.rows:
            if row["status"] == "ok":
                steps[f"{row['recipe']} {row['backend']}"] = self._step(row, inputs)
        seconds = interleave(steps, rounds, after=lambda name, _: self._report(f"timed {name}", 1, 1))
        for row in self.rows:
            own = seconds.get(f"{row['recipe']} {row['backend']}")
            if own is None or row["status"] != "ok":
                continue
            row["latency_ms"] = Spread.of(own).milliseconds()
            for backend in ("onnxruntime", "eager"):
                base = seconds.get(f"{PLAIN} {backend}")
                if base is not None and self._row(PLAIN, backend)["status"] == "ok":
                    ratios = [theirs / mine for mine, theirs in zip(own, base, strict=True)]
                    row[f"speedup_vs_{backend}_fp32"] = median(ratios)

    def videos(
        self,
        cases: Sequence[TuningCase],
        encoders: Encoders,
        metrics: Sequence[str],
        *,
        backends: Sequence[str] = BACKENDS,
        after_row: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Measure each row's videos against eager float32's, and return the means of those.

        metrics: of `metrics.METRICS`. backends: whose rows get videos. after_row: called when a row is done.
        """
        exact = [self._video(PLAIN, "eager", case) for case in cases]
        own = mean_values(
            [measure_case(c, video, video, encoders, metrics) for c, video in zip(cases, exact, strict=True)]
        )

        def measure(row: Row) -> dict[str, Any]:
            measured = []
            for number, (case, want) in enumerate(zip(cases, exact, strict=True)):
                self._report(f"videos of {row['recipe']} on {row['backend']}", number, len(cases))
                frames = self._video(row["recipe"], row["backend"], case)
                measured.append(measure_case(case, frames, want, encoders, metrics))
            return {"means": mean_values(measured), "videos": {one.case: one.values for one in measured}}

        for row in self.rows:
            if row["backend"] not in backends:
                continue
            self._try(row, "video", partial(measure, row))
            if backend := self._open.pop((row["recipe"], row["backend"]), None):
                backend.close()
            after_row()
        return own

    def _has_row(self, recipe: str, backend: str) -> bool:
        """Simulation is for recipes whose products PyTorch has not, here on a CPU."""
        if backend != "eager-simulated":
            return True
        from proteus_deploy.export.torch_quantizer import TorchQuantizer

        found = self._recipes[recipe]
        if found is None:
            return False
        try:
            TorchQuantizer(found, self._statistics).check_runs_on(torch.device("cpu"))
        except BackendError:
            return True
        return False

    def _row(self, recipe: str, backend: str) -> Row:
        return next(row for row in self.rows if (row["recipe"], row["backend"]) == (recipe, backend))

    def _try(self, row: Row, field: str, measure: Callable[[], Any]) -> None:
        """Put what is measured into the row, or the reason why not."""
        if row["status"] != "ok":
            return
        try:
            row[field] = measure()
        except (BackendError, BundleError) as error:
            row.update(status="not measured", reason=str(error))
        except Exception as error:  # noqa: BLE001 - runtimes raise anything; the row says it
            _fail(row, error)

    def _backend(self, recipe: str, backend: str) -> Backend:
        """Opened once. Raises BackendError where the recipe can't run on it."""
        key = recipe, backend
        if key not in self._open:
            self._open[key] = self._opened(recipe, backend)
        return self._open[key]

    def _opened(self, recipe: str, backend: str) -> Backend:
        from proteus_deploy.runtime.eager import EagerBackend
        from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeBackend
        from proteus_deploy.runtime.openvino_backend import OpenVinoBackend

        bundle, threads = self.bundle(recipe), torch.get_num_threads()
        if backend == "onnxruntime":
            return OnnxRuntimeBackend(bundle, threads=threads)
        if backend == "openvino":
            return OpenVinoBackend(bundle, threads=threads)
        found, quantizer = self._recipes[recipe], None
        if found is not None:
            from proteus_deploy.export.torch_quantizer import TorchQuantizer

            quantizer = TorchQuantizer(found, self._statistics, simulate=backend == "eager-simulated")
        return EagerBackend(self._checkpoint, table=bundle.table, quantize=quantizer)

    def _reference(self) -> StageReference:
        """Inputs of one step and what eager float32 makes of them."""
        plain = self._backend(PLAIN, "eager")
        graph = plain.table.graph(_DENOISER)
        inputs = sample_inputs(graph, reference_sizes(plain.table, "opt"), seed=SEED)
        return StageReference(graph, "opt", inputs, plain.runner(_DENOISER)(**inputs))

    def _error(self, row: Row, stage: StageReference) -> float:
        backend = self._backend(row["recipe"], row["backend"])
        error = graph_error(backend.runner(_DENOISER), stage, backend.dtype).worst
        if not math.isfinite(error):
            raise ValueError("its velocity holds NaN or infinity")
        return error

    def _step(self, row: Row, inputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """One step, warmed up; one that fails is out of the others and keeps nobody from being timed."""

        def step() -> None:
            if row["status"] == "ok":
                try:
                    self._backend(row["recipe"], row["backend"]).runner(_DENOISER)(**inputs)
                except Exception as error:  # noqa: BLE001 - the row says it
                    _fail(row, error)

        step()
        return step

    def _video(self, recipe: str, backend: str, case: TuningCase) -> NDArray[np.uint8]:
        """Frames uint8 [F, H, W, 3], made or read."""
        from proteus_deploy.pipeline import Pipeline

        request = json.dumps(case.request.to_json(), sort_keys=True)
        name = f"{case.name}-{hashlib.sha256(request.encode()).hexdigest()[:12]}.npy"
        file = self._work / "videos" / f"{recipe}-{self._key(recipe)}-{backend}" / name
        if not file.is_file():
            of = self._checkpoint
            parts = of.transformer, of.vae, of.scheduler, of.tokenizer, of.face_encoder
            video = Pipeline(self._backend(recipe, backend), *parts).generate(case.request)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, frames_from_video(video))
        frames: NDArray[np.uint8] = np.load(file)
        return frames

    def _key(self, recipe: str) -> str:
        """12 hex digits of all that decides a recipe's numbers."""
        found = self._recipes[recipe]
        parts = [self._checkpoint.hash, PLAIN if found is None else found.hash]
        if found is not None and found.needs_statistics and self._statistics is not None:
            parts.append(self._statistics.hash)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def _fail(row: Row, error: BaseException) -> None:
    row.update(status="failed", reason=words(error))


def _bytes(bundle: Bundle) -> dict[str, dict[str, int]]:
    """Of each measured graph that the bundle has: its files, and the weights in them."""
    found = {}
    for graph in MEASURED_GRAPHS:
        record = bundle.manifest["graphs"].get(graph)
        if record is not None:
            files = [bundle.folder / name for name in record["files"]]
            weights = _weight_bytes(bundle.onnx_file(graph))
            found[graph] = {"file_bytes": sum(f.stat().st_size for f in files), "weight_bytes": weights}
    return found


def _weight_bytes(file: Path) -> int:
    """Of all initialisers, scales among them, without what no checkpoint holds: tables of angles.

    4-bit codes lie two to a byte.
    """
    import onnx

    from proteus_deploy.onnx_shapes import TensorInfo, read_model

    kinds = onnx.TensorProto.DataType
    return sum(
        TensorInfo(kinds.Name(tensor.data_type), tuple(tensor.dims)).bytes
        for tensor in read_model(file).graph.initializer
        if not tensor.name.endswith(_COMPUTED)
    )
