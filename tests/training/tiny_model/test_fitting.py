"""One network, one loss: stopped anywhere it goes on to the same bits, and says what doesn't fit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from proteus_deploy.errors import Cancelled, ComputationError, InputError
from proteus_deploy.training.state import load_tensors
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit

SETTINGS = FitSettings(steps=12, learning_rate=0.05, warmup=3, ema=0.8, log_every=3, seed=5)


class Small(nn.Module):
    """With a buffer that changes while it trains, and a frozen weight."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.norm(self.linear(values)) * self.frozen
        return output


def training(
    folder: Path, settings: FitSettings = SETTINGS, *, stop: int | None = None, width: int = 4
) -> Small:
    """Train; `stop`: set the event at that step."""
    module, cancel = Small(width), Event()

    def loss(step: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        values = torch.randn(8, width, generator=generator)
        return (module(values) - values).square().mean(), {"at": float(step)}

    def report(_name: str, done: int, _total: int) -> None:
        if done == stop:
            cancel.set()

    result = fit(module, loss, settings, folder=folder, name="small", report=report, cancel=cancel)
    assert result is module
    assert not module.training
    return module


def test_stopping_and_going_on_gives_the_same_bits(tmp_path: Path) -> None:
    whole = training(tmp_path / "whole")
    for stop in (0, 1, 5, 11):
        with pytest.raises(Cancelled, match=f"training of small stopped at step {stop}; the same command"):
            training(tmp_path / "parts", stop=stop)
        assert (tmp_path / "parts/small.state.safetensors").exists()
    parts = training(tmp_path / "parts")
    ours, theirs = whole.state_dict(), parts.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert ours["norm.num_batches_tracked"] == 12
    files = [load_tensors(tmp_path / name / "small.safetensors")[0] for name in ("whole", "parts")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in ours)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "small.log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [line["step"] for line in logs[1]] == [1, 3, 6, 9, 12]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "small.log.jsonl",
        "small.safetensors",
    ]


def test_a_finished_result_is_loaded(tmp_path: Path) -> None:
    """Nothing is trained; a state that was left behind goes."""
    first = training(tmp_path)
    (tmp_path / "small.state.safetensors").write_bytes(b"left behind")
    module = Small()

    def never(_step: int, _generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        pytest.fail("it was trained again")

    fit(module, never, SETTINGS, folder=tmp_path, name="small")
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in first.state_dict().items())
    assert not (tmp_path / "small.state.safetensors").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_what_does_not_fit_is_refused(tmp_path: Path, finished: bool) -> None:
    if finished:
        training(tmp_path)
    else:
        with pytest.raises(Cancelled):
            training(tmp_path, stop=2)
    file = "small.safetensors" if finished else "small.state.safetensors"
    with pytest.raises(InputError, match=rf"{file} was trained with steps = 12, now it is 13"):
        training(tmp_path, FitSettings(**{**vars(SETTINGS), "steps": 13}))
    with pytest.raises(InputError, match=rf"{file}.* another network"):
        training(tmp_path, width=5)
    (tmp_path / file).write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"{file} can't be read .* remove it to train anew"):
        training(tmp_path)


def test_without_averaging_the_weights_are_the_result(tmp_path: Path) -> None:
    plain = FitSettings(**{**vars(SETTINGS), "ema": 0.0})
    with pytest.raises(Cancelled):
        training(tmp_path, plain, stop=5)
    state, _ = load_tensors(tmp_path / "small.state.safetensors")
    assert not [key for key in state if key.startswith("average.")]
    assert not torch.equal(training(tmp_path, plain).linear.weight, training(tmp_path / "b").linear.weight)


@pytest.mark.parametrize(("factor", "what"), [(math.nan, "loss"), (math.inf, "gradient")])
def test_numbers_that_are_not_finite(tmp_path: Path, factor: float, what: str) -> None:
    module = Small()

    def loss(step: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        value = module(torch.randn(8, 4, generator=generator)).square().mean()
        if step == 2 and what == "gradient":
            value.register_hook(lambda grad: grad * factor)
        return (value * factor if step == 2 and what == "loss" else value), {}

    before: dict[str, Any] = {}
    with pytest.raises(ComputationError, match=f"the {what} of small is (nan|inf) at step 2; choose a lower"):
        fit(
            module,
            loss,
            SETTINGS,
            folder=tmp_path,
            name="small",
            report=lambda *_: before.update({key: value.clone() for key, value in module.named_parameters()}),
        )
    assert all(torch.equal(value, before[key]) for key, value in module.named_parameters())


def test_convolutions_by_muon_go_on_to_the_same_bits(tmp_path: Path) -> None:
    settings = FitSettings(**{**vars(SETTINGS), "optimiser": "muon"})

    def train(folder: Path, stop: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        module, cancel = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 1, 3)), Event()

        def loss(_: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
            values = torch.randn(4, 2, 8, 8, generator=generator)
            return (module(values) - values[:, :1, 2:-2, 2:-2]).square().mean(), {}

        def report(_name: str, done: int, _total: int) -> None:
            if done == stop:
                cancel.set()

        return fit(module, loss, settings, folder=folder, name="small", report=report, cancel=cancel)

    whole = train(tmp_path / "whole").state_dict()
    with pytest.raises(Cancelled):
        train(tmp_path / "parts", stop=5)
    stored, _ = load_tensors(tmp_path / "parts" / "small.state.safetensors")
    fields = {key.removeprefix("adam.") for key in stored if key.startswith("adam.")}
    assert "momentum_buffer.0.weight" in fields
    assert {"exp_avg.2.weight", "exp_avg.0.bias"} <= fields, "the rest is AdamW's"
    parts = train(tmp_path / "parts").state_dict()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_rules() -> None:
    with pytest.raises(InputError, match="optimiser is 'sgd'; choose adamw or muon"):
        FitSettings(steps=1, learning_rate=1.0, optimiser="sgd")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="steps is 0; choose at least 1"):
        FitSettings(steps=0, learning_rate=1.0)
    with pytest.raises(InputError, match=r"ema is 1\.0; choose 0"):
        FitSettings(steps=1, learning_rate=1.0, ema=1.0)
