"""Every attention behind one function: the reference's result, or an error that says what is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.kernels import launch
from proteus_deploy.kernels.joint_attention import (
    attention,
    attention_names,
    attention_with,
    check_attention_runs_on,
    choices,
)
from proteus_deploy.testing import TOLERANCES, assert_close

Randn = Callable[..., Tensor]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def heads(randn: Randn) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (randn(2, 37, 3, 64).transpose(1, 2) for _ in range(3))
    return query, key, value


def test_every_name_is_known() -> None:
    names = ("torch", "triton", "triton-int8", "triton-fp8", "flash-attn", "sage")
    assert set(names) <= set(attention_names())
    assert attention_names()[0] == "torch"


def test_torch_is_the_reference_itself() -> None:
    assert attention_with("torch") is attention


@pytest.mark.parametrize("name", ["triton", "triton-int8", "triton-fp8"])
def test_triton_choices_compute_it(name: str, randn: Randn) -> None:
    given = heads(randn)
    want = attention(*(x.double() for x in given))
    product = name.removeprefix("triton").removeprefix("-")
    kind = ("attention", product) if product else ("kernel", "float32")
    error = assert_close(name, attention_with(name)(*given), want, TOLERANCES[kind])
    assert not product or error > 1e-3, "8 bits can't be as near"


def test_a_compiled_graph_takes_a_choice(randn: Randn) -> None:
    given = heads(randn)
    run = torch.compile(attention_with("triton"), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(*given), attention_with("triton")(*given))


def flash_attn_stand_in() -> tuple[ModuleType, list[dict[str, Any]]]:
    """Signature of flash_attn 2.8: [B, S, H, D] in and out; scores by 1/√D unless softmax_scale is given."""
    module, calls = ModuleType("flash_attn"), []

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), **rest: Any,
    ) -> Tensor:  # fmt: skip
        assert {tuple(x.shape) for x in (q, k, v)} == {(2, 37, 3, 64)}
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        calls.append({"dropout_p": dropout_p, "scale": softmax_scale, "causal": causal, **rest})
        assert window_size == (-1, -1)
        return attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    vars(module)["flash_attn_func"] = flash_attn_func
    return module, calls


def sageattention_stand_in() -> tuple[ModuleType, list[dict[str, Any]]]:
    """Signature of sageattention 1 and 2: "HND" is [B, H, S, D]; the last axis has to be packed."""
    module, calls = ModuleType("sageattention"), []

    def sageattn(
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
        sm_scale: float | None = None, **rest: Any,
    ) -> Tensor:  # fmt: skip
        assert tensor_layout == "HND"
        assert {tuple(x.shape) for x in (q, k, v)} == {(2, 3, 37, 64)}
        assert all(x.stride(-1) == 1 for x in (q, k, v)), "Last dim of qkv must be contiguous."
        calls.append({"dropout_p": 0.0, "scale": sm_scale, "causal": is_causal, **rest})
        return attention(q, k, v)

    vars(module)["sageattn"] = sageattn
    return module, calls


PACKAGES: dict[str, Callable[[], tuple[ModuleType, list[dict[str, Any]]]]] = {
    "flash-attn": flash_attn_stand_in,
    "sage": sageattention_stand_in,
}


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_get_their_layout(name: str, randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = PACKAGES[name]()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    query, key, value = heads(randn)
    attend = choices._CHOICES[name].load()  # without the check: the stand-in runs on a CPU
    assert torch.equal(attend(query, key, value), attention(query, key, value))
    assert calls == [{"dropout_p": 0.0, "scale": None, "causal": False}]


def test_sage_gets_packed_heads(randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = sageattention_stand_in()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    query, key, value = heads(randn)
    attended = choices._CHOICES["sage"].load()(query, key, value.mT.contiguous().mT)
    assert_close("attention", attended, attention(query, key, value), TOLERANCES["kernel", "float32"])
    assert len(calls) == 1


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_run_in_16_bits_on_cuda(name: str, randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = PACKAGES[name]()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    attend = attention_with(name)
    with pytest.raises(BackendError, match=f"'{name}' runs on CUDA devices, and the device is cpu"):
        attend(*(x.cpu() for x in heads(randn)))
    with pytest.raises(BackendError, match=r"runs in bfloat16 and float16, and the precision is float32"):
        check_attention_runs_on(name, CUDA, torch.float32)
    check_attention_runs_on(name, CUDA, torch.bfloat16)
    assert not calls


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation"),
        ("sage", "sageattention", "pip install sageattention"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_it(
    name: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=f"needs the package {package}, which isn't installed: {install}"):
        attention_with(name)
    with pytest.raises(BackendError, match="isn't installed"):
        check_attention_runs_on(name, CUDA, torch.bfloat16)
    monkeypatch.setitem(sys.modules, package, ModuleType(package))  # a release without the function
    with pytest.raises(BackendError, match=f"the package {package} is here but gives no .*{install}"):
        attention_with(name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        BackendError, match="attention 'triton-int4' is unknown; there are torch, cpu-bf16, triton, "
    ):
        attention_with("triton-int4")
    with pytest.raises(BackendError, match="attention '' is unknown"):
        check_attention_runs_on("", CPU, torch.float32)


def test_without_gpu_or_interpreter_triton_is_refused(randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_is_interpreted", lambda _: False)
    with pytest.raises(
        BackendError, match="the device is cpu; take attention 'torch', or set TRITON_INTERPRET"
    ):
        check_attention_runs_on("triton-int8", CPU, torch.float32)
    with pytest.raises(BackendError, match="the device is cpu"):
        attention_with("triton-int8")(*(x.cpu() for x in heads(randn)))
    check_attention_runs_on("torch", CPU, torch.float32)
