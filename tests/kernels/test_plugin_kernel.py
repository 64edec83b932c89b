"""The kernel with a TensorRT plugin's arguments is the reference; PTX is read and cut as it should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.kernels import ptx
from proteus_deploy.kernels.identity_attention import FoldedIdentity, folded_identity_attention
from proteus_deploy.kernels.launch import load_kernels, power_of_two
from proteus_deploy.testing import TOLERANCES, assert_close

PTX = """\
.version 8.7
.target sm_90a
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0,
\t.param .u32 kernel_param_1,
\t.param .u64 .ptr .global .align 1 kernel_param_2
)
.reqntid 128
{
\t.loc\t1 6 0                           // file.py:6:0
\tld.param.b64 \t%rd3, [kernel_param_0];
\tret;
}
\t.file\t1 "/home/someone/file.py"
\t.section\t.debug_abbrev
\t{
.b8 1                                   // Abbreviation Code
\t}
\t.section\t.debug_info
\t{
.b32 .debug_abbrev
\t}
"""


@pytest.mark.parametrize("gate", [0.7, 0.0])
@pytest.mark.parametrize(
    ("batch", "identities", "tokens", "queries", "heads", "width"),
    [(1, 1, 1, 8, 2, 32), (3, 1, 17, 5, 3, 48), (2, 2, 37, 5, 3, 33), (2, 2, 5, 40, 15, 70)],
)
def test_dense_inputs(
    batch: int,
    identities: int,
    tokens: int,
    queries: int,
    heads: int,
    width: int,
    gate: float,
    randn: Callable[..., Tensor],
) -> None:
    kernels = load_kernels("proteus_deploy.kernels.identity_attention.triton")
    columns = heads * queries
    hidden = randn(batch, tokens, width)
    rows = 2 * randn(identities, columns, width) / width**0.5
    a0, Bm = randn(identities, 1, columns), randn(identities, columns, width) / heads**0.5
    strength = torch.tensor([gate], device=hidden.device)
    out = torch.empty_like(hidden)
    blocks = dict(kernels.forward_space(width, heads, queries, torch.float32)[0].blocks)
    grid = (-(-tokens // blocks["BLOCK_N"]), batch)
    kernels.identity_attention_plugin_kernel[grid](
        hidden, rows, rows.sum(-1), a0, Bm, strength, tokens, identities, out,
        EPS=1e-5, D=width, H=heads, Q=queries, BLOCK_Q=power_of_two(queries), **blocks,
    )  # fmt: skip
    folded = FoldedIdentity(rows.mT.double(), a0.double(), Bm.double())
    want = folded_identity_attention(hidden.double(), folded, gate=strength.double(), heads=heads)
    assert_close("hidden", out, want, TOLERANCES["kernel", "float32"])


def test_parameters_are_read() -> None:
    name, parameters = ptx.read_parameters(PTX)
    assert name == "kernel"
    assert parameters == [("kernel_param_0", "u64"), ("kernel_param_1", "u32"), ("kernel_param_2", "u64")]


def test_unused_pointers_of_the_launcher_are_taken_off() -> None:
    cut = ptx._without_scratch(PTX, ["u64", "u32"])
    assert ptx.read_parameters(cut)[1] == [("kernel_param_0", "u64"), ("kernel_param_1", "u32")]
    assert cut.replace("kernel_param_1\n", "kernel_param_1,\n\tX\n") == PTX.replace(
        ".param .u64 .ptr .global .align 1 kernel_param_2", "X"
    )


def test_pointers_that_are_read_stay_an_error() -> None:
    used = PTX.replace("\tret;", "\tld.param.b64 \t%rd4, [kernel_param_2];\n\tret;")
    with pytest.raises(BackendError, match="reads kernel_param_2, which only Triton's launcher passes"):
        ptx._without_scratch(used, ["u64", "u32"])


def test_another_order_of_parameters_is_an_error() -> None:
    with pytest.raises(BackendError, match="the signature asks for"):
        ptx._without_scratch(PTX, ["u32", "u64"])


def test_line_tables_go_and_code_stays() -> None:
    short = ptx._without_debug(PTX)
    assert "someone" not in short
    assert ".debug" not in short
    assert short.endswith("{\n\tld.param.b64 \t%rd3, [kernel_param_0];\n\tret;\n}\n")


def test_two_kernels_are_an_error() -> None:
    with pytest.raises(BackendError, match="has 2 entries, expected one"):
        ptx.read_parameters(PTX + PTX)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled and not interpreted here")
def test_interpreted_kernels_are_not_compiled() -> None:
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1 interprets kernels; unset it"):
        ptx.check_compiles()
