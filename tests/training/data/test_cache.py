"""The dataset gives float32 tensors of the promised shapes, and a batch one reference and variant a clip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.training.data.cache import LatentDataset, PreparedSet, collate

SHAPES = {
    "latent_mean": (3, 16, 8, 8),
    "latent_std": (3, 16, 8, 8),
    "prompt": (64, 64),
    "prompt_mask": (64,),
    "identity": (16, 64),
    "identity_mask": (16,),
    "condition": (1, 4, 16, 8, 8),
    "id_cond": (1, 1, 64),
    "image_states": (1, 5, 17, 32),
    "heat": (3, 8, 8),
    "head_mask": (3, 8, 8),
    "face_mask": (3, 8, 8),
}


@pytest.mark.parametrize("in_memory", [False, True])
def test_samples(prepared: PreparedSet, in_memory: bool) -> None:
    dataset = LatentDataset(prepared.folder, in_memory=in_memory)
    assert len(dataset) == 8
    for index, clip in enumerate(prepared.clips):
        sample, stored = dataset[index], load_file(clip.file)
        assert {key: tuple(value.shape) for key, value in sample.items()} == SHAPES
        assert all(value.dtype == torch.float32 for value in sample.values())
        for key, value in stored.items():
            assert torch.equal(sample[key], value.float()), key
    # "no masks" is the last one.
    assert not bool(sample["head_mask"].any() or sample["face_mask"].any())
    assert bool(dataset[0]["head_mask"].any())
    dataset[0]["id_cond"].zero_()
    assert bool(dataset[0]["id_cond"].any())


def _sample(photos: int, variants: int = 2) -> dict[str, Tensor]:
    """Each number of a reference is 10 times its photo plus its variant."""
    photo = torch.arange(photos).float() * 10
    return {
        "latent_mean": torch.zeros(1, 2, 3, 3),
        "condition": (photo[:, None] + torch.arange(variants)).reshape(photos, variants, 1, 1, 1),
        "keypoint_condition": -(photo[:, None] + torch.arange(variants)).reshape(photos, variants, 1, 1, 1),
        "id_cond": photo.reshape(-1, 1, 1),
        "image_states": photo.reshape(-1, 1, 1, 1).expand(-1, 5, 2, 2),
    }


def test_a_batch_takes_one_reference_and_variant_of_each_clip() -> None:
    batch = collate([_sample(3), _sample(1), _sample(2)], [(4, 5), (7, 0), (1, 1)])
    assert batch["condition"].flatten().tolist() == [11, 0, 11]  # 4 % 3 = 1, 5 % 2 = 1; 7 % 1 = 0; 1, 1
    assert batch["keypoint_condition"].flatten().tolist() == [-11, 0, -11]
    assert batch["id_cond"].tolist() == [[[10]], [[0]], [[10]]]
    assert batch["image_states"].shape == (3, 5, 2, 2)
    assert batch["image_states"][:, 0, 0, 0].tolist() == [10, 0, 10]
    assert batch["condition"].shape == (3, 1, 1, 1)
    assert batch["latent_mean"].shape == (3, 1, 2, 3, 3)


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="2 samples and 1 choices"):
        collate([_sample(1), _sample(1)], [(0, 0)])
    with pytest.raises(InputError, match="whole numbers from 0 on"):
        collate([_sample(1)], [(-1, 0)])
    other = _sample(1)
    other["latent_mean"] = torch.zeros(1, 2, 3, 4)
    with pytest.raises(InputError, match="latent_mean differs in shape"):
        collate([_sample(1), other], [(0, 0), (0, 0)])
    del other["latent_mean"], other["keypoint_condition"]
    with pytest.raises(InputError, match="latent_mean differs in shape"):
        collate([_sample(1), other], [(0, 0), (0, 0)])


def test_sets_that_are_not_there(prepared: PreparedSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no prepared set 'other' .there are: .*train"):
        PreparedSet.open(prepared.folder, "other")
    with pytest.raises(InputError, match="no name for a set"):
        PreparedSet.open(prepared.folder, "../train")
    document = json.loads((prepared.folder / "train.json").read_text(encoding="utf-8"))
    (tmp_path / "train.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError, match=r"8 of the 8 clips of .* are gone"):
        PreparedSet.open(tmp_path)
    for change, words in (({"format": 99}, "has format 99"), ({"clips": [1]}, "is no prepared set")):
        (tmp_path / "train.json").write_text(json.dumps(document | change), encoding="utf-8")
        with pytest.raises(InputError, match=words):
            PreparedSet.open(tmp_path)
    document["clips"][0]["file"] = "../outside.safetensors"
    (tmp_path / "train.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError, match="points outside"):
        PreparedSet.open(tmp_path)
