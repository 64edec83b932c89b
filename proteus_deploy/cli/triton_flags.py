"""`--triton` and its companions: a model repository of Triton Inference Server from a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.reporting import Report

__all__ = ["add_triton_flags", "check_triton_flags", "check_triton_source", "describe", "write_triton"]

_COMPANIONS = ("triton_stages", "triton_device", "triton_name", "triton_files")


def add_triton_flags(parser: argparse.ArgumentParser) -> None:
    """Companions default to None, so that one that was given without `--triton` can be refused."""
    group = parser.add_argument_group("Triton Inference Server (docs/triton.md)")
    group.add_argument(
        "--triton", type=Path, metavar="DIR", help="write a model repository into DIR, a new folder"
    )
    group.add_argument(
        "--triton-stages",
        choices=("tensorrt", "onnxruntime", "python"),
        help="what runs the networks in the server (python: ONNX Runtime in processes of their own)",
    )
    group.add_argument(
        "--triton-device", choices=("cpu", "cuda"), help="of the networks (tensorrt: cuda, else cpu)"
    )
    group.add_argument("--triton-name", metavar="NAME", help="name of the model that makes videos (proteus)")
    group.add_argument(
        "--triton-files",
        choices=("copy", "link"),
        help="networks are copied (the default), or are hard links to those of the bundle",
    )


def check_triton_flags(arguments: argparse.Namespace, dtype: str) -> None:
    """Raises InputError, before any work, where a bundle of this dtype can't become what was asked for."""
    if arguments.triton is None:
        for name in _COMPANIONS:
            if getattr(arguments, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} is for a repository; add --triton DIR")
        return
    from proteus_deploy.export.triton_repository import check_repository

    choices = _choices(arguments)
    choices.pop("files")
    check_repository(arguments.triton, dtype, **choices)


def check_triton_source(arguments: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises InputError where a bundle that is yet to be exported could not become a repository at once."""
    if arguments.triton is None:
        return
    if arguments.triton_stages == "tensorrt":
        raise InputError(
            "--triton-stages is tensorrt, and engines are built from a finished bundle: export without "
            "--triton, build, then proteus-deploy export BUNDLE --triton DIR --triton-stages tensorrt"
        )
    if checkpoint.face_encoder is None:
        raise InputError(
            f"{checkpoint.folder} came without face_encoder/, so a server could not read the photo that a "
            "request brings; leave --triton out, or add the folder"
        )


def write_triton(bundle: Bundle, arguments: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Write the repository; its facts as JSON: folder, and each model with its backend and device."""
    from proteus_deploy.export.triton_repository import write_repository

    models = write_repository(bundle, arguments.triton, **_choices(arguments), report=report)
    rows = [{"name": one.name, "backend": one.backend, "kind": one.kind} for one in models]
    return {"folder": str(arguments.triton), "models": rows}


def describe(document: dict[str, Any]) -> None:
    """Print the models of `write_triton`'s document, and how a server is started on them."""
    from proteus_deploy.cli.output import print_table

    rows = [[model["name"], model["backend"], model["kind"]] for model in document["models"]]
    print_table(["Triton model", "backend", "instances"], rows)
    print(f"tritonserver --model-repository {document['folder']} --disable-auto-complete-config")


def _choices(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "stages": arguments.triton_stages or "python",
        "device": arguments.triton_device,
        "name": arguments.triton_name or "proteus",
        "files": arguments.triton_files or "copy",
    }
