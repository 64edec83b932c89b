"""The published pipeline's own numbers through an exported bundle, and the eager reference beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from proteus_deploy import GenerateRequest, IdentityFeatures, InputError, Pipeline
from proteus_deploy.model.identity_fusion import combine_text_and_identity
from proteus_deploy.testing import TOLERANCES, assert_close

pytest.importorskip("onnxruntime")

CASES = ["case_cfg_dpm", "case_dynamic_cfg_negative", "case_long_prompt_portrait"]


@pytest.fixture(scope="module")
def exported(parity_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(parity_bundle) as pipeline:
        yield pipeline


def first_step(pipeline: Pipeline, t: dict[str, Tensor]) -> Tensor:
    """The transformer's output on the recorded inputs of step 0, every stage on the pipeline's backend."""
    stages = pipeline.stages
    hidden = {f"hidden_{i}": t[f"id_vit_hidden_{i}"] for i in range(5)}
    fused = stages["identity_fusion"](
        identity_text=t["t0_identity_prompt_embeds"], id_cond=t["id_cond"], **hidden
    )["fused"]
    face_tokens = stages["identity_schedule"](
        fused=fused, id_cond=t["id_cond"], hidden_4=t["id_vit_hidden_4"], timesteps=t["t0_timestep"][:1]
    )["face_tokens"]
    text = combine_text_and_identity(t["t0_encoder_hidden_states"], t["t0_encoder_hidden_mask"], fused)
    return stages["denoiser"](
        latents=t["t0_hidden_states"], text=text, timestep=t["t0_timestep"], face_tokens=face_tokens
    )["velocity"]


def request_of(folder: Path, t: dict[str, Tensor]) -> tuple[GenerateRequest, dict[str, Any]]:
    case = json.loads((folder / "case.json").read_text())
    names = ("prompt", "identity_prompt", "negative_prompt", "height", "width", "num_frames", "seed")
    more = ("num_inference_steps", "guidance_scale", "use_dynamic_cfg", "max_sequence_length")
    fields = {name: case[name] for name in (*names, *more, "max_identity_length")}
    identity = IdentityFeatures(t["id_cond"], tuple(t[f"id_vit_hidden_{i}"] for i in range(5)))
    image = str(folder / "reference.png")
    return GenerateRequest(**fields, identity=identity, condition_image=image), case


def check_case(pipeline: Pipeline, eager: Pipeline, folder: Path) -> None:
    t = load_file(folder / "case.safetensors")
    got = first_step(pipeline, t)
    assert_close("velocity, eager", got, first_step(eager, t), TOLERANCES["onnx", "transformer", "fp32"])
    assert_close("velocity, published", got, t["t0_output"], TOLERANCES["onnx", "transformer", "fp32"])
    request, _ = request_of(folder, t)
    video = pipeline.generate(request, initial_latents=t["initial_latents"])
    assert_close("frames", video.frames, t["frames"], TOLERANCES["onnx", "frames", "fp32"])


@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime(exported: Pipeline, parity_pipeline: Pipeline, parity: Path, case: str) -> None:
    check_case(exported, parity_pipeline, parity / case)


@pytest.mark.slow
def test_openvino(parity_bundle: Path, parity_pipeline: Pipeline, parity: Path) -> None:
    pytest.importorskip("openvino")
    with Pipeline.from_bundle(parity_bundle, backend="openvino") as pipeline:
        check_case(pipeline, parity_pipeline, parity / "case_cfg_dpm")


def test_the_seed_alone_gives_the_eager_video(
    exported: Pipeline, parity_pipeline: Pipeline, small_request: Callable[..., GenerateRequest]
) -> None:
    video = exported.generate(small_request())
    want = parity_pipeline.generate(small_request())
    assert_close("frames", video.frames, want.frames, TOLERANCES["onnx", "frames", "fp32"])
    assert video.metadata["backend"] == "onnxruntime"
    assert torch.equal(video.frames, exported.generate(small_request()).frames)


def test_tiles_through_the_exported_decoder(
    parity_bundle: Path, exported: Pipeline, small_request: Callable[..., GenerateRequest]
) -> None:
    """Tiles are smaller than anything the untiled decoder is asked for: other sizes of the same graphs."""
    request = small_request(height=64, width=96)
    with Pipeline.from_bundle(parity_bundle, vae_tiling=True) as tiled:
        video = tiled.generate(request)
    assert video.frames.shape == exported.generate(request).frames.shape


USER = """
import sys
import numpy, torch
from proteus_deploy import GenerateRequest, IdentityFeatures, Pipeline
generator = torch.Generator().manual_seed(0)
states = tuple(torch.randn(1, 10, 16, generator=generator) for _ in range(5))
request = GenerateRequest(
    prompt="A woman waves", identity_prompt="A woman", height=32, width=48, num_frames=5,
    num_inference_steps=2, seed=7, condition_image=numpy.zeros((32, 48, 3), "uint8"),
    identity=IdentityFeatures(torch.randn(1, 1, 40, generator=generator), states),
)
with Pipeline.from_bundle(sys.argv[1]) as pipeline:
    print(list(pipeline.generate(request).frames.shape))
"""


@pytest.mark.slow
def test_copy_runs_without_its_checkpoint(parity_bundle: Path, tmp_path: Path) -> None:
    """In another folder, in another process that opens no file of the checkpoint or of the first copy."""
    copy = tmp_path / "moved here" / "bundle"
    shutil.copytree(parity_bundle, copy)
    watch = (
        'import sys; sys.addaudithook(lambda e, a: e == "open" and sys.stderr.write(f"opened {a[0]}\\n"))\n'
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", watch + USER, str(copy)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[1, 8, 3, 32, 48]"
    opened = [line for line in done.stderr.splitlines() if line.startswith("opened ")]
    assert any(str(copy) in line for line in opened)
    assert not [line for line in opened if "data/parity" in line or str(parity_bundle) in line]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 112}, r"height is 112; this bundle was exported for 32 to 96 \(axis y\)"),
        ({"width": 128}, r"width is 128; this bundle was exported for 32 to 96 \(axis x\)"),
        ({"num_frames": 21}, r"num_frames is 21; this bundle was exported for up to 17 \(axis f\)"),
    ],
)
def test_requests_outside_the_ranges(
    exported: Pipeline,
    parity_pipeline: Pipeline,
    small_request: Callable[..., GenerateRequest],
    fields: dict[str, int],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        exported.generate(small_request(**fields))
    parity_pipeline.generate(small_request(**fields, num_inference_steps=1))  # it has no such limit


def test_more_videos_than_the_batch_holds(
    exported: Pipeline, small_request: Callable[..., GenerateRequest]
) -> None:
    with pytest.raises(InputError, match=r"videos in a batch is 2; .* for up to 1 \(axis B\)"):
        exported.generate_batch([small_request(), small_request(seed=8)])


def test_largest_sizes_of_the_ranges_run(
    exported: Pipeline, small_request: Callable[..., GenerateRequest]
) -> None:
    request = small_request(height=96, width=96, num_frames=17, num_inference_steps=1)
    assert exported.generate(request).frames.shape == (1, 17, 3, 96, 96)
