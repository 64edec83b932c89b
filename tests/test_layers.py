"""Imports point one way only; docs/architecture.md draws the arrows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the bottom up. A module may import its own layer and those before it.
LAYERS = (
    ("errors", "_files", "reporting", "testing"),
    ("kernels",),
    ("weights", "model", "stages", "onnx_shapes", "onnx_weights", "onnxruntime_session", "graph_memory"),
    (
        "tokens",
        "portrait",
        "identity",
        "component_configs",
        "checkpoint",
        "stage_table",
        "network_factory",
        "tiny",
        "pickle_conversion",
        "optical_flow",
    ),
    ("bundle",),
    ("runtime",),
    (
        "adapters",
        "control",
        "policies",
        "request",
        "cached_stages",
        "guidance",
        "guidance_parallel",
        "process_groups",
        "provenance",
        "sequence_parallel",
        "schedulers",
        "size_ranges",
        "vae_decode",
        "memory_plan",
        "stage_cache",
        "stage_calls",
        "conditioning",
        "denoising",
        "video",
        "pipeline",
        "reference_portrait",
    ),
    ("export",),
    ("evaluate", "training", "personalize"),
    ("serving",),
    ("benchmarks",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def _runtime_imports(tree: ast.Module) -> Iterator[str]:
    """Modules of ours that are imported when the code runs; those for type checkers alone don't count."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield node.module if node.module != "proteus_deploy" else names[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _parts(repository: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted((repository / "proteus_deploy").rglob("*.py")):
        relative = file.relative_to(repository / "proteus_deploy")
        yield relative.parts[0].removesuffix(".py"), file
    for name in ("kernels", "export", "serving", "benchmarks"):
        yield from ((name, file) for file in sorted((repository / name).rglob("*.py")))


def test_imports_point_down(repository: Path) -> None:
    wrong = []
    for part, file in _parts(repository):
        if part == "__init__":  # the lazy public surface names everything
            continue
        assert part in RANK, f"{part} has no layer; add it to LAYERS and to docs/architecture.md"
        for module in _runtime_imports(ast.parse(file.read_text(encoding="utf-8"))):
            words = module.split(".")
            if (
                words[0] == "proteus_deploy"
                and len(words) > 1
                and words[1] in RANK
                and RANK[words[1]] > RANK[part]
            ):
                wrong.append(f"{file.relative_to(repository)} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["export", "serving", "benchmarks", "kernels"])
def test_links_lead_to_the_top_folders(repository: Path, name: str) -> None:
    link = repository / "proteus_deploy" / name
    assert link.is_symlink()
    assert link.resolve() == (repository / name).resolve()
    assert not link.readlink().is_absolute()
