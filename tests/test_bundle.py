"""A bundle is what its manifest says, or an error names the field or file that isn't."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy import BundleError, InputError
from proteus_deploy._files import sha256_of, write_json
from proteus_deploy.bundle import MANIFEST, Bundle, write_engine_manifest, write_manifest
from proteus_deploy.stages import AxisRange, Graph, StageTable, TensorSpec

TABLE = StageTable(
    {"B": AxisRange(1, 2, 4)},
    (Graph("only", "only", (TensorSpec("x", ("B", 3)),), (TensorSpec("y", ("B", 3)),)),),
)
DOCUMENT = {
    "checkpoint": {"hash": "0"},
    "dtype": "fp32",
    "stage_table": TABLE.to_json(),
    "graphs": {"only": {"file": "onnx/only.onnx", "files": ["onnx/only.onnx"], "operators": {"Add": 2}}},
    "versions": {},
    "parity": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose ONNX file is some bytes: opening looks at sizes and hashes, not into files."""
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "only.onnx").write_bytes(b"a graph" * 100)
    write_json(folder / "config" / "vae.json", {"latent_channels": 16})
    write_manifest(folder, DOCUMENT)
    return folder


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def test_what_was_written_is_read(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.table == TABLE
    assert bundle.dtype == "fp32"
    assert bundle.hash == sha256_of(folder / MANIFEST)
    assert bundle.onnx_file("only").read_bytes() == b"a graph" * 100
    assert bundle.config("vae") == {"latent_channels": 16}
    assert set(bundle.manifest["files"]) == {"onnx/only.onnx", "config/vae.json"}
    assert Bundle.open(str(folder)).manifest == bundle.manifest


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            "has 699 bytes, the manifest says 700",
        ),
        (lambda file: file.write_bytes(b""), "has 0 bytes, the manifest says 700"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "has 701 bytes"),
        (_flip, r"differs from the manifest \(sha256\)"),
        (lambda file: file.unlink(), "is missing; the manifest lists it"),
    ],
    ids=["truncated", "empty", "longer", "one bit", "missing"],
)
def test_damaged_file_is_named(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder / "onnx" / "only.onnx")
    with pytest.raises(BundleError, match=rf"onnx/only\.onnx {message}"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["onnx/other.onnx", "weights.bin", "tokenizer/spiece.model"])
def test_foreign_file_is_named(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(BundleError, match=rf"{name} is not in the manifest; remove it"):
        Bundle.open(folder)


def test_foreign_link_to_a_folder_is_named(folder: Path, tmp_path: Path) -> None:
    """`face_encoder` is looked for by name: a link there would bring in files from outside."""
    (tmp_path / "elsewhere").mkdir()
    (folder / "face_encoder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="face_encoder is not in the manifest"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", [".DS_Store", ".cache/x", "engines/.partial-sm89-1/a"])
def test_hidden_files_and_engines_are_no_part_of_the_export(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    assert Bundle.open(folder).targets == ()


def test_file_that_became_a_link_out_is_refused(folder: Path, tmp_path: Path) -> None:
    """Even when it leads to the very same bytes: they may change without the bundle."""
    shutil.move(folder / "onnx" / "only.onnx", tmp_path / "moved.onnx")
    (folder / "onnx" / "only.onnx").symlink_to(tmp_path / "moved.onnx")
    with pytest.raises(BundleError, match=r"lists 'onnx/only\.onnx', which is outside the bundle"):
        Bundle.open(folder)


def test_folder_that_became_a_link_out_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "config", tmp_path / "config")
    (folder / "config").symlink_to(tmp_path / "config")
    with pytest.raises(BundleError, match=r"lists 'config/vae\.json', which is outside the bundle"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "onnx/../../secret"])
def test_manifest_cannot_name_files_outside(folder: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"key")
    record = {"bytes": 3, "sha256": sha256_of(secret)}
    change_manifest(folder, lambda document: document["files"].update({name: record}))
    with pytest.raises(BundleError, match="which is outside the bundle"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "field", ["checkpoint", "dtype", "stage_table", "graphs", "files", "versions", "parity"]
)
def test_field_that_is_missing_or_of_another_type_is_named(folder: Path, field: str) -> None:
    whole = (folder / MANIFEST).read_text()
    for change in (lambda d: d.pop(field), lambda d: d.update({field: 7}), lambda d: d.update({field: None})):
        (folder / MANIFEST).write_text(whole)
        change_manifest(folder, change)
        with pytest.raises(BundleError, match=rf"manifest\.json: field '{field}' is missing or not a"):
            Bundle.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(kind="another thing"), "field 'kind' is 'another thing', expected"),
        (lambda d: d.pop("kind"), "field 'kind' is None"),
        (lambda d: d.update(schema_version=2), "field 'schema_version' is 2; this release reads 1"),
        (lambda d: d.pop("schema_version"), "field 'schema_version' is None"),
        (lambda d: d["graphs"].pop("only"), "graph 'only' has no ONNX file"),
        (lambda d: d["graphs"].update(only=[]), "graph 'only' has no ONNX file"),
        (lambda d: d["graphs"].update(only={}), "graph 'only' has no ONNX file"),
        (lambda d: d["graphs"]["only"].update(file=["a"]), "graph 'only' has no ONNX file"),
        (lambda d: d["graphs"]["only"].update(file="onnx/absent.onnx"), "graph 'only' has no ONNX file"),
        (lambda d: d["graphs"]["only"].update(file="../out.onnx"), "graph 'only' has no ONNX file"),
        (lambda d: d["graphs"]["only"].pop("files"), "graph 'only': 'files' is None; it must list"),
        (lambda d: d["graphs"]["only"].update(files=[]), "graph 'only': 'files' is "),
        (lambda d: d["graphs"]["only"]["files"].append("onnx/absent.data"), "graph 'only': 'files' is "),
        (lambda d: d["graphs"]["only"]["files"].append(["a"]), "graph 'only': 'files' is "),
        (lambda d: d["graphs"]["only"].pop("operators"), "graph 'only': 'operators' is None; it must give"),
        (lambda d: d["graphs"]["only"].update(operators={"Add": "2"}), "graph 'only': 'operators' is "),
        (lambda d: d.update(dtype="fp8"), "field 'dtype' is 'fp8'; this release reads fp32, fp16, bf16"),
        (
            lambda d: d["checkpoint"].update(lineage=["a"]),
            r"the checkpoint's lineage is \['a'\]; this release",
        ),
        (
            lambda d: d["checkpoint"].update(lineage="consisid"),
            "field 'stage_table' lacks text_encoder, identity_schedule, denoiser, vae_encoder, vae_decoder_",
        ),
        (lambda d: d["stage_table"].update(graphs=[]), "field 'stage_table' .*graphs is empty"),
        (lambda d: d["files"].update({"onnx/only.onnx": 700}), r"files\['onnx/only.onnx'\] must hold"),
        (lambda d: d["files"]["onnx/only.onnx"].pop("sha256"), r"files\['onnx/only.onnx'\] must hold"),
        (lambda d: d["stage_table"].pop("axes"), "field 'stage_table' is not a stage table"),
        (lambda d: d["stage_table"].update(graphs=[1]), "field 'stage_table' is not a stage table"),
        (lambda d: d["stage_table"]["axes"]["B"].update(min=9), "field 'stage_table' .* min <= opt <= max"),
        (lambda d: d["stage_table"]["axes"]["B"].update(step=9), "field 'stage_table' is not a stage table"),
    ],
)
def test_manifest_that_contradicts_itself(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change_manifest(folder, change)
    with pytest.raises(BundleError, match=rf"manifest\.json: {message}"):
        Bundle.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"a"', "null", "\xff\xfe"])
def test_manifest_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(
        BundleError, match=r"manifest\.json(:| is not readable JSON| must hold a JSON object)"
    ):
        Bundle.open(folder)


def test_manifest_nested_too_deeply(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(BundleError, match=r"manifest\.json is not readable JSON \(nested too deeply\)"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "name", ["onnx/\0.onnx", "x" * 5000, "onnx/\ud800.onnx"], ids=["NUL", "long", "half"]
)
def test_manifest_with_names_that_no_file_has(folder: Path, name: str) -> None:
    change_manifest(folder, lambda document: document["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(
        BundleError, match=r"manifest\.json lists '.{1,90}, which can't be the name of a file"
    ):
        Bundle.open(folder)


def test_manifest_of_absurd_size_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(BundleError, match="is never above 33554432"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["absent", "."])
def test_folder_that_is_no_bundle(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"has no manifest\.json; a bundle is a folder that"):
        Bundle.open(tmp_path / name)


def test_config_that_the_bundle_does_not_hold(folder: Path) -> None:
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=r"config/scheduler\.json can't be read"):
        bundle.config("scheduler")
    with pytest.raises(InputError, match="points outside"):
        bundle.config("../../secret")


def test_unknown_graph_is_answered_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(InputError, match="no graph 'unet'; the table has only"):
        Bundle.open(folder).onnx_file("unet")


def _add_engines(bundle: Bundle) -> Path:
    engines = bundle.folder / "engines" / "sm89"
    engines.mkdir(parents=True)
    (engines / "only.engine").write_bytes(b"an engine")
    write_engine_manifest(engines, bundle, {"graphs": {"only": {"file": "only.engine"}}})
    return engines


def test_engines_belong_to_one_export(folder: Path) -> None:
    bundle = Bundle.open(folder)
    _add_engines(bundle)
    assert Bundle.open(folder).targets == ("sm89",)
    assert bundle.engines("sm89").file("only").read_bytes() == b"an engine"
    with pytest.raises(BundleError, match=r"has no engine for 'other'; it has only"):
        bundle.engines("sm89").file("other")
    with pytest.raises(BundleError, match=r"no engines for 'sm120' in .* \(built: sm89\); make them with"):
        bundle.engines("sm120")
    with pytest.raises(InputError, match="points outside"):
        bundle.engines("../..")
    change_manifest(folder, lambda document: document.update(versions={"torch": "another"}))
    with pytest.raises(BundleError, match="sm89 was built from another export of this bundle"):
        Bundle.open(folder).engines("sm89")


def test_bundle_manifest_does_not_pass_for_engines(folder: Path) -> None:
    engines = _add_engines(Bundle.open(folder))
    shutil.copyfile(folder / MANIFEST, engines / MANIFEST)
    with pytest.raises(BundleError, match=r"field 'kind' is 'proteus_deploy bundle', expected .* engines'"):
        Bundle.open(folder).engines("sm89")


@pytest.mark.parametrize("record", [{}, [], {"file": ["a"]}, {"file": "absent.engine"}])
def test_engine_records_name_a_listed_file(folder: Path, record: Any) -> None:
    bundle = Bundle.open(folder)
    change_manifest(_add_engines(bundle), lambda document: document["graphs"].update(only=record))
    with pytest.raises(BundleError, match="graph 'only' has no engine file among 'files'; build it again"):
        bundle.engines("sm89")


@pytest.mark.parametrize(
    "name", ["text_encoder", "identity_schedule", "identity_fusion", "denoiser", "vae_decoder_next"]
)
def test_graph_that_every_video_needs(parity_bundle: Path, tmp_path: Path, name: str) -> None:
    """Without its lineage a bundle may hold any graphs, and no video is made with it."""
    copy = tmp_path / "copy"
    shutil.copytree(parity_bundle, copy)
    assert Bundle.open(copy, hashes=False).transformer.lineage == "proteus"

    def leave_out(document: dict[str, Any]) -> None:
        table = document["stage_table"]
        table["graphs"] = [graph for graph in table["graphs"] if graph["name"] != name]

    change_manifest(copy, leave_out)
    with pytest.raises(BundleError, match=f"field 'stage_table' lacks {name}, without which"):
        Bundle.open(copy, hashes=False)
    change_manifest(copy, lambda document: document["checkpoint"].pop("lineage"))
    with pytest.raises(BundleError, match=f"field 'stage_table' lacks {name}, without which"):
        _ = Bundle.open(copy, hashes=False).transformer
