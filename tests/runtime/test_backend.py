"""Choosing a backend by name: no fallback, and errors that say what there is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest

from proteus_deploy import BackendError, InputError, Pipeline
from proteus_deploy.bundle import Bundle
from proteus_deploy.runtime import BUNDLE_BACKENDS, CHECKPOINT_BACKENDS, open_bundle_backend


@pytest.mark.parametrize("name", CHECKPOINT_BACKENDS)
def test_backend_of_a_checkpoint_is_refused_for_a_bundle(
    new_bundle: Callable[..., Bundle], name: str
) -> None:
    with pytest.raises(BackendError, match=f"backend '{name}' runs a checkpoint, not a bundle"):
        open_bundle_backend(new_bundle("bundle"), name)


@pytest.mark.parametrize("name", ["", "onnx", "ONNXRuntime", "cuda"])
def test_unknown_backend_lists_the_known_ones(new_bundle: Callable[..., Bundle], name: str) -> None:
    message = f"backend '{name}' is unknown; a bundle runs with {', '.join(BUNDLE_BACKENDS)}"
    with pytest.raises(BackendError, match=re.escape(message)):
        open_bundle_backend(new_bundle("bundle"), name)


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_missing_package_is_named(
    new_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    bundle = new_bundle("bundle")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        BackendError, match=rf'{name} is not installed; pip install "proteus-deploy\[{extra}\]"'
    ):
        open_bundle_backend(bundle, name)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_missing_device_is_named(new_bundle: Callable[..., Bundle], name: str) -> None:
    pytest.importorskip(name)
    with pytest.raises(BackendError, match=r"device is 'tpu'; choose from|has no device 'tpu'; it has .*CPU"):
        open_bundle_backend(new_bundle("bundle"), name, device="tpu")


def test_every_bundle_error_is_an_input_error() -> None:
    with pytest.raises(InputError, match="a bundle is a folder"):
        Pipeline.from_bundle("absent")
