"""The loop: settings, when it stops, what it keeps, going on after an interruption to the same bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from proteus_deploy.adapters import TimestepGate
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import Cancelled, ComputationError, InputError
from proteus_deploy.model.config import BackboneConfig
from proteus_deploy.personalize.loop import Evaluation, Progress, TrainingLoop
from proteus_deploy.personalize.settings import PersonalizeSettings
from proteus_deploy.personalize.trainable import TrainableAdapter

SETTINGS = PersonalizeSettings(rank=2, videos=2, steps=6, evaluate_every=2, learning_rate=0.1, batch_size=2)


@pytest.fixture(scope="module")
def config(parity: Path) -> BackboneConfig:
    return Checkpoint.open(parity / "checkpoint").transformer.backbone


class Course:
    """A loop whose loss pulls `up` towards random targets and whose evaluations are given."""

    def __init__(
        self,
        config: BackboneConfig,
        folder: Path,
        evaluations: Sequence[tuple[float, float]] = ((0.1, 1), (0.2, 1), (0.3, 1), (0.4, 1)),
        settings: PersonalizeSettings = SETTINGS,
        **inputs: Any,
    ) -> None:
        self.adapter = TrainableAdapter(config, settings)
        self.evaluations, self.settings = evaluations, settings
        self.seen: dict[int, Tensor] = {}
        self.places: list[int] = []
        self.loop = TrainingLoop(self.adapter, settings, folder, inputs)

    def train(self, **options: Any) -> Progress:
        self.loop.train(self.loss, self.evaluate, **options)
        self.loop.take_best()
        return self.loop.progress

    def loss(self, place: int, generator: Generator) -> tuple[Tensor | None, Mapping[str, float]]:
        self.places.append(place)
        target = torch.randn(self.adapter.up.shape, generator=generator)
        loss = (self.adapter.up - target).square().mean()
        return loss, {"identity_loss": float(loss.detach())}

    def evaluate(self, step: int) -> Evaluation:
        self.seen[step] = self.adapter.up.detach().clone()
        return Evaluation(step, *self.evaluations[step // self.settings.evaluate_every])


def test_all_steps(config: BackboneConfig, tmp_path: Path) -> None:
    course = Course(config, tmp_path)
    progress = course.train()
    assert (progress.step, progress.stopped) == (6, "all steps")
    assert [one.step for one in progress.evaluations] == [0, 2, 4, 6]
    assert course.places == list(range(12))
    assert not torch.equal(course.seen[2], course.seen[4])
    assert torch.equal(course.adapter.up, course.seen[6])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("evaluations", "stopped", "step", "best"),
    [
        (((0.1, 1), (0.3, 1), (0.2, 1), (0.25, 1)), "reward turned", 6, 2),
        (((0.1, 1), (0.3, 1), (0.4, 0.9), (0.5, 1)), "motion fell", 4, 2),
        (((0.1, 1), (0.3, 0.96), (0.2, 2), (0.4, 0.97)), "all steps", 6, 6),
        (((0.5, 1), (0.3, 1), (0.4, 1), (0.6, 1)), "reward turned", 4, 0),
    ],
)
def test_stopping(
    config: BackboneConfig,
    tmp_path: Path,
    evaluations: Sequence[tuple[float, float]],
    stopped: str,
    step: int,
    best: int,
) -> None:
    """patience 2, motion_loss 5%: the best that moves enough is what remains."""
    course = Course(config, tmp_path, evaluations)
    progress = course.train()
    assert (progress.stopped, progress.step) == (stopped, step)
    assert progress.best(SETTINGS).step == best
    assert torch.equal(course.adapter.up, course.seen[best])


def test_it_goes_on_to_the_same_bits(config: BackboneConfig, tmp_path: Path) -> None:
    whole = Course(config, tmp_path / "whole")
    whole.train()
    cancel = Event()
    first = Course(config, tmp_path / "parts")

    def stop_at_three(_: str, done: int, __: int) -> None:
        if done == 3:
            cancel.set()

    with pytest.raises(Cancelled, match="step 3 of 6; the same command goes on"):
        first.train(report=stop_at_three, cancel=cancel)
    second = Course(config, tmp_path / "parts")
    progress = second.train()
    assert torch.equal(second.adapter.up, whole.adapter.up)
    assert torch.equal(second.adapter.down, whole.adapter.down)
    assert progress.evaluations == whole.loop.progress.evaluations
    assert second.places == list(range(6, 12))
    assert len((tmp_path / "parts/log.jsonl").read_text().splitlines()) == 6
    third = Course(config, tmp_path / "parts")
    assert third.loop.progress.stopped == "all steps"  # finished: nothing more is computed
    assert third.places == []
    third.loop.take_best()
    assert torch.equal(third.adapter.up, whole.adapter.up)


def test_other_settings_or_inputs_are_refused(config: BackboneConfig, tmp_path: Path) -> None:
    Course(config, tmp_path, photo="a").train()
    with pytest.raises(InputError, match="rank"):
        Course(config, tmp_path, settings=replace(SETTINGS, rank=3), photo="a").train()
    with pytest.raises(InputError, match="photo = 'a', now it is 'b'"):
        Course(config, tmp_path, photo="b").train()


def test_a_video_without_a_face_teaches_nothing(
    config: BackboneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No optimiser step: weight decay and moments would move the factors."""
    course = Course(config, tmp_path)
    monkeypatch.setattr(course, "loss", lambda *_: (None, {}))
    before = [value.detach().clone() for value in course.adapter.parameters()]
    course.train()
    assert all(torch.equal(*pair) for pair in zip(course.adapter.parameters(), before, strict=True))
    assert not course.loop._optimiser.state


def test_broken_losses_stop_it(
    config: BackboneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = Course(config, tmp_path)
    monkeypatch.setattr(course, "loss", lambda *_: (course.adapter.up.sum() * math.nan, {}))
    with pytest.raises(ComputationError, match=r"loss is nan at step 0; .* learning_rate, in another folder"):
        course.train()


def test_verdict_counts_from_the_best() -> None:
    settings = replace(SETTINGS, patience=1)
    rows = [Evaluation(0, 0.1, 1.0), Evaluation(2, 0.3, 1.0), Evaluation(4, 0.2, 1.0)]
    assert Progress(evaluations=rows[:2]).verdict(settings) is None
    assert Progress(evaluations=rows).verdict(settings) == "reward turned"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rank": 513}, "rank is 513; choose 1 to 512"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"semantic_weight": -1.0}, "semantic_weight is -1.0"),
        ({"identity_weight": 0.0, "semantic_weight": 0.0}, "nothing would be learnt"),
        ({"motion_loss": 1.5}, "motion_loss is 1.5"),
        ({"projections": "to_q,to_w"}, "projections is 'to_q,to_w'; choose some of to_q, to_k"),
        ({"projections": "to_q,to_q"}, "each once"),
        ({"recognisers": "arc"}, "recognisers is 'arc'; choose some of glint, curricular"),
        ({"gradient_steps": 60}, "gradient_steps is 60; a video has 50 steps"),
        ({"videos": 9, "steps": 4, "batch_size": 2}, "videos is 9, and 4 steps of 2 reach only 8 of them"),
        ({"gate_low": 250}, "the gate is 250 to 250"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        PersonalizeSettings(**wrong)


def test_trainable(config: BackboneConfig) -> None:
    settings = replace(SETTINGS, projections="to_v, to_out.0", first_block=1)
    trainable = TrainableAdapter(config, settings)
    inputs = trainable.at(torch.float32, torch.device("cpu"))
    shape = (1, config.num_layers, 4, 2, config.width)
    assert inputs(100, 2)["adapter_down"].shape == inputs(100, 2)["adapter_up"].shape == shape
    assert inputs(249, 2)["adapter_scale"].tolist() == [[1, 1]]
    assert inputs(250, 2)["adapter_scale"].tolist() == [[0, 0]]
    used = inputs(0, 1)["adapter_down"][0].abs().amax(dim=(2, 3)) > 0
    assert not used[0].any()
    assert used[1:].equal(torch.tensor([False, False, True, True]).expand(config.num_layers - 1, 4))
    with torch.no_grad():
        trainable.up.add_(1)
    adapter = trainable.adapter(name="anna", base="b", person="p")
    assert set(adapter.factors) == {
        f"transformer_blocks.{block}.attn1.{name}"
        for block in range(1, config.num_layers)
        for name in ("to_v", "to_out.0")
    }
    factors = adapter.factors["transformer_blocks.1.attn1.to_v"]
    assert torch.equal(factors.down, trainable.down[1, 2])
    assert torch.equal(factors.up, trainable.up[1, 2].mT)
    assert adapter.gate == TimestepGate(0, 250)
    with pytest.raises(InputError, match=f"this denoiser has blocks 0 to {config.num_layers - 1}"):
        TrainableAdapter(config, replace(SETTINGS, last_block=config.num_layers))
