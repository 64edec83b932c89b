"""Weight files: one or several, safetensors only, damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from proteus_deploy import CheckpointError
from proteus_deploy.weights import RandomWeights, SafetensorsFolder, check_keys, read_all

A, B = {"a": torch.arange(6.0).reshape(2, 3)}, {"b": torch.ones(4)}
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, weight_map: object) -> None:
    save_file(A, folder / "model-1.safetensors")
    save_file(B, folder / "model-2.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_one_file(tmp_path: Path) -> None:
    save_file(A | B, tmp_path / "model.safetensors")
    store = SafetensorsFolder(tmp_path)
    assert set(store.keys()) == {"a", "b"}
    assert store.shape("a") == (2, 3)
    assert torch.equal(store.tensor("a"), A["a"])
    assert store.files == (tmp_path / "model.safetensors",)


def test_shards_with_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    save_file({"c": torch.ones(1)}, tmp_path / "left-over.safetensors")
    store = SafetensorsFolder(tmp_path)
    assert set(store.keys()) == {"a", "b"}, "only what the index names"
    assert torch.equal(store.tensor("b"), B["b"])


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write_shards(blobs, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert set(SafetensorsFolder(snapshot).keys()) == {"a", "b"}


@pytest.mark.parametrize(
    "name", ["../model-1.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "model.bin", 3, None]
)
def test_an_index_may_only_name_safetensors_beside_it(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(A, tmp_path / "model-1.safetensors")
    write_shards(folder, {"a": name, "b": "model-2.safetensors"})
    with pytest.raises(CheckpointError, match=f"{INDEX} names .* not a .safetensors file in"):
        SafetensorsFolder(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "model-1.safetensors", "b": "model-3.safetensors"})
    with pytest.raises(CheckpointError, match=r"shards named in .* are missing: model-3\.safetensors"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", '{"a":' * 100_000, "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["x"]}}', "3"]
)
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        SafetensorsFolder(tmp_path)


def test_two_variants_are_not_chosen_between(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "model-1.safetensors"})
    (tmp_path / "model.fp16.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="several indices"):
        SafetensorsFolder(tmp_path)


def test_a_key_in_two_files_is_named(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    save_file(A, tmp_path / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in both .*fp16.* and .*; remove one of them"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"pytorch_model.{suffix}"
    file.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError) as refusal:
        SafetensorsFolder(tmp_path)
    assert file.name in str(refusal.value)
    assert f"proteus-deploy convert {tmp_path}" in str(refusal.value)


def test_an_empty_or_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        SafetensorsFolder(tmp_path / "transformer")


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(A | B, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read as safetensors .* damaged"):
        SafetensorsFolder(tmp_path)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("<html>404</html>" * 50)
    with pytest.raises(CheckpointError, match="can't be read as safetensors"):
        SafetensorsFolder(tmp_path)


def test_random_weights_depend_on_seed_and_key_and_nothing_else() -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (3, 4)}
    store, other = RandomWeights(shapes, seed=1), RandomWeights(shapes, seed=2)
    first = store.tensor("a")
    store.tensor("b")
    assert torch.equal(first, store.tensor("a"))
    assert not torch.equal(first, store.tensor("b"))
    assert not torch.equal(first, other.tensor("a"))
    check_keys(shapes, store)
    with pytest.raises(CheckpointError, match=r"random weights \(seed 1\): .*\n  missing: c \[2\]"):
        check_keys({**shapes, "c": (2,)}, store)


def test_random_weights_of_many_threads_are_those_of_one() -> None:
    shapes = {f"{number}": (number % 7 + 1, 3) for number in range(60)}
    store = RandomWeights(shapes, seed=3)
    keys = [*reversed(shapes), "5"]  # in any order, and again
    read = list(read_all(store, keys))
    assert len(read) == len(keys)
    assert all(torch.equal(value, store.tensor(key)) for key, value in zip(keys, read, strict=True))
    some = read_all(store, keys)
    assert torch.equal(next(some), store.tensor("59"))
    some.close()  # type: ignore[attr-defined]


def test_files_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    save_file(A | B, tmp_path / "model.safetensors")
    values = read_all(SafetensorsFolder(tmp_path), ["b", "a"])
    assert torch.equal(next(values), B["b"])
    assert torch.equal(next(values), A["a"])
