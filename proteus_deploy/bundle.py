"""An exported bundle: a folder that runs without its checkpoint.

    manifest.json               what it is, where it comes from, sha256 of every file below
    onnx/<graph>.onnx           one per graph of the stage table, large weights beside it as external data
    config/  scheduler/  tokenizer/  face_encoder/      what the pipeline needs besides the networks
    reference/                  inputs and outputs of the PyTorch reference, for `verify`
    engines/<target>/           TensorRT engines with a manifest of their own, added by `build`
    reports/                    what `verify` wrote

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
from proteus_deploy.model.config import TransformerConfig, read_transformer_config
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.stages import StageTable

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
ENGINES = "engines"
_FREE_FOLDERS = (ENGINES, "reports")  # not part of the export; engines carry their own manifest
_KIND = "proteus_deploy bundle"
_MAX_MANIFEST_BYTES = 32 << 20

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
    def open(cls, folder: str | Path, *, report: Report = no_report, hashes: bool = True) -> Bundle:
        """Read the manifest and check every listed file's size and sha256.

        hashes: False leaves the sha256 out, for a bundle that this process has just written.
        report("checking the bundle", done, total) counts files; a published-size bundle has 28 GB to read.
        Raises BundleError that names the field or file at fault: missing, truncated, altered, foreign,
        written by another schema version, or not a bundle at all.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder / MANIFEST, _REQUIRED, _KIND)
        check_files(folder, manifest["files"], report=report, hashes=hashes)
        foreign = sorted(set(_own_files(folder)) - set(manifest["files"]))
        if foreign:
            raise BundleError(
                f"{folder / foreign[0]} is not in the manifest; remove it or export the bundle again"
            )
        table = _stage_table(folder / MANIFEST, manifest["stage_table"])
        for graph in table.graphs:
            record = manifest["graphs"].get(graph.name)
            file = record.get("file") if isinstance(record, dict) else None
            if not isinstance(file, str) or file not in manifest["files"]:
                raise BundleError(
                    f"{folder / MANIFEST}: graph {graph.name!r} has no ONNX file; export the bundle again"
                )
        return cls(folder, manifest, table)

    @property
    def dtype(self) -> str:
        """Precision of the networks' floating point inputs and outputs: fp32, fp16 or bf16."""
        return self.manifest["dtype"]  # type: ignore[no-any-return]

    @property
    def hash(self) -> str:
        """sha256 of manifest.json, which itself holds the hash of every file."""
        return sha256_of(self.folder / MANIFEST)

    def onnx_file(self, graph: str) -> Path:
        self.table.graph(graph)
        return inside(self.folder, self.manifest["graphs"][graph]["file"])

    def config(self, name: str) -> dict[str, Any]:
        """A published config kept in the bundle: transformer, vae or text_encoder."""
        file = inside(self.folder, f"config/{name}.json")
        try:
            return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} can't be read ({error}); export the bundle again") from error

    @property
    def transformer(self) -> TransformerConfig:
        return read_transformer_config(
            self.config("transformer"), str(self.folder / "config/transformer.json")
        )

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
        return EngineSet(target, folder, document)


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
    if file.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{file} has {file.stat().st_size} bytes; a manifest is never above {_MAX_MANIFEST_BYTES}"
        )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BundleError(f"{file} is not readable JSON ({error}); export the bundle again") from error
    if not isinstance(document, dict) or document.get("kind") != kind:
        found = document.get("kind") if isinstance(document, dict) else type(document).__name__
        raise BundleError(f"{file}: field 'kind' is {found!r}, expected {kind!r}")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{file}: field 'schema_version' is {document.get('schema_version')!r}; this release reads "
            f"{SCHEMA_VERSION}, so export the bundle again with it"
        )
    for field, expected in required.items():
        if not isinstance(document.get(field), expected):
            raise BundleError(f"{file}: field {field!r} is missing or not a {expected.__name__}")
    return document


def _stage_table(file: Path, document: Mapping[str, Any]) -> StageTable:
    try:
        return StageTable.from_json(document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{file}: field 'stage_table' is not a stage table ({error!r}); export the bundle again"
        ) from error


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
            raise BundleError(f"{folder / MANIFEST}: files[{name!r}] must hold 'bytes' and 'sha256'")
        _check_size(folder, name, record["bytes"])
    if not hashes:
        return
    for index, (name, found) in enumerate(hash_files(folder, names), start=1):
        if found != files[name]["sha256"]:
            raise BundleError(
                f"{folder / name} differs from the manifest (sha256); it was altered after the export"
            )
        report("checking the bundle", index, len(names))


def _check_size(folder: Path, name: str, expected: int) -> None:
    try:
        file = inside(folder, name)
    except InputError as error:
        raise BundleError(f"{folder / MANIFEST} lists {name!r}, which is outside the bundle") from error
    if not file.is_file():
        raise BundleError(f"{file} is missing; the manifest lists it")
    if (size := file.stat().st_size) != expected:
        raise BundleError(
            f"{file} has {size} bytes, the manifest says {expected}; it is truncated or altered"
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
