"""The whole pipeline as one model of Triton Inference Server: a request in; progress, then an mp4 out.

The loop is the library's `Pipeline`; its networks are the other models of the repository. Many responses
answer one request (Triton's decoupled policy): one after each part of a phase, and the video at the end.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from proteus_deploy.errors import BackendError, Cancelled, InputError, ProteusError
from proteus_deploy.export.triton_config import VIDEO_INPUTS, VIDEO_OUTPUTS
from proteus_deploy.runtime.triton_backend import TritonBackend, load_utilities

if TYPE_CHECKING:
    from proteus_deploy.pipeline import ProgressEvent
    from proteus_deploy.request import GenerateRequest
    from proteus_deploy.video import Video

__all__ = ["TritonPythonModel", "check_numpy", "mp4_of", "request_of"]

_ARRAYS = {"TYPE_STRING": np.object_, "TYPE_INT64": np.int64}


def check_numpy(utilities: Any) -> None:
    """Let the server make an array now: where NumPy doesn't fit it comes up, and dies with the first request.

    Raises BackendError where Triton's Python backend can't use the NumPy that is installed.
    """
    sent = torch.arange(1, 4)
    got = utilities.Tensor.from_dlpack("probe", sent).as_numpy().tolist()
    # A backend built for NumPy 1 takes the size of an element from the wrong place in NumPy 2's types.
    if got != sent.tolist():
        raise BackendError(
            f"Triton's Python backend can't use numpy {np.__version__}: it reads {sent.tolist()} as {got}; "
            "servers up to 2.51 need numpy below 2 in their environment"
        )


def request_of(inputs: Mapping[str, Any]) -> GenerateRequest:
    """The request of a model's inputs: NumPy arrays of one element each, as Triton's Python backend has them.

    An input that was left out takes the default of `GenerateRequest`; without a seed one is drawn.
    Raises InputError for text that isn't UTF-8 and for a plan that isn't one.
    """
    from proteus_deploy.policies.plan import plan_from_json
    from proteus_deploy.request import GenerateRequest

    fields: dict[str, Any] = {"seed": None}
    for name, array in inputs.items():
        value = array.reshape(-1)[0]
        if VIDEO_INPUTS[name] != "TYPE_STRING":
            fields[name] = value.item()
        else:
            fields[name] = bytes(value) if name == "photo" else _text(name, value)
    if "plan" in fields:
        try:
            fields["plan"] = plan_from_json(json.loads(fields["plan"]))
        except ValueError as error:
            raise InputError(f"plan can't be read: {error}; send the JSON of docs/policies.md") from error
    return GenerateRequest(**fields)


def _text(name: str, value: bytes | str) -> str:
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is no UTF-8 ({error.reason} at byte {error.start}); encode it so"
        ) from error


def mp4_of(video: Video) -> bytes:
    """The bytes of the video's mp4, marked as generated (provenance.py)."""
    from proteus_deploy.provenance import mark_generated

    with tempfile.TemporaryDirectory(prefix="proteus-") as folder:
        file = Path(folder) / "video.mp4"
        video.save(file)
        mark_generated(file)
        return file.read_bytes()


class TritonPythonModel:
    """What Triton calls. One request at a time: a video takes the whole of the device that it runs on."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the bundle's part beside the code; the networks are asked for at the first request.

        Raises BundleError or BackendError, and InputError for a parameter of the config that isn't known.
        """
        from proteus_deploy.bundle import Bundle
        from proteus_deploy.pipeline import Pipeline

        self._utilities = load_utilities()
        check_numpy(self._utilities)
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        bundle = Bundle.open(folder, graphs=False)
        parameters = json.loads(args["model_config"]).get("parameters", {})
        tiling = parameters.get("vae_tiling", {}).get("string_value", "false")
        if tiling not in ("true", "false"):
            raise InputError(f"config.pbtxt: vae_tiling is {tiling!r}; it must be true or false")
        backend = TritonBackend(bundle, args["model_name"])
        self._pipeline = Pipeline.from_bundle(bundle, backend=backend, vae_tiling=tiling == "true")

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer each request through its response sender, in order."""
        for request in requests:
            self._answer(request, request.get_response_sender())

    def finalize(self) -> None:
        """Close the pipeline."""
        self._pipeline.close()

    def _answer(self, request: Any, sender: Any) -> None:
        try:
            answer = self._make(request, sender)
        except ProteusError as error:
            answer = self._refusal(error)
        except Exception as error:  # noqa: BLE001  the client waits for an end, whatever it was that failed
            self._utilities.Logger.log_error(traceback.format_exc())
            answer = self._refusal(error)
        sender.send(answer, flags=self._utilities.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _make(self, request: Any, sender: Any) -> Any:
        stop = Event()

        def tell(event: ProgressEvent) -> None:
            # The pipeline looks at `stop` right after this: a cancelled request ends with the step it is in.
            if sender.is_cancelled():
                stop.set()
            else:
                sender.send(self._response(phase=event.phase, done=event.done, total=event.total))

        if sender.is_cancelled():
            raise Cancelled("cancelled by the client before it began")
        wanted = request_of({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        video = self._pipeline.generate(wanted, on_progress=tell, cancel=stop)
        return self._response(video=mp4_of(video), seed=video.metadata["seed"])

    def _response(self, **values: Any) -> Any:
        tensors = [
            self._utilities.Tensor(name, np.array([value], _ARRAYS[VIDEO_OUTPUTS[name]]))
            for name, value in values.items()
        ]
        return self._utilities.InferenceResponse(tensors)

    def _refusal(self, error: Exception) -> Any:
        codes = self._utilities.TritonError
        code = codes.INTERNAL
        if isinstance(error, Cancelled):
            code = codes.CANCELLED
        elif isinstance(error, BackendError):
            code = codes.UNAVAILABLE
        elif isinstance(error, InputError):
            code = codes.INVALID_ARG
        text = str(error) if isinstance(error, ProteusError) else f"{type(error).__name__}: {error}"
        return self._utilities.InferenceResponse([], error=codes(text, code))
