"""A bundle's graphs in ONNX Runtime: results, contracts, memory, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from proteus_deploy import BackendError, InputError
from proteus_deploy.bundle import Bundle, write_manifest
from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeBackend, OnnxRuntimeGraph

pytest.importorskip("onnxruntime")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
W = torch.tensor([0.1 * (index % 7 - 3) for index in range(256)]).reshape(16, 16)


def expected(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return x.float() @ W + timestep[:, None]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_graph_computes_what_it_says(new_bundle: Callable[..., Bundle], dtype: str, batch: int) -> None:
    backend = OnnxRuntimeBackend(new_bundle("bundle", dtype))
    assert backend.dtype == DTYPES[dtype]
    assert backend.checks_ranges
    x, timestep = torch.randn(batch, 16).to(DTYPES[dtype]), torch.arange(batch)
    outputs = backend.runner("first")(x=x, timestep=timestep)
    assert list(outputs) == ["y"]
    assert outputs["y"].dtype == DTYPES[dtype]
    bound = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[dtype]
    assert (outputs["y"].float() - expected(x, timestep)).norm() <= bound * expected(x, timestep).norm()


def test_threads_rest_between_runs(new_bundle: Callable[..., Bundle]) -> None:
    """Those of one graph would take the cores from the next."""
    run = OnnxRuntimeBackend(new_bundle("bundle")).runner("first")
    options = run._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_results_do_not_share_memory(new_bundle: Callable[..., Bundle]) -> None:
    """The next call must not write into what the last one returned, nor into its inputs."""
    run = OnnxRuntimeBackend(new_bundle("bundle")).runner("first")
    x = torch.randn(2, 16)
    given = x.clone()
    first = run(x=x, timestep=torch.zeros(2, dtype=torch.int64))["y"]
    kept = first.clone()
    run(x=x + 1, timestep=torch.ones(2, dtype=torch.int64))
    assert torch.equal(first, kept)
    assert torch.equal(x, given)


def test_strided_and_grad_inputs(new_bundle: Callable[..., Bundle]) -> None:
    run = OnnxRuntimeBackend(new_bundle("bundle")).runner("first")
    x, timestep = torch.randn(16, 3, requires_grad=True).T, torch.tensor([0, 7, 1, 7, 2])[::2]
    got = run(x=x, timestep=timestep)["y"]
    assert torch.allclose(got, expected(x.detach(), timestep), atol=1e-5)


def test_inputs_that_break_the_contract_are_named(new_bundle: Callable[..., Bundle]) -> None:
    run = OnnxRuntimeBackend(new_bundle("bundle")).runner("first")
    zeros = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match=r"first: input 'timestep' is missing; inputs are x \['B', 16\]"):
        run(x=torch.zeros(1, 16))
    with pytest.raises(InputError, match="first: 'z' is not an input"):
        run(x=torch.zeros(1, 16), timestep=zeros, z=zeros)
    with pytest.raises(InputError, match=r"input 'x' has shape \[1, 15\]"):
        run(x=torch.zeros(1, 15), timestep=zeros)
    with pytest.raises(InputError, match=r"input 'timestep' has shape \[1\]; .* \{'B': 2\}"):
        run(x=torch.zeros(2, 16), timestep=zeros)


def test_graphs_are_kept_until_they_are_released(new_bundle: Callable[..., Bundle]) -> None:
    backend = OnnxRuntimeBackend(new_bundle("bundle"))
    first = backend.runner("first")
    assert isinstance(first, OnnxRuntimeGraph)
    assert backend.runner("first") is first
    backend.release("second_start")
    backend.release("first")
    again = backend.runner("first")
    assert again is not first
    backend.close()
    assert backend.runner("first") is not again


def test_unknown_graph_lists_the_known_ones(new_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(InputError, match="no graph 'unet'; the table has first, second_start, second_next"):
        OnnxRuntimeBackend(new_bundle("bundle")).runner("unet")


def test_file_that_is_no_graph_is_named(new_bundle: Callable[..., Bundle]) -> None:
    bundle = new_bundle("bundle")
    bundle.onnx_file("second_start").write_bytes(b"not a graph")
    document = {k: v for k, v in bundle.manifest.items() if k not in ("files", "kind", "schema_version")}
    (bundle.folder / "manifest.json").unlink()
    write_manifest(bundle.folder, document)
    with pytest.raises(BackendError, match=r"ONNX Runtime can't .* .*second_start\.onnx: "):
        OnnxRuntimeBackend(Bundle.open(bundle.folder)).runner("second_start")


def test_bfloat16_is_refused_on_the_cpu(new_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(BackendError, match="has no bfloat16 kernels; run this bundle with openvino"):
        OnnxRuntimeBackend(new_bundle("bundle", "bf16"))


def test_number_of_threads(new_bundle: Callable[..., Bundle]) -> None:
    backend = OnnxRuntimeBackend(new_bundle("bundle"), threads=1)
    assert backend.runner("first")._session.get_session_options().intra_op_num_threads == 1
