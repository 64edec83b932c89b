"""A reference portrait from text, for those who have no photo, in which the identity stage finds a face."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError, PhotoError
from proteus_deploy.identity.alignment import align_face
from proteus_deploy.onnxruntime_session import device_name
from proteus_deploy.portrait.painter import Painter, check_captions
from proteus_deploy.provenance import xmp_packet
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from proteus_deploy.identity.encoder import IdentityEncoder

__all__ = [
    "ATTEMPTS",
    "Portrait",
    "check_portrait_prompt",
    "draw_reference",
    "painter_device",
    "portrait_folder",
    "portrait_png",
]

ATTEMPTS = 4  # portraits that are drawn, one seed after the other, before a prompt is given up


@dataclass(frozen=True, eq=False)
class Portrait:
    """image: RGB uint8 [H, W, 3]. seed: that drew it. attempts: how many were drawn, this one included."""

    image: NDArray[np.uint8]
    seed: int
    attempts: int


def draw_reference(
    painter: Painter,
    encoder: IdentityEncoder,
    prompt: str,
    seed: int,
    *,
    face_index: int | None = None,
    attempts: int = ATTEMPTS,
    report: Report = no_report,
    cancel: Event | None = None,
    on_retry: Callable[[int, str], None] | None = None,
) -> Portrait:
    """The first portrait of seed, seed + 1, … in which `encoder` finds a face that it can use.

    encoder: `Pipeline.identity_encoder`, so that a portrait which passes here passes there.
    face_index: as in a request. report: counts tokens, attempt by attempt. cancel: looked at between tokens.
    on_retry(seed, reason): told of a portrait that won't do, before the next one is begun.

    Raises InputError for a prompt that can't be drawn, PhotoError when none of the portraits will do,
    Cancelled when `cancel` was set.
    """
    check_portrait_prompt(prompt)
    if attempts < 1:
        raise InputError(f"attempts is {attempts}; choose at least 1")
    reason = ""
    for number in range(attempts):
        if number and on_retry is not None:
            on_retry(seed + number - 1, reason)
        phase = "portrait" if number == 0 else f"portrait, attempt {number + 1}"
        tell = partial(_report_as, report, phase)
        (image,) = painter.draw([prompt], seeds=[seed + number], report=tell, cancel=cancel)
        try:
            photo, face = encoder.find_face(image, face_index=face_index)
            align_face(photo, face.landmarks)
        except PhotoError as error:
            reason = str(error).partition(";")[0]  # what follows is advice on photos
        else:
            return Portrait(image, seed + number, number + 1)
    tried = f"seed {seed} was" if attempts == 1 else f"seeds {seed} to {seed + attempts - 1} were"
    raise PhotoError(
        f"no portrait of {prompt!r} shows a face that can be used: {tried} tried, and of the last one it was "
        f"said that {reason}; say more plainly who is to be seen, choose another seed, or pass a photo"
    )


def _report_as(report: Report, phase: str, _: str, done: int, total: int) -> None:
    report(phase, done, total)


def check_portrait_prompt(prompt: str) -> None:
    """Raises InputError for a prompt that is empty, endless or no text."""
    check_captions([prompt])
    half = next((character for character in prompt if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise InputError(
            f"the portrait prompt has half a character, {half!a}; text must be encodable as UTF-8, so write "
            "the whole character or leave it out"
        )


def portrait_folder(bundle: str | Path) -> Path | None:
    """The portrait model of the video bundle in a folder; None for a bundle without. Raises BundleError."""
    from proteus_deploy.bundle import Bundle

    return Bundle.open(bundle, hashes=False).portrait


def painter_device(portrait: str | Path, asked: str | None, pipelines: torch.device) -> str:
    """Where to open the portrait model in a folder for a pipeline that nobody asked another place for.

    That is the pipeline's GPU, where it has one and what runs the portrait model can use it; else the CPU.
    A portrait bundle can use the first GPU only: beside a pipeline on cuda:1 it is opened on the CPU.
    asked: the device that the pipeline was opened with. pipelines: the one of its backend; ONNX Runtime's
    takes tensors of the CPU, whatever device it computes on.
    """
    device = asked if asked is not None and asked.startswith("cuda") else str(pipelines)
    return device if device.startswith("cuda") and _can_use(portrait, device) else "cpu"


def _can_use(portrait: str | Path, device: str) -> bool:
    from proteus_deploy.portrait.onnx_bundle import is_portrait_bundle

    if not is_portrait_bundle(portrait):
        import torch

        return torch.cuda.is_available()
    if device_name(device) != "cuda":
        return False
    try:
        import onnxruntime
    except ImportError:  # opening the model says so
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def portrait_png(image: NDArray[np.uint8], facts: Mapping[str, Any], *, mark: bool = True) -> bytes:
    """A PNG of RGB uint8 [H, W, 3] with `facts` as JSON in its comment; the same bytes for the same values.

    mark: state that it was generated (provenance.py), in the text chunk that XMP has in a PNG.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt("Comment", json.dumps(facts, sort_keys=True))
    if mark:
        texts.add_itxt("XML:com.adobe.xmp", xmp_packet())
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png", pnginfo=texts)
    return stream.getvalue()
