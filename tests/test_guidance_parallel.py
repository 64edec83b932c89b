"""Guidance shared by two processes over gloo gives the video of one."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy.errors import BackendError
from proteus_deploy.guidance_parallel import use_guidance_parallel
from proteus_deploy.pipeline import Pipeline
from proteus_deploy.policies.guided_steps import GuidanceInterval
from proteus_deploy.policies.plan import Plan
from proteus_deploy.request import GenerateRequest

STEPS = 4


def work(rank: int, port: int, folder: Path, request: GenerateRequest, answers: Any) -> None:
    """One of two processes: its frames, and how many rows its denoiser was given in each step."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    rows: list[int] = []
    with Pipeline.from_checkpoint(folder) as pipeline:
        stages: Any = pipeline.stages
        denoiser = stages["denoiser"]

        class Counted:
            inputs = denoiser.inputs

            def __call__(self, **inputs: Any) -> Any:
                rows.append(len(inputs["latents"]))
                return denoiser(**inputs)

        stages["denoiser"] = Counted()
        use_guidance_parallel(pipeline)
        frames = pipeline.generate(request).frames
    answers.put((rank, frames.numpy(), rows))
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_video_of_one(
    parity: Path, parity_pipeline: Pipeline, small_request: Callable[..., GenerateRequest]
) -> None:
    # Guidance ends half-way: the last steps have one row, which no two processes can share.
    plan = Plan(guidance_interval=GuidanceInterval(lowest=500))
    request = small_request(num_inference_steps=STEPS, plan=plan)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, port, parity / "checkpoint", request, answers), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = sorted((answers.get(timeout=300) for _ in processes), key=lambda answer: answer[0])
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert [rows for *_, rows in found] == [[1, 1, 1, 1], [1, 1, 1, 1]]
    first, second = (torch.from_numpy(frames) for _, frames, _ in found)
    assert torch.equal(first, second)
    alone = parity_pipeline.generate(request)
    assert alone.metadata["steps"]["both_prompts"] == [0, 1]
    torch.testing.assert_close(first, alone.frames, rtol=0, atol=1e-5)


def test_without_torch_distributed_it_is_refused(parity_pipeline: Pipeline) -> None:
    with pytest.raises(BackendError, match="start the processes with torchrun"):
        use_guidance_parallel(parity_pipeline)


def test_residuals_are_divided_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes gets the second half of what has a row for each row."""
    from proteus_deploy import guidance_parallel

    given: dict[str, torch.Tensor] = {}

    class Stage:
        inputs = ("latents", "control_00", "face_tokens", "rotary_cos")

        def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            given.update(inputs)
            return {"velocity": inputs["latents"]}

    def gather(parts: list[torch.Tensor], own: torch.Tensor, group: object) -> None:
        for part in parts:
            part.copy_(own)

    monkeypatch.setattr(guidance_parallel, "check_same", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 1)
    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    shared = guidance_parallel._SharedDenoiser(Stage(), None)
    rows = torch.arange(2.0).reshape(2, 1)
    shared(latents=rows, control_00=rows + 10, face_tokens=rows[:1], rotary_cos=rows)
    assert {name: value.flatten().tolist() for name, value in given.items()} == {
        "latents": [1.0],
        "control_00": [11.0],
        "face_tokens": [0.0],
        "rotary_cos": [0.0, 1.0],
    }
