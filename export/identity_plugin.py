"""Fused identity attention inside TensorRT engines: a Python plugin that is compiled ahead of time.

TensorRT's "quickly deployable plugins" (`tensorrt.plugin`) are Python functions that the builder calls. The
ahead-of-time kind, since TensorRT 10.9, hands it PTX, which the engine then carries: whoever loads the engine
needs neither Python nor Triton nor this file. A kernel is launched with its inputs, 32-bit whole numbers
that may depend on sizes, and its outputs: the order of `identity_attention_plugin_kernel`.

The points of the kernel's autotune space that fit the GPU are the plugin's tactics: TensorRT times them
during the build and keeps the fastest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch

from proteus_deploy.errors import BackendError
from proteus_deploy.export.identity_onnx import INPUTS, OPERATOR_ID
from proteus_deploy.kernels.launch import LaunchConfig, load_kernels, power_of_two
from proteus_deploy.kernels.ptx import Ptx, check_compiles, compile_ptx
from proteus_deploy.runtime.tensorrt_api import DTYPES, TensorRT

if TYPE_CHECKING:
    from types import ModuleType

# What a block may use without being asked for more; beyond it a launcher has to opt in.
_SHARED_KIB_FOR_ALL = 48
_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PLUGIN_TYPES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
_KERNELS = "proteus_deploy.kernels.identity_attention.triton"


@dataclass(frozen=True)
class PluginProblem:
    """What one node's kernel is compiled for; batch, tokens and identities stay free."""

    width: int
    heads: int
    queries: int  # face tokens
    dtype: str  # fp32, bf16 or fp16, of hidden, A, a0, Bm and the output
    eps: float


class _Settings:
    """What the registered functions ask for when TensorRT calls them; there is one registry a process."""

    def __init__(self) -> None:
        self.capability = 0
        self.api: TensorRT | None = None


def register_identity_plugin(api: TensorRT, target: str) -> None:
    """Make `api` build the node FusedIdentityAttention for `target` ("sm90"). May be called again.

    Raises BackendError where the package has no ahead-of-time plugins or Triton can't compile here.
    """
    plugin = plugin_module(api)
    check_compiles()
    settings = _register(plugin)
    settings.api, settings.capability = api, int(target.removeprefix("sm"))


def plugin_module(api: TensorRT) -> ModuleType:
    """The package's module for Python plugins. Raises BackendError where it can't compile them ahead."""
    try:
        plugin = importlib.import_module(f"{api.flavour}.plugin")
    except ImportError as error:
        reason = f"its module {api.flavour}.plugin can't be imported ({error})"
    else:
        if hasattr(plugin, "aot_impl") and hasattr(plugin, "KernelLaunchParams"):
            return plugin
        reason = f"its module {api.flavour}.plugin has no ahead-of-time plugins"
    raise BackendError(
        f"{api.label} can't build {OPERATOR_ID}: {reason}. The package tensorrt has them from 10.9 on and in "
        '11: pip install "proteus-deploy[tensorrt]" and build with --flavour tensorrt on the GPU to build '
        "for, or export the bundle again without --identity-plugin"
    )


def plugin_tactics(problem: PluginProblem, capability: int) -> tuple[LaunchConfig, ...]:
    """The kernel's configurations for a GPU, the default first. Raises BackendError where none fits.

    At 16 bits the last one takes no more shared memory than every launcher grants.
    """
    kernels = load_kernels(_KERNELS)
    kind = _KINDS[problem.dtype]
    space = kernels.forward_space(problem.width, problem.heads, problem.queries, kind)
    fitting = [config for config in space if config.fits(capability)]
    columns = power_of_two(problem.queries) * power_of_two(problem.heads)
    if kind.itemsize == 2 and columns <= kernels.GROUP_COLUMNS:
        blocks = {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_OUT": 16}
        blocks |= dict(kernels.head_blocks(problem.heads, problem.queries, 1))
        fitting.append(LaunchConfig(tuple(blocks.items()), 8, 2, _SHARED_KIB_FOR_ALL))
    if not fitting:
        raise BackendError(
            f"identity attention of {problem.heads} heads and {problem.queries} face tokens in "
            f"{problem.dtype} fits no sm_{capability}; export without --identity-plugin"
        )
    return tuple(fitting)


@cache
def compile_tactic(problem: PluginProblem, capability: int, config: LaunchConfig) -> Ptx:
    """PTX of one tactic, compiled without a GPU. Raises BackendError."""
    kernels = load_kernels(_KERNELS)
    tokens = f"*{problem.dtype}"
    types = {
        "hidden": tokens, "A": tokens, "sums": "*fp32", "a0": tokens, "Bm": tokens, "gate": "*fp32",
        "tokens": "i32", "identities": "i32", "out": tokens,
    }  # fmt: skip
    constants = {
        "EPS": problem.eps, "D": problem.width, "H": problem.heads, "Q": problem.queries,
        "BLOCK_Q": power_of_two(problem.queries),
    }  # fmt: skip
    # TensorRT aligns a tensor to more than 16 bytes; a token inside it is aligned where the width is.
    aligned = ("hidden", "A", "sums", "a0", "Bm", "out") if problem.width % 16 == 0 else ()
    return compile_ptx(
        kernels.identity_attention_plugin_kernel, types, constants, config, capability, aligned=aligned
    )


def plugin_key() -> dict[str, str]:
    """What decides the PTX besides graph and target, for the key of a cached engine."""
    import triton

    check_compiles()
    return {
        "triton": triton.__version__,
        "kernel": load_kernels(_KERNELS).identity_attention_plugin_kernel.cache_key,
    }


@cache
def _register(plugin: Any) -> _Settings:
    """Register the functions once in this process: TensorRT refuses a second plugin of one name."""
    settings = _Settings()

    def describe(
        hidden: Any, A: Any, sums: Any, a0: Any, Bm: Any, gate: Any, heads: Any, eps: Any
    ) -> Any:  # fmt: skip
        del A, sums, a0, Bm, gate, heads, eps
        return hidden.like()

    def autotune(
        hidden: Any, A: Any, sums: Any, a0: Any, Bm: Any, gate: Any, heads: Any, eps: Any, outputs: Any
    ) -> Any:
        del sums, a0, Bm, gate, outputs
        found = []
        for dtype, name in _PLUGIN_TYPES.items():
            count = len(plugin_tactics(_problem(hidden, A, heads, eps, dtype), settings.capability))
            types = f"{name}, {name}, FP32, {name}, {name}, FP32, {name}"
            found.append(plugin.AutoTuneCombination(types, "LINEAR", list(range(1, count + 1))))
        return found

    def compile_ahead(
        hidden: Any, A: Any, sums: Any, a0: Any, Bm: Any, gate: Any, heads: Any, eps: Any, outputs: Any,
        tactic: int | None,
    ) -> Any:  # fmt: skip
        del sums, a0, Bm, gate, outputs
        problem = _problem(hidden, A, heads, eps, DTYPES[hidden.dtype.name])
        # Tactics of one's own are counted from 1; TensorRT's default tactic is 0.
        config = plugin_tactics(problem, settings.capability)[max(tactic or 0, 1) - 1]
        ptx = compile_tactic(problem, settings.capability, config)
        batch, tokens, _ = hidden.shape_expr
        launch = plugin.KernelLaunchParams()
        launch.grid_x = plugin.cdiv(tokens, dict(config.blocks)["BLOCK_N"])
        launch.grid_y = batch
        launch.block_x = ptx.threads
        launch.shared_mem = ptx.shared_bytes
        scalars = plugin.SymIntExprs(2)  # tokens, identities: between inputs and outputs
        scalars[0], scalars[1] = plugin.SymInt32(tokens), plugin.SymInt32(A.shape_expr[0])
        return ptx.kernel, ptx.text, launch, scalars

    _annotate(plugin, describe, plugin.TensorDesc)
    _annotate(plugin, autotune, list[plugin.AutoTuneCombination])
    ahead = tuple[str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]
    _annotate(plugin, compile_ahead, ahead)
    plugin.register(OPERATOR_ID)(describe)
    plugin.autotune(OPERATOR_ID)(_keep_failure(settings, autotune))
    plugin.aot_impl(OPERATOR_ID)(_keep_failure(settings, compile_ahead))
    return settings


def _annotate(plugin: Any, function: Callable[..., Any], returns: Any) -> None:
    """TensorRT reads the types of tensors, attributes and result off a function, as types and not as text."""
    import numpy as np
    from numpy.typing import NDArray

    function.__annotations__ = {
        **dict.fromkeys(INPUTS, plugin.TensorDesc),
        "heads": NDArray[np.int32],
        "eps": NDArray[np.float32],
        "return": returns,
    }


def _keep_failure(settings: _Settings, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose exception is kept for the build to raise: TensorRT's C++ frames drop it."""

    @wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except BaseException as error:
            if settings.api is not None:
                settings.api.log.failure = error
            raise

    return called


def _problem(hidden: Any, A: Any, heads: Any, eps: Any, dtype: str) -> PluginProblem:
    """Sizes from the tensors' descriptors. Raises BackendError for one that isn't fixed or doesn't fit."""
    sizes = {"width": hidden.shape_expr[2], "columns": A.shape_expr[1]}
    if free := [name for name, size in sizes.items() if not size.is_constant]:
        raise BackendError(f"{OPERATOR_ID}: {' and '.join(free)} must be fixed when the engine is built")
    width, columns = (int(size.constant_value()) for size in sizes.values())
    count = int(heads[0])
    if columns % count:
        raise BackendError(f"{OPERATOR_ID}: {columns} columns can't be shared by {count} heads")
    return PluginProblem(width, count, columns // count, dtype, float(eps[0]))
