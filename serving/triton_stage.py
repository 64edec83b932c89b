"""One graph as a model of Triton's Python backend: `model.onnx` beside the model's code, under ONNX Runtime.

Each such model is a process of its own, so nothing here imports torch.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proteus_deploy.errors import BackendError
from proteus_deploy.runtime.onnxruntime_session import PROVIDERS, open_session

__all__ = ["TritonPythonModel", "check_numpy"]

_DEVICES = {"KIND_CPU": "cpu", "KIND_GPU": "cuda"}


def check_numpy(utilities: Any) -> None:
    """Make and read one tensor now: a server whose NumPy doesn't fit comes up, and fails at the first use.

    Raises BackendError where Triton's Python backend can't use the NumPy that is installed.
    """
    import numpy as np

    try:
        utilities.Tensor("probe", np.zeros(1, np.int64)).as_numpy()
    except (AttributeError, ImportError, RuntimeError, TypeError) as error:
        raise BackendError(
            f"Triton's Python backend can't use numpy {np.__version__} ({error}); servers up to 2.51 need "
            "numpy below 2: install it into the server's environment"
        ) from error


class TritonPythonModel:
    """What Triton calls. Types and sizes are checked by the server, from the model's config."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the session. Raises BackendError with ONNX Runtime's reason."""
        self._utilities = importlib.import_module("triton_python_backend_utils")
        check_numpy(self._utilities)
        config = json.loads(args["model_config"])
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        formats = config.get("parameters", {}).get("formats", {}).get("string_value", "")
        provider = PROVIDERS[_DEVICES[config["instance_group"][0]["kind"]]]
        self._session = open_session(file, provider, formats=[one for one in formats.split(",") if one])
        self._outputs = [output["name"] for output in config["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request, in order. What ONNX Runtime raises is the server's to report."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        values = self._session.run(self._outputs, feeds)
        tensor = self._utilities.Tensor
        return self._utilities.InferenceResponse(
            [tensor(name, value) for name, value in zip(self._outputs, values, strict=True)]
        )
