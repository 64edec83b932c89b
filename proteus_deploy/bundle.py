"""An exported bundle: a folder that runs without its checkpoint.

    manifest.json               what it is, where it comes from, sha256 of every file below
    onnx/<graph>.onnx           one per graph of the stage table, large weights beside it as external data
    config/  tokenizer/  face_encoder/      what the pipeline needs besides the networks
    reference/                  inputs and outputs of the PyTorch reference, for `verify`
    calibration/                statistics of activations, of a quantised bundle whose recipe reads them
    portrait/                   a portrait bundle, of an export with one: see portrait.onnx_bundle
    engines/<target>/           TensorRT engines with a manifest of their own, added by `build`

`export` writes the folder in one rename and never touches it again; `build` adds one folder per target
the same way. So a killed command leaves no half file that loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proteus_deploy._files import hash_files, inside, sha256_of, write_json
from proteus_deploy.errors import BundleError, InputError
from proteus_deploy.model.config import TransformerConfig, read_transformer_config, shortened
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.stages import StageTable
from proteus_deploy.weights import read_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
ENGINES = "engines"
PORTRAIT = "portrait"
_FREE_FOLDERS = (ENGINES,)  # not part of the export; engines carry their own manifest
_PIPELINE_FOLDERS = ("config", "tokenizer", "face_encoder")  # what the pipeline reads besides the networks
_KIND = "proteus_deploy bundle"
_DTYPES = ("fp32", "fp16", "bf16")
# What a video is made with. Bundles of other graphs name no lineage; they can be built and run, not generate.
_VIDEO_GRAPHS = ("text_encoder", "identity_schedule", "denoiser", "vae_encoder", "vae_decoder_next")
_GRAPHS_OF = {"proteus": (*_VIDEO_GRAPHS, "identity_fusion"), "consisid": _VIDEO_GRAPHS}

_REQUIRED: dict[str, type] = {
    "kind": str,
    "schema_version": int,
    "checkpoint": dict,
    "dtype": str,
    "stage_table": dict,
    "graphs": dict,
    "files": dict,
    "versions": dict,
    "parity": dict,
}


@dataclass(frozen=True)
class EngineSet:
    """The engines of one target. `graphs` maps a graph to its record (file, contract, status, …)."""

    target: str
    folder: Path
    document: Mapping[str, Any]

    @property
    def graphs(self) -> Mapping[str, Mapping[str, Any]]:
        return self.document["graphs"]  # type: ignore[no-any-return]

    def file(self, graph: str) -> Path:
        if graph not in self.graphs:
            raise BundleError(
                f"{self.folder} has no engine for {graph!r}; it has {', '.join(sorted(self.graphs))}"
            )
        return inside(self.folder, self.graphs[graph]["file"])


@dataclass(frozen=True)
class Bundle:
    folder: Path
    manifest: Mapping[str, Any]
    table: StageTable

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        report: Report = no_report,
        hashes: bool = True,
        graphs: bool = True,
    ) -> Bundle:
        """Read the manifest and check every listed file's size and sha256.

        hashes: False leaves the sha256 out, for a bundle that this process has just written.
        graphs: False for a copy that holds no more than `pipeline_files`, whose networks run elsewhere.
        report("checking the bundle", done, total) counts files; a published-size bundle has 28 GB to read.
        Raises BundleError that names the field or file at fault: missing, truncated, altered, foreign,
        written by another schema version, or not a bundle at all.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder / MANIFEST, _REQUIRED, _KIND)
        wanted = manifest["files"] if graphs else _pipeline_part(manifest["files"])
        check_files(folder, wanted, report=report, hashes=hashes)
        foreign = sorted(set(_own_files(folder)) - set(manifest["files"]))
        if foreign:
            raise BundleError(
                f"{folder / foreign[0]} is not in the manifest; remove it or export the bundle again"
            )
        table = _stage_table(folder / MANIFEST, manifest["stage_table"])
        if manifest["dtype"] not in _DTYPES:
            raise BundleError(
                f"{folder / MANIFEST}: field 'dtype' is {shortened(manifest['dtype'])}; this release reads "
                f"{', '.join(_DTYPES)}"
            )
        for graph in table.graphs:
            _check_record(folder / MANIFEST, graph.name, manifest)
        lineage = manifest["checkpoint"].get("lineage")
        if lineage is not None:
            _check_complete(folder / MANIFEST, table, lineage)
        return cls(folder, manifest, table)

    @property
    def dtype(self) -> str:
        """Precision of the networks' floating point inputs and outputs: fp32, fp16 or bf16."""
        return self.manifest["dtype"]  # type: ignore[no-any-return]

    @property
    def hash(self) -> str:
        """sha256 of manifest.json, which itself holds the hash of every file."""
        return sha256_of(self.folder / MANIFEST)

    @property
    def controlnet_hash(self) -> str | None:
        """Of the control network that it was exported with; None without one."""
        record = self.manifest.get("controlnet")
        return record.get("hash") if isinstance(record, dict) else None

    @property
    def portrait(self) -> Path | None:
        """The portrait bundle's folder; None where it was exported without, and in a copy of other files."""
        folder = self.folder / PORTRAIT
        return folder if PORTRAIT in self.manifest and folder.is_dir() else None

    def onnx_file(self, graph: str) -> Path:
        self.table.graph(graph)
        return inside(self.folder, self.manifest["graphs"][graph]["file"])

    @property
    def pipeline_files(self) -> tuple[str, ...]:
        """Names of what the pipeline reads besides the networks: configs, tokenizer, face detector."""
        return (MANIFEST, *sorted(_pipeline_part(self.manifest["files"])))

    def config(self, name: str) -> dict[str, Any]:
        """A published config kept in the bundle: transformer, vae or text_encoder."""
        file = inside(self.folder, f"config/{name}.json")
        try:
            return read_json(file, error=BundleError)
        except BundleError as error:
            raise BundleError(f"{file} can't be read ({error}); export the bundle again") from error

    @property
    def transformer(self) -> TransformerConfig:
        """Raises BundleError, too, when a graph that this transformer's videos need is not in the table."""
        file = self.folder / "config/transformer.json"
        config = read_transformer_config(self.config("transformer"), str(file))
        _check_complete(self.folder / MANIFEST, self.table, config.lineage)
        return config

    @property
    def targets(self) -> tuple[str, ...]:
        """GPU targets that engines were built for, for instance sm89."""
        folder = self.folder / ENGINES
        if not folder.is_dir():
            return ()
        return tuple(sorted(child.name for child in folder.iterdir() if (child / MANIFEST).is_file()))

    def engines(self, target: str) -> EngineSet:
        """The engines of one target, checked like the bundle itself.

        Raises BundleError when they are absent, damaged, or were built from another export.
        """
        folder = inside(self.folder, f"{ENGINES}/{target}")
        if not (folder / MANIFEST).is_file():
            built = ", ".join(self.targets) or "none"
            raise BundleError(
                f"no engines for {target!r} in {self.folder} (built: {built}); "
                f"make them with: proteus-deploy build {self.folder} --target {target}"
            )
        required = {"kind": str, "schema_version": int, "bundle": str, "graphs": dict, "files": dict}
        document = _read_manifest(folder / MANIFEST, required, f"{_KIND} engines")
        if document["bundle"] != self.hash:
            raise BundleError(f"{folder} was built from another export of this bundle; build it again")
        check_files(folder, document["files"])
        for graph, record in document["graphs"].items():
            file = record.get("file") if isinstance(record, dict) else None
            if not isinstance(file, str) or file not in document["files"]:
                raise BundleError(
                    f"{folder / MANIFEST}: graph {shortened(graph)} has no engine file among 'files'; "
                    "build it again"
                )
        return EngineSet(target, folder, document)


def _pipeline_part(files: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record for name, record in files.items() if name.split("/")[0] in _PIPELINE_FOLDERS}


def _own_files(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        # A link to a folder counts as a file: nothing behind it is in the manifest.
        if (
            (file.is_file() or file.is_symlink())
            and not hidden
            and name.parts[0] not in _FREE_FOLDERS
            and name.as_posix() != MANIFEST
        ):
            yield name.as_posix()


def _read_manifest(file: Path, required: Mapping[str, type], kind: str) -> dict[str, Any]:
    if not file.is_file():
        raise BundleError(
            f"{file.parent} has no {file.name}; a bundle is a folder that `proteus-deploy export` wrote"
        )
    document = read_json(file, error=BundleError)
    if document.get("kind") != kind:
        raise BundleError(f"{file}: field 'kind' is {shortened(document.get('kind'))}, expected {kind!r}")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{file}: field 'schema_version' is {shortened(document.get('schema_version'))}; "
            f"this release reads {SCHEMA_VERSION}, so export the bundle again with it"
        )
    for field, expected in required.items():
        if not isinstance(document.get(field), expected):
            raise BundleError(f"{file}: field {field!r} is missing or not a {expected.__name__}")
    return document


def _stage_table(file: Path, document: Mapping[str, Any]) -> StageTable:
    try:
        return StageTable.from_json(document)
    except InputError as error:
        raise BundleError(
            f"{file}: field 'stage_table' is not a stage table ({error}); export the bundle again"
        ) from error


def _check_record(manifest_file: Path, graph: str, manifest: Mapping[str, Any]) -> None:
    listed, record = manifest["files"], manifest["graphs"].get(graph)
    record = record if isinstance(record, dict) else {}
    way_out = "export the bundle again"
    file, files, operators = (record.get(key) for key in ("file", "files", "operators"))
    if not isinstance(file, str) or file not in listed:
        raise BundleError(f"{manifest_file}: graph {graph!r} has no ONNX file among 'files'; {way_out}")
    if (
        not isinstance(files, list)
        or file not in files
        or any(not isinstance(name, str) or name not in listed for name in files)
    ):
        raise BundleError(
            f"{manifest_file}: graph {graph!r}: 'files' is {shortened(files)}; it must list the graph's file "
            f"and its data, all of them in the manifest's 'files'; {way_out}"
        )
    if not isinstance(operators, dict) or any(type(count) is not int for count in operators.values()):
        raise BundleError(
            f"{manifest_file}: graph {graph!r}: 'operators' is {shortened(operators)}; it must give the "
            f"number of each operator; {way_out}"
        )


def _check_complete(manifest_file: Path, table: StageTable, lineage: Any) -> None:
    if not isinstance(lineage, str) or lineage not in _GRAPHS_OF:
        raise BundleError(
            f"{manifest_file}: the checkpoint's lineage is {shortened(lineage)}; "
            f"this release knows {', '.join(_GRAPHS_OF)}"
        )
    names = {graph.name for graph in table.graphs}
    missing = [name for name in _GRAPHS_OF[lineage] if name not in names]
    if missing:
        raise BundleError(
            f"{manifest_file}: field 'stage_table' lacks {', '.join(missing)}, without which no video is "
            "made; export the bundle again"
        )


def is_bundle(folder: Path) -> bool:
    """Whether `folder` holds a manifest of a bundle of any schema version; nothing else is checked."""
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("kind") == _KIND


def check_files(
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    *,
    report: Report = no_report,
    hashes: bool = True,
) -> None:
    """Every listed file is inside `folder` with its size and sha256. Raises BundleError naming the file."""
    names = sorted(files)
    for name in names:
        record = files[name]
        if not isinstance(record, dict) or not {"bytes", "sha256"} <= set(record):
            raise BundleError(f"{folder / MANIFEST}: files[{shortened(name)}] must hold 'bytes' and 'sha256'")
        _check_size(folder, name, record["bytes"])
    if not hashes:
        return
    for index, (name, found) in enumerate(hash_files(folder, names), start=1):
        if found != files[name]["sha256"]:
            raise BundleError(
                f"{folder / name} differs from the manifest (sha256); it was altered after the export"
            )
        report("checking the bundle", index, len(names))


def _check_size(folder: Path, name: str, expected: Any) -> None:
    listed = f"{folder / MANIFEST} lists {shortened(name)}"
    try:
        file = inside(folder, name)
        present = file.is_file()
    except InputError as error:
        raise BundleError(f"{listed}, which is outside the bundle") from error
    except (ValueError, OSError, RuntimeError) as error:  # NUL, half a character, too long, a loop of links
        raise BundleError(f"{listed}, which can't be the name of a file; export it again") from error
    if not present:
        raise BundleError(f"{file} is missing; the manifest lists it")
    if (size := file.stat().st_size) != expected:
        raise BundleError(
            f"{file} has {size} bytes, the manifest says {shortened(expected)}; it is truncated or altered"
        )


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative name: {"bytes", "sha256"}} of every file in `folder` except its manifest."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    names = [file.relative_to(folder).as_posix() for file in files]
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in hash_files(folder, names)
    }


def write_manifest(folder: Path, document: Mapping[str, Any]) -> None:
    """Complete a bundle under construction: list its files and write manifest.json."""
    complete = {"kind": _KIND, "schema_version": SCHEMA_VERSION, **document, "files": list_files(folder)}
    write_json(folder / MANIFEST, complete)


def write_engine_manifest(folder: Path, bundle: Bundle, document: Mapping[str, Any]) -> None:
    """Complete a folder of engines under construction."""
    complete = {
        "kind": f"{_KIND} engines",
        "schema_version": SCHEMA_VERSION,
        "bundle": bundle.hash,
        **document,
        "files": list_files(folder),
    }
    write_json(folder / MANIFEST, complete)
