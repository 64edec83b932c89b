"""The published pipeline's own numbers, from the checkpoint folder through the public interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from proteus_deploy import GenerateRequest, IdentityFeatures, Pipeline, StepEvent
from proteus_deploy.model.identity_fusion import combine_text_and_identity
from proteus_deploy.testing import TOLERANCES, assert_close

CASES = ["case_cfg_dpm", "case_dynamic_cfg_negative", "case_long_prompt_portrait"]


def read_case(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "case.json").read_text()), load_file(folder / "case.safetensors")


def features(tensors: dict[str, Tensor]) -> IdentityFeatures:
    return IdentityFeatures(tensors["id_cond"], tuple(tensors[f"id_vit_hidden_{i}"] for i in range(5)))


def request_of(folder: Path, case: dict[str, Any], tensors: dict[str, Tensor]) -> GenerateRequest:
    names = ("prompt", "identity_prompt", "negative_prompt", "height", "width", "num_frames", "seed")
    more = ("num_inference_steps", "guidance_scale", "use_dynamic_cfg", "max_sequence_length")
    fields = {name: case[name] for name in (*names, *more, "max_identity_length")}
    return GenerateRequest(
        **fields, identity=features(tensors), condition_image=str(folder / "reference.png")
    )


@pytest.mark.parametrize("case", CASES)
def test_transformer_output_of_the_first_step(parity: Path, parity_pipeline: Pipeline, case: str) -> None:
    _, t = read_case(parity / case)
    stages = parity_pipeline.stages
    hidden = {f"hidden_{i}": t[f"id_vit_hidden_{i}"] for i in range(5)}
    fused = stages["identity_fusion"](
        identity_text=t["t0_identity_prompt_embeds"], id_cond=t["id_cond"], **hidden
    )["fused"]
    face_tokens = stages["identity_schedule"](
        fused=fused, id_cond=t["id_cond"], hidden_4=t["id_vit_hidden_4"], timesteps=t["t0_timestep"][:1]
    )["face_tokens"]
    text = combine_text_and_identity(t["t0_encoder_hidden_states"], t["t0_encoder_hidden_mask"], fused)
    velocity = stages["denoiser"](
        latents=t["t0_hidden_states"], text=text, timestep=t["t0_timestep"], face_tokens=face_tokens
    )["velocity"]
    assert_close("velocity", velocity, t["t0_output"], TOLERANCES["parity", "transformer"])


@pytest.mark.parametrize("case", CASES)
def test_folded_identity_attention_gives_the_same_output(parity: Path, case: str) -> None:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.runtime.eager import EagerBackend

    _, t = read_case(parity / case)
    backend = EagerBackend(Checkpoint.open(parity / "checkpoint"), folded=True)
    hidden = {f"hidden_{i}": t[f"id_vit_hidden_{i}"] for i in range(5)}
    run = backend.runner
    fused = run("identity_fusion")(
        identity_text=t["t0_identity_prompt_embeds"], id_cond=t["id_cond"], **hidden
    )["fused"]
    face_tokens = run("identity_schedule")(
        fused=fused, id_cond=t["id_cond"], hidden_4=t["id_vit_hidden_4"], timesteps=t["t0_timestep"][:1]
    )["face_tokens"]
    shape = t["t0_hidden_states"].shape
    grid = (shape[1], shape[3] // 2, shape[4] // 2, -1)
    velocity = run("denoiser")(
        latents=t["t0_hidden_states"],
        text=combine_text_and_identity(t["t0_encoder_hidden_states"], t["t0_encoder_hidden_mask"], fused),
        timestep=t["t0_timestep"],
        face_tokens=face_tokens,
        identity_gate=torch.ones(1),
        rotary_cos=t["t0_rope_cos"].reshape(grid),
        rotary_sin=t["t0_rope_sin"].reshape(grid),
    )["velocity"]
    assert_close("velocity", velocity, t["t0_output"], TOLERANCES["parity", "transformer"])


@pytest.mark.parametrize("case", CASES)
def test_latents_of_every_step_and_the_frames(parity: Path, parity_pipeline: Pipeline, case: str) -> None:
    document, t = read_case(parity / case)
    steps: list[StepEvent] = []
    video = parity_pipeline.generate(
        request_of(parity / case, document, t), initial_latents=t["initial_latents"], on_step=steps.append
    )
    assert [event.index for event in steps] == list(range(document["num_inference_steps"]))
    for event in steps:
        want = t[f"latents_step_{event.index}"]
        assert_close(f"latents_step_{event.index}", event.latents, want, TOLERANCES["parity", "latents"])
    assert_close("frames", video.frames, t["frames"], TOLERANCES["parity", "frames"])
