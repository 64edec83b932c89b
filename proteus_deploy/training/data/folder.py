"""A folder of videos with their captions beside them; `clip_files.py` says which files make a clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from proteus_deploy.errors import InputError
from proteus_deploy.training.data.clip_files import VIDEO_ENDINGS, ClipFiles, is_member
from proteus_deploy.training.data.video_frames import VideoOptions

__all__ = ["FolderClips", "VideoOptions"]


class FolderClips:
    """Every video in `folder` and below it is a clip, by its path in the folder without the ending.

    Hidden files and folders are passed over. Raises InputError when there is no video.
    """

    def __init__(self, folder: str | Path, options: VideoOptions | None = None) -> None:
        """options: None takes the published ones."""
        self.folder = Path(folder)
        self.options = options or VideoOptions()
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is not a folder; give one that holds NAME.mp4 and NAME.txt")
        self._clips = _group(self.folder)
        if not self._clips:
            raise InputError(
                f"{self.folder} holds no video; expected files that end in .{', .'.join(VIDEO_ENDINGS)}"
            )

    def __len__(self) -> int:
        return len(self._clips)

    def __iter__(self) -> Iterator[tuple[str, ClipFiles]]:
        for name, members in self._clips.items():
            yield name, ClipFiles(name, members, self.options)


def _group(folder: Path) -> dict[str, dict[str, Path | bytes]]:
    """{name: {ending: file}}, names in order. A name may hold dots: the video's own name decides."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    names = sorted(
        {name.rpartition(".")[0] for name in files if name.rpartition(".")[2].lower() in VIDEO_ENDINGS}
    )
    clips: dict[str, dict[str, Path | bytes]] = {name: {} for name in names if name}
    for file, path in files.items():
        name, ending = _longest_name(file, clips)
        if name is not None and is_member(ending):
            clips[name][ending] = path
    return clips


def _longest_name(file: str, clips: dict[str, dict[str, Path | bytes]]) -> tuple[str | None, str]:
    """The clip that a file belongs to: of "a" and "a.b", "a.b.txt" belongs to the second."""
    position = len(file)
    while (position := file.rfind(".", 0, position)) > 0:
        if file[:position] in clips:
            return file[:position], _lower_video(file[position + 1 :])
    return None, ""


def _lower_video(ending: str) -> str:
    return ending.lower() if ending.lower() in VIDEO_ENDINGS else ending
