"""`proteus-deploy serve`: an HTTP server that makes videos, in the shape of OpenAI's video API."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy.cli import serve_ray
from proteus_deploy.cli.paths import kind_of
from proteus_deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    from proteus_deploy.serving.service import ServiceSettings

NAME = "serve"
HELP = "serve a bundle or checkpoint over HTTP, in the shape of OpenAI's video API"

_BUNDLE_BACKENDS = ("onnxruntime", "openvino", "tensorrt", "aotinductor")
_CHECKPOINT_BACKENDS = ("eager", "compiled")
_LONGEST_BATCH_WAIT_MS = 5000
_MOST_ADAPTER_MIB = 900  # SQLite and PostgreSQL both end at about 1 GB a value
_PACKAGES = ("fastapi", "uvicorn", "sqlalchemy", "alembic", "python_multipart", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, metavar="BUNDLE_OR_CHECKPOINT")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="0 takes any free one and prints it (default: %(default)s)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("proteus-data"),
        help="folder of queue and finished videos (default: ./%(default)s)",
    )
    parser.add_argument(
        "--database-url", metavar="URL", help="postgresql://… or sqlite:////… (default: SQLite in --data-dir)"
    )
    parser.add_argument(
        "--results-url",
        metavar="URL",
        help="finished videos for several servers: file:///folder, s3://bucket/prefix, … "
        "(default: a folder in --data-dir)",
    )
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="a name and the sha256 of a key on each line (default: none)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, each with the model in memory")
    parser.add_argument("--model-name", default="proteus-id", help="name in the API (default: %(default)s)")
    parser.add_argument(
        "--backend",
        choices=(*_BUNDLE_BACKENDS, *_CHECKPOINT_BACKENDS),
        help="default: onnxruntime for a bundle, eager for a checkpoint",
    )
    parser.add_argument("--device", help="e.g. cpu, cuda (default: the backend's own)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="checkpoint only")
    parser.add_argument(
        "--attention", metavar="NAME", help="checkpoint only, as for generate (default: torch)"
    )
    parser.add_argument("--frozen", action="store_true", help="checkpoint only, as for generate")
    parser.add_argument(
        "--portrait",
        type=Path,
        metavar="DIR",
        help="portrait model, for requests without a photo (default: the bundle's own, if any)",
    )
    parser.add_argument("--vae-tiling", action="store_true", help="decode in tiles: less memory, more time")
    parser.add_argument("--low-memory", action="store_true", help="hold one part's networks at a time")
    _add_limits(parser)
    serve_ray.add_arguments(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-queued", type=int, default=1000, help="jobs that may wait, then 429 (default: %(default)s)"
    )
    parser.add_argument(
        "--max-attempts", type=int, default=3, help="crashes before a job is given up (default: %(default)s)"
    )
    parser.add_argument(
        "--max-wait-seconds",
        type=float,
        metavar="S",
        help="refuse jobs (429) that would wait longer, by cost and the measured rate (default: no limit)",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=1,
        help="videos of one size and schedule made together (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-wait-ms",
        type=float,
        default=0.0,
        help="how long a batch that isn't full waits for more (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-parts",
        type=int,
        default=1,
        metavar="N",
        help="make a batch in N parts side by side, each with its share of the CPU's threads; for a "
        "checkpoint on the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-mib",
        type=int,
        default=256,
        help="memory of each worker for results of text and identity stages (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter-cache-mib",
        type=int,
        default=1024,
        help="memory of each worker for uploaded adapters (default: %(default)s)",
    )
    parser.add_argument(
        "--max-adapter-mib",
        type=int,
        default=256,
        help="largest adapter that may be uploaded (default: %(default)s)",
    )
    parser.add_argument(
        "--traces", metavar="URL", help="send OpenTelemetry spans to an OTLP/HTTP address, or to the console"
    )
    parser.add_argument("--log-json", action="store_true", help="write each line of the log as a JSON object")
    parser.add_argument(
        "--no-provenance", action="store_true", help="leave out the mark in each mp4 that it was generated"
    )
    parser.add_argument(
        "--no-warm-up", action="store_true", help="be ready without having made one step of a video"
    )
    parser.add_argument(
        "--keep-days", type=float, default=7.0, help="days that finished videos stay (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-gib", type=float, help="GiB of finished videos, the oldest go (default: no limit)"
    )
    parser.add_argument(
        "--finish-seconds",
        type=float,
        default=0.0,
        help="on Ctrl-C let a running job go on for so long before it is put back (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM and return 0. Raises InputError for what can't go together."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(
            f"serving needs the packages {', '.join(missing)}: pip install 'proteus-deploy[serve]'"
        )
    serve_ray.check_arguments(arguments)
    settings = _settings(arguments)
    from proteus_deploy.serving.logs import write_logs

    write_logs(as_json=arguments.log_json)
    if arguments.engine == "ray":
        serve_ray.run(settings, arguments, on_ready=_say_where)
        return 0
    from proteus_deploy.serving.server import serve

    serve(settings, arguments.host, arguments.port, on_ready=_say_where)
    return 0


def _say_where(url: str) -> None:
    print(f"serving on {url}", flush=True)


def _settings(arguments: argparse.Namespace) -> ServiceSettings:
    """Everything about the flags that can be known before anything is opened."""
    kind = kind_of(arguments.path)
    _check_backend(kind, arguments)
    if arguments.portrait is not None and not arguments.portrait.is_dir():
        raise InputError(f"--portrait is {arguments.portrait}, which is no folder; pass a portrait model's")
    for name, least in (
        ("workers", 1), ("max_queued", 1), ("max_attempts", 1), ("max_batch", 1), ("batch_parts", 1),
        ("cache_mib", 0),
        ("adapter_cache_mib", 0), ("max_adapter_mib", 1),
    ):  # fmt: skip
        if getattr(arguments, name) < least:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} is {getattr(arguments, name)}; it must be at least {least}")
    if arguments.max_adapter_mib > _MOST_ADAPTER_MIB:
        raise InputError(
            f"--max-adapter-mib is {arguments.max_adapter_mib}; databases hold {_MOST_ADAPTER_MIB} at most"
        )
    if not 0 <= arguments.port <= 65535:
        raise InputError(f"--port is {arguments.port}; it must be 0 to 65535")
    for name in ("keep_days", "keep_gib", "finish_seconds", "max_wait_seconds", "batch_wait_ms"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be a number of 0 or more")
    from proteus_deploy.serving.keys import Keys
    from proteus_deploy.serving.messages import PipelineChoice
    from proteus_deploy.serving.service import ServiceSettings

    return ServiceSettings(
        pipeline=PipelineChoice(
            kind=kind,
            folder=str(arguments.path.absolute()),
            backend=arguments.backend,
            device=arguments.device,
            dtype=arguments.dtype,
            attention=arguments.attention or "torch",
            frozen=arguments.frozen,
            vae_tiling=arguments.vae_tiling,
            low_memory=arguments.low_memory,
            portrait=None if arguments.portrait is None else str(arguments.portrait.absolute()),
        ),
        data_dir=arguments.data_dir,
        database_url=arguments.database_url,
        results_url=arguments.results_url,
        model_name=arguments.model_name,
        workers=arguments.workers,
        max_attempts=arguments.max_attempts,
        max_queued=arguments.max_queued,
        keep_s=arguments.keep_days * 86400,
        keep_bytes=None if arguments.keep_gib is None else int(arguments.keep_gib * 2**30),
        finish_s=arguments.finish_seconds,
        max_wait_s=arguments.max_wait_seconds,
        max_batch=arguments.max_batch,
        batch_wait_s=arguments.batch_wait_ms / 1000,
        batch_parts=arguments.batch_parts,
        cache_bytes=arguments.cache_mib << 20,
        adapter_cache_bytes=arguments.adapter_cache_mib << 20,
        max_adapter_bytes=arguments.max_adapter_mib << 20,
        warm_up=not arguments.no_warm_up,
        provenance=not arguments.no_provenance,
        traces=arguments.traces,
        log_json=arguments.log_json,
        keys=Keys() if arguments.api_keys is None else Keys.read(arguments.api_keys),
    )


def _check_parts(kind: str, arguments: argparse.Namespace) -> None:
    """Raises InputError where parts of a batch can't be made side by side, or would gain nothing."""
    said = f"--batch-parts is {arguments.batch_parts}"
    if arguments.batch_parts > arguments.max_batch:
        raise InputError(f"{said} and --max-batch {arguments.max_batch}; raise --max-batch, or leave it out")
    if kind == "bundle" or arguments.backend not in (None, "eager") or arguments.device not in (None, "cpu"):
        raise InputError(
            f"{said}, which shares out PyTorch's threads on the CPU; serve a checkpoint with --backend eager "
            "and --device cpu, or leave it out"
        )
    if arguments.low_memory:
        raise InputError(
            f"{said}, and with --low-memory one part would release the networks that another one runs; leave "
            "one of them out"
        )


def _check_backend(kind: str, arguments: argparse.Namespace) -> None:
    backend = arguments.backend
    if kind == "bundle":
        if arguments.dtype is not None:
            raise InputError(
                f"--dtype is {arguments.dtype}; a bundle runs in the precision that it was exported in: "
                "leave the flag out, or export again with it"
            )
        if arguments.attention is not None or arguments.frozen:
            raise InputError(
                "--attention and --frozen are for checkpoints; a bundle's graphs have their own attention "
                "and weights: leave them out, or serve the checkpoint"
            )
        if backend in _CHECKPOINT_BACKENDS:
            raise BackendError(
                f"backend {backend!r} runs a checkpoint, and {arguments.path} is a bundle; choose one of "
                f"{', '.join(_BUNDLE_BACKENDS)}, or pass the checkpoint's folder"
            )
    elif backend in _BUNDLE_BACKENDS:
        raise BackendError(
            f"backend {backend!r} runs a bundle, and {arguments.path} is a checkpoint; make a bundle with: "
            f"proteus-deploy export {arguments.path} --output-dir DIR"
        )
    if arguments.frozen and (backend != "compiled" or arguments.device not in (None, "cpu")):
        raise InputError("--frozen is for --backend compiled on the CPU; add that, or leave it out")
    if backend == "compiled" and arguments.low_memory:
        raise InputError(
            "--low-memory releases networks between the parts of each video, and --backend compiled would "
            "compile them again for each; leave one of them out"
        )
    if arguments.batch_wait_ms and arguments.max_batch == 1:
        raise InputError(
            f"--batch-wait-ms is {arguments.batch_wait_ms:g} and --max-batch 1, so there is nothing to wait "
            "for; raise --max-batch, or leave it out"
        )
    if arguments.batch_wait_ms > _LONGEST_BATCH_WAIT_MS:
        raise InputError(
            f"--batch-wait-ms is {arguments.batch_wait_ms:g}; at most {_LONGEST_BATCH_WAIT_MS}, as a job "
            "that waits in a worker's hands for longer is taken for lost"
        )
    if arguments.batch_parts > 1:
        _check_parts(kind, arguments)
    if arguments.low_memory and arguments.workers > 1:
        raise InputError(
            f"--low-memory is for a model that hardly fits, and --workers {arguments.workers} would load it "
            f"{arguments.workers} times; leave one of them out"
        )
