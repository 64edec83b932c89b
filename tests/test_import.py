"""Importing the package is cheap, its public surface is complete, bare folder names are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import proteus_deploy
from proteus_deploy import errors

HEAVY = {
    "PIL", "accelerate", "alembic", "av", "cv2", "diffusers", "fastapi", "insightface", "numpy", "onnx",
    "onnx_ir", "onnxruntime", "onnxscript", "openvino", "prometheus_client", "pydantic", "safetensors",
    "scipy", "sqlalchemy", "starlette", "tensorrt", "tensorrt_rtx", "torch", "tqdm", "transformers", "triton",
    "uvicorn",
}  # fmt: skip


def _modules_after(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import proteus_deploy; dir(proteus_deploy)",
        "from proteus_deploy.cli.main import build_parser, load_commands; build_parser(load_commands())",
    ],
    ids=["package", "command line"],
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    assert not _modules_after(statement) & HEAVY


@pytest.mark.parametrize("name", ["benchmarks", "export", "kernels", "serving"])
def test_bare_folder_name_is_refused(name: str, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from {name} import reference"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"import proteus_deploy.{name}; the bare name '{name}'" in done.stderr


@pytest.mark.slow
def test_other_libraries_work_in_the_clone(repository: Path) -> None:
    """`kernels` is also a distribution that diffusers and transformers look for on sys.path."""
    code = "from transformers import T5EncoderModel; from diffusers import CogVideoXDPMScheduler"
    subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, check=True)


@pytest.mark.parametrize("name", ["benchmarks", "export", "kernels", "serving"])
def test_link_is_relative_and_leads_to_the_folder(name: str, repository: Path) -> None:
    link = repository / "proteus_deploy" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == repository / name


def test_all_is_sorted_and_every_name_exists() -> None:
    assert proteus_deploy.__all__ == sorted(proteus_deploy.__all__)
    for name in proteus_deploy.__all__:
        value = getattr(proteus_deploy, name)
        if isinstance(value, type):
            assert value.__name__ == name
    assert set(proteus_deploy.__all__) <= set(dir(proteus_deploy))


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(proteus_deploy.__all__)
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.ProteusError)
    }
    assert defined == set(errors.__all__)


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Pipelin'"):
        proteus_deploy.Pipelin  # noqa: B018 - reading it is the test
