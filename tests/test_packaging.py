"""The wheel holds every package of the tree and adds one import name."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path, PurePosixPath

import pytest

import proteus_deploy

TOP_FOLDERS = ("benchmarks", "export", "kernels", "serving")


def _modules_in_tree(repository: Path) -> set[str]:
    """Every .py file of the library as its path inside the wheel."""
    found = {path.relative_to(repository).as_posix() for path in _python_files(repository / "proteus_deploy")}
    for folder in TOP_FOLDERS:
        found |= {
            f"proteus_deploy/{path.relative_to(repository).as_posix()}"
            for path in _python_files(repository / folder)
        }
    return found


def _python_files(folder: Path) -> list[Path]:
    # os.walk, as it doesn't follow the four links: those files are counted under their own folder.
    return [Path(base) / name for base, _, names in os.walk(folder) for name in names if name.endswith(".py")]


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that no build folder is left in it or read from it."""
    source = tmp_path_factory.mktemp("source") / "tree"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(repository, source, symlinks=True, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_packages_name_each_folder_with_code(repository: Path) -> None:
    with (repository / "pyproject.toml").open("rb") as stream:
        listed = set(tomllib.load(stream)["tool"]["setuptools"]["packages"])
    present = {".".join(PurePosixPath(module).parent.parts) for module in _modules_in_tree(repository)}
    assert present - listed == set(), "packages of the tree that pyproject.toml doesn't list"
    assert listed - present == set(), "packages that pyproject.toml lists and the tree doesn't have"


def test_each_package_has_an_init(repository: Path) -> None:
    modules = _modules_in_tree(repository)
    folders = {str(PurePosixPath(module).parent) for module in modules}
    assert {folder for folder in folders if f"{folder}/__init__.py" not in modules} == set()


def test_wheel_holds_the_tree_and_one_import_name(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    dist_info = f"proteus_deploy-{proteus_deploy.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"proteus_deploy", dist_info}
    code = {name for name in names if name.endswith(".py")}
    assert code == _modules_in_tree(repository)
    rest = {name for name in names - code if not name.startswith(dist_info)}
    configs = {
        f"proteus_deploy/training/accelerate/{name}.yaml" for name in ("ddp", "fsdp", "deepspeed_zero2")
    }
    networks = {
        file.relative_to(repository).as_posix()
        for folder in ("model", "encoders", "portrait_model")
        for file in (repository / "proteus_deploy" / "tiny" / folder).rglob("*")
        if file.is_file()
    }
    source = "proteus_deploy/kernels/joint_attention/cpu.cpp"
    prompts = "proteus_deploy/personalize/general.txt"
    recipes = {
        f"proteus_deploy/export/recipes/{file.name}" for file in (repository / "export/recipes").iterdir()
    }
    assert recipes
    page = {f"proteus_deploy/serving/page/{name}" for name in ("index.html", "page.css", "page.js")}
    assert rest == {"proteus_deploy/py.typed", source, prompts} | configs | networks | recipes | page
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_has_the_entry_point_and_no_test_dependency(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        dist_info = f"proteus_deploy-{proteus_deploy.__version__}.dist-info"
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{dist_info}/entry_points.txt").decode())
        metadata = archive.read(f"{dist_info}/METADATA").decode()
    assert entry_points["console_scripts"]["proteus-deploy"] == "proteus_deploy.cli.main:main"
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    base = [line for line in required if "extra ==" not in line]
    assert any(line.startswith("Requires-Dist: torch") for line in base)
    optional = ("onnx", "tensorrt", "pytest", "mypy", "ruff", "fastapi", "insightface", "openvino")
    assert not any(line.startswith(f"Requires-Dist: {name}") for line in base for name in optional)


def test_wheel_installs_and_runs_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    """Unpacked alone on sys.path, the command line starts and a nested package is found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import proteus_deploy, proteus_deploy.kernels as k; print(proteus_deploy.__file__, k.__file__)"
    # -S -I: neither the editable install nor the current folder may answer for the wheel.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert all(word.startswith(str(tmp_path)) for word in done.stdout.split())


def test_constraints_agree_with_pyproject(repository: Path) -> None:
    """Every pinned version lies in the declared range of the package, where one is declared."""
    from packaging.requirements import Requirement

    with (repository / "pyproject.toml").open("rb") as stream:
        project = tomllib.load(stream)["project"]
    declared = chain(project["dependencies"], *project["optional-dependencies"].values())
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, declared)}
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    wrong = {name: pin for name, pin in pins.items() if name in ranges and pin not in ranges[name]}
    assert wrong == {}
