"""Runs the plugin against a stand-in of `tensorrt.plugin`, in a process where Triton compiles.

    python plugin_driver.py FOLDER      writes FOLDER/cases.json and one FOLDER/<case>.ptx for each case

The stand-in follows the documented interface: which signatures and annotations are accepted, what the builder
calls with what, which values a launch takes. Sizes are symbols that are evaluated at the end, as at run time.
"""

from __future__ import annotations

import enum
import inspect
import json
import subprocess
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ID = "proteus_deploy::FusedIdentityAttention"
SIZES = ({"B": 1, "N": 1, "I": 1}, {"B": 2, "N": 17_550, "I": 2}, {"B": 3, "N": 65, "I": 1})
SMALL = {"width": 64, "heads": 3, "queries": 5}
PUBLISHED = {"width": 3072, "heads": 16, "queries": 32}


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    BF16 = 2


class SymInt32:
    """A number, or an expression of sizes."""

    def __init__(self, value: int | SymInt32 | None = None) -> None:
        self.evaluate: Callable[[Mapping[str, int]], int]
        if isinstance(value, SymInt32):
            self.evaluate = value.evaluate
        else:
            assert type(value) is int, value
            self.evaluate = lambda sizes, number=value: number  # type: ignore[misc]

    def is_fixed(self) -> bool:
        return len({self.evaluate(sizes) for sizes in SIZES}) == 1


class ShapeExpr(SymInt32):
    def __init__(self, size: int | str) -> None:
        self.symbol = size if isinstance(size, str) else None
        self.evaluate = lambda sizes: sizes[size] if isinstance(size, str) else size

    @property
    def is_constant(self) -> bool:
        return self.symbol is None

    def constant_value(self) -> int:
        assert self.symbol is None
        return self.evaluate({})


def cdiv(first: SymInt32, second: int) -> SymInt32:
    result = SymInt32(0)
    result.evaluate = lambda sizes: -(-first.evaluate(sizes) // second)
    return result


class SymExprs:
    pass


class SymIntExprs(SymExprs):
    def __init__(self, length: int) -> None:
        self.values: list[SymInt32 | None] = [None] * length

    def __setitem__(self, index: int, value: SymInt32) -> None:
        assert isinstance(value, SymInt32)
        self.values[index] = value


class KernelLaunchParams:
    FIELDS = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")

    def __init__(self) -> None:
        for name in self.FIELDS:
            setattr(self, name, 0 if name == "shared_mem" else 1)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in self.FIELDS, name
        self.__dict__[name] = SymInt32(value)


class TensorDesc:
    def __init__(self, shape: tuple[int | str, ...], dtype: DataType) -> None:
        self.shape_expr = [ShapeExpr(size) for size in shape]
        self.dtype = dtype

    def like(self) -> TensorDesc:
        return TensorDesc(tuple(e.symbol or e.constant_value() for e in self.shape_expr), self.dtype)


class AutoTuneCombination:
    def __init__(self, io_types: str, layouts: str, tactics: list[int]) -> None:
        self.io_types = [name.strip() for name in io_types.split(",")]
        self.layouts, self.tactics = layouts, tactics
        assert all(tactic > 0 for tactic in tactics)


class Registry:
    """What the decorators check and keep."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self.attributes: dict[str, Any] = {}
        self.tensors: list[str] = []

    def register(self, plugin_id: str) -> Callable[..., Any]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            assert plugin_id == ID
            assert not self.functions, "TensorRT refuses a second plugin of one name"
            for name, parameter in inspect.signature(function).parameters.items():
                assert parameter.default is inspect.Parameter.empty
                assert not isinstance(parameter.annotation, str), "annotations have to be types"
                if issubclass(parameter.annotation, TensorDesc):
                    assert not self.attributes, "tensors come first"
                    self.tensors.append(name)
                else:
                    self.attributes[name] = parameter.annotation
            assert issubclass(inspect.signature(function).return_annotation, TensorDesc)
            self.functions["register"] = function
            return function

        return decorate

    def autotune(self, plugin_id: str) -> Callable[..., Any]:
        return self._decorator("autotune", plugin_id, ["outputs"])

    def aot_impl(self, plugin_id: str) -> Callable[..., Any]:
        return self._decorator("aot_impl", plugin_id, ["outputs", "tactic"])

    def _decorator(self, kind: str, plugin_id: str, trailing: list[str]) -> Callable[..., Any]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            assert plugin_id == ID
            assert "register" in self.functions
            signature = inspect.signature(function)
            assert list(signature.parameters) == [*self.tensors, *self.attributes, *trailing]
            for name, wanted in self.attributes.items():
                assert signature.parameters[name].annotation == wanted
            returns = signature.return_annotation
            parts = typing.get_args(returns)
            if kind == "autotune":
                assert typing.get_origin(returns) is list
                assert issubclass(parts[0], AutoTuneCombination)
            else:
                assert typing.get_origin(returns) is tuple
                assert issubclass(parts[2], KernelLaunchParams)
                assert issubclass(parts[3], SymExprs)
            self.functions[kind] = function
            return function

        return decorate


def install(registry: Registry) -> None:
    """Put the stand-in where `import tensorrt` and `import tensorrt.plugin` find it."""
    package: Any = types.ModuleType("tensorrt")
    package.__version__, package.ILogger, package.__path__ = "10.9.0", type("ILogger", (), {}), []
    package.plugin = plugin = types.ModuleType("tensorrt.plugin")
    for value in (TensorDesc, AutoTuneCombination, KernelLaunchParams, SymExprs, SymIntExprs, SymInt32, cdiv):
        setattr(plugin, value.__name__, value)
    for name in ("register", "autotune", "aot_impl"):
        setattr(plugin, name, getattr(registry, name))
    sys.modules |= {"tensorrt": package, "tensorrt.plugin": plugin}


def build(registry: Registry, sizes: Mapping[str, int], dtype: str, tactic: int | None) -> dict[str, Any]:
    """One node, as the builder goes about it; `tactic` -1 is the last one."""
    import numpy as np

    kind = {"fp32": DataType.FLOAT, "fp16": DataType.HALF, "bf16": DataType.BF16}[dtype]
    columns = sizes["heads"] * sizes["queries"]
    inputs = [
        TensorDesc(("B", "N", sizes["width"]), kind), TensorDesc(("I", columns, sizes["width"]), kind),
        TensorDesc(("I", columns), DataType.FLOAT), TensorDesc(("I", 1, columns), kind),
        TensorDesc(("I", columns, sizes["width"]), kind), TensorDesc((1,), DataType.FLOAT),
    ]  # fmt: skip
    attributes = [np.array([sizes["heads"]], np.int32), np.array([1e-5], np.float32)]
    named = dict(zip(registry.attributes, attributes, strict=True))
    output = registry.functions["register"](*inputs, **named)
    combinations = registry.functions["autotune"](*inputs, *attributes, [output])
    here = [
        c for c in combinations if c.io_types[0] == {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}[dtype]
    ]
    assert len(here) == 1
    chosen = here[0].tactics[-1] if tactic == -1 else tactic
    kernel, ptx, launch, scalars = registry.functions["aot_impl"](*inputs, *attributes, [output], chosen)
    return {
        "output": [[e.symbol or e.constant_value() for e in output.shape_expr], output.dtype.name],
        "combination": here[0].io_types, "layouts": here[0].layouts, "tactics": here[0].tactics,
        "tactic": chosen, "kernel": kernel, "ptx": ptx, "inputs": len(inputs), "outputs": 1,
        "launches": [
            {name: getattr(launch, name).evaluate(at) for name in KernelLaunchParams.FIELDS} for at in SIZES
        ],
        "scalars": [[value.evaluate(at) for value in scalars.values] for at in SIZES],
    }  # fmt: skip


def triton_grids(sizes: Mapping[str, int], dtype: str, target: int, tactic: int | None) -> list[list[int]]:
    """Grids that the op's own launcher asks for at SIZES, with the blocks of the same tactic."""
    import torch

    from proteus_deploy.export.identity_plugin import PluginProblem, plugin_tactics

    kernels: Any = import_module("proteus_deploy.kernels.identity_attention.triton")
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    configs = plugin_tactics(PluginProblem(**sizes, dtype=dtype, eps=1e-5), target)
    blocks = dict(configs[max(tactic or 0, 1) - 1].blocks)
    grids: list[list[int]] = []
    columns, width = sizes["heads"] * sizes["queries"], sizes["width"]
    original = kernels.launch
    kernels.launch = lambda kernel, grid, *_, **__: grids.append([*map(int, grid(blocks))])
    try:
        for at in SIZES:
            tensors = [
                torch.empty(*shape, dtype=kind, device="meta")
                for shape in (
                    (at["B"], at["N"], width), (at["I"], width, columns), (at["I"], 1, columns),
                    (at["I"], columns, width), (1,),
                )
            ]  # fmt: skip
            kernels.forward(*tensors, sizes["heads"], 1e-5)
    finally:
        kernels.launch = original
    return grids


def assemble(ptx: str) -> dict[str, Any]:
    """What NVIDIA's assembler, which Triton brings, makes of the text."""
    import re

    import triton

    from proteus_deploy.kernels.ahead_of_time import _read_cubin

    arch = re.search(r"\.target (\w+)", ptx)
    assert arch is not None
    new = int("".join(filter(str.isdigit, arch[1]))) >= 100
    tool = triton.knobs.nvidia.ptxas_blackwell if new else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        command = [tool.path, f"--gpu-name={arch[1]}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": done.stderr}
        registers, local = _read_cubin(cubin.read_bytes())
        return {"arch": arch[1], "registers": registers, "local_bytes": local}


def main(folder: Path) -> None:
    from proteus_deploy.errors import BackendError
    from proteus_deploy.export.identity_plugin import plugin_key, register_identity_plugin
    from proteus_deploy.runtime.tensorrt_api import TensorRT

    registry = Registry()
    install(registry)
    api = TensorRT.load("tensorrt")
    cases: dict[str, Any] = {}
    asked = [(SMALL, "bf16", target, tactic) for target in (80, 89, 90, 100, 120) for tactic in (None, -1)]
    asked += [(SMALL, dtype, 90, 2) for dtype in ("fp16", "fp32")]
    asked += [(PUBLISHED, "bf16", 90, tactic) for tactic in (0, -1)]
    for sizes, dtype, target, tactic in asked:
        register_identity_plugin(api, f"sm{target}")
        case = build(registry, sizes, dtype, tactic)
        name = f"{sizes['width']}-{dtype}-{target}-{case['tactic']}"
        (folder / f"{name}.ptx").write_text(case.pop("ptx"), encoding="utf-8")
        case["triton_grids"] = triton_grids(sizes, dtype, target, case["tactic"])
        case["assembled"] = assemble((folder / f"{name}.ptx").read_text(encoding="utf-8"))
        cases[name] = case | {"target": target, "sizes": sizes, "dtype": dtype}
    free: Any = {**SMALL, "width": "W"}  # a width that isn't known when the engine is built
    try:
        build(registry, free, "bf16", None)
    except BackendError as error:
        kept = api.log.failure is error
        document = {"cases": cases, "key": plugin_key(), "refusal": str(error), "kept": kept}
    (folder / "cases.json").write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
