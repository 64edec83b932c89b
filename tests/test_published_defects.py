"""What the published inference code gets wrong works here: one test per defect, each fails on that code.

Each docstring starts with the defect's number in the project's digest of that code (commit a768260).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from proteus_deploy import CheckpointError, GenerateRequest, IdentityFeatures, Pipeline, StepEvent
from proteus_deploy.guidance import guidance_scale
from proteus_deploy.stage_calls import Stage
from proteus_deploy.testing import TOLERANCES, assert_close

MakeCheckpoint = Callable[..., Path]
SmallRequest = Callable[..., GenerateRequest]
MakeIdentity = Callable[..., IdentityFeatures]


def latents_of(pipeline: Pipeline, request: GenerateRequest) -> Tensor:
    """The latents after the last step."""
    steps: list[StepEvent] = []
    pipeline.generate(request, on_step=steps.append)
    return steps[-1].latents


class Watched:
    """A stage whose calls go through a function of the test."""

    def __init__(self, stage: Stage, call: Callable[..., dict[str, Tensor]]) -> None:
        self.inputs = stage.inputs
        self._call = call

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self._call(**inputs)


def schedule_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "fused": torch.randn(1, 8, 64, generator=generator),
        "id_cond": torch.randn(1, 1, 40, generator=generator),
        "hidden_4": torch.randn(1, 10, 16, generator=generator),
    }


@pytest.mark.parametrize(
    ("layers", "interval", "sites"), [(3, 2, 2), (5, 2, 3), (4, 3, 2), (1, 2, 1), (2, 5, 1), (3, 1, 3)]
)
def test_odd_layer_counts_and_intervals_that_do_not_divide_them(
    make_checkpoint: MakeCheckpoint, small_request: SmallRequest, layers: int, interval: int, sites: int
) -> None:
    """1: as many identity attentions as are used, ceil(layers / interval), and each of them matters."""
    folder = make_checkpoint(num_layers=layers, cross_attn_interval=interval)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    found = {key.split(".")[1] for key in weights if key.startswith("perceiver_cross_attention")}
    assert found == {str(site) for site in range(sites)}
    inputs = {
        "latents": torch.randn(2, 2, 32, 4, 6),
        "text": torch.randn(2, 40, 64),
        "timestep": torch.tensor([9, 9]),
        "face_tokens": torch.randn(1, 8, 64),
    }
    with Pipeline.from_checkpoint(folder) as pipeline:
        before = pipeline.stages["denoiser"](**inputs)["velocity"]
    from safetensors.torch import save_file

    for site in range(sites):
        key = f"perceiver_cross_attention.{site}.to_out.weight"
        save_file({**weights, key: torch.zeros_like(weights[key])}, file)
        with Pipeline.from_checkpoint(folder) as pipeline:
            after = pipeline.stages["denoiser"](**inputs)["velocity"]
        assert not torch.allclose(before, after), f"identity attention {site} is not used"


def test_face_tokens_follow_every_timestep(parity_pipeline: Pipeline) -> None:
    """2: published, a batch of timesteps meets fused tokens of batch 1 and fails, or takes timesteps[0]."""
    inputs = schedule_inputs()
    timesteps = torch.tensor([999, 750, 750, 3, 0])
    schedule = parity_pipeline.stages["identity_schedule"]
    together = schedule(**inputs, timesteps=timesteps)["face_tokens"]
    assert together.shape == (5, 8, 64)
    for index in range(5):
        alone = schedule(**inputs, timesteps=timesteps[index : index + 1])["face_tokens"]
        assert_close(f"t={timesteps[index]}", together[index], alone[0], TOLERANCES["batch", "latents"])
    assert torch.equal(together[1], together[2])
    assert not torch.allclose(together[0], together[3])


def test_a_run_gives_each_step_the_face_tokens_of_its_own_timestep(
    parity: Path, small_request: SmallRequest
) -> None:
    """2: seen from the denoiser under guidance, in a schedule longer than one call may be (50)."""
    with Pipeline.from_checkpoint(parity / "checkpoint") as pipeline:
        schedule = pipeline.stages["identity_schedule"]
        given: list[tuple[int, Tensor]] = []
        kept: list[dict[str, Tensor]] = []

        def watch_denoiser(**inputs: Tensor) -> dict[str, Tensor]:
            given.append((int(inputs["timestep"][0]), inputs["face_tokens"]))
            assert inputs["latents"].shape[0] == 2
            return {"velocity": torch.zeros_like(inputs["latents"][:, :, :16])}

        def watch_schedule(**inputs: Tensor) -> dict[str, Tensor]:
            kept.append(inputs)
            return schedule(**inputs)

        replaced: Any = pipeline.stages
        replaced["denoiser"] = watch_denoiser
        replaced["identity_schedule"] = Watched(schedule, watch_schedule)
        pipeline.generate(small_request(num_inference_steps=60))
        assert [len(call["timesteps"]) for call in kept] == [50, 10]
        for timestep, tokens in given[::7]:
            once = {**kept[0], "timesteps": torch.tensor([timestep])}
            want = schedule(**once)["face_tokens"]
            assert_close(f"face tokens at {timestep}", tokens, want, TOLERANCES["batch", "latents"])


def test_the_denoiser_reads_fused_tokens_then_the_prompt_then_zeros(
    parity: Path, small_request: SmallRequest
) -> None:
    """3, 26: one identity in front of both prompts of the guidance pair, and no padding of the encoder."""
    with Pipeline.from_checkpoint(parity / "checkpoint") as pipeline:
        texts: list[Tensor] = []

        def keep(**given: Tensor) -> dict[str, Tensor]:
            texts.append(given["text"])
            return {"velocity": torch.zeros_like(given["latents"][:, :, :16])}

        stages: Any = pipeline.stages
        stages["denoiser"] = keep
        pipeline.generate(small_request(prompt="A woman", negative_prompt=""))
    negative, positive = texts[0]
    assert torch.equal(negative[:8], positive[:8])
    assert positive[8:10].abs().sum(dim=1).min() > 0
    assert negative[8].any(), "an empty prompt is one token, its end"
    assert not negative[9:].any()
    assert not positive[20:].any()


@pytest.mark.parametrize("guidance", [5.0, 1.0], ids=["guided", "unguided"])
def test_several_prompts_and_photos_in_one_batch(
    parity_pipeline: Pipeline,
    small_request: SmallRequest,
    identity: MakeIdentity,
    parity: Path,
    guidance: float,
) -> None:
    """3: each video of the batch is the one that its request gives alone."""
    images = [parity / case / "reference.png" for case in ("case_cfg_dpm", "case_dynamic_cfg_negative")]
    requests = [
        small_request(guidance_scale=guidance, seed=1),
        small_request(
            prompt="An old man reads",
            identity_prompt="An old man with a grey beard",
            negative_prompt="blurry",
            identity=identity(1),
            condition_image=images[1],
            guidance_scale=guidance,
            seed=2,
        ),
        small_request(prompt="A cat", identity=identity(2), guidance_scale=guidance, seed=1),
    ]
    steps: list[StepEvent] = []
    videos = parity_pipeline.generate_batch(requests, on_step=steps.append)
    assert len(videos) == 3
    assert steps[-1].latents.shape[0] == 3
    for index, request in enumerate(requests):
        own: list[StepEvent] = []
        alone = parity_pipeline.generate(request, on_step=own.append)
        for event, single in zip(steps, own, strict=True):
            name = f"video {index}, step {event.index}"
            assert_close(name, event.latents[index], single.latents[0], TOLERANCES["batch", "latents"])
        assert_close(f"frames {index}", videos[index].frames, alone.frames, TOLERANCES["parity", "frames"])
        assert videos[index].metadata["seed"] == request.seed


def test_several_videos_of_one_prompt(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    """6: the published pipeline forces one video per prompt; here seeds of a batch give several."""
    videos = parity_pipeline.generate_batch([small_request(seed=seed) for seed in (0, 1, 2)])
    frames = [video.frames for video in videos]
    assert all(not torch.allclose(frames[i], frames[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.0])
def test_without_guidance(parity_pipeline: Pipeline, small_request: SmallRequest, scale: float) -> None:
    """4: one row a step instead of two, no negative prompt, and no error."""
    request = small_request(guidance_scale=scale, negative_prompt="blurry", use_dynamic_cfg=True)
    assert not request.guided
    rows: list[int] = []
    denoiser = parity_pipeline.stages["denoiser"]

    def watch(**inputs: Tensor) -> dict[str, Tensor]:
        rows.append(inputs["latents"].shape[0])
        return denoiser(**inputs)

    stages: Any = parity_pipeline.stages
    try:
        stages["denoiser"] = watch
        got = latents_of(parity_pipeline, request)
    finally:
        stages["denoiser"] = denoiser
    assert rows == [1, 1]
    # A guided run whose negative prompt equals its prompt predicts the same velocity.
    same = small_request(guidance_scale=3.0, negative_prompt=request.prompt)
    assert_close("latents", got, latents_of(parity_pipeline, same), TOLERANCES["batch", "latents"])


def test_corrected_dynamic_guidance_falls_with_the_step() -> None:
    """5: from 1 + g at the first step towards 1 at the last, whatever the timesteps are."""
    request = GenerateRequest(
        "x", guidance_scale=6.0, use_dynamic_cfg=True, dynamic_cfg="corrected", num_inference_steps=50
    )
    scales = [guidance_scale(request, index, 999 - 20 * index) for index in range(50)]
    assert scales[0] == pytest.approx(7.0)
    assert scales[-1] == pytest.approx(1.0, abs=1e-6)
    assert all(before >= after for before, after in pairwise(scales))
    assert scales[10] == pytest.approx(1 + 6 * (1 - math.cos(math.pi * 0.8**5)) / 2)


def test_published_dynamic_guidance_is_kept_for_its_seeds() -> None:
    """5: the published scale reads the timestep, so it swings; one seed must still give that video."""
    request = GenerateRequest("x", guidance_scale=4.0, use_dynamic_cfg=True, num_inference_steps=5)
    # 1 + 4 (1 - cos(pi ((5 - t) / 5)^5)) / 2, by hand for two timesteps.
    assert guidance_scale(request, 0, 0) == pytest.approx(5.0)
    assert guidance_scale(request, 3, 5) == pytest.approx(1.0)
    scales = [guidance_scale(request, index, t) for index, t in enumerate((999, 799, 599, 399, 199))]
    assert scales != sorted(scales, reverse=True)


def test_dynamic_guidance_forms_give_different_videos(
    parity_pipeline: Pipeline, small_request: SmallRequest
) -> None:
    """5, through the whole pipeline."""
    runs = [
        latents_of(parity_pipeline, small_request(use_dynamic_cfg=dynamic, dynamic_cfg=form))
        for dynamic, form in ((False, "published"), (True, "published"), (True, "corrected"))
    ]
    assert all(not torch.allclose(runs[i], runs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_keypoints_are_drawn_on_the_condition_image_itself(
    make_checkpoint: MakeCheckpoint, small_request: SmallRequest, identity: MakeIdentity
) -> None:
    """8: published, points of the original photo are drawn on the aligned crop."""
    import numpy as np

    points = torch.tensor([[20.0, 20.0], [70.0, 22.0], [45.0, 33.0], [25.0, 50.0], [66.0, 51.0]])
    with Pipeline.from_checkpoint(make_checkpoint(is_kps=True)) as pipeline:
        encoder = pipeline.stages["vae_encoder"]
        images: list[Tensor] = []
        inputs: list[Tensor] = []

        def watch(**given: Tensor) -> dict[str, Tensor]:
            images.append(given["image"])
            return encoder(**given)

        def stop(**given: Tensor) -> dict[str, Tensor]:
            inputs.append(given["latents"])
            return {"velocity": torch.zeros_like(given["latents"][:, :, :16])}

        stages: Any = pipeline.stages
        stages["vae_encoder"], stages["denoiser"] = watch, stop
        picture = np.full((64, 96, 3), 40, dtype=np.uint8)
        request = small_request(
            identity=identity(keypoints=points), condition_image=picture, height=64, width=96, num_frames=13
        )
        pipeline.generate(request)
        without = small_request(condition_image=picture, height=64, width=96, num_frames=13)
        first = inputs[0][0, :, 16:]
        inputs.clear()
        pipeline.generate(without)
    drawing = (images[1][0] + 1) / 2
    for x, y in points.long().tolist():
        assert drawing[:, y, x].sum() > 0.5, "a disc stands at every keypoint"
    assert not drawing[:, 0, 95].any()
    condition = first.abs().amax(dim=(1, 2, 3))
    assert (condition[:2] > 0).all()
    assert not condition[2:].any()
    assert inputs[0][0, 1:, 16:].abs().max() == 0, "without keypoints frame 1 stays empty"


def test_everything_runs_on_a_cpu(parity: Path, small_request: SmallRequest) -> None:
    """9: published, the device is the literal "cuda"."""
    with Pipeline.from_checkpoint(parity / "checkpoint", device="cpu", dtype="bfloat16") as pipeline:
        video = pipeline.generate(small_request())
    assert video.frames.device.type == "cpu"
    assert video.frames.dtype == torch.float32
    assert video.frames.isfinite().all()


def test_seed_0_is_a_seed(parity_pipeline: Pipeline, small_request: SmallRequest) -> None:
    """10: published, 0 means that none was given, so two runs differ."""
    zero = parity_pipeline.generate(small_request(seed=0))
    again = parity_pipeline.generate(small_request(seed=0))
    assert torch.equal(zero.frames, again.frames)
    assert zero.metadata["seed"] == 0
    assert not torch.allclose(zero.frames, parity_pipeline.generate(small_request(seed=1)).frames)
    drawn = parity_pipeline.generate(small_request(seed=None))
    assert drawn.metadata["seed"] not in (None, 0)
    assert torch.equal(
        drawn.frames, parity_pipeline.generate(small_request(seed=drawn.metadata["seed"])).frames
    )


def test_a_checkpoint_without_the_token_adapter_is_refused(
    make_checkpoint: MakeCheckpoint, write_transformer: Callable[..., None]
) -> None:
    """12: the published save leaves fuse_token_adapter out, and its load says nothing."""
    folder = make_checkpoint()
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    adapter = [key for key in weights if key.startswith("fuse_token_adapter")]
    assert len(adapter) == 10
    config = json.loads((folder / "transformer" / "config.json").read_text())
    write_transformer(folder, config, {key: weights[key] for key in weights if key not in adapter})
    with Pipeline.from_checkpoint(folder) as pipeline, pytest.raises(CheckpointError) as refusal:
        pipeline.backend.runner("denoiser")
    assert all(f"missing: {key} " in str(refusal.value) for key in adapter)


def test_parameters_that_nothing_uses_are_accounted_for(parity: Path, parity_pipeline: Pipeline) -> None:
    """13: they are in every published file, so they load, and they change nothing."""
    from proteus_deploy.runtime.eager import EagerGraph

    unused = {"latents", "proj_out.0.weight", "proj_out.0.bias", "proj_out.1.weight", "proj_out.1.bias"}
    runner = parity_pipeline.backend.runner("identity_schedule")
    assert isinstance(runner, EagerGraph)
    state = runner.module.state_dict()
    inputs = schedule_inputs() | {"timesteps": torch.tensor([500])}
    before = runner(**inputs)["face_tokens"]
    saved = {key: value.clone() for key, value in state.items()}
    try:
        for name in unused:
            state[f"fuse_facital_attention.{name}"].fill_(float("nan"))
        assert torch.equal(runner(**inputs)["face_tokens"], before)
    finally:
        runner.module.load_state_dict(saved)


LINEAGE_1_5 = {"patch_size_t": 2, "ofs_embed_dim": 48, "patch_bias": False}


@pytest.mark.parametrize("inverted", [False, True], ids=["scaled", "inverted scale"])
@pytest.mark.parametrize("num_frames", [9, 13], ids=["3 latent frames", "4 latent frames"])
def test_cogvideox_1_5_pads_in_front_and_inverts_the_image_scale(
    make_checkpoint: MakeCheckpoint,
    small_request: SmallRequest,
    parity: Path,
    num_frames: int,
    inverted: bool,
) -> None:
    """16, 17: a whole run equals diffusers' 1.5 pipeline on the same embeddings, identity attention off."""
    import diffusers
    from PIL import Image

    folder = make_checkpoint(vae={"invert_scale_latents": inverted}, **LINEAGE_1_5)
    request = small_request(
        num_frames=num_frames, height=64, width=96, identity_scale=0.0, num_inference_steps=3
    )
    steps: list[StepEvent] = []
    given: list[Tensor] = []
    with Pipeline.from_checkpoint(folder) as pipeline:
        denoiser = pipeline.stages["denoiser"]

        def watch(**inputs: Tensor) -> dict[str, Tensor]:
            given.append(inputs["text"])
            return denoiser(**inputs)

        stages: Any = pipeline.stages
        stages["denoiser"] = watch
        video = pipeline.generate(request, on_step=steps.append)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    backbone = diffusers.CogVideoXTransformer3DModel.from_config(config)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    backbone.load_state_dict({key: weights[key] for key in backbone.state_dict()})
    scheduler = json.loads((parity / "checkpoint/scheduler/scheduler_config.json").read_text())
    theirs: Any = diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        transformer=backbone,
        scheduler=diffusers.CogVideoXDPMScheduler.from_config(scheduler),
    )
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(request.condition_image, Path)
    with Image.open(request.condition_image) as image:
        frames = theirs(
            image=image.convert("RGB"),
            prompt_embeds=given[0][1:],
            negative_prompt_embeds=given[0][:1],
            height=64,
            width=96,
            num_frames=num_frames,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(request.seed or 0),
            output_type="pt",
        ).frames
    assert steps[-1].latents.shape[1] == 4
    assert_close("frames", video.frames, frames, TOLERANCES["parity", "frames"])


def test_keypoints_of_1_5_take_the_same_scale_as_the_image(
    make_checkpoint: MakeCheckpoint, small_request: SmallRequest, identity: MakeIdentity
) -> None:
    """17: published, the keypoints' latents are multiplied where the image's are divided."""
    points = torch.tensor([[20.0, 20.0], [70.0, 22.0], [45.0, 33.0], [25.0, 50.0], [66.0, 51.0]])
    seen: dict[bool, Tensor] = {}
    for inverted in (False, True):
        folder = make_checkpoint(
            f"inverted {inverted}", vae={"invert_scale_latents": inverted}, is_kps=True, **LINEAGE_1_5
        )
        with Pipeline.from_checkpoint(folder) as pipeline:

            def keep(inverted: bool = inverted, **given: Tensor) -> dict[str, Tensor]:
                seen[inverted] = given["latents"][0, :, 16:]
                return {"velocity": torch.zeros_like(given["latents"][:, :, :16])}

            stages: Any = pipeline.stages
            stages["denoiser"] = keep
            pipeline.generate(small_request(identity=identity(keypoints=points), num_frames=9))
    scaling_factor = 0.7
    want = seen[False] / scaling_factor**2
    assert (want[:2].abs().amax(dim=(1, 2, 3)) > 0).all()
    assert_close("image and keypoints", seen[True], want, TOLERANCES["kernel", "float32"])


def test_a_width_whose_two_thirds_are_not_the_face_tokens_width(
    make_checkpoint: MakeCheckpoint, small_request: SmallRequest
) -> None:
    """18: CogVideoX-2B is 1920 wide; published, identity attention then expects 1280 instead of 2048."""
    folder = make_checkpoint(num_attention_heads=2)
    with Pipeline.from_checkpoint(folder) as pipeline:
        assert pipeline.config.backbone.width * 2 // 3 != pipeline.config.identity_attention.face_dim
        assert pipeline.generate(small_request()).frames.isfinite().all()


def test_weights_made_for_two_thirds_of_the_width_are_named(
    make_checkpoint: MakeCheckpoint, write_transformer: Callable[..., None]
) -> None:
    """18, the other way round: a file written with the published rule does not fit, and says where."""
    folder = make_checkpoint(num_attention_heads=2)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    key = "perceiver_cross_attention.0.to_kv.weight"
    weights[key] = weights[key][:, :42].contiguous()
    config = json.loads((folder / "transformer" / "config.json").read_text())
    write_transformer(folder, config, weights)
    with (
        Pipeline.from_checkpoint(folder) as pipeline,
        pytest.raises(CheckpointError, match=rf"wrong shape: {key} is \[128, 42\], .* asks for \[128, 64\]"),
    ):
        pipeline.backend.runner("denoiser")
