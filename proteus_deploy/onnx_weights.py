"""Weights in an ONNX file, under the names that they have in the network it was exported from."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["OnnxWeights"]


class OnnxWeights:
    """Initialisers of one ONNX file as the source of a network's weights; each is read when it is asked for.

    names: those that are weights; a graph holds constants of its own beside them.
    """

    def __init__(self, file: Path, names: Container[str]) -> None:
        import onnx

        self.source, self._folder = str(file), str(file.parent)
        graph = onnx.load(str(file), load_external_data=False).graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name in names}

    def keys(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].dims)

    def tensor(self, key: str) -> Tensor:
        from onnx import numpy_helper

        values = numpy_helper.to_array(self._tensors[key], base_dir=self._folder)
        if values.dtype.name == "bfloat16":  # a type of its own, that torch doesn't take from NumPy
            return torch.from_numpy(values.view("int16").copy()).view(torch.bfloat16)
        return torch.from_numpy(values.copy())
