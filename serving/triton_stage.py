"""One graph as a model of Triton's Python backend: `model.onnx` beside the model's code, under ONNX Runtime.

Each such model is a process of its own, so nothing here imports torch.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proteus_deploy.onnxruntime_session import PROVIDERS, open_session

__all__ = ["TritonPythonModel"]

_DEVICES = {"KIND_CPU": "cpu", "KIND_GPU": "cuda"}


class TritonPythonModel:
    """What Triton calls. Types and sizes are checked by the server, from the model's config."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the session. Raises BackendError with ONNX Runtime's reason."""
        self._utilities = importlib.import_module("triton_python_backend_utils")
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
