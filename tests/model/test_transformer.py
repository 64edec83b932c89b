"""The denoiser against diffusers' CogVideoX transformer, in both lineages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy import InputError, Pipeline
from proteus_deploy.model.transformer import rotary_tables
from proteus_deploy.testing import TOLERANCES, assert_close

LINEAGE_1_5 = {"patch_size_t": 2, "ofs_embed_dim": 48, "patch_bias": False, "sample_frames": 13}


def diffusers_backbone(folder: Path) -> Any:
    """diffusers' model with the backbone's share of a checkpoint's weights; it has no identity modules."""
    from diffusers import CogVideoXTransformer3DModel
    from safetensors.torch import load_file

    config = json.loads((folder / "transformer" / "config.json").read_text())
    model = CogVideoXTransformer3DModel.from_config(config).eval()
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    model.load_state_dict({key: weights[key] for key in model.state_dict()})
    return model


def denoiser_inputs(frames: int, height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(2, frames, 32, height, width, generator=generator),
        "text": torch.randn(2, 40, 64, generator=generator),
        "timestep": torch.tensor([999, 1]),
        "face_tokens": torch.randn(1, 8, 64, generator=generator),
    }


@torch.no_grad()
def diffusers_output(model: Any, pipeline: Pipeline, inputs: dict[str, Tensor]) -> Tensor:
    backbone = pipeline.config.backbone
    rotary = None
    if backbone.rotary:
        _, frames, _, height, width = inputs["latents"].shape
        grid = (frames // (backbone.patch_size_t or 1), height // 2, width // 2)
        rotary = tuple(table.flatten(0, 2) for table in rotary_tables(backbone, *grid))
    output: Tensor = model(
        inputs["latents"],
        inputs["text"],
        inputs["timestep"],
        ofs=None if backbone.ofs_embed_dim is None else torch.full((1,), 2.0),
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
    return output


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (3, 8, 12)),
        ({"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}, (1, 4, 6)),
        ({"use_learned_positional_embeddings": True}, (3, 8, 12)),
        ({"use_rotary_positional_embeddings": False}, (3, 8, 12)),
        (LINEAGE_1_5, (4, 8, 12)),
        (LINEAGE_1_5, (2, 6, 4)),
        (LINEAGE_1_5 | {"patch_bias": True, "ofs_embed_dim": None}, (6, 4, 4)),
    ],
    ids=["1.0", "other embedding", "learned", "sinusoidal", "1.5", "1.5 smaller", "1.5 without ofs"],
)
def test_backbone_matches_diffusers(
    make_checkpoint: Callable[..., Path], changes: dict[str, Any], size: tuple[int, int, int]
) -> None:
    folder = make_checkpoint(**changes)
    inputs = denoiser_inputs(*size)
    with Pipeline.from_checkpoint(folder) as pipeline:
        got = pipeline.stages["denoiser"](**inputs, identity_gate=torch.zeros(1))["velocity"]
        want = diffusers_output(diffusers_backbone(folder), pipeline, inputs)
        assert_close("velocity, gate 0", got, want, TOLERANCES["backbone", "transformer"])
        gated = pipeline.stages["denoiser"](**inputs)["velocity"]
    assert not torch.allclose(gated, want), "identity attention must matter where its gate is open"


def test_the_gate_scales_the_first_identity_attention(make_checkpoint: Callable[..., Path]) -> None:
    """One block, one identity attention: its residual reaches the output through smooth layers only."""
    folder = make_checkpoint(num_layers=1)
    inputs = denoiser_inputs(3, 8, 12)
    with Pipeline.from_checkpoint(folder) as pipeline:
        denoise = pipeline.stages["denoiser"]
        plain, half, full = (
            denoise(**inputs, identity_gate=torch.tensor([gate]))["velocity"] for gate in (0.0, 0.5, 1.0)
        )
    assert (full - plain).norm() > (half - plain).norm() > 0


def test_the_checkpoints_own_scale_is_the_default_gate(make_checkpoint: Callable[..., Path]) -> None:
    inputs = denoiser_inputs(3, 8, 12)
    with Pipeline.from_checkpoint(make_checkpoint(local_face_scale=0.25)) as pipeline:
        denoise = pipeline.stages["denoiser"]
        default = denoise(**inputs)["velocity"]
        assert torch.equal(default, denoise(**inputs, identity_gate=torch.tensor([0.25]))["velocity"])


def test_one_identity_stands_for_the_whole_batch(parity_pipeline: Pipeline) -> None:
    inputs = denoiser_inputs(3, 8, 12)
    one = parity_pipeline.stages["denoiser"](**inputs)["velocity"]
    inputs["face_tokens"] = inputs["face_tokens"].expand(2, -1, -1)
    assert torch.equal(one, parity_pipeline.stages["denoiser"](**inputs)["velocity"])
    inputs["face_tokens"] = inputs["face_tokens"][:1].expand(3, -1, -1)
    with pytest.raises(InputError, match="face_tokens"):
        parity_pipeline.stages["denoiser"](**inputs)


def test_non_contiguous_inputs_give_the_same_output(parity_pipeline: Pipeline) -> None:
    inputs = denoiser_inputs(3, 8, 12)
    want = parity_pipeline.stages["denoiser"](**inputs)["velocity"]
    turned = {name: value.clone().mT.contiguous().mT for name, value in inputs.items() if value.ndim > 1}
    assert not turned["latents"].is_contiguous()
    got = parity_pipeline.stages["denoiser"](**{**inputs, **turned})["velocity"]
    assert_close("velocity", got, want, TOLERANCES["backbone", "transformer"])
