"""Calibration: what is looked at, in which group, and that a killed run ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import Cancelled, ComputationError, InputError
from proteus_deploy.export import calibrate as module
from proteus_deploy.export.activation_recorder import ActivationRecorder, _look_at, timestep_group
from proteus_deploy.export.activation_statistics import ActivationStatistics
from proteus_deploy.export.calibrate import CalibrationCase, calibrate, cases_folder, equal_groups
from proteus_deploy.pipeline import Pipeline
from proteus_deploy.policies.plan import Plan
from proteus_deploy.request import GenerateRequest

STEPS = 4
MakeRequest = Callable[..., GenerateRequest]
FILES = ("statistics.json", "statistics.safetensors")


@pytest.fixture(name="checkpoint")
def _checkpoint(parity: Path) -> Checkpoint:
    return Checkpoint.open(parity / "checkpoint")


@pytest.fixture(name="cases")
def _cases(small_request: MakeRequest) -> list[CalibrationCase]:
    return [
        CalibrationCase(f"case {seed}", small_request(num_inference_steps=STEPS, seed=seed))
        for seed in (1, 2, 3)
    ]


def bytes_of(folder: Path) -> list[bytes]:
    return [(folder / file).read_bytes() for file in FILES]


def test_groups() -> None:
    assert equal_groups(5) == (0, 200, 400, 600, 800)
    assert equal_groups(3) == (0, 334, 667)
    assert [timestep_group((0, 334, 667), t) for t in (0, 333, 334, 999)] == [0, 0, 1, 2]
    for count in (0, 1001):
        with pytest.raises(InputError, match="choose 1 to 1000"):
            equal_groups(count)


def test_the_statistics_are_those_of_the_inputs(
    checkpoint: Checkpoint, cases: list[CalibrationCase], tmp_path: Path
) -> None:
    """Against plain hooks that keep every input of every linear module of the denoiser."""
    found = calibrate(checkpoint, cases[:1], tmp_path / "statistics")
    kept: dict[str, list[tuple[int, Tensor]]] = {}
    timesteps: list[int] = []
    with Pipeline.from_checkpoint(checkpoint.folder) as pipeline:
        denoiser = module._module(pipeline, "denoiser")
        denoiser.register_forward_pre_hook(lambda _, inputs: timesteps.append(int(inputs[2][0])))

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, inputs: kept.setdefault(name, []).append((timesteps[-1], inputs[0].clone()))

        for name, part in denoiser.named_modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(keep(name))
        pipeline.generate(cases[0].request)
    assert len(timesteps) == STEPS
    assert len(kept) > 20
    for name, inputs in kept.items():
        layer = found.layers[f"denoiser/{name}"]
        for group in range(len(found.groups)):
            own = [x.flatten(0, -2) for t, x in inputs if timestep_group(found.groups, t) == group]
            assert int(layer.rows[group]) == sum(map(len, own)), name
            if own:
                rows = torch.cat(own)
                seen = _look_at(rows)
                assert torch.equal(layer.amax[group], rows.abs().amax(0)), name
                assert torch.equal(layer.histogram[group], seen.histogram), name
                # Two float64 sums in another order, rounded to float32.
                torch.testing.assert_close(
                    layer.mean_abs[group], rows.double().abs().mean(0).float(), rtol=2e-7, atol=0
                )


def test_products_without_a_module_call_and_attention_are_seen(
    checkpoint: Checkpoint, cases: list[CalibrationCase], tmp_path: Path
) -> None:
    found = calibrate(checkpoint, cases[:1], tmp_path / "statistics", groups=2)
    for name in (
        "patch_embed.proj",
        "perceiver_cross_attention.0.to_q",
        "perceiver_cross_attention.0.to_out",
    ):
        assert f"denoiser/{name}" in found.layers
    block = "denoiser/transformer_blocks.0.attn1"
    width = found.layers[f"{block}.to_q"].channels
    for operand in ("query", "key", "value"):
        layer = found.layers[f"{block}.{operand}"]
        assert layer.channels == width
        # Video and text tokens of both branches of guidance, at every step.
        assert int(layer.rows.sum()) == int(found.layers[f"{block}.to_q"].rows.sum())
    text = [name for name in found.layers if name.startswith("text_encoder/")]
    assert text
    assert all(found.layers[name].rows.shape == (1,) for name in text)


def test_both_branches_of_guidance_are_seen(
    checkpoint: Checkpoint, cases: list[CalibrationCase], tmp_path: Path
) -> None:
    unguided = CalibrationCase("unguided", replace(cases[0].request, guidance_scale=1.0))
    rows = [
        int(calibrate(checkpoint, [case], tmp_path / case.name).layers["denoiser/proj_out"].rows.sum())
        for case in (cases[0], unguided)
    ]
    assert rows[0] == 2 * rows[1]


def test_watching_leaves_nothing_behind(checkpoint: Checkpoint, small_request: MakeRequest) -> None:
    with Pipeline.from_checkpoint(checkpoint.folder) as pipeline:
        before = pipeline.generate(small_request()).frames
        denoiser = module._module(pipeline, "denoiser")
        recorder = ActivationRecorder((0,))
        with recorder.watch({"denoiser": denoiser}):
            assert torch.equal(pipeline.generate(small_request()).frames, before)
        rows = recorder.layers()["denoiser/proj_out"].rows
        assert torch.equal(pipeline.generate(small_request()).frames, before)
        assert torch.equal(recorder.layers()["denoiser/proj_out"].rows, rows)


def test_broken_activations_name_layer_and_step(checkpoint: Checkpoint, small_request: MakeRequest) -> None:
    with Pipeline.from_checkpoint(checkpoint.folder) as pipeline:
        denoiser = module._module(pipeline, "denoiser")
        part = denoiser.get_submodule("transformer_blocks.1.norm2")
        calls: list[int] = []

        def spoil_the_second(_module: nn.Module, _inputs: Any, outputs: tuple[Tensor, ...]) -> Any:
            calls.append(1)
            return (outputs[0] * torch.nan, *outputs[1:]) if len(calls) == 2 else outputs

        part.register_forward_hook(spoil_the_second)
        recorder = ActivationRecorder((0,))
        with (
            recorder.watch({"denoiser": denoiser}),
            pytest.raises(
                ComputationError,
                match=r"denoiser/transformer_blocks\.1\.ff\.net\.0\.proj holds NaN .* in step 2,",
            ),
        ):
            pipeline.generate(small_request())


def test_finished_cases_do_not_run_again(
    checkpoint: Checkpoint, cases: list[CalibrationCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    calibrate(checkpoint, cases, whole)
    assert not cases_folder(whole).exists()
    ran: list[str] = []
    run_case = module._run_case

    def run(pipeline: Any, case: CalibrationCase, *rest: Any) -> Any:
        ran.append(case.name)
        if ran == ["case 1", "case 2"]:
            raise KeyboardInterrupt
        return run_case(pipeline, case, *rest)

    monkeypatch.setattr(module, "_run_case", run)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, cases, folder)
    assert not folder.exists()
    (damaged,) = cases_folder(folder).iterdir()
    calibrate(checkpoint, cases, folder)
    assert ran == ["case 1", "case 2", "case 2", "case 3"]
    assert bytes_of(folder) == bytes_of(whole)
    # The result is there already: nothing runs.
    calibrate(checkpoint, cases, folder)
    assert len(ran) == 4
    # A partial file that was damaged is computed again.
    calibrate(checkpoint, cases[:1], tmp_path / "one")
    part = cases_folder(tmp_path / "other") / damaged.name
    part.mkdir(parents=True)
    (part / FILES[0]).write_text("{")
    calibrate(checkpoint, cases[:1], tmp_path / "other")
    assert bytes_of(tmp_path / "other") == bytes_of(tmp_path / "one")


def test_an_occupied_folder_is_kept(
    checkpoint: Checkpoint, cases: list[CalibrationCase], tmp_path: Path
) -> None:
    folder = tmp_path / "statistics"
    calibrate(checkpoint, cases[:1], folder)
    before = bytes_of(folder)
    with pytest.raises(InputError, match="holds no statistics of these cases and settings"):
        calibrate(checkpoint, cases[1:2], folder)
    assert bytes_of(folder) == before
    calibrate(checkpoint, cases[1:2], folder, overwrite=True)
    found = ActivationStatistics.load(folder)
    assert [case["name"] for case in found.provenance["cases"]] == ["case 2"]


def test_cancelling_stops_after_the_step(
    checkpoint: Checkpoint, cases: list[CalibrationCase], tmp_path: Path
) -> None:
    cancel, steps = Event(), []

    def report(phase: str, done: int, total: int) -> None:
        del total
        steps.append((phase, done))
        if (phase, done) == ("case case 1", 2):
            cancel.set()

    with pytest.raises(Cancelled):
        calibrate(checkpoint, cases, tmp_path / "statistics", cancel=cancel, report=report)
    assert steps[-1] == ("case case 1", 2)
    assert not list(tmp_path.iterdir())


def test_cases_that_can_not_be_calibrated_with(
    checkpoint: Checkpoint, cases: list[CalibrationCase], tmp_path: Path
) -> None:
    request = cases[0].request
    for wrong, message in (
        ([], "there are no cases"),
        ([CalibrationCase("a", replace(request, plan=Plan()))], "case a has a plan"),
        ([CalibrationCase("a", replace(request, seed=None))], "case a has no seed"),
        (
            [CalibrationCase("a", replace(request, identity=None, condition_image=None))],
            "case a has neither photo nor identity",
        ),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(checkpoint, wrong, tmp_path / "statistics")


COMMAND = """
import sys
from pathlib import Path
import torch
from proteus_deploy import GenerateRequest, IdentityFeatures
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.export.calibrate import CalibrationCase, calibrate

torch.set_num_threads(1)
data, folder = Path(sys.argv[1]), Path(sys.argv[2])
generator = torch.Generator().manual_seed(0)
states = tuple(torch.randn(1, 10, 16, generator=generator) for _ in range(5))
identity = IdentityFeatures(torch.randn(1, 1, 40, generator=generator), states)
cases = [
    CalibrationCase(str(seed), GenerateRequest(
        prompt="A woman waves", identity=identity, condition_image=data / "case_cfg_dpm" / "reference.png",
        height=32, width=48, num_frames=5, num_inference_steps=6, seed=seed,
    ))
    for seed in range(4)
]
calibrate(Checkpoint.open(data / "checkpoint"), cases, folder)
"""
LIMIT_S = 300


@pytest.mark.slow
def test_killed_at_random_moments(parity: Path, tmp_path: Path) -> None:
    chance = random.Random(5)

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(parity), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(child: subprocess.Popen[bytes]) -> None:
        _, errors = child.communicate(timeout=LIMIT_S)
        assert child.returncode == 0, errors.decode()

    def wait_for_cases(child: subprocess.Popen[bytes], count: int) -> None:
        """Until so many cases are finished; the time that importing takes varies too much to aim by clock."""
        end_s = time.monotonic() + LIMIT_S
        while child.poll() is None:
            done = [path for path in cases_folder(folder).glob("*") if not path.name.startswith(".partial-")]
            if len(done) >= count:
                return
            assert time.monotonic() < end_s
            time.sleep(0.001)

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole))
    caught = 0
    for count in (0, 1, 2, 3, 4):
        child = start(folder)
        wait_for_cases(child, count)
        time.sleep(chance.uniform(0, 0.3) if count else chance.uniform(0, 3))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        caught += child.returncode == -signal.SIGKILL
        assert not folder.exists() or bytes_of(folder) == bytes_of(whole)
    assert caught, "no run was killed; the test proves nothing"
    finish(start(folder))
    assert bytes_of(folder) == bytes_of(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
