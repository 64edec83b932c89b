"""One adapter for the packages `tensorrt` (10.x, 11.x) and `tensorrt_rtx`, which differ in small ways.

|                     | tensorrt 10.x        | tensorrt 11.x | tensorrt_rtx                               |
|---------------------|----------------------|---------------|--------------------------------------------|
| strong typing       | a flag               | always        | always                                     |
| builds for          | the GPU it runs on   | the same      | named compute capabilities, without a GPU  |
| timing cache        | yes                  | yes           | deprecated, does nothing                   |
| runtime cache       | no                   | no            | yes: kernels are compiled on the GPU       |
| strip and refit     | yes                  | yes           | needs a GPU while building                 |

Neither package is imported before `TensorRT.load` is called with its name.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

from proteus_deploy.errors import BackendError, BundleError, Cancelled, InputError

FLAVOURS = ("tensorrt_rtx", "tensorrt")
_EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
_TARGET = re.compile(r"sm[1-9]\d{1,2}")
_SHOWN_ERRORS = 3
_NO_DRIVER = "cudaError 35"

# The package's names -> ours, which are those of `--dtype`.
DTYPES = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "FP8": "fp8",
    "FP4": "fp4",
    "E8M0": "e8m0",
    "INT4": "int4",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class EngineOptions:
    """What changes the bytes of an engine besides its graph and target.

    optimization_level: 0 (fast build) to 5 (long search); None takes the package's default.
    tf32: let float32 products round to TF32, as TensorRT does unless told otherwise. Off here, so that an
    fp32 bundle computes in fp32.
    weight_streaming: weights may stay in host memory and be copied to the GPU while it computes.
    """

    refit: bool = False
    strip_weights: bool = False
    optimization_level: int | None = None
    tf32: bool = False
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InputError(f"optimization level {self.optimization_level} is not between 0 and 5")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def current_gpu(index: int = 0) -> str | None:
    """Compute capability of a CUDA device as a target ("sm89"), from the driver; None without a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    for attribute, value in ((75, major), (76, minor)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"sm{major.value}{minor.value}"


def _new_log(module: Any) -> Any:
    """An ILogger that keeps errors and warnings; the base class exists only once the package is imported."""

    class MessageLog(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.failure: BaseException | None = None  # what a callback of ours met, Ctrl-C as a rule

        def log(self, severity: Any, message: str) -> None:
            try:
                if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                    self.errors.append(message)
                elif severity == module.ILogger.WARNING:
                    self.warnings.append(message)
            except BaseException as error:  # noqa: BLE001  it must not cross the C++ frames above
                self.failure = error

    return MessageLog()


class TensorRT:
    """A TensorRT package: what it is called, its version, and the calls that differ between them."""

    def __init__(self, flavour: str, module: Any) -> None:
        self.flavour = flavour
        self.module = module
        self.version: str = module.__version__
        self.log = _new_log(module)  # one per package: TensorRT keeps using the first logger it was given

    @classmethod
    def load(cls, flavour: str) -> TensorRT:
        """Import `flavour` ("tensorrt_rtx" or "tensorrt"). Raises BackendError when it isn't installed."""
        if flavour not in FLAVOURS:
            raise InputError(f"no TensorRT flavour {flavour!r}; choose one of {', '.join(FLAVOURS)}")
        return _load(flavour)

    @property
    def label(self) -> str:
        return f"{self.flavour} {self.version}"

    @property
    def can_build_ahead(self) -> bool:
        """Whether engines can be built for other GPUs than the one present."""
        return self.flavour == "tensorrt_rtx"

    @property
    def ahead_of_time_targets(self) -> tuple[str, ...]:
        if not self.can_build_ahead:
            return ()
        names = (name.lower() for name in dir(self.module.ComputeCapability))
        return tuple(sorted(filter(_TARGET.fullmatch, names), key=lambda name: int(name[2:])))

    def resolve_target(self, target: str) -> str:
        """The target that will be built; "current" becomes the GPU present.

        Raises InputError for a target this package can't build, BackendError when it needs another GPU.
        """
        gpu = current_gpu()
        known = ", ".join(self.ahead_of_time_targets)
        if target == "current":
            if gpu is None:
                way_out = f"name one of {known}" if known else "run the command on the GPU to build for"
                raise BackendError(f"target 'current' needs a CUDA device and there is none here; {way_out}")
            target = gpu
        if not _TARGET.fullmatch(target):
            raise InputError(
                f"no target {target!r}; targets are 'current' or one of {known or 'sm80, sm89, sm90, …'}"
            )
        if self.can_build_ahead and target not in self.ahead_of_time_targets:
            raise InputError(
                f"{self.label} has no ahead-of-time target {target!r} (it has {known}); "
                f"build on that GPU with --flavour tensorrt"
            )
        if not self.can_build_ahead and target != gpu:
            raise BackendError(
                f"{self.label} builds only for the GPU it runs on: {target} was asked for, here is "
                f"{gpu or 'no CUDA device'}; run the command on that GPU, or use --flavour tensorrt_rtx"
            )
        return target

    def check_options(self, options: EngineOptions) -> None:
        """Raises BackendError for an option that this package refuses on this machine."""
        if options.weight_streaming and not hasattr(self.module.BuilderFlag, "WEIGHT_STREAMING"):
            raise BackendError(
                f"{self.label} has no weight streaming; leave --weight-streaming out, or install TensorRT 10 "
                "or later"
            )
        wanted = {"--refit": options.refit, "--strip-weights": options.strip_weights}
        asked = [flag for flag, on in wanted.items() if on]
        if asked and self.can_build_ahead and current_gpu() is None:
            raise BackendError(
                f"{self.label} can't make engines with {' and '.join(asked)} ahead of time: its compiler "
                f"asks for a CUDA device and there is none here; leave the flag out, or build on a GPU"
            )

    def new_network(self) -> tuple[Any, Any]:
        """(builder, empty strongly typed network), with the messages of earlier work forgotten."""
        self.log.errors.clear()
        self.log.warnings.clear()
        self.log.failure = None
        builder = self.module.Builder(self.log)
        flags = 0
        if self.flavour == "tensorrt" and int(self.version.split(".")[0]) < 11:
            flags = 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return builder, builder.create_network(flags)

    def parse(self, network: Any, onnx_file: Path) -> Any:
        """Read `onnx_file` into `network`; return the parser, which owns the weights until the build is done.

        Raises BundleError that names the node TensorRT can't take.
        """
        parser = self.module.OnnxParser(network, self.log)
        parsed = parser.parse_from_file(str(onnx_file))
        self._raise_caught()
        if not parsed:
            found = [parser.get_error(index) for index in range(parser.num_errors)]
            text = "; ".join(f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in found)
            raise BundleError(f"{self.label} can't parse {onnx_file}: {text or self.last_errors()}")
        return parser

    def new_config(self, builder: Any, target: str, options: EngineOptions) -> Any:
        """A builder configuration for one target."""
        flags = self.module.BuilderFlag
        config = builder.create_builder_config()
        if self.can_build_ahead:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self.module.ComputeCapability, target.upper()), 0)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if not options.tf32:
            config.clear_flag(flags.TF32)
        if options.refit:
            config.set_flag(flags.REFIT)
        if options.strip_weights:
            config.set_flag(flags.STRIP_PLAN)
        if options.weight_streaming:
            config.set_flag(flags.WEIGHT_STREAMING)
        config.profiling_verbosity = self.module.ProfilingVerbosity.DETAILED
        return config

    def can_stream(self, builder: Any) -> bool:
        """Streaming to a file needs less host memory than a whole plan in memory."""
        method = "build_serialized_network_to_stream"
        return hasattr(builder, method) and hasattr(self.module, "IStreamWriter")

    def write_engine(
        self, builder: Any, network: Any, config: Any, file: Path, *, cancel: Event | None = None
    ) -> None:
        """Build and write the engine.

        cancel: looked at after every step of the build, where the package reports them.
        Raises BackendError with TensorRT's messages, the disk's OSError, or Cancelled.
        """
        watched = hasattr(self.module, "IProgressMonitor") and hasattr(config, "progress_monitor")
        monitor = _new_monitor(self.module, self.log, cancel) if watched else None
        with file.open("wb") as stream:
            if watched:
                config.progress_monitor = monitor
            try:
                if self.can_stream(builder):
                    writer = _new_writer(self.module, self.log, stream)
                    # The builder reports success whatever `write` returned.
                    built = builder.build_serialized_network_to_stream(network, config, writer)
                else:
                    plan = builder.build_serialized_network(network, config)
                    built = plan is not None
                    if built:
                        stream.write(memoryview(plan))
            finally:
                if watched:
                    config.progress_monitor = None  # it goes before the configuration does
        self._raise_caught()
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled by the caller")
        if not built or not file.stat().st_size:
            raise BackendError(f"{self.label} built no engine: {self.last_errors()}")

    def deserialize(self, file: Path) -> Any:
        """The engine in `file`, on the current CUDA device. Raises BackendError with TensorRT's messages."""
        self.log.errors.clear()
        runtime = self.module.Runtime(self.log)
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BackendError(f"{self.label} can't load the engine {file}: {self.last_errors()}")
        return engine

    def _raise_caught(self) -> None:
        """Raise what a callback had to keep back."""
        failure, self.log.failure = self.log.failure, None
        if failure is not None:
            raise failure

    def last_errors(self) -> str:
        """The last messages of severity error, once each, on one line."""
        # Without a GPU every failed build ends with this complaint, whatever its reason was.
        telling = [text for text in self.log.errors if _NO_DRIVER not in text] or self.log.errors
        return "; ".join(list(dict.fromkeys(telling))[-_SHOWN_ERRORS:]) or "it gave no reason"


def _new_writer(module: Any, log: Any, stream: Any) -> Any:
    class FileWriter(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                if log.failure is None:
                    return int(stream.write(data))
            except BaseException as error:  # noqa: BLE001  it must not cross the C++ frames above
                log.failure = error
            return 0

    return FileWriter()


def _new_monitor(module: Any, log: Any, cancel: Event | None) -> Any:
    """An IProgressMonitor that ends the build when `cancel` is set or a callback has failed."""

    class CancelMonitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, _phase: str, _parent: str | None, _steps: int) -> None:
            pass

        def phase_finish(self, _phase: str) -> None:
            pass

        def step_complete(self, _phase: str, _step: int) -> bool:
            try:
                return log.failure is None and not (cancel is not None and cancel.is_set())
            except BaseException as error:  # noqa: BLE001  it must not cross the C++ frames above
                log.failure = error
                return False

    return CancelMonitor()


@cache
def _load(flavour: str) -> TensorRT:
    try:
        module = importlib.import_module(flavour)
    except ImportError as error:
        raise BackendError(
            f"the package {flavour} can't be imported ({error}); "
            f'install it with: pip install "proteus-deploy[{_EXTRAS[flavour]}]"'
        ) from error
    return TensorRT(flavour, module)
