"""`config.pbtxt` of NVIDIA Triton Inference Server: the models of a bundle as Triton is told of them.

Inputs, outputs, types and sizes of a stage come from the bundle's stage table. What a video is asked for
with, and answered with, is `VIDEO_INPUTS` and `VIDEO_OUTPUTS`; the model in the server reads the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from proteus_deploy.stages import Graph, StageTable, TensorSpec

__all__ = ["VIDEO_INPUTS", "VIDEO_OUTPUTS", "ModelConfig", "TritonTensor", "stage_tensors", "video_config"]

Backend = Literal["tensorrt", "onnxruntime", "python"]
Kind = Literal["KIND_CPU", "KIND_GPU"]

# Fields of a GenerateRequest, each one element; text is UTF-8, a photo the bytes of its file, a plan JSON.
VIDEO_INPUTS: Mapping[str, str] = {
    "prompt": "TYPE_STRING",
    "photo": "TYPE_STRING",
    "identity_prompt": "TYPE_STRING",
    "negative_prompt": "TYPE_STRING",
    "face_index": "TYPE_INT64",
    "height": "TYPE_INT64",
    "width": "TYPE_INT64",
    "num_frames": "TYPE_INT64",
    "fps": "TYPE_FP64",
    "num_inference_steps": "TYPE_INT64",
    "guidance_scale": "TYPE_FP64",
    "use_dynamic_cfg": "TYPE_BOOL",
    "dynamic_cfg": "TYPE_STRING",
    "seed": "TYPE_INT64",
    "scheduler": "TYPE_STRING",
    "identity_scale": "TYPE_FP64",
    "plan": "TYPE_STRING",
}
_REQUIRED = ("prompt", "photo")
# The first three come after every part of a phase, the last two once, at the end.
VIDEO_OUTPUTS: Mapping[str, str] = {
    "phase": "TYPE_STRING",
    "done": "TYPE_INT64",
    "total": "TYPE_INT64",
    "video": "TYPE_STRING",
    "seed": "TYPE_INT64",
}
_FLOATS = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16", "bf16": "TYPE_BF16"}


@dataclass(frozen=True)
class TritonTensor:
    """dims: sizes of all axes, -1 where any size will do; the batch, where there is one, is among them."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """One model. plans: file of each compute capability ("8.9"), for engines; empty for `model.onnx`."""

    name: str
    backend: Backend
    inputs: tuple[TritonTensor, ...]
    outputs: tuple[TritonTensor, ...]
    kind: Kind
    decoupled: bool = False
    plans: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """The text of `config.pbtxt`. max_batch_size is 0: the stages' own axes carry the batch."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield f"name: {_quoted(self.name)}"
        yield f"backend: {_quoted(self.backend)}"
        yield "max_batch_size: 0"
        for word, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                optional = " optional: true" if tensor.optional else ""
                dims = ", ".join(map(str, tensor.dims))
                name = _quoted(tensor.name)
                yield f"{word} {{ name: {name} data_type: {tensor.data_type} dims: [ {dims} ]{optional} }}"
        yield f"instance_group {{ count: 1 kind: {self.kind} }}"
        if self.decoupled:
            yield "model_transaction_policy { decoupled: true }"
        for capability, file in sorted(self.plans.items()):
            yield f"cc_model_filenames {{ key: {_quoted(capability)} value: {_quoted(file)} }}"
        for key, value in sorted(self.parameters.items()):
            yield f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"


def _quoted(text: str) -> str:
    # ASCII JSON and protobuf's text format agree on escapes of all that stands in names and versions.
    return json.dumps(text)


def stage_tensors(
    graph: Graph, table: StageTable, dtype: str
) -> tuple[tuple[TritonTensor, ...], tuple[TritonTensor, ...]]:
    """Inputs and outputs of a graph of the stage table. dtype: of the bundle, "fp32", "fp16" or "bf16"."""

    def tensor(spec: TensorSpec) -> TritonTensor:
        kind = {"float": _FLOATS[dtype], "float32": "TYPE_FP32", "int64": "TYPE_INT64"}[spec.dtype]
        return TritonTensor(spec.name, kind, tuple(table.dims(spec)))

    return tuple(map(tensor, graph.inputs)), tuple(map(tensor, graph.outputs))


def video_config(name: str) -> ModelConfig:
    """The model that runs the whole loop and calls the stages: many responses to one request."""
    return ModelConfig(
        name,
        "python",
        tuple(
            TritonTensor(field, kind, (1,), optional=field not in _REQUIRED)
            for field, kind in VIDEO_INPUTS.items()
        ),
        tuple(TritonTensor(field, kind, (1,)) for field, kind in VIDEO_OUTPUTS.items()),
        "KIND_CPU",
        decoupled=True,
        parameters={"vae_tiling": "false"},
    )
