"""The denoiser's tokens shared by processes over gloo: the velocities and the video of one process."""

from __future__ import annotations

import gc
import multiprocessing
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy import GenerateRequest, InputError, Pipeline
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import BackendError
from proteus_deploy.guidance_parallel import use_guidance_parallel
from proteus_deploy.model.sharded_sequence import TokenShares
from proteus_deploy.policies.guided_steps import GuidanceInterval
from proteus_deploy.policies.plan import Plan
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.sequence_parallel import use_sequence_parallel
from proteus_deploy.testing import Tolerance, assert_close

SAME = Tolerance(
    1e-5,
    "relative",
    "the same sums over the same tokens in the same order; a library may order a product of fewer rows "
    "differently (here it doesn't: 0 is usual), and anything wired wrongly is above 1e-2",
)
HEADS = {"num_attention_heads": 12, "attention_head_dim": 16}
LEARNED = {"use_learned_positional_embeddings": True, "sample_height": 6, "sample_width": 6}
SINUSOIDAL = {"use_rotary_positional_embeddings": False, "sample_height": 6, "sample_width": 6}
LINEAGE_1_5 = {"patch_size_t": 2, "ofs_embed_dim": 48, "patch_bias": False, "sample_frames": 13}
CONSISID = {"_class_name": "ConsisIDTransformer3DModel", "is_train_face": True}

# One server imports these, and the processes are forked from it.
_IMPORTED_ONCE = [
    "proteus_deploy.pipeline",
    "proteus_deploy.sequence_parallel",
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox",
    "diffusers.models.embeddings",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox",
    "diffusers.schedulers.scheduling_dpm_cogvideox",
    "transformers.models.t5.modeling_t5",
    "torch.distributed.device_mesh",
]


# Each function below runs in every process of a group.


def velocities(rank: int, runs: list[tuple[Path, dict[str, Any], dict[str, Tensor]]]) -> list[Any]:
    found = []
    for folder, options, inputs in runs:
        with pipeline_on(folder, **options) as pipeline:
            use_sequence_parallel(pipeline)
            found.append(pipeline.stages["denoiser"](**inputs)["velocity"].numpy())
    return found


def velocities_of_groups(rank: int, folder: Path, runs: dict[int, dict[str, Tensor]]) -> dict[int, Any]:
    """{processes: velocity} of the first 3, 4, … processes."""
    found = {}
    for processes, inputs in runs.items():
        group = torch.distributed.new_group(list(range(processes)))
        with Pipeline.from_checkpoint(folder) as pipeline:
            if rank < processes:
                use_sequence_parallel(pipeline, group)
                found[processes] = pipeline.stages["denoiser"](**inputs)["velocity"].numpy()
            else:
                with pytest.raises(BackendError, match=f"process {rank} is not in the group"):
                    use_sequence_parallel(pipeline, group)
    return found


def exchanges(rank: int, text_length: int, video_length: int) -> None:
    """Whole tokens -> shares -> this process's heads -> shares: every step holds the very same numbers."""
    batch, heads, head_size = 2, 6, 8
    shares = TokenShares(None)
    generator = torch.Generator().manual_seed(0)
    text, video = (
        torch.randn(batch, length, heads * head_size, generator=generator)
        for length in (text_length, video_length)
    )
    own = torch.cat(shares.divide(text, video), dim=1)
    assert own.shape[1] == -(-text_length // shares.processes) + -(-video_length // shares.processes)
    # What padding holds must reach nobody.
    padding = (own == 0).all(dim=-1, keepdim=True)
    padded = own.masked_fill(padding, float("nan"))
    parts = torch.stack((padded, 2 * padded)).unflatten(-1, (heads, head_size))
    mine = shares.to_heads(parts)
    whole = torch.cat((text, video), dim=1).unflatten(-1, (heads, head_size)).transpose(1, 2)
    count = heads // shares.processes
    assert torch.equal(mine[0], whole[:, rank * count : (rank + 1) * count])
    assert torch.equal(mine[1], 2 * mine[0])
    assert torch.equal(shares.to_tokens(mine[0]), own)
    assert torch.equal(shares.gather_video(own[:, -(-text_length // shares.processes) :]), video)


def compiled_velocity(rank: int, folder: Path, inputs: dict[str, Tensor]) -> tuple[Any, int, int]:
    """Velocity, graphs, and breaks between graphs."""
    from torch._dynamo.utils import counters

    with Pipeline.from_checkpoint(folder, compiled=True) as pipeline:
        use_sequence_parallel(pipeline)
        velocity = pipeline.stages["denoiser"](**inputs)["velocity"].numpy()
    return velocity, counters["stats"]["unique_graphs"], len(counters["graph_break"])


def fused_velocity(rank: int, folder: Path, inputs: dict[str, Tensor]) -> Any:
    with pipeline_on(folder, kernels="triton") as pipeline:
        use_sequence_parallel(pipeline)
        return pipeline.stages["denoiser"](**inputs)["velocity"].numpy()


def bytes_sent(rank: int, folder: Path, inputs: dict[str, Tensor]) -> tuple[int, Any]:
    """Bytes of tokens that leave this process in one step in bfloat16, and the velocity."""
    distributed: Any = torch.distributed
    sent, processes = 0, distributed.get_world_size()
    to_all, gather = distributed.all_to_all_single, distributed.all_gather

    def counted_to_all(received: Tensor, part: Tensor, **options: Any) -> None:
        nonlocal sent
        sent += part.nbytes * (processes - 1) // processes
        to_all(received, part, **options)

    def counted_gather(received: list[Tensor], part: Tensor, **options: Any) -> None:
        nonlocal sent
        sent += part.nbytes * (processes - 1) if part.is_floating_point() else 0
        gather(received, part, **options)

    distributed.all_to_all_single = counted_to_all
    distributed.all_gather = counted_gather
    with Pipeline.from_checkpoint(folder, dtype="bf16") as pipeline:
        use_sequence_parallel(pipeline)
        velocity = pipeline.stages["denoiser"](**inputs)["velocity"]
    return sent, velocity.float().numpy()


def video(rank: int, folder: Path, request: GenerateRequest) -> Any:
    with Pipeline.from_checkpoint(folder) as pipeline:
        use_sequence_parallel(pipeline)
        return pipeline.generate(request).frames.numpy()


def video_on_a_mesh(rank: int, folder: Path, request: GenerateRequest) -> tuple[Any, list[int]]:
    """Frames, and the rows that this process's denoiser was given in each step."""
    mesh = torch.distributed.device_mesh.init_device_mesh(
        "cpu", (2, 2), mesh_dim_names=("guidance", "sequence")
    )
    rows = []
    with Pipeline.from_checkpoint(folder) as pipeline:
        use_sequence_parallel(pipeline, mesh.get_group("sequence"))
        stages: Any = pipeline.stages
        denoiser = stages["denoiser"]

        class Counted:
            inputs = denoiser.inputs

            def __call__(self, **inputs: Any) -> Any:
                rows.append(len(inputs["latents"]))
                return denoiser(**inputs)

        stages["denoiser"] = Counted()
        use_guidance_parallel(pipeline, mesh.get_group("guidance"))
        return pipeline.generate(request).frames.numpy(), rows


def refusals(rank: int, folder: Path, requests: list[GenerateRequest]) -> list[str]:
    """What this process is told when the processes make different requests, and when heads don't divide."""
    said = []
    with Pipeline.from_checkpoint(folder) as pipeline:
        use_sequence_parallel(pipeline)
        with pytest.raises(BackendError, match="was replaced already"):
            use_sequence_parallel(pipeline)
        for mine in (requests[rank], requests[2 * rank]):
            with pytest.raises(InputError) as caught:
                pipeline.generate(mine)
            said.append(str(caught.value))
    return said


def heads_refused(rank: int, folder: Path) -> None:
    with (
        Pipeline.from_checkpoint(folder) as pipeline,
        pytest.raises(BackendError, match=r"has 3 attention heads, which 2 processes .* start 1, 3 of them"),
    ):
        use_sequence_parallel(pipeline)


def _run(
    rank: int, processes: int, store: Path, work: Callable[..., Any], arguments: Any, answers: Any
) -> None:
    torch.set_num_threads(1)
    try:
        address = f"file://{store}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
        answers.put((rank, work(rank, *arguments), None))
        torch.distributed.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise


@pytest.fixture
def together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """together(processes, work, *arguments) -> what work(rank, *arguments) returns in each process."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the server reads it when it imports Triton
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)

    def start(processes: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        answers = context.Queue()
        store = tmp_path / f"store-{work.__name__}"
        started = [
            context.Process(target=_run, args=(rank, processes, store, work, arguments, answers), daemon=True)
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        found = {}
        for _ in started:
            rank, result, error = answers.get(timeout=300)
            assert error is None, error
            found[rank] = result
        for process in started:
            process.join(timeout=60)
            assert process.exitcode == 0
        return [found[rank] for rank in range(processes)]

    return start


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    store = f"file://{tmp_path / 'alone'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def denoiser_inputs(text: int, frames: int, height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(2, frames, 32, height, width, generator=generator),
        "text": torch.randn(2, text, 64, generator=generator),
        "timestep": torch.tensor([999, 1]),
        "face_tokens": torch.randn(1, 8, 64, generator=generator),
    }


def pipeline_on(folder: Path, **options: Any) -> Pipeline:
    """On an EagerBackend with `options`."""
    checkpoint = Checkpoint.open(folder)
    backend = EagerBackend(checkpoint, **options)
    parts = (checkpoint.vae, checkpoint.scheduler, checkpoint.tokenizer, None)
    return Pipeline(backend, checkpoint.transformer, *parts)


def velocity_alone(folder: Path, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    with pipeline_on(folder, **options) as pipeline:
        return pipeline.stages["denoiser"](**inputs)["velocity"]


def test_two_processes_on_every_kind_of_checkpoint(
    make_checkpoint: Callable[..., Path], together: Callable[..., list[Any]]
) -> None:
    """27 video tokens and an odd number of text tokens: neither can be halved."""
    rotary = make_checkpoint("rotary", **HEADS)
    runs: list[Any] = [
        (rotary, {}, denoiser_inputs(39, 3, 6, 6)),
        (rotary, {"folded": True}, denoiser_inputs(39, 3, 6, 6)),
        (make_checkpoint("learned", **HEADS, **LEARNED), {}, denoiser_inputs(37, 3, 6, 6)),
        (make_checkpoint("sinusoidal", **HEADS, **SINUSOIDAL), {}, denoiser_inputs(35, 3, 6, 6)),
        (make_checkpoint("1.5", **HEADS, **LINEAGE_1_5), {}, denoiser_inputs(33, 6, 6, 6)),
        (make_checkpoint("ConsisID", **HEADS, **CONSISID), {}, denoiser_inputs(31, 3, 6, 6)),
    ]
    first, second = together(2, velocities, runs)
    for (folder, options, inputs), mine, theirs in zip(runs, first, second, strict=True):
        got, want = torch.from_numpy(mine), velocity_alone(folder, inputs, **options)
        assert torch.equal(got, torch.from_numpy(theirs))
        assert_close(f"velocity, {folder.name} {options}", got, want, SAME)
        without = velocity_alone(folder, inputs | {"identity_gate": torch.zeros(1)}, **options)
        assert not torch.allclose(got, without, rtol=1e-2), "identity attention must matter here"


def test_three_four_and_six_processes(
    make_checkpoint: Callable[..., Path], together: Callable[..., list[Any]]
) -> None:
    """Six have less than a token each: most shares are padding alone."""
    folder = make_checkpoint(**HEADS)
    runs = {3: denoiser_inputs(40, 3, 4, 6), 4: denoiser_inputs(39, 3, 6, 6), 6: denoiser_inputs(1, 1, 2, 4)}
    found = together(6, velocities_of_groups, folder, runs)
    for processes, inputs in runs.items():
        want = velocity_alone(folder, inputs)
        for rank in range(processes):
            got = torch.from_numpy(found[rank][processes])
            assert_close(f"velocity, process {rank} of {processes}", got, want, SAME)


def test_fused_kernels_work_on_shares(
    make_checkpoint: Callable[..., Path], together: Callable[..., list[Any]]
) -> None:
    folder, inputs = make_checkpoint(num_layers=1, **HEADS), denoiser_inputs(5, 3, 2, 6)
    want = velocity_alone(folder, inputs)
    for got in together(2, fused_velocity, folder, inputs):
        assert_close("velocity", torch.from_numpy(got), want, SAME)


@pytest.mark.slow
def test_the_compiled_denoiser_is_one_graph(
    make_checkpoint: Callable[..., Path], together: Callable[..., list[Any]]
) -> None:
    folder, inputs = make_checkpoint(num_layers=1, **HEADS), denoiser_inputs(39, 3, 6, 6)
    want = velocity_alone(folder, inputs)
    for got, graphs, breaks in together(2, compiled_velocity, folder, inputs):
        assert (graphs, breaks) == (1, 0)
        assert_close("velocity", torch.from_numpy(got), want, SAME)


@pytest.mark.parametrize(("text", "video_tokens"), [(4, 10), (7, 2)])
def test_exchanges_move_tokens_and_change_none(
    together: Callable[..., list[Any]], text: int, video_tokens: int
) -> None:
    together(3, exchanges, text, video_tokens)


def test_the_bytes_exchanged_are_those_of_the_formula(
    make_checkpoint: Callable[..., Path], together: Callable[..., list[Any]]
) -> None:
    """docs/parallel.md: 4 layers B s d e (P - 1) / P + B n c e (P - 1)."""
    folder, inputs = make_checkpoint(**HEADS), denoiser_inputs(39, 3, 6, 6)
    layers, batch, width, channels, element = 4, 2, 12 * 16, 4 * 16, 2
    share, video_share = 20 + 14, 14
    want = 4 * layers * batch * share * width * element // 2 + batch * video_share * channels * element
    reference = velocity_alone(folder, inputs, dtype=torch.bfloat16).float()
    for sent, velocity in together(2, bytes_sent, folder, inputs):
        assert sent == want
        assert_close("velocity", torch.from_numpy(velocity), reference, SAME)


def test_two_processes_make_the_video_of_one(
    make_checkpoint: Callable[..., Path],
    together: Callable[..., list[Any]],
    small_request: Callable[..., GenerateRequest],
) -> None:
    folder, request = make_checkpoint(**HEADS), small_request(height=48, width=48)
    first, second = (torch.from_numpy(frames) for frames in together(2, video, folder, request))
    assert torch.equal(first, second)
    with Pipeline.from_checkpoint(folder) as pipeline:
        torch.testing.assert_close(first, pipeline.generate(request).frames, rtol=0, atol=1e-5)


def test_four_processes_share_guidance_and_sequence(
    make_checkpoint: Callable[..., Path],
    together: Callable[..., list[Any]],
    small_request: Callable[..., GenerateRequest],
) -> None:
    # Guidance ends half-way: the last steps have one row, which no two processes can share.
    plan = Plan(guidance_interval=GuidanceInterval(lowest=500))
    folder, request = make_checkpoint(**HEADS), small_request(num_inference_steps=4, plan=plan)
    found = together(4, video_on_a_mesh, folder, request)
    assert [rows for _, rows in found] == [[1, 1, 1, 1]] * 4
    frames = [torch.from_numpy(frames) for frames, _ in found]
    assert all(torch.equal(frames[0], other) for other in frames)
    with Pipeline.from_checkpoint(folder) as pipeline:
        alone = pipeline.generate(request)
    assert alone.metadata["steps"]["both_prompts"] == [0, 1]
    torch.testing.assert_close(frames[0], alone.frames, rtol=0, atol=1e-5)


def test_different_requests_are_refused_by_all(
    make_checkpoint: Callable[..., Path],
    together: Callable[..., list[Any]],
    small_request: Callable[..., GenerateRequest],
) -> None:
    requests = [small_request(), small_request(seed=8), small_request(prompt="A man runs")]
    for seeds, prompts in together(2, refusals, make_checkpoint(**HEADS), requests):
        assert "inputs differ in latents, so" in seeds
        assert "inputs differ in text, so" in prompts


def test_heads_that_do_not_divide_are_refused(parity: Path, together: Callable[..., list[Any]]) -> None:
    together(2, heads_refused, parity / "checkpoint")


def test_without_torch_distributed_it_is_refused(parity_pipeline: Pipeline) -> None:
    with pytest.raises(BackendError, match="start the processes with torchrun"):
        use_sequence_parallel(parity_pipeline)


@pytest.mark.usefixtures("one_process")
def test_other_backends_are_refused() -> None:
    bundle: Any = SimpleNamespace(backend=SimpleNamespace(name="onnxruntime"))
    with pytest.raises(BackendError, match=r"'onnxruntime' can't share a sequence.*from_checkpoint"):
        use_sequence_parallel(bundle)


@pytest.mark.usefixtures("one_process")
def test_guidance_first_is_refused(parity: Path) -> None:
    with Pipeline.from_checkpoint(parity / "checkpoint") as pipeline:
        use_guidance_parallel(pipeline)
        with pytest.raises(BackendError, match="use_guidance_parallel after it"):
            use_sequence_parallel(pipeline)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("folded", [False, True])
def test_weights_are_the_pipelines_own_and_go_with_them(parity: Path, folded: bool) -> None:
    pipeline = pipeline_on(parity / "checkpoint", folded=folded)
    use_sequence_parallel(pipeline)
    inputs = denoiser_inputs(40, 3, 8, 12)
    first = pipeline.stages["denoiser"](**inputs)["velocity"]
    whole: Any = pipeline.backend.runner("denoiser")
    shared: Any = pipeline.stages["denoiser"].backend.runner("denoiser")
    assert shared.module.perceiver_cross_attention[0].form == ("folded" if folded else "published")
    theirs = dict(whole.module.named_parameters())
    for name, weight in shared.module.named_parameters():
        assert weight.data_ptr() == theirs.pop(name).data_ptr()
    assert not theirs
    gone = weakref.ref(shared.module)
    del shared, whole, theirs, weight
    pipeline.backend.release("denoiser")
    gc.collect()
    assert gone() is None, "a released denoiser must give its memory back"
    assert torch.equal(pipeline.stages["denoiser"](**inputs)["velocity"], first)
