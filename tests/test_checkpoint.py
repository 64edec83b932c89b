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


def test_the_hash_follows_links_to_folders(folder: Path, tmp_path: Path) -> None:
    """A folder of links has the hash of what they lead to, and notices when that changes."""
    plain = Checkpoint.open(folder).hash
    shutil.move(folder / "transformer", tmp_path / "shared")
    (folder / "transformer").symlink_to(tmp_path / "shared")
    assert Checkpoint.open(folder).hash == plain
    (tmp_path / "shared" / "loop").symlink_to(folder)
    (tmp_path / "shared" / "nowhere").symlink_to("absent")
    assert Checkpoint.open(folder).hash == plain, "what lies above has its names already"
    (tmp_path / "shared" / "NOTES.txt").write_text("x")
    assert Checkpoint.open(folder).hash != plain


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("vae/config.json", {"scaling_factor": ...}, "'scaling_factor' is missing"),
    ("vae/config.json", {"scaling_factor": 0}, "'scaling_factor' is 0.0; latents are divided by it"),
    ("vae/config.json", {"scaling_factor": "0.7"}, "'scaling_factor' is '0.7'; expected float"),
    ("vae/config.json", {"scaling_factor": float("nan")}, "'scaling_factor' is nan; it must be a finite"),
    ("vae/config.json", {"scaling_factor": 10**400}, "'scaling_factor' is 10{70,}…; expected float"),
    ("vae/config.json", {"latent_channels": True}, "'latent_channels' is True; expected int"),
    ("vae/config.json", {"block_out_channels": 8}, "'block_out_channels' is 8; expected list"),
    ("vae/config.json", {"block_out_channels": [8]}, "'block_out_channels' has 1 entries; the VAE has 4"),
    (
        "vae/config.json",
        {"block_out_channels": [8, 8, 6, 8]},
        r"holds 6; .* multiple of norm_num_groups \(4\)",
    ),
    ("vae/config.json", {"block_out_channels": [8, 8, [], 8]}, r"holds \[\]; each must be a positive"),
    ("vae/config.json", {"norm_num_groups": 0}, "'norm_num_groups' is 0; it must be at least 1"),
    (
        "vae/config.json",
        {"down_block_types": ["Other"] * 4},
        "'down_block_types' names 'Other'; .* knows 'CogVid",
    ),
    ("vae/config.json", {"up_block_types": ["CogVideoXUpBlock3D"]}, "'up_block_types' has 1 entries"),
    ("vae/config.json", {"sample_height": None}, "'sample_height' is None; expected int"),
    ("vae/config.json", {"sample_width": 96.5}, "'sample_width' is 96.5; expected int"),
    ("vae/config.json", {"layers_per_block": 10**5}, "'layers_per_block' is 100000; it must be at most 1000"),
    ("vae/config.json", {"temporal_compression_ratio": 8}, "'temporal_compression_ratio' is 8; .* knows 4"),
    ("text_encoder/config.json", {"vocab_size": ...}, "'vocab_size' is missing"),
    (
        "text_encoder/config.json",
        {"vocab_size": 10**9},
        "'vocab_size' is 1000000000; it must be at most 1000000",
    ),
    ("text_encoder/config.json", {"num_layers": -1}, "'num_layers' is -1; it must be at least 1"),
    ("text_encoder/config.json", {"d_ff": "96"}, "'d_ff' is '96'; expected int"),
    ("text_encoder/config.json", {"feed_forward_proj": 3}, "'feed_forward_proj' is 3; this project knows"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "is 500; it must be 1000"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": ...}, "'num_train_timesteps' is missing"),
    (
        "scheduler/scheduler_config.json",
        {"prediction_type": "epsilon"},
        "'epsilon'; .* must be 'v_prediction'",
    ),
    ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "'cosine'; this project knows 'linear'"),
    ("scheduler/scheduler_config.json", {"beta_end": 0}, "0 < beta_start <= beta_end < 1"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "'trained_betas' is .*must be null"),
    ("transformer/config.json", {"_class_name": ["a"]}, r"_class_name is \['a'\]; this project loads"),
    (
        "transformer/config.json",
        {"num_layers": 10**7},
        "'num_layers' is 10000000; it must be at most 1000000",
    ),
    ("transformer/config.json", {"norm_eps": float("inf")}, "'norm_eps' is inf; it must be a finite number"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD_FIELDS)
def test_a_field_that_no_published_config_could_have_is_named(
    folder: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    change_json(folder / name, **changes)
    with pytest.raises(CheckpointError, match=f"{name}: .*{message}"):
        Checkpoint.open(folder)


def test_the_real_sizes_open(tmp_path: Path) -> None:
    from proteus_deploy.benchmarks.real_size_export import write_configs

    assert Checkpoint.open(write_configs(tmp_path)).transformer.backbone.num_layers == 42


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a":' * 100_000, r"vae/config\.json is not readable JSON \(nested too deeply\)"),
        (" " * (32 << 20) + "{}", r"vae/config\.json has 33554434 bytes; .* never above 33554432"),
    ],
    ids=["deep", "large"],
)
def test_json_without_end_is_not_read(folder: Path, content: str, message: str) -> None:
    (folder / "vae" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_a_damaged_tokenizer_is_named(folder: Path, small_request: Callable[..., Any]) -> None:
    (folder / "tokenizer" / "spiece.model").write_bytes(b"not a model")
    with (
        Pipeline.from_checkpoint(folder) as pipeline,
        pytest.raises(
            CheckpointError, match=r"tokenizer can't be read as a T5 tokenizer .* download the folder"
        ),
    ):
        pipeline.generate(small_request())
