"""Attention for CPUs with AVX512-BF16 against float64 and against PyTorch's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.kernels.joint_attention import check_attention_runs_on, cpu
from proteus_deploy.testing import relative_error

RUNS = torch.cpu._is_avx512_bf16_supported() and shutil.which("g++") is not None
runs_here = pytest.mark.skipif(not RUNS, reason="needs a processor with AVX512-BF16 and g++")

Randn = Callable[..., Tensor]

# Around one pair of keys, a block of queries (64) and a block of keys (512).
SHAPES = [
    (1, 1, 1, 64), (2, 3, 2, 64), (1, 2, 63, 64), (1, 2, 65, 64), (2, 2, 511, 64), (1, 2, 513, 64),
    (1, 3, 1025, 64), (1, 2, 77, 32), (1, 2, 130, 128), (1, 1, 9, 2), (1, 1, 9, 256),
]  # fmt: skip


@pytest.fixture
def heads(randn: Randn) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """heads(shape) -> query, key, value, scores several units apart."""

    def make(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (randn(*shape, dtype=torch.bfloat16) for _ in range(3))
        return query * 3, key, value

    return make


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    return torch.softmax(scores, dim=-1) @ value.double()


@runs_here
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_pytorch(heads: Callable[..., tuple[Tensor, ...]], shape: tuple[int, ...]) -> None:
    query, key, value = heads(*shape)
    want = exact(query, key, value)
    got = cpu.cpu_attention(query, key, value)
    assert got.shape == query.shape
    assert got.dtype == torch.bfloat16
    own = relative_error(F.scaled_dot_product_attention(query, key, value), want)
    # Rounding the result alone is an error of up to 2^-9; PyTorch rounds the weights to bfloat16 as well.
    assert relative_error(got, want) <= 1.2 * own + 2**-12


@runs_here
def test_layouts_give_the_same_bits(
    heads: Callable[..., tuple[Tensor, ...]], strided: Callable[[Tensor], Tensor]
) -> None:
    query, key, value = heads(2, 3, 70, 64)
    want = cpu.cpu_attention(query, key, value)
    split = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    assert torch.equal(cpu.cpu_attention(*split), want)
    assert torch.equal(cpu.cpu_attention(strided(query), key, strided(value)), want)
    assert want.transpose(1, 2).is_contiguous()


@runs_here
def test_threads_do_not_change_the_bits(heads: Callable[..., tuple[Tensor, ...]]) -> None:
    query, key, value = heads(1, 3, 200, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(cpu.cpu_attention(query, key, value))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@runs_here
@pytest.mark.parametrize("size", [3e2, 1e6, 1e10, 1e12])
def test_large_scores_do_not_overflow(randn: Randn, size: float) -> None:
    query = size * randn(1, 1, 600, 64, dtype=torch.bfloat16)
    key, value = randn(1, 1, 600, 64, dtype=torch.bfloat16), randn(1, 1, 600, 64, dtype=torch.bfloat16)
    got = cpu.cpu_attention(query, key, value)
    assert relative_error(got, exact(query, key, value)) < 2**-8  # nearly one key takes all


@runs_here
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_lost(heads: Callable[..., tuple[Tensor, ...]], which: int) -> None:
    tensors = heads(1, 2, 70, 64)
    tensors[which][0, 1, 67, 5] = float("nan")
    got = cpu.cpu_attention(*tensors).isnan()
    assert not got[0, 0].any()
    if which == 0:
        assert got[0, 1, 67].all()
        assert not got[0, 1, :67].any()
    elif which == 1:
        assert got[0, 1].all()
    else:
        assert got[0, 1, :, 5].all()


@runs_here
def test_is_an_operator(heads: Callable[..., tuple[Tensor, ...]]) -> None:
    tensors = heads(1, 2, 9, 64)
    torch.library.opcheck(torch.ops.proteus_deploy.joint_attention_cpu, tensors)
    compiled = torch.compile(cpu.cpu_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*tensors), cpu.cpu_attention(*tensors))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.float(), "query is float32 on cpu"),
        (lambda x: x[..., :63], "head size is 63"),
        (lambda x: x[:, :, :0], "holds no token"),
    ],
)
def test_what_it_does_not_take(randn: Randn, change: Callable[[Tensor], Tensor], words: str) -> None:
    tensors = [change(randn(1, 2, 5, 64, dtype=torch.bfloat16)) for _ in range(3)]
    with pytest.raises(InputError, match=words):
        cpu.cpu_attention(*tensors)
    with pytest.raises(InputError, match="key has the shape"):
        cpu.cpu_attention(*(randn(1, n, 5, 64, dtype=torch.bfloat16) for n in (1, 2, 2)))


def test_a_processor_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(BackendError, match="AVX512-BF16"):
        cpu._library.__wrapped__()


@runs_here
def test_a_missing_or_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROTEUS_DEPLOY_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="no C\\+\\+ compiler 'no-such-compiler'"):
        cpu._library.__wrapped__()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BackendError, match="could not be compiled by false"):
        cpu._library.__wrapped__()
    assert not list(tmp_path.rglob("*.so"))


@runs_here
def test_the_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROTEUS_DEPLOY_CACHE", str(tmp_path))
    cpu._library.__wrapped__()
    (kept,) = tmp_path.rglob("*.so")
    written = kept.stat().st_mtime_ns
    monkeypatch.setattr(cpu, "_compile", lambda *_: pytest.fail("compiled again"))
    cpu._library.__wrapped__()
    assert kept.stat().st_mtime_ns == written


@runs_here
def test_the_denoiser_on_it(parity: Path) -> None:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.runtime.eager import EagerBackend
    from proteus_deploy.stages import sample_inputs

    checkpoint = Checkpoint.open(parity / "checkpoint")
    plain = EagerBackend(checkpoint, dtype=torch.bfloat16)
    ours = EagerBackend(checkpoint, dtype=torch.bfloat16, attention="cpu-bf16", weights_of=plain)
    assert ours.name == "eager-attention-cpu-bf16"
    exact_backend = EagerBackend(checkpoint)
    graph = plain.table.graph("denoiser")
    inputs = sample_inputs(graph, plain.table.sizes("opt") | {"B": 2})
    low = {
        name: value.bfloat16() if graph.input(name).dtype == "float" else value
        for name, value in inputs.items()
    }
    want = exact_backend.runner("denoiser")(**inputs)["velocity"]
    got, own = (backend.runner("denoiser")(**low)["velocity"] for backend in (ours, plain))
    assert not torch.equal(got, own)  # another kernel did run
    assert relative_error(got, want) <= 1.2 * relative_error(own, want) + 2**-12


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (torch.bfloat16, "cuda")])
def test_the_choice_is_refused_elsewhere(dtype: torch.dtype, device: str) -> None:
    with pytest.raises(BackendError, match="'cpu-bf16' runs on the CPU in bfloat16"):
        check_attention_runs_on("cpu-bf16", torch.device(device), dtype)
