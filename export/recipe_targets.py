"""What can run a recipe: GPU generations and backends, refused by name before any work is done.

Facts: which targets TensorRT for RTX 1.7 built which formats for (docs/quantize.md), CUDA's own rule that
E4M3 came with compute capability 8.9 and E2M1 with 10.0, and what ONNX Runtime 1.31 and OpenVINO 2026.4
were seen to load and compute.
"""

from __future__ import annotations

import re

from proteus_deploy.errors import InputError
from proteus_deploy.export.recipe import Recipe

# Lowest compute capability (major * 10 + minor) with products or conversions of a format.
_LOWEST = {
    "fp8_e4m3": (89, "E4M3 came with sm89"),
    "nvfp4": (100, "E2M1 with block scales came with sm100"),
    "int4": (80, "TensorRT builds 4-bit weights from sm80 on"),
    "int8": (75, "TensorRT builds from sm75 on"),
}
_TARGET = re.compile(r"sm(\d{2,3})a?")
BACKENDS = ("onnxruntime", "openvino", "tensorrt", "eager", "compiled")


def check_target(recipe: Recipe, target: str, dtype: str = "fp32") -> None:
    """Raise InputError when a target ("sm89") or backend ("onnxruntime") can't run the recipe.

    dtype: fp32, fp16 or bf16, of what the recipe leaves high. Nothing is computed.
    """
    reasons = unsupported(recipe, target, dtype)
    if reasons:
        raise InputError(
            f"recipe {recipe.name!r} with {dtype} can't run on {target}: {'; '.join(reasons)}; choose "
            "another recipe or target"
        )


def unsupported(recipe: Recipe, target: str, dtype: str = "fp32") -> list[str]:
    """Reasons why `target` can't run the recipe; none if it can. Raises InputError for an unknown target."""
    formats = _formats(recipe)
    if match := _TARGET.fullmatch(target):
        return _by_capability(formats, int(match[1]), dtype)
    if target not in BACKENDS:
        raise InputError(f"{target!r} is no target; name one like sm89, or a backend: {', '.join(BACKENDS)}")
    if target == "onnxruntime":
        reasons = []
        if "nvfp4" in formats:
            reasons.append("ONNX Runtime has no kernel of DequantizeLinear for E2M1 (nvfp4)")
        if dtype == "bf16":
            reasons.append("ONNX Runtime's CPU provider has no bfloat16 kernels")
        return reasons
    return []


def _formats(recipe: Recipe) -> tuple[str, ...]:
    found = set(recipe.weight_formats)
    for graph in recipe.graphs.values():
        found |= {rule.activation for rule in graph.rules} | {rule.format for rule in graph.attention}
    return tuple(sorted(found - {"none"}))


def _by_capability(formats: tuple[str, ...], capability: int, dtype: str) -> list[str]:
    reasons = [
        f"{kind} needs sm{_LOWEST[kind][0]} or newer ({_LOWEST[kind][1]})"
        for kind in formats
        if capability < _LOWEST[kind][0]
    ]
    if dtype == "bf16" and capability < 80:
        reasons.append("bfloat16 came with sm80")
    return reasons
