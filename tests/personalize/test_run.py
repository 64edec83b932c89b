"""A whole run on the tiny model: interrupted and gone on with, used by the pipeline, without gain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from proteus_deploy import GenerateRequest
from proteus_deploy.adapters import AdapterUse
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import Cancelled, ComputationError
from proteus_deploy.evaluate.encoders import load_encoders
from proteus_deploy.personalize.face_reward import FaceReward
from proteus_deploy.personalize.held_out import HeldOut
from proteus_deploy.personalize.model import PersonalModel
from proteus_deploy.personalize.networks import DifferentiableBackend
from proteus_deploy.personalize.run import NoImprovementError, Outcome, Person, personalize
from proteus_deploy.personalize.settings import PersonalizeSettings
from proteus_deploy.personalize.tail import TailSampler
from proteus_deploy.personalize.trainable import TrainableAdapter
from proteus_deploy.tiny.trained import ENCODERS, MODEL
from proteus_deploy.training.avatars import make_photo

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

TEMPLATES = ["{person} nods", "{person} blinks", "{person} stands still"]
PERSON = Person(make_photo(33, 0).image, "an older man", "bald")
# Timesteps 999, 799, 599, 399, 199: the gate opens at the last but one.
SETTINGS = PersonalizeSettings(
    rank=4,
    gate_high=450,
    videos=1,
    num_inference_steps=5,
    guidance_scale=1.0,
    faces=2,
    views=1,
    steps=3,
    learning_rate=2e-3,
    held_out=1,
    evaluate_every=3,
    motion_loss=1.0,
)


def train(folder: Path, settings: PersonalizeSettings = SETTINGS, **options: Any) -> Outcome:
    with PersonalModel.from_checkpoint(MODEL) as model:
        return personalize(
            model, PERSON, TEMPLATES, load_encoders(ENCODERS), folder, settings=settings, **options
        )


def lines_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


@pytest.mark.slow
def test_interrupted_and_gone_on_with(tmp_path: Path) -> None:
    """From kept heads, DPM-Solver++'s memory and the optimiser's state: the same adapter, the same log."""
    whole = train(tmp_path / "whole")
    assert all(line["face_found"] == 1 for line in lines_of(tmp_path / "whole"))
    cancel = Event()

    def stop(phase: str, done: int, _: int) -> None:
        if (phase, done) == ("training", 1):
            cancel.set()

    with pytest.raises(Cancelled, match="stopped at step 1 of 3"):
        train(tmp_path / "parts", report=stop, cancel=cancel)
    heads = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts/heads").iterdir()}
    assert len(heads) == 2
    parts = train(tmp_path / "parts")
    assert parts.adapter.hash == whole.adapter.hash
    assert parts.progress.evaluations == whole.progress.evaluations
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    assert heads == {file: file.stat().st_mtime_ns for file in (tmp_path / "parts/heads").iterdir()}
    assert parts.progress.seconds > 0


@pytest.mark.slow
def test_the_pipeline_makes_the_video_that_was_trained(tmp_path: Path) -> None:
    """What the tail computes with an adapter's inputs is what `generate` makes with the adapter."""
    with PersonalModel.from_checkpoint(MODEL) as model:
        pipeline = model.pipeline
        trainable = TrainableAdapter(pipeline.config.backbone, SETTINGS)
        with torch.no_grad():
            trainable.up.normal_(std=0.02)
        request = GenerateRequest(
            "an older man nods",
            identity_prompt="an older man",
            photo=PERSON.photo,
            num_inference_steps=5,
            guidance_scale=1.0,
            seed=3,
        )
        sampler = TailSampler(model.backend, SETTINGS.gate)
        head = sampler.head(pipeline.start(request))
        assert head.index == 3
        with torch.no_grad():
            inputs = trainable.at(torch.float32, torch.device("cpu"))
            tail = sampler.frames(head, sampler.finish(head, inputs), whole=True)
            plain = sampler.frames(head, sampler.finish(head, None), whole=True)
        use = AdapterUse(trainable.adapter(name="a", base=model.base, person=None))
        video = pipeline.generate(replace(request, adapters=(use,))).frames[0]
    assert torch.allclose(tail, video, atol=1e-5)
    assert (tail - plain).abs().max() > 0.01, "the adapter changes the video"


@pytest.mark.slow
def test_without_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = iter([0.5, 0.4])
    monkeypatch.setattr(FaceReward, "similarity", lambda *_: next(rewards))
    short = replace(SETTINGS, steps=1, evaluate_every=1)
    with pytest.raises(
        NoImprovementError, match=r"none of 1 evaluations .* 0\.500; .* in another folder"
    ) as found:
        train(tmp_path, short)
    assert found.value.seconds > 0
    assert not (tmp_path / "adapter.safetensors").exists()


@pytest.mark.slow
def test_videos_without_a_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaceReward, "loss", lambda *_: None)
    monkeypatch.setattr(HeldOut, "_preview", lambda *_: None)
    with pytest.raises(
        ComputationError, match="no face is found in the first frames of any of the 1 training"
    ):
        train(tmp_path)


def test_recomputed_activations_give_the_same_gradients() -> None:
    """Blocks and stages run once more on the way back, to the same gradients."""
    checkpoint = Checkpoint.open(MODEL)
    found: dict[bool, dict[str, tuple[int, torch.Tensor]]] = {}
    for again in (False, True):
        backend = DifferentiableBackend.of_checkpoint(checkpoint, gradient_checkpointing=again)
        found[again] = {name: gradient_of(backend, name) for name in ("denoiser", "vae_decoder_first_3")}
    for name, (calls, gradient) in found[False].items():
        more, same = found[True][name]
        assert (calls, more) == (1, 2), name
        assert gradient.abs().max() > 0
        assert torch.allclose(same, gradient, atol=1e-6)


def gradient_of(backend: DifferentiableBackend, name: str) -> tuple[int, torch.Tensor]:
    """How often the first block's product runs, and the gradient of the latents."""
    runner: Any = backend.runner(name)
    module = runner.__self__.module
    inside = "transformer_blocks.0.attn1.to_q" if name == "denoiser" else "decoder.mid_block.resnets.0.conv1"
    block = module.get_submodule(inside)
    calls: list[int] = []
    block.register_forward_hook(lambda *_: calls.append(1))
    if name == "denoiser":
        latents, inputs = denoiser_inputs(backend)
    else:
        latents, inputs = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)), {}
    latents.requires_grad_()
    output = next(iter(runner(latents=latents, **inputs).values()))
    output.square().mean().backward()
    assert latents.grad is not None
    return len(calls), latents.grad


def denoiser_inputs(backend: DifferentiableBackend) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from proteus_deploy.stages import sample_inputs

    graph = backend.table.graph("denoiser")
    samples = dict(sample_inputs(graph, backend.table.sizes("min")))
    latents = samples.pop("latents").clone()
    return latents, {name: value for name, value in samples.items() if not graph.input(name).optional}
