"""ConsisID, the public relative: checkpoints that diffusers saved, against diffusers' own forward and run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proteus_deploy import CheckpointError, GenerateRequest, IdentityFeatures, Pipeline, StepEvent
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.model.transformer import rotary_tables
from proteus_deploy.testing import TOLERANCES, assert_close

CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "in_channels": 32,
    "out_channels": 16,
    "time_embed_dim": 48,
    "text_embed_dim": 64,
    "num_layers": 4,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 40,
    "use_rotary_positional_embeddings": True,
    "is_train_face": True,
    "cross_attn_dim_head": 16,
    "cross_attn_num_heads": 4,
    "LFE_id_dim": 40,
    "LFE_vit_dim": 16,
    "LFE_depth": 10,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 3,
    "LFE_num_querie": 6,
    "LFE_output_dim": 64,
    "LFE_ff_mult": 2,
    "local_face_scale": 0.7,
}
RandomWeights = Callable[[dict[str, Any]], dict[str, Tensor]]


@pytest.fixture
def consisid(random_weights: RandomWeights) -> Callable[..., Any]:
    """consisid(**changes) -> diffusers' ConsisID transformer with random, non-zero weights everywhere."""
    from diffusers import ConsisIDTransformer3DModel

    def make(**changes: Any) -> Any:
        model: Any = ConsisIDTransformer3DModel(**{**CONFIG, **changes})
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        model.load_state_dict(random_weights(shapes))
        return model.eval()

    return make


@pytest.fixture
def save(parity: Path, tmp_path: Path) -> Callable[..., Path]:
    """save(model, **options) -> a checkpoint folder around the model that diffusers saved."""

    def write(model: Any, **options: Any) -> Path:
        folder = tmp_path / "consisid"
        folder.mkdir()
        for part in ("text_encoder", "tokenizer", "scheduler", "vae", "model_index.json"):
            (folder / part).symlink_to(parity / "checkpoint" / part)
        model.save_pretrained(folder / "transformer", **options)
        return folder

    return write


def forward_inputs(config: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": randn(2, 3, config["in_channels"], 8, 12),
        "encoder_hidden_states": randn(2, 40, config["text_embed_dim"]),
        "timestep": torch.tensor([749, 749]),
        "id_cond": randn(1, config["LFE_id_dim"]),
        "id_vit_hidden": [randn(1, 10, config["LFE_vit_dim"]) for _ in range(5)],
    }


def our_forward(pipeline: Pipeline, inputs: dict[str, Any]) -> Tensor:
    states = {f"hidden_{index}": state for index, state in enumerate(inputs["id_vit_hidden"])}
    face_tokens = pipeline.stages["identity_schedule"](
        id_cond=inputs["id_cond"][:, None], **states, timesteps=inputs["timestep"][:1]
    )["face_tokens"]
    return pipeline.stages["denoiser"](
        latents=inputs["hidden_states"],
        text=inputs["encoder_hidden_states"],
        timestep=inputs["timestep"],
        face_tokens=face_tokens,
    )["velocity"]


@torch.no_grad()
def their_forward(model: nn.Module, inputs: dict[str, Any], folder: Path) -> Tensor:
    config = Checkpoint.open(folder).transformer.backbone
    tables = tuple(table.flatten(0, 2) for table in rotary_tables(config, 3, 4, 6))
    rotary = tables if config.rotary else None
    output: Tensor = model(**inputs, image_rotary_emb=rotary, return_dict=False)[0]
    return output


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 6, "cross_attn_interval": 3},
        {"attention_bias": False, "LFE_num_scale": 5, "LFE_depth": 5},
        {"use_learned_positional_embeddings": True},
        {"use_rotary_positional_embeddings": False},
        {"num_attention_heads": 2, "attention_head_dim": 48, "local_face_scale": 0.0},
    ],
    ids=["plain", "interval 3", "no bias", "learned positions", "sinusoidal positions", "scale 0"],
)
def test_transformer_matches_diffusers(
    consisid: Callable[..., Any], save: Callable[..., Path], changes: dict[str, Any]
) -> None:
    model = consisid(**changes)
    folder = save(model)
    inputs = forward_inputs(model.config)
    with Pipeline.from_checkpoint(folder) as pipeline:
        assert "identity_fusion" not in pipeline.stages
        got = our_forward(pipeline, inputs)
    want = their_forward(model, inputs, folder)
    assert_close("velocity", got, want, TOLERANCES["consisid", "transformer"])


def test_shards_load_as_one_checkpoint(consisid: Callable[..., Any], save: Callable[..., Path]) -> None:
    model = consisid()
    folder = save(model, max_shard_size="200KB")
    shards = list((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    inputs = forward_inputs(model.config)
    with Pipeline.from_checkpoint(folder) as pipeline:
        got = our_forward(pipeline, inputs)
    want = their_forward(model, inputs, folder)
    assert_close("velocity", got, want, TOLERANCES["consisid", "transformer"])


def test_without_identity_modules_the_checkpoint_is_refused(
    consisid: Callable[..., Any], save: Callable[..., Path]
) -> None:
    folder = save(consisid(is_train_face=False))
    with pytest.raises(CheckpointError, match="is_train_face is false"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("scheduler", ["CogVideoXDPMScheduler", "CogVideoXDDIMScheduler"])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 4.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "use_dynamic_cfg": True, "negative_prompt": "blurry"},
    ],
    ids=["guided", "unguided", "dynamic guidance"],
)
def test_a_whole_run_matches_diffusers_pipeline(
    consisid: Callable[..., Any],
    save: Callable[..., Path],
    identity: Callable[..., IdentityFeatures],
    parity: Path,
    scheduler: str,
    options: dict[str, Any],
) -> None:
    """One seed decides the image's sample, the initial noise and each step, in the published order."""
    run_both(consisid(), save, identity(5), parity, scheduler, options)


def test_keypoints_of_an_is_kps_checkpoint_stand_in_latent_frame_one(
    consisid: Callable[..., Any],
    save: Callable[..., Path],
    identity: Callable[..., IdentityFeatures],
    parity: Path,
) -> None:
    """The condition image is wider than high here, so a drawing with its sides swapped would show."""
    points = torch.tensor([[30.0, 20.0], [60.0, 21.0], [45.0, 32.0], [33.0, 44.0], [58.0, 45.0]])
    features = identity(5, keypoints=points)
    run_both(consisid(is_kps=True), save, features, parity, "CogVideoXDPMScheduler", {"guidance_scale": 4.0})


def run_both(
    model: Any,
    save: Callable[..., Path],
    features: IdentityFeatures,
    parity: Path,
    scheduler: str,
    options: dict[str, Any],
) -> None:
    import diffusers
    from PIL import Image
    from transformers import T5EncoderModel, T5Tokenizer

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    folder = save(model)
    published = parity / "checkpoint"
    config = json.loads((published / "scheduler" / "scheduler_config.json").read_text())
    theirs: Any = diffusers.ConsisIDPipeline(
        tokenizer=T5Tokenizer.from_pretrained(str(published / "tokenizer"), local_files_only=True),
        text_encoder=T5EncoderModel.from_pretrained(published / "text_encoder", dtype=torch.float32),
        vae=diffusers.AutoencoderKLCogVideoX.from_pretrained(published / "vae", torch_dtype=torch.float32),
        transformer=model,
        scheduler=getattr(diffusers, scheduler).from_config(config),
    )
    theirs.set_progress_bar_config(disable=True)
    image = parity / "case_cfg_dpm" / "reference.png"
    shared: dict[str, Any] = {
        "prompt": "A man nods",
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "num_inference_steps": 3,
    }
    want: list[Tensor] = []

    def keep(_pipeline: Any, _index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        want.append(tensors["latents"])
        return tensors

    with Image.open(image) as opened:
        frames = theirs(
            image=opened.convert("RGB"),
            **shared,
            **options,
            generator=torch.Generator().manual_seed(11),
            id_cond=features.id_cond[:, 0],
            id_vit_hidden=list(features.id_vit_hidden),
            kps_cond=None if features.keypoints is None else features.keypoints.numpy(),
            max_sequence_length=40,
            output_type="pt",
            callback_on_step_end=keep,
        ).frames
    request = GenerateRequest(
        identity=features,
        condition_image=image,
        seed=11,
        scheduler="ddim" if "DDIM" in scheduler else "dpm",
        **shared,
        **options,
    )
    steps: list[StepEvent] = []
    with Pipeline.from_checkpoint(folder) as pipeline:
        video = pipeline.generate(request, on_step=steps.append)
    assert len(want) == len(steps) == 3
    for event, latents in zip(steps, want, strict=True):
        assert_close(f"latents {event.index}", event.latents, latents, TOLERANCES["consisid", "latents"])
    assert_close("frames", video.frames, frames, TOLERANCES["parity", "frames"])
