"""Opening a checkpoint folder: what it is made of, and what is said when it does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from proteus_deploy import CheckpointError, Pipeline
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.network_factory import NetworkFactory

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(parity: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(parity / "checkpoint", copy)
    return copy


def change_json(file: Path, **changes: Any) -> None:
    document = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def change_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def build_every_network(folder: Path) -> None:
    build = NetworkFactory(Checkpoint.open(folder))
    for graph in ("denoiser", "vae_encoder", "vae_decoder_next", "text_encoder"):
        build(graph)


def test_the_published_layout_opens(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.transformer.lineage == "proteus"
    assert checkpoint.scaling_factor == 0.7
    assert checkpoint.face_encoder is None
    assert checkpoint.tokenizer == folder / "tokenizer"
    (folder / "face_encoder").mkdir()
    assert Checkpoint.open(folder).face_encoder == folder / "face_encoder"
    build_every_network(folder)


def test_a_path_may_be_text(folder: Path) -> None:
    assert Checkpoint.open(str(folder)).folder == folder


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), ("{", "is not readable JSON"), ("[]", "must hold a JSON object, not list")],
)
def test_a_config_file_that_is_missing_or_broken_is_named(
    folder: Path, name: str, content: str | None, message: str
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} .*{message}|{name} {message}"):
        Checkpoint.open(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is not a folder; a checkpoint is a folder with"):
        Checkpoint.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "key", "known"),
    [
        ("transformer/config.json", "_class_name", "ConsisIDTransformer3DModel, ProteusIDTransformer3DModel"),
        ("vae/config.json", "_class_name", "AutoencoderKLCogVideoX"),
        ("scheduler/scheduler_config.json", "_class_name", "CogVideoXDPMScheduler, CogVideoXDDIMScheduler"),
        ("text_encoder/config.json", "model_type", "t5"),
    ],
)
def test_an_unknown_class_is_named_with_the_known_ones(folder: Path, name: str, key: str, known: str) -> None:
    change_json(folder / name, **{key: "Other"})
    with pytest.raises(
        CheckpointError, match=f"{name}: {key} is 'Other'; this project (knows|loads) {known}"
    ):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("text_encoder/config.json", {"d_model": 128}, "d_model is 128 .* text_embed_dim is 64"),
        ("vae/config.json", {"latent_channels": 8}, "latent_channels is 8 .* out_channels is 16"),
    ],
)
def test_parts_of_different_checkpoints_are_refused(
    folder: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    change_json(folder / name, **changes)
    with pytest.raises(CheckpointError, match=f"{message}; the parts come from different checkpoints"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "file",
    [TRANSFORMER, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"],
)
def test_every_key_is_accounted_for(folder: Path, file: str) -> None:
    key = next(key for key, value in load_file(folder / file).items() if value.ndim > 1 < value.shape[0])

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        other = next(name for name in weights if name != key)
        weights["added.weight"] = torch.zeros(3)
        weights[key] = weights[key][:1].clone()
        del weights[other]
        spoilt.append(other)

    spoilt: list[str] = []
    change_weights(folder / file, spoil)
    with pytest.raises(CheckpointError) as refusal:
        build_every_network(folder)
    message = str(refusal.value)
    assert f"missing: {spoilt[0]} [" in message
    assert "unexpected: added.weight [3]" in message
    assert f"wrong shape: {key} is [1, " in message
    assert str(folder / Path(file).parent) in message


def test_many_problems_are_counted_and_not_all_listed(folder: Path) -> None:
    change_weights(folder / TRANSFORMER, lambda weights: [weights.pop(key) for key in list(weights)[:50]])
    with pytest.raises(CheckpointError, match="and 30 more"):
        build_every_network(folder)


@pytest.mark.parametrize("tied", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_the_text_encoders_embedding_may_be_stored_under_either_name(
    folder: Path, parity_pipeline: Pipeline, tied: str
) -> None:
    file = folder / "text_encoder" / "model.safetensors"

    def rename(weights: dict[str, torch.Tensor]) -> None:
        table = weights.pop("shared.weight", None)
        table = weights.pop("encoder.embed_tokens.weight", table)
        assert table is not None
        for name in ("shared.weight", "encoder.embed_tokens.weight"):
            if tied in (name, "both"):
                weights[name] = table.clone()

    change_weights(file, rename)
    ids = torch.tensor([[5, 9, 1, 0]])
    with Pipeline.from_checkpoint(folder) as pipeline:
        got = pipeline.stages["text_encoder"](input_ids=ids)["text"]
    assert torch.equal(got, parity_pipeline.stages["text_encoder"](input_ids=ids)["text"])


def test_the_tokenizer_is_missed_by_name(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer is missing; the prompt can't be turned into tokens"):
        Pipeline.from_checkpoint(folder)


def test_an_empty_tokenizer_folder_is_named(folder: Path, small_request: Callable[..., Any]) -> None:
    (folder / "tokenizer" / "spiece.model").unlink()
    with (
        Pipeline.from_checkpoint(folder) as pipeline,
        pytest.raises(CheckpointError, match=r"neither spiece\.model nor tokenizer\.json"),
    ):
        pipeline.generate(small_request())


def test_the_hash_follows_content_and_names_only(folder: Path) -> None:
    first = Checkpoint.open(folder).hash
    (folder / ".cache").mkdir()
    (folder / ".cache" / "stamp").write_text("downloaded today")
    (folder / ".gitattributes").write_text("x")
    assert Checkpoint.open(folder).hash == first
    change_weights(folder / TRANSFORMER, lambda weights: weights["proj_out.bias"].add_(1))
    second = Checkpoint.open(folder).hash
    assert second != first
    (folder / "NOTES.txt").write_text("x")
    third = Checkpoint.open(folder).hash
    (folder / "NOTES.txt").rename(folder / "NOTE.txt")
    assert len({first, second, third, Checkpoint.open(folder).hash}) == 4


def test_random_weights_stand_in_for_files(folder: Path, small_request: Callable[..., Any]) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    one, other = (Checkpoint.open(folder, random_weights_seed=seed) for seed in (1, 2))
    assert one.hash != other.hash != Checkpoint.open(folder).hash
    networks = [NetworkFactory(checkpoint)("denoiser") for checkpoint in (one, one, other)]
    values = [network.source.tensor("proj_out.weight") for network in networks]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
