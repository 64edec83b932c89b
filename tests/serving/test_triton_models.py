"""The models of a Triton repository, called as the server calls them: its module is played by the test.

tests/serving/test_triton_server.py runs the same in a real server.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from proteus_deploy import GenerateRequest, Pipeline
from proteus_deploy.bundle import Bundle
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.export.triton_config import VIDEO_INPUTS, VIDEO_OUTPUTS
from proteus_deploy.export.triton_repository import write_repository
from proteus_deploy.policies.plan import Plan
from proteus_deploy.provenance import GENERATED, source_type
from proteus_deploy.runtime.triton_backend import TritonBackend
from proteus_deploy.serving.triton_loop import TritonPythonModel, request_of
from proteus_deploy.serving.triton_stage import TritonPythonModel as StageModel
from proteus_deploy.video import read_video

pytest.importorskip("onnxruntime")
pytest.importorskip("insightface")

STEPS = 3


class Tensor:
    """pb_utils.Tensor: from NumPy or DLPack, to either."""

    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    @classmethod
    def from_dlpack(cls, name: str, tensor: torch.Tensor) -> Tensor:
        return cls(name, from_dlpack(tensor).numpy().copy())

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array

    def to_dlpack(self) -> Any:
        return torch.from_numpy(self._array).__dlpack__()


class Error:
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "internal", "invalid", "unavailable", "cancelled"

    def __init__(self, text: str, code: str = INTERNAL) -> None:
        self.text, self.code = text, code

    def message(self) -> str:
        return self.text


class Response:
    def __init__(self, output_tensors: Any = (), error: Error | None = None) -> None:
        self.tensors, self.failure = list(output_tensors), error

    def has_error(self) -> bool:
        return self.failure is not None

    def error(self) -> Error | None:
        return self.failure

    def output_tensors(self) -> list[Tensor]:
        return self.tensors

    def values(self) -> dict[str, Any]:
        return {tensor.name(): tensor.as_numpy()[0] for tensor in self.tensors}


class Sender:
    def __init__(self, cancel_at: tuple[str, int] | None) -> None:
        self.sent: list[Response] = []
        self.finals = 0
        self._cancel_at = cancel_at

    def send(self, response: Response, flags: int = 0) -> None:
        self.sent.append(response)
        self.finals += flags

    def is_cancelled(self) -> bool:
        if self._cancel_at is None:
            return False
        told = [(one["phase"], one["done"]) for one in map(Response.values, self.sent)]
        return self._cancel_at in told or self._cancel_at == ("", 0)


class Request:
    def __init__(self, fields: Mapping[str, Any], cancel_at: tuple[str, int] | None = None) -> None:
        self.sender = Sender(cancel_at)
        self._fields = fields

    def inputs(self) -> list[Tensor]:
        kinds = {"TYPE_STRING": np.object_, "TYPE_INT64": np.int64, "TYPE_FP64": np.float64}
        return [
            Tensor(name, np.array([value], kinds.get(VIDEO_INPUTS[name], np.bool_)))
            for name, value in self._fields.items()
        ]

    def get_response_sender(self) -> Sender:
        return self.sender


class Server:
    """Plays the server: its repository's stage models are opened and called by name."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.calls: list[str] = []
        self.fail = ""
        self.models: dict[str, StageModel] = {}
        self.log: list[str] = []
        self.utilities = ModuleType("triton_python_backend_utils")
        for name, value in {
            "Tensor": Tensor,
            "TritonError": Error,
            "InferenceResponse": Response,
            "InferenceRequest": self.request,
            "PreferredMemory": lambda *_: None,
            "TRITONSERVER_MEMORY_CPU": 0,
            "TRITONSERVER_RESPONSE_COMPLETE_FINAL": 1,
            "Logger": type("Logger", (), {"log_error": staticmethod(self.log.append)}),
        }.items():
            setattr(self.utilities, name, value)

    def arguments(self, name: str, **parameters: str) -> dict[str, str]:
        folder = self.repository / name
        outputs = [
            {"name": line.split('"')[1]}
            for line in (folder / "config.pbtxt").read_text().splitlines()
            if line.startswith("output")
        ]
        config = {
            "output": outputs,
            "instance_group": [{"kind": "KIND_CPU"}],
            "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        }
        return {
            "model_config": json.dumps(config),
            "model_repository": str(folder),
            "model_version": "1",
            "model_name": name,
        }

    def request(
        self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], **_: Any
    ) -> Any:
        self.calls.append(model_name.removeprefix("proteus_"))
        if model_name not in self.models:
            self.models[model_name] = StageModel()
            self.models[model_name].initialize(self.arguments(model_name))
        request = type("StageRequest", (), {"inputs": lambda _self: inputs})()

        def run(_self: Any) -> Response:
            if self.fail == model_name:
                return Response(error=Error("out of memory"))
            (response,) = self.models[model_name].execute([request])
            names = [tensor.name() for tensor in response.output_tensors()]
            assert names == requested_output_names
            found: Response = response
            return found

        return type("Call", (), {"exec": run})()


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    write_repository(Bundle.open(tiny_bundle, hashes=False), folder, files="link")
    return folder


@pytest.fixture
def server(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server(repository)
    monkeypatch.setitem(sys.modules, server.utilities.__name__, server.utilities)
    return server


@pytest.fixture
def loop(server: Server) -> TritonPythonModel:
    model = TritonPythonModel()
    model.initialize(server.arguments("proteus"))
    return model


@pytest.fixture
def fields(drawn_photo: bytes) -> dict[str, Any]:
    return {
        "prompt": b"a person waves",
        "identity_prompt": b"a person",
        "photo": drawn_photo,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "seed": 7,
    }


@pytest.fixture
def ask(loop: TritonPythonModel, fields: dict[str, Any]) -> Callable[..., Sender]:
    """ask(cancel_at, **changes) -> what was sent."""

    def ask(cancel_at: tuple[str, int] | None = None, **changes: Any) -> Sender:
        request = Request({**fields, **changes}, cancel_at)
        loop.execute([request])
        assert request.sender.finals == 1
        return request.sender

    return ask


def _failure(sender: Sender) -> tuple[str, str]:
    failure = sender.sent[-1].error()
    assert failure is not None
    return failure.code, failure.text


def test_a_video_is_the_librarys(
    ask: Callable[..., Sender], fields: dict[str, Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    sender = ask()
    *progress, last = [response.values() for response in sender.sent]
    steps = [(one["done"], one["total"]) for one in progress if one["phase"] == "denoise"]
    assert steps == [(1, STEPS), (2, STEPS), (3, STEPS)]
    assert list(dict.fromkeys(one["phase"] for one in progress)) == [
        "identity", "text", "schedule", "denoise", "decode",
    ]  # fmt: skip
    assert set(last) == {"video", "seed"}
    assert set(last) | set(progress[0]) == set(VIDEO_OUTPUTS)
    assert last["seed"] == 7
    (tmp_path / "got.mp4").write_bytes(last["video"])
    assert source_type(tmp_path / "got.mp4") == GENERATED
    with Pipeline.from_bundle(Bundle.open(tiny_bundle, hashes=False)) as pipeline:
        text = {name: value.decode() for name, value in fields.items() if name.endswith("prompt")}
        pipeline.generate(GenerateRequest(**{**fields, **text})).save(tmp_path / "want.mp4")
    got, want = read_video(tmp_path / "got.mp4"), read_video(tmp_path / "want.mp4")
    assert torch.equal(got.frames, want.frames)
    assert got.metadata == {**want.metadata, "backend": "triton"}


def test_a_cancel_ends_with_its_step_and_leaves_nothing(ask: Callable[..., Sender], server: Server) -> None:
    whole = ask().sent[-1].values()["video"]
    server.calls.clear()
    sender = ask(("denoise", 1))
    assert _failure(sender) == ("cancelled", "cancelled by the caller")
    # Seen by the first look after it: at the end of the second step, which is never told of.
    assert server.calls.count("denoiser") == 2
    assert sender.sent[-2].values()["done"] == 1
    assert ask().sent[-1].values()["video"] == whole


def test_a_request_that_was_cancelled_while_it_waited(ask: Callable[..., Sender], server: Server) -> None:
    sender = ask(("", 0))
    assert _failure(sender) == ("cancelled", "cancelled by the client before it began")
    assert (server.calls, len(sender.sent)) == ([], 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": b"  "}, "prompt is empty"),
        ({"prompt": b"\xff"}, "prompt is no UTF-8 (invalid start byte at byte 0)"),
        ({"height": 33}, "height is 33; it must be a multiple of 16"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"scheduler": b"euler"}, "scheduler is 'euler'"),
        ({"photo": b"no picture"}, "photo"),
        ({"plan": b"{"}, "plan can't be read"),
        ({"plan": b"[]"}, "plan can't be read"),
    ],
)
def test_wrong_requests(ask: Callable[..., Sender], changes: dict[str, Any], message: str) -> None:
    code, text = _failure(ask(**changes))
    assert code == "invalid"
    assert message in text


def test_a_stage_that_fails(ask: Callable[..., Sender], server: Server) -> None:
    server.fail = "proteus_denoiser"
    assert _failure(ask()) == ("unavailable", "Triton's model 'proteus_denoiser' failed: out of memory")


def test_a_mistake_of_ours_is_answered_and_logged(
    ask: Callable[..., Sender], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proteus_deploy.serving.triton_loop.mp4_of", lambda _: 1 // 0)
    code, text = _failure(ask())
    assert (code, text.split(":")[0]) == ("internal", "ZeroDivisionError")
    assert "Traceback" in server.log[0]


def test_requests_of_inputs(fields: dict[str, Any]) -> None:
    plan = json.dumps(Plan().to_json()).encode()
    inputs = Request({**fields, "use_dynamic_cfg": True, "plan": plan, "negative_prompt": "écharpe".encode()})
    request = request_of({tensor.name(): tensor.as_numpy() for tensor in inputs.inputs()})
    assert (request.prompt, request.negative_prompt) == ("a person waves", "écharpe")
    assert (request.seed, request.num_inference_steps, request.use_dynamic_cfg) == (7, STEPS, True)
    assert type(request.guidance_scale) is float
    assert request.plan == Plan()
    assert request_of({"prompt": np.array(["text"], np.object_)}).seed is None


def test_tiling_is_a_parameter(server: Server) -> None:
    model = TritonPythonModel()
    model.initialize(server.arguments("proteus", vae_tiling="true"))
    model.finalize()
    with pytest.raises(InputError, match="vae_tiling is 'yes'; it must be true or false"):
        model.initialize(server.arguments("proteus", vae_tiling="yes"))


def test_numpy_that_the_server_can_not_use(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NumPy 2 gave in a server built for NumPy 1."""
    monkeypatch.setattr(Tensor, "as_numpy", lambda _: np.array([1, 1, 1]))
    with pytest.raises(BackendError, match=r"reads \[1, 2, 3\] as \[1, 1, 1\].*numpy below 2"):
        TritonPythonModel().initialize(server.arguments("proteus"))


def test_outside_of_the_server(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="runs inside Triton Inference Server; make a repository"):
        TritonBackend(Bundle.open(tiny_bundle, hashes=False), "proteus")
