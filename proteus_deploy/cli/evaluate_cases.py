"""What `evaluate` is to measure: videos from the command line or from a file of cases."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Case", "cases_from_file", "cases_from_videos", "read_case_list", "read_mask", "request_facts"]

_TEXTS = ("name", "video", "photo", "prompt", "person", "reference", "person_mask")
_KEYS = (*_TEXTS, "seed")
_MAX_FILE_BYTES = 16 << 20
_WHITE = 128  # levels from here up are the person
_SETTINGS = ("num_inference_steps", "guidance_scale", "identity_scale", "num_frames")


@dataclass(frozen=True)
class Case:
    """One video to measure; None is unknown. Prompt and seed may yet come from the video itself."""

    name: str
    video: Path
    photo: Path | None = None
    prompt: str | None = None
    person: str | None = None
    seed: int | None = None
    reference: Path | None = None
    person_mask: Path | None = None


def cases_from_videos(
    videos: Sequence[Path],
    *,
    photo: Path | None,
    prompt: str | None,
    reference: Path | None,
    person_mask: Path | None,
) -> list[Case]:
    """A case for each video, all with the same photo, prompt, reference and mask. Raises InputError."""
    return _checked(
        [
            Case(name, video, photo, prompt, reference=reference, person_mask=person_mask)
            for name, video in zip(_names(videos), videos, strict=True)
        ]
    )


def cases_from_file(file: Path) -> list[Case]:
    """Cases of a JSON list of {video, photo, prompt, person, seed, reference, person_mask, name}.

    Only video is needed. Paths are relative to the file's folder.
    Raises InputError naming the case and what is wrong with it.
    """
    document = read_case_list(file, example='[{"video": "a.mp4"}]')
    cases = [_case(f"{file}, case {number}", entry, file.parent) for number, entry in enumerate(document, 1)]
    names = _names([case.video for case in cases])
    return _checked([replace(case, name=case.name or name) for case, name in zip(cases, names, strict=True)])


def read_case_list(file: Path, *, example: str) -> list[Any]:
    """The entries of a JSON list of cases, at least one. Raises InputError showing the example."""
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{file} has more than {_MAX_FILE_BYTES} bytes; it is no list of cases")
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cases {file} is not readable JSON ({error})") from error
    if not isinstance(document, list) or not document:
        raise InputError(f"cases {file} must be a JSON list of cases, like {example}")
    return document


def _case(where: str, entry: Any, folder: Path) -> Case:
    """A case whose name is empty where the entry gives none."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}; a case is an object with the key video")
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    for key in _TEXTS:
        if entry.get(key) is not None and (not isinstance(entry[key], str) or not entry[key]):
            raise InputError(f"{where}: {key} is {entry[key]!r}; it is text")
    if entry.get("video") is None:
        raise InputError(f"{where} names no video")
    seed = entry.get("seed")
    if seed is not None and type(seed) is not int:
        raise InputError(f"{where}: seed is {seed!r}; it is a whole number")
    files = {
        key: None if entry.get(key) is None else folder / entry[key]
        for key in ("photo", "reference", "person_mask")
    }
    return Case(
        name=entry.get("name") or "",
        video=folder / entry["video"],
        prompt=entry.get("prompt"),
        person=entry.get("person"),
        seed=seed,
        **files,
    )


def _names(videos: Sequence[Path]) -> list[str]:
    """Each video's path below the folder that all of them share, without the suffix.

    Two runs that lay their videos out alike so get the same names, and can be compared case by case.
    """
    absolute = [Path(os.path.abspath(video)) for video in videos]  # noqa: PTH100 - links keep their own names
    common = Path(os.path.commonpath([video.parent for video in absolute]))
    return [video.relative_to(common).with_suffix("").as_posix() for video in absolute]


def _checked(cases: list[Case]) -> list[Case]:
    """The cases, when their names differ, their files exist, and persons are named for all or for none."""
    seen: dict[str, Case] = {}
    for case in cases:
        twin = seen.setdefault(case.name, case)
        if twin is not case:
            raise InputError(
                f"{twin.video} and {case.video} are both called {case.name!r}; give each a name of its own "
                "in --cases"
            )
        for what in ("video", "photo", "reference", "person_mask"):
            file = getattr(case, what)
            if file is not None and not file.is_file():
                raise InputError(f"{file} is not a file; it is the {what} of {case.name!r}")
    nameless = [case.name for case in cases if case.person is None]
    if 0 < len(nameless) < len(cases):
        raise InputError(
            f"{len(nameless)} of {len(cases)} cases name no person ({nameless[0]!r} first); intervals are "
            "over persons, so name all of them or none"
        )
    return cases


def request_facts(metadata: Mapping[str, Any]) -> tuple[str | None, int | None, dict[str, float]]:
    """(prompt, seed, settings) that a video made by this program carries; None and {} for any other.

    settings: the numbers of the request that change its quality, those that are there.
    """
    request = metadata.get("request")
    if not isinstance(request, dict):
        return None, None, {}
    prompt, seed = request.get("prompt"), metadata.get("seed", request.get("seed"))
    settings = {
        key: float(request[key])
        for key in _SETTINGS
        if isinstance(request.get(key), int | float) and not isinstance(request[key], bool)
    }
    return (
        prompt if isinstance(prompt, str) and prompt else None,
        seed if type(seed) is int else None,
        settings,
    )


def read_mask(file: Path, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """bool [F, H, W] of `shape`, true where the file is brighter than grey.

    file: an mp4 with a picture for each frame, or one picture that holds for all of them.
    Raises InputError when it can't be read or has another size than the video.
    """
    import numpy as np

    from proteus_deploy.evaluate.frames import frames_from_video
    from proteus_deploy.identity.photo import open_photo
    from proteus_deploy.video import read_video

    if file.suffix.lower() == ".mp4":
        pictures = frames_from_video(read_video(file))
    else:
        pictures = open_photo(file)[None]
    mask = pictures.mean(axis=-1) >= _WHITE
    if mask.shape[1:] != shape[1:] or len(mask) not in (1, shape[0]):
        raise InputError(
            f"the mask {file} has the shape {list(mask.shape)} and the video {list(shape)} (frames, height, "
            "width); make it of the same size, as one picture or one for each frame"
        )
    return np.ascontiguousarray(np.broadcast_to(mask, shape))
