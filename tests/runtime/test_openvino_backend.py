"""A bundle's graphs in OpenVINO: results, contracts, memory, refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from proteus_deploy import BackendError, InputError
from proteus_deploy.bundle import Bundle, write_manifest
from proteus_deploy.runtime.openvino_backend import OpenVinoBackend, OpenVinoGraph
from proteus_deploy.stages import sample_inputs
from proteus_deploy.testing import TOLERANCES, assert_close

pytest.importorskip("openvino")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
W = torch.tensor([0.1 * (index % 7 - 3) for index in range(256)]).reshape(16, 16)


def expected(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return x.float() @ W + timestep[:, None]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_graph_computes_what_it_says(new_bundle: Callable[..., Bundle], dtype: str, batch: int) -> None:
    backend = OpenVinoBackend(new_bundle("bundle", dtype))
    assert backend.dtype == DTYPES[dtype]
    assert backend.checks_ranges
    x, timestep = torch.randn(batch, 16).to(DTYPES[dtype]), torch.arange(batch)
    outputs = backend.runner("first")(x=x, timestep=timestep)
    assert list(outputs) == ["y"]
    assert outputs["y"].dtype == DTYPES[dtype]
    bound = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[dtype]
    assert (outputs["y"].float() - expected(x, timestep)).norm() <= bound * expected(x, timestep).norm()


def test_results_do_not_share_memory(new_bundle: Callable[..., Bundle]) -> None:
    """The next call must not write into what the last one returned, nor into its inputs."""
    run = OpenVinoBackend(new_bundle("bundle")).runner("first")
    x = torch.randn(2, 16)
    given = x.clone()
    first = run(x=x, timestep=torch.zeros(2, dtype=torch.int64))["y"]
    kept = first.clone()
    run(x=x + 1, timestep=torch.ones(2, dtype=torch.int64))
    assert torch.equal(first, kept)
    assert torch.equal(x, given)


def test_strided_and_grad_inputs(new_bundle: Callable[..., Bundle]) -> None:
    run = OpenVinoBackend(new_bundle("bundle")).runner("first")
    x, timestep = torch.randn(16, 3, requires_grad=True).T, torch.tensor([0, 7, 1, 7, 2])[::2]
    got = run(x=x, timestep=timestep)["y"]
    assert torch.allclose(got, expected(x.detach(), timestep), atol=1e-5)


def test_inputs_that_break_the_contract_are_named(new_bundle: Callable[..., Bundle]) -> None:
    run = OpenVinoBackend(new_bundle("bundle")).runner("first")
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
    backend = OpenVinoBackend(new_bundle("bundle"))
    first = backend.runner("first")
    assert isinstance(first, OpenVinoGraph)
    assert backend.runner("first") is first
    backend.release("second_start")
    backend.release("first")
    again = backend.runner("first")
    assert again is not first
    backend.close()
    assert backend.runner("first") is not again


def test_unknown_graph_lists_the_known_ones(new_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(InputError, match="no graph 'unet'; the table has first, second_start, second_next"):
        OpenVinoBackend(new_bundle("bundle")).runner("unet")


def test_file_that_is_no_graph_is_named(new_bundle: Callable[..., Bundle]) -> None:
    bundle = new_bundle("bundle")
    bundle.onnx_file("second_start").write_bytes(b"not a graph")
    document = {k: v for k, v in bundle.manifest.items() if k not in ("files", "kind", "schema_version")}
    (bundle.folder / "manifest.json").unlink()
    write_manifest(bundle.folder, document)
    with pytest.raises(BackendError, match=r"OpenVINO can't .* .*second_start\.onnx: "):
        OpenVinoBackend(Bundle.open(bundle.folder)).runner("second_start")


def test_threads_get_their_own_results(new_bundle: Callable[..., Bundle]) -> None:
    """One request serves a graph; nobody may run it before another's results are copied."""
    run = OpenVinoBackend(new_bundle("bundle")).runner("first")

    def one(seed: int) -> bool:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
        timestep = torch.arange(4)
        return torch.allclose(run(x=x, timestep=timestep)["y"], expected(x, timestep), atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(200)))


_CLOSED_ELSEWHERE = """
import gc, os, signal, sys, threading
from pathlib import Path
from proteus_deploy.bundle import Bundle
from proteus_deploy.runtime.openvino_backend import OpenVinoBackend

bundle = Bundle.open(Path(sys.argv[1]))
backends = [OpenVinoBackend(bundle), OpenVinoBackend(bundle)]
for backend in backends:
    backend.runner("first")
del backend

def close():
    while backends:
        backends.pop(0).close()
    gc.collect()

thread = threading.Thread(target=close)
thread.start()
thread.join()
met = []
signal.signal(signal.SIGINT, lambda *_: met.append("SIGINT"))
os.kill(os.getpid(), signal.SIGINT)
print(*met, sep="")
"""


def test_ctrl_c_after_backends_were_closed_in_another_thread(new_bundle: Callable[..., Bundle]) -> None:
    """Python's handlers run on the signal stack, which OpenVINO's CPU plugin takes along when it goes."""
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-c",
        _CLOSED_ELSEWHERE,
        str(new_bundle("bundle").folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "SIGINT\n"), done.stderr


def test_number_of_threads(new_bundle: Callable[..., Bundle]) -> None:
    run = OpenVinoBackend(new_bundle("bundle"), threads=1).runner("first")
    assert run._compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_nothing_is_quantised_behind_the_graph(new_bundle: Callable[..., Bundle]) -> None:
    run = OpenVinoBackend(new_bundle("bundle")).runner("first")
    assert run._compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


@pytest.fixture(scope="module")
def small(parity_bundle: Path) -> Bundle:
    return Bundle.open(parity_bundle)


def test_denoiser_of_fixed_sizes_computes_the_same(small: Bundle) -> None:
    table = small.table
    graph, sizes = table.graph("denoiser"), table.sizes("opt")
    fixed = {symbol: sizes[symbol] for symbol in graph.symbols}
    inputs = sample_inputs(graph, sizes)
    want = OpenVinoBackend(small).runner("denoiser")(**inputs)["velocity"]
    backend = OpenVinoBackend(small, denoiser_sizes=fixed)
    run = backend.runner("denoiser")
    assert not run._compiled.input("latents").partial_shape.is_dynamic
    assert_close("velocity", run(**inputs)["velocity"], want, TOLERANCES["bundle", "graph", "fp32"])
    with pytest.raises(
        InputError, match=r"denoiser: batch \(B\) is 1, and denoiser_sizes fixed it at 2; open"
    ):
        run(**sample_inputs(graph, sizes | {"B": 1}))
    text = backend.runner("text_encoder")
    assert text(**sample_inputs(text.graph, {"B": 1, "N": 5}))["text"].shape[:2] == (1, 5)


def test_part_of_the_sizes_can_be_fixed(small: Bundle) -> None:
    run = OpenVinoBackend(small, denoiser_sizes={"y": 4, "x": 6}).runner("denoiser")
    for batch in (1, 2):
        sizes = small.table.sizes("opt") | {"B": batch}
        inputs = sample_inputs(run.graph, sizes)
        assert run(**inputs)["velocity"].shape == inputs["latents"][:, :, :16].shape


def test_sizes_that_the_denoiser_has_not_are_refused(small: Bundle) -> None:
    with pytest.raises(InputError, match="denoiser_sizes has 'h'; the denoiser's symbols are B, f, y, x, L"):
        OpenVinoBackend(small, denoiser_sizes={"h": 3})
    with pytest.raises(InputError, match=r"batch \(B\) is 99; the declared range is 1 to 2"):
        OpenVinoBackend(small, denoiser_sizes={"B": 99})
