"""Every graph of a bundle to TensorRT engines of one target: a folder that is whole or absent."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from proteus_deploy._files import publish_directory
from proteus_deploy.bundle import ENGINES, MANIFEST, Bundle, EngineSet, write_engine_manifest
from proteus_deploy.errors import BundleError, Cancelled, InputError
from proteus_deploy.export.engine_cache import EngineCache
from proteus_deploy.export.engine_findings import UNEXPLAINED
from proteus_deploy.export.engine_recipe import add_recipe
from proteus_deploy.export.quantised_export import recipe_of, refusals
from proteus_deploy.export.tensorrt_engine import build_engine
from proteus_deploy.runtime.tensorrt_api import EngineOptions, TensorRT
from proteus_deploy.stages import Graph

DEFAULT_FLAVOUR = "tensorrt_rtx"
OnGraph = Callable[[str, Mapping[str, Any] | None], None]
BuildGraph = Callable[[Graph, Path], dict[str, Any]]

_PARTIAL = ".partial-"


def build_bundle(
    bundle: Bundle,
    target: str,
    *,
    flavour: str | None = None,
    stages: Sequence[str] | None = None,
    options: EngineOptions | None = None,
    cache: EngineCache | None = None,
    force_memory: bool = False,
    progress: OnGraph | None = None,
    cancel: Event | None = None,
) -> EngineSet:
    """Build engines into `bundle.folder/engines/<target>/` and return them.

    stages: only these; engines of other stages stay when they were built from the same export by the same
    package with the same options. progress: called with (graph, None) before a build, (graph, record) after.
    cancel: looked at between engines, and within one where TensorRT reports its steps.

    The folder is replaced in one rename: a process killed at any moment leaves the old engines or the new.
    Raises InputError, BundleError, BackendError or Cancelled; then nothing is changed.
    """
    api = TensorRT.load(flavour or DEFAULT_FLAVOUR)
    target = api.resolve_target(target)
    if reasons := refusals(bundle.manifest, target):
        raise InputError(
            f"{bundle.folder} is quantised for what {target} can't run: {'; '.join(reasons)}; export another "
            "recipe (--quantize) or build for another target"
        )
    options = options or EngineOptions()
    api.check_options(options)
    graphs = select_graphs(bundle, stages)
    document: dict[str, Any] = {
        "target": target,
        "flavour": api.flavour,
        "version": api.version,
        "options": options.to_json(),
    }

    recipe = recipe_of(bundle.manifest)

    def build(graph: Graph, folder: Path) -> dict[str, Any]:
        record = build_engine(
            bundle.onnx_file(graph.name),
            graph,
            bundle.table,
            target,
            api=api,
            destination=folder / f"{graph.name}.engine",
            dtype=bundle.dtype,
            options=options,
            cache=cache,
            force_memory=force_memory,
            cancel=cancel,
        )
        if recipe is None:
            return record
        # Behind the cache, whose engines may have been built of the same graph for another bundle.
        plan = bundle.manifest["graphs"][graph.name].get("quantization")
        return {**record, "report": add_recipe(record["report"], graph.name, plan, recipe)}

    return write_engines(
        bundle, document, graphs, build, keep_others=stages is not None, progress=progress, cancel=cancel
    )


def write_engines(
    bundle: Bundle,
    document: Mapping[str, Any],
    graphs: Sequence[Graph],
    build: BuildGraph,
    *,
    keep_others: bool,
    progress: OnGraph | None = None,
    cancel: Event | None = None,
) -> EngineSet:
    """Fill `bundle.folder/engines/<document["target"]>/` in one rename.

    build(graph, folder) writes files named `<graph>.…` into `folder` and returns the graph's record, whose
    "file" is the one to open. keep_others: engines of other graphs stay if made under the same `document`.
    """
    report = progress or _no_progress
    target = document["target"]
    final = bundle.folder / ENGINES / target
    with _locked(final.parent):
        _refuse_foreign(final)
        partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{target}-", dir=final.parent))
        try:
            started_s = time.monotonic()
            records = _keep(bundle, document, graphs, partial) if keep_others else {}
            for graph in graphs:
                _stop_if(cancel)
                report(graph.name, None)
                records[graph.name] = {"stage": graph.stage, **build(graph, partial)}
                report(graph.name, records[graph.name])
            _stop_if(cancel)
            seconds = round(time.monotonic() - started_s, 3)
            write_engine_manifest(partial, bundle, {**document, "seconds": seconds, "graphs": records})
            partial.chmod(0o755)
            publish_directory(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return bundle.engines(target)


def select_graphs(bundle: Bundle, stages: Sequence[str] | None) -> list[Graph]:
    """Graphs of the named stages, all for None. Raises InputError for a stage that the bundle hasn't."""
    for stage in stages or ():
        if stage not in bundle.table.stages:
            raise InputError(
                f"no stage {stage!r} in {bundle.folder}; it has {', '.join(bundle.table.stages)}"
            )
    return [graph for graph in bundle.table.graphs if stages is None or graph.stage in stages]


def check_recipe_gate(gates: Sequence[str], bundle: Bundle) -> None:
    """Raises InputError where a gate asks what a recipe explains and the bundle has none."""
    if UNEXPLAINED in gates and recipe_of(bundle.manifest) is None:
        raise InputError(
            f"--fail-on {UNEXPLAINED} compares products with a recipe, and {bundle.folder} has none; "
            "export it with --quantize, or leave the gate out"
        )


def _stop_if(cancel: Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("cancelled by the caller")


def _no_progress(_graph: str, _record: Mapping[str, Any] | None) -> None:
    pass


def _keep(
    bundle: Bundle, document: Mapping[str, Any], graphs: Sequence[Graph], folder: Path
) -> dict[str, dict[str, Any]]:
    """Link into `folder` the earlier engines that fit those to be built now; their records."""
    try:
        earlier = bundle.engines(document["target"])
    except BundleError:
        return {}
    if any(earlier.document.get(field) != value for field, value in document.items()):
        return {}
    built_now = {graph.name for graph in graphs}
    records = {name: dict(record) for name, record in earlier.graphs.items() if name not in built_now}
    for name in records:
        for file in earlier.folder.glob(f"{name}.*"):
            os.link(file, folder / file.name)
    return records


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one build at a time writes below `folder`; what killed builds left there is removed."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another build is writing into {folder}; wait until it is done") from None
        for stale in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(stale)
        yield
    finally:
        os.close(descriptor)


def _refuse_foreign(final: Path) -> None:
    ours = (final / MANIFEST).is_file() or (final.is_dir() and not any(final.iterdir()))
    if final.exists() and not ours:
        raise InputError(f"{final} exists and holds no engines of ours; move it away, then build again")
