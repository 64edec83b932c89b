"""A portrait bundle: a folder that draws portraits on ONNX Runtime, without the checkpoint.

    portrait.json           what it is, where it comes from, sha256 of every file below
    onnx/<graph>.onnx       text_encoder, condition, decoder, vq_decoder; large weights beside them
    tokenizer/              of the text encoder
    reference.safetensors   what PyTorch computed for one caption, for `verify`

The decoder's graph has a cache of fixed size among its inputs and outputs, so the plan of that cache is fixed
as well. It is made for all positions of a condition: padding takes slots of the budget, and is masked.
`export.portrait_onnx` writes the folder, and `step_module` says what the decoder's tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proteus_deploy._files import hash_files, inside, write_json
from proteus_deploy.errors import BundleError, CheckpointError, InputError
from proteus_deploy.portrait.config import GptConfig, VqConfig, config_from_json
from proteus_deploy.portrait.plan import CachePlan, CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.stages import StageTable
from proteus_deploy.weights import read_json

__all__ = ["DOCUMENT", "GRAPHS", "PortraitBundle", "is_portrait_bundle", "write_document"]

DOCUMENT = "portrait.json"
GRAPHS = ("text_encoder", "condition", "decoder", "vq_decoder")
SCHEMA_VERSION = 1
_KIND = "portrait bundle"
_FIELDS = ("gpt", "vq", "sampling", "cache", "plan", "stage_table", "graphs", "checkpoint", "files")


@dataclass(frozen=True)
class PortraitBundle:
    """An opened bundle. sampling, cache: what it draws with. document: all of `portrait.json`."""

    folder: Path
    document: Mapping[str, Any]
    gpt: GptConfig
    vq: VqConfig
    sampling: Sampling
    cache: CacheSettings
    plan: CachePlan
    table: StageTable

    @classmethod
    def open(cls, folder: str | Path, *, hashes: bool = True) -> PortraitBundle:
        """Read `portrait.json` and check every listed file's size and sha256.

        hashes: False leaves the sha256 out, for files that were checked just now.
        Raises BundleError naming the field or file at fault.
        """
        folder = Path(folder)
        file = folder / DOCUMENT
        if not file.is_file():
            raise BundleError(f"{folder} has no {DOCUMENT}; a portrait bundle is a folder with one")
        document = read_json(file, error=BundleError)
        if document.get("kind") != _KIND:
            raise BundleError(f"{file}: field 'kind' is {document.get('kind')!r}, expected {_KIND!r}")
        if document.get("schema_version") != SCHEMA_VERSION:
            raise BundleError(
                f"{file}: field 'schema_version' is {document.get('schema_version')!r}; this release reads "
                f"{SCHEMA_VERSION}, so export the portrait again with it"
            )
        for name in _FIELDS:
            if not isinstance(document.get(name), dict):
                raise BundleError(f"{file}: field {name!r} is missing or not an object; {_WAY_OUT}")
        try:
            read = (
                config_from_json(GptConfig, document["gpt"]),
                config_from_json(VqConfig, document["vq"]),
                Sampling(**document["sampling"]),
                CacheSettings(**document["cache"]),
                CachePlan(**document["plan"]),
                StageTable.from_json(document["stage_table"]),
            )
        except (CheckpointError, InputError, TypeError) as error:
            raise BundleError(f"{file}: {error}; {_WAY_OUT}") from error
        _check_files(folder, document["files"], hashes=hashes)
        bundle = cls(folder, document, *read)
        for name in (*map(_onnx_name, GRAPHS), "reference.safetensors"):
            if name not in document["files"]:
                raise BundleError(f"{file}: {name} is not among 'files'; {_WAY_OUT}")
        return bundle

    @property
    def side(self) -> int:
        """Pixels of a portrait, across and down."""
        return self.gpt.grid_size * self.vq.downsample

    def onnx_file(self, graph: str) -> Path:
        """Where the graph of this name is."""
        return self.folder / _onnx_name(graph)

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def reference(self) -> Path:
        return self.folder / "reference.safetensors"


_WAY_OUT = "export the portrait again"


def is_portrait_bundle(folder: str | Path) -> bool:
    """Whether the folder says that it is one; nothing else is checked."""
    try:
        return read_json(Path(folder) / DOCUMENT).get("kind") == _KIND
    except InputError:
        return False


def write_document(
    folder: Path,
    *,
    gpt: GptConfig,
    vq: VqConfig,
    sampling: Sampling,
    cache: CacheSettings,
    plan: CachePlan,
    table: StageTable,
    more: Mapping[str, Any],
) -> None:
    """Complete a bundle under construction: list its files and write `portrait.json`."""
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file != folder / DOCUMENT
    )
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in hash_files(folder, names)
    }
    document = {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "gpt": asdict(gpt),
        "vq": asdict(vq),
        "sampling": asdict(sampling),
        "cache": asdict(cache),
        "plan": asdict(plan),
        "stage_table": table.to_json(),
        **more,
        "files": files,
    }
    write_json(folder / DOCUMENT, document)


def _onnx_name(graph: str) -> str:
    return f"onnx/{graph}.onnx"


def _check_files(folder: Path, files: Mapping[str, Any], *, hashes: bool) -> None:
    """Every listed file is inside `folder` with its size and sha256. Raises BundleError naming the file."""
    for name in sorted(files):
        record = files[name]
        if not isinstance(record, dict) or not {"bytes", "sha256"} <= record.keys():
            raise BundleError(f"{folder / DOCUMENT}: files[{name!r}] must hold 'bytes' and 'sha256'")
        try:
            file = inside(folder, name)
            present = file.is_file()
        except (InputError, ValueError, OSError) as error:
            raise BundleError(
                f"{folder / DOCUMENT} lists {name!r}, which can't be one of its files"
            ) from error
        if not present:
            raise BundleError(f"{file} is missing; {DOCUMENT} lists it: {_WAY_OUT}")
        if (size := file.stat().st_size) != record["bytes"]:
            raise BundleError(
                f"{file} has {size} bytes, and {DOCUMENT} says {record['bytes']}; it is truncated or altered"
            )
    if hashes:
        for name, digest in hash_files(folder, sorted(files)):
            if digest != files[name]["sha256"]:
                raise BundleError(
                    f"{folder / name} differs from {DOCUMENT} (sha256); it was altered after the export"
                )
