"""The training loop in one process: what is trained, to which numbers, and how it goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import Cancelled, ComputationError, InputError
from proteus_deploy.testing import TOLERANCES, assert_close
from proteus_deploy.training.loop import STATE_FILE, Schedule, Trainer
from proteus_deploy.training.settings import TrainSettings
from proteus_deploy.training.state import load_tensors

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings_of(fake: ModuleType, **changes: Any) -> TrainSettings:
    return TrainSettings(**{**fake.SETTINGS, "steps": 2, "batch_size": 2, "micro_batch": 0, **changes})


def trained(fake: ModuleType, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Weights after a short run, by their names in the module."""
    trainer = fake.make_trainer(folder, settings_of(fake, **changes))
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.network.state_dict().items()}


def stopping_at(step: int) -> dict[str, Any]:
    """Arguments of `train` under which it is asked to stop at this step."""
    cancel = Event()

    def report(_phase: str, done: int, _total: int) -> None:
        if done == step:
            cancel.set()

    return {"report": report, "cancel": cancel}


def start(fake: ModuleType) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in fake.small_network().state_dict().items()}


def test_identity_leaves_the_backbone_as_it_was(fake: ModuleType, tmp_path: Path) -> None:
    before, after = start(fake), trained(fake, tmp_path, trainable="identity")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    backbone = {name for name in before if name.startswith("denoiser.") and "perceiver" not in name}
    assert backbone
    assert not moved & backbone
    assert {name.partition(".")[0] for name in moved} == {"fusion", "schedule", "denoiser"}
    state, _ = load_tensors(tmp_path / STATE_FILE)
    assert not {name for name in state if name.partition(".")[2] in backbone}, "frozen weights were saved"


def test_all_trains_all_but_what_nothing_reads(fake: ModuleType, tmp_path: Path) -> None:
    before, after = start(fake), trained(fake, tmp_path, trainable="all")
    same = {name for name in before if torch.equal(before[name], after[name])}
    names = {name for name, _ in fake.small_network().named_parameters()}
    assert same & names == {
        name
        for name in names
        if "fuse_facital_attention.latents" in name or "fuse_facital_attention.proj_out." in name
    }


def test_checkpointed_gradients_are_the_same(fake: ModuleType, tmp_path: Path) -> None:
    plain = trained(fake, tmp_path / "plain", steps=1)
    again = trained(fake, tmp_path / "again", steps=1, gradient_checkpointing=True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_parts_of_a_batch_are_the_batch(fake: ModuleType, tmp_path: Path) -> None:
    """Weights, masks and dropout are on; a part that counted by its mask's area would show."""
    same = {"batch_size": 4, "epsilon": 1.0, "weight_decay": 0.0, "learning_rate": 0.3}
    whole = trained(fake, tmp_path / "whole", **same)
    parts = trained(fake, tmp_path / "parts", **same, micro_batch=1)
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [line["step"] for line in first] == [1, 2]
    for one, other in zip(first, second, strict=True):
        for key in ("loss", "unweighted_loss", "norm"):
            assert_close(key, other[key], one[key], TOLERANCES["training", "loss"])
        assert one["clips_without_mask"] == other["clips_without_mask"]
    change = {name: whole[name] - value for name, value in start(fake).items()}
    assert_close(
        "change of the weights",
        torch.cat([(parts[name] - value).flatten() for name, value in start(fake).items()]),
        torch.cat([value.flatten() for value in change.values()]),
        TOLERANCES["training", "weights"],
    )


def test_bf16_runs(fake: ModuleType, tmp_path: Path) -> None:
    """Weights stay float32; the loss is near that of float32, and not the same."""
    after = trained(fake, tmp_path / "bf16", mixed_precision="bf16", steps=1)
    assert {value.dtype for value in after.values()} == {torch.float32}
    trained(fake, tmp_path / "fp32", steps=1)
    first, second = (json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("bf16", "fp32"))
    assert first["loss"] != second["loss"]
    assert first["loss"] == pytest.approx(second["loss"], rel=4e-2)  # ten roundings of 4e-3 on a path


def test_averages_by_hand(fake: ModuleType, tmp_path: Path) -> None:
    """Kept: min(decay, (1 + k) / (10 + k)) after step k; the checkpoint holds the average, not the weight."""
    settings = settings_of(fake, steps=3, ema=0.15)
    seen, given = [], {}

    def keep(step: int, weights: Mapping[str, Tensor]) -> None:
        given.update({name: value.clone() for name, value in weights.items()})

    trainer: Trainer = fake.make_trainer(tmp_path, settings, on_checkpoint=keep)
    name = "denoiser.proj_out.weight"
    expected = trainer.parameters[name].detach().double()

    def note(phase: str, done: int, total: int) -> None:
        if done:
            seen.append(trainer.parameters[name].detach().double())

    trainer.train(report=note)
    for weight, kept in zip(seen, (0.1, 0.15, 0.15), strict=True):
        expected = kept * expected + (1 - kept) * weight
    torch.testing.assert_close(given["proj_out.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(given["proj_out.weight"].double(), seen[-1])
    assert torch.equal(trainer.parameters[name].detach().double(), seen[-1]), "averaging moved the weights"


def test_stopping_and_going_on_gives_the_same_bits(fake: ModuleType, tmp_path: Path) -> None:
    """Stopped after each step, a new trainer each time: weights, averages, AdamW, log."""
    settings = settings_of(fake, steps=4)
    fake.make_trainer(tmp_path / "whole", settings).train()
    for stop in (0, 1, 3):
        with pytest.raises(Cancelled, match=f"stopped at step {stop} of 4; the same command goes on"):
            fake.make_trainer(tmp_path / "parts", settings).train(**stopping_at(stop))
    fake.make_trainer(tmp_path / "parts", settings).train()
    for file in (STATE_FILE, "weights.safetensors"):
        whole, parts = (load_tensors(tmp_path / name / file)[0] for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole), file
    state, facts = load_tensors(tmp_path / "parts" / STATE_FILE)
    assert facts["step"] == 4
    assert state["adam.step.denoiser.proj_out.weight"] == 4
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [line["step"] for line in second] == [1, 4]
    assert [line["loss"] for line in second] == [line["loss"] for line in first]


def test_lost_steps_leave_the_log(fake: ModuleType, tmp_path: Path) -> None:
    """Killed at step 3 after a state of step 1, in the middle of a line."""
    settings = settings_of(fake, steps=4)
    with pytest.raises(Cancelled):
        fake.make_trainer(tmp_path, settings, schedule=Schedule(1)).train(**stopping_at(1))
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    (tmp_path / "samples.jsonl").write_text('{"step": 2, "face_sim_arc": {}}\n')
    fake.make_trainer(tmp_path, settings, schedule=Schedule(1)).train()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["loss"] != 1.0
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_a_checkpoint_that_is_missing_is_made_again(fake: ModuleType, tmp_path: Path) -> None:
    settings, made = settings_of(fake, steps=2), []

    def keep(step: int, _weights: Mapping[str, Tensor]) -> None:
        made.append(step)

    def has(step: int) -> bool:
        return len(made) > 1

    for _ in range(3):
        fake.make_trainer(tmp_path, settings, on_checkpoint=keep, has_checkpoint=has).train()
    assert made == [2, 2]
    fake.make_trainer(tmp_path / "often", settings, on_checkpoint=keep, schedule=Schedule(0, 1)).train()
    assert made == [2, 2, 1, 2]
    assert not (tmp_path / "often" / "log.jsonl").exists()


def test_another_run_in_the_folder_is_refused(fake: ModuleType, tmp_path: Path) -> None:
    settings = settings_of(fake, steps=1)
    fake.make_trainer(tmp_path, settings, inputs={"clips": "one"}).train()
    other = settings_of(fake, steps=1, text_dropout=0.1)
    with pytest.raises(
        InputError, match=r"text_dropout = 0\.3, now it is 0\.1; go on with the same settings"
    ):
        fake.make_trainer(tmp_path, other, inputs={"clips": "one"}).train()
    with pytest.raises(InputError, match="clips = 'one', now it is 'two'"):
        fake.make_trainer(tmp_path, settings, inputs={"clips": "two"}).train()
    small = fake.small_network(fake.small_config(time_embed_dim=20))
    trainer = Trainer(
        small,
        fake.make_batches(settings),
        settings,
        tmp_path,
        accelerator=fake.make_accelerator(settings, device="cpu"),
        inputs={"clips": "one"},
    )
    with pytest.raises(InputError, match=r"state\.safetensors: .* another network, choose another folder"):
        trainer.train()
    (tmp_path / STATE_FILE).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"can't be read .* remove it to train anew"):
        fake.make_trainer(tmp_path, settings).train()


def test_numbers_that_are_not_finite_stop_training(fake: ModuleType, tmp_path: Path) -> None:
    """A loss of NaN, and a gradient of infinity behind a finite loss; the saved state stays good."""
    settings = settings_of(fake, steps=3, image_dropout=0.0)
    trainer: Trainer = fake.make_trainer(tmp_path, settings, schedule=Schedule(0, 1))
    broken = fake.RandomClips()
    for clip in broken.clips:
        clip["condition"][:] = math.nan
    good = trainer.batches

    def switch(_phase: str, done: int, _total: int) -> None:
        trainer.batches = fake.make_batches(settings, broken) if done == 1 else good

    with pytest.raises(ComputationError, match="the loss is nan at step 1; lower learning_rate"):
        trainer.train(report=switch)
    state, facts = load_tensors(tmp_path / STATE_FILE)
    assert facts["step"] == 1
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    trainer = fake.make_trainer(tmp_path / "gradient", settings)
    trainer.parameters["denoiser.proj_out.bias"].register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ComputationError, match=r"the gradient's norm is (inf|nan) at step 0"):
        trainer.train()


def test_schedule_rules() -> None:
    with pytest.raises(InputError, match=r"save_every_s is -1; choose 0 \(never\) or more"):
        Schedule(save_every_s=-1)
