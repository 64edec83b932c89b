"""Clips in WebDataset shards: tar files in which the files of one clip stand together and share a name."""

from __future__ import annotations

import glob
import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from proteus_deploy.errors import InputError
from proteus_deploy.training.data.clip_files import VIDEO_ENDINGS, ClipFiles, is_member
from proteus_deploy.training.data.video_frames import VideoOptions

__all__ = ["WebDatasetClips", "expand_shards"]

_MAX_MEMBER_BYTES = 4 << 30
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 1_000_000


class WebDatasetClips:
    """The clips of tar shards, read in order, one clip in memory at a time.

    shards: a name or several, each with brace expansion ("clips-{000..009}.tar", "{a,b}.tar") and the
    wildcards of a shell; compressed tars are read too. As WebDataset has it, the clip's name is what
    stands before the first dot of the file's name, with its folder in the tar, and the files of one clip
    stand one after the other. Files of other kinds and groups without a video are passed over.

    Raises InputError for a shard that is missing, damaged or no tar, when it is reached.
    """

    def __init__(
        self, shards: str | Path | Sequence[str | Path], options: VideoOptions | None = None
    ) -> None:
        """options: None takes the published ones."""
        self.shards = expand_shards(shards)
        self.options = options or VideoOptions()

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        """From the tars' headers alone."""
        return sum(1 for shard in self.shards for _ in _groups(shard, read=False))

    def __iter__(self) -> Iterator[tuple[str, ClipFiles]]:
        for shard in self.shards:
            for name, members in _groups(shard, read=True):
                yield name, ClipFiles(name, members, self.options)


def expand_shards(shards: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """Names with braces and wildcards -> files, in order. Raises InputError for a name without a file."""
    names = [shards] if isinstance(shards, str | Path) else list(shards)
    found: list[Path] = []
    for name in itertools.chain.from_iterable(_expand_braces(str(name)) for name in names):
        matches = [name] if Path(name).is_file() else sorted(glob.glob(name))  # noqa: PTH207 - absolute patterns too
        if not matches:
            raise InputError(f"no shard {name}; check the path (braces {{000..009}} and * are expanded)")
        found += map(Path, matches)
    if not found:
        raise InputError("no shards were given; name at least one .tar file")
    return tuple(found)


def _expand_braces(pattern: str) -> list[str]:
    """ "a{0..2}b" -> a0b, a1b, a2b, with leading zeros kept; "{x,y}" -> x, y; several braces: all pairs."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inside = match.group(1)
    limits = _RANGE.fullmatch(inside)
    if limits is not None:
        first, last = int(limits.group(1)), int(limits.group(2))
        if last < first or last - first >= _MOST_SHARDS:
            raise InputError(f"{pattern}: {{{inside}}} counts no shards; write the smaller number first")
        digits = len(limits.group(1))
        words = [f"{number:0{digits}d}" for number in range(first, last + 1)]
    elif "," in inside:
        words = inside.split(",")
    else:
        raise InputError(f"{pattern}: {{{inside}}} is neither a range 000..009 nor a list a,b")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for word in words for name in _expand_braces(before + word + after)]


def _groups(shard: Path, *, read: bool) -> Iterator[tuple[str, dict[str, Path | bytes]]]:
    """(name, {ending: bytes}) of each clip in a shard; without `read` the bytes are left empty."""
    name, members = "", dict[str, Path | bytes]()
    try:
        # Streaming for reading; to look at headers alone, seeking passes over the contents.
        with tarfile.open(shard, "r|*" if read else "r:*") as tar:
            for entry in tar:
                if not entry.isfile():
                    continue
                folder, _, file = entry.name.rpartition("/")
                stem, _, ending = file.partition(".")
                key = f"{folder}/{stem}" if folder not in ("", ".") else stem
                if not stem:
                    continue  # hidden files
                if key != name:
                    if _has_video(members):
                        yield name, members
                    name, members = key, {}
                ending = ending.lower() if ending.lower() in VIDEO_ENDINGS else ending
                if is_member(ending):
                    members[ending] = _content(tar, entry, shard) if read else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{shard} can't be read as a tar file ({error}); copy it again") from error
    if _has_video(members):
        yield name, members


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo, shard: Path) -> bytes:
    if entry.size > _MAX_MEMBER_BYTES:
        raise InputError(
            f"{shard}: {entry.name} has {entry.size} bytes, more than the {_MAX_MEMBER_BYTES} allowed"
        )
    stream = tar.extractfile(entry)
    assert stream is not None
    return stream.read()


def _has_video(members: dict[str, Path | bytes]) -> bool:
    return any(ending in members for ending in VIDEO_ENDINGS)
