"""A clip is the same from a folder and from a shard; what is wrong with its files is said by name."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.training.data.cache import PreparedSet
from proteus_deploy.training.data.clip_files import ClipFiles
from proteus_deploy.training.data.folder import FolderClips
from proteus_deploy.training.data.networks import EncodingNetworks
from proteus_deploy.training.data.prepare import prepare
from proteus_deploy.training.data.report import ClipRejected, Reason
from proteus_deploy.training.data.video_frames import VideoOptions
from proteus_deploy.training.data.webdataset import WebDatasetClips, expand_shards


@pytest.fixture(scope="module")
def shards(clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The clips folder in two shards, one compressed, with files that belong to no clip."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(clips_folder.iterdir(), key=lambda file: (file.name.partition(".")[0], file.name))
    names = sorted({file.name.partition(".")[0] for file in files})
    for number, mode in enumerate(("w", "w:gz")):
        with tarfile.open(folder / f"clips-{number:03d}.tar", mode) as tar:  # type: ignore[call-overload]
            for file in files:
                if names.index(file.name.partition(".")[0]) % 2 == number:
                    tar.add(file, arcname=f"./{file.name}")
            note = tarfile.TarInfo("notes/readme.txt")
            tar.addfile(note, io.BytesIO())
    return str(folder / "clips-{000..001}.tar")


def test_shards_give_what_the_folder_gives(
    prepared: PreparedSet,
    shards: str,
    clips_folder: Path,
    small_options: VideoOptions,
    networks: EncodingNetworks,
) -> None:
    sharded = WebDatasetClips(shards, small_options)
    assert len(sharded) == len(list(sharded)) == 12
    found = prepare(sharded, networks, prepared.folder, name="sharded")
    assert found.encoded == 0  # every clip is known by its content already
    assert {clip.name: clip.file for clip in found.clips} == {clip.name: clip.file for clip in prepared.clips}
    assert found.report.counts == prepared.report.counts
    from_tar, from_folder = (
        dict(source)["good 0"].load(networks.find_faces)
        for source in (sharded, FolderClips(clips_folder, small_options))
    )
    assert np.array_equal(from_tar.frames, from_folder.frames)
    assert np.array_equal(from_tar.references[0], from_folder.references[0])
    assert from_tar.head_mask is not None
    assert from_folder.head_mask is not None
    assert np.array_equal(from_tar.head_mask, from_folder.head_mask)


def test_a_reference_is_no_frame_of_the_clip(
    clips_folder: Path, small_options: VideoOptions, networks: EncodingNetworks
) -> None:
    looked_at: list[bytes] = []

    def watched(image: np.ndarray) -> list:  # type: ignore[type-arg]
        looked_at.append(image.tobytes())
        return networks.find_faces(image)

    loader = dict(FolderClips(clips_folder, replace(small_options, height=160, width=160)))["good 0"]
    clip = loader.load(watched)
    assert len(clip.references) == 1
    assert max(clip.references[0].shape) < 160
    inside = {frame.tobytes() for frame in clip.frames}
    assert [image in inside for image in looked_at] == [True, False, False, False]


def test_masks_follow_the_frames(
    clips_folder: Path, small_options: VideoOptions, networks: EncodingNetworks
) -> None:
    """14 frames, 1 skipped, 9 in the middle of 12: frames 2 to 10, of 160 pixels shrunk to 64."""
    clip = dict(FolderClips(clips_folder, small_options))["good 1"].load(networks.find_faces)
    with np.load(clips_folder / "good 1.masks.npz") as masks:
        whole = masks["face"]
    assert clip.face_mask is not None
    assert clip.face_mask.shape == (9, 64, 64)
    shares = clip.face_mask.mean(axis=(1, 2)) - whole[2:11].mean(axis=(1, 2))
    assert np.abs(shares).max() < 0.01
    assert clip.references[0].shape == (256, 256, 3)


def _npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.mark.parametrize(
    ("members", "reason", "words"),
    [
        ({"identity.txt": None}, Reason.NO_IDENTITY_CAPTION, "clip.identity.txt is missing"),
        ({"txt": b" \n"}, Reason.NO_CAPTION, "clip.txt is empty"),
        ({"txt": b"\xff\xfe\x00"}, Reason.NO_CAPTION, "not UTF-8"),
        ({"webm": b"a second video"}, Reason.UNREADABLE_VIDEO, "found mp4, webm"),
        ({"reference.png": b"no picture"}, Reason.UNUSABLE_REFERENCE, "not an image"),
        ({"masks.npz": b"no arrays"}, Reason.WRONG_MASK, "can't be read"),
        (
            {"masks.npz": _npz(head=np.zeros((13, 160, 160), bool))},
            Reason.WRONG_MASK,
            r"head mask is bool \[13, 160, 160\]; .* \[14, 160, 160\]",
        ),
        ({"masks.npz": _npz(face=np.zeros((14, 160, 160)))}, Reason.WRONG_MASK, "face mask is float64"),
        ({"masks.npz": _npz(face=np.array([{}]))}, Reason.WRONG_MASK, "can't be read"),  # a pickle
    ],
)
def test_what_is_wrong_is_said(
    members: dict[str, bytes | None],
    reason: Reason,
    words: str,
    clips_folder: Path,
    small_options: VideoOptions,
) -> None:
    files: dict[str, Path | bytes | None] = {
        "mp4": clips_folder / "good 0.mp4",
        "txt": b"a person talks",
        "identity.txt": b"a person",
        **members,
    }
    present = {ending: content for ending, content in files.items() if content is not None}
    with pytest.raises(ClipRejected, match=words) as caught:
        ClipFiles("clip", present, small_options).load(lambda _: [])
    assert caught.value.reason == reason


def test_the_caption_in_place_of_the_identity_caption(
    clips_folder: Path, small_options: VideoOptions, networks: EncodingNetworks
) -> None:
    members: dict[str, Path | bytes] = {
        "mp4": clips_folder / "good 0.mp4",
        "txt": "un été\n".encode("utf-8-sig"),
        "reference.png": clips_folder / "good 1.reference.png",
    }
    options = replace(small_options, identity_caption_from_caption=True)
    clip = ClipFiles("clip", members, options).load(networks.find_faces)
    assert clip.caption == clip.identity_caption == "un été"
    assert clip.person_mask is None


def test_the_fingerprint_is_of_content_and_options(clips_folder: Path, small_options: VideoOptions) -> None:
    def fingerprint(name: str, caption: bytes, options: VideoOptions) -> str:
        return ClipFiles(name, {"mp4": clips_folder / "good 0.mp4", "txt": caption}, options).fingerprint()

    first = fingerprint("a", b"one", small_options)
    assert fingerprint("b", b"one", small_options) == first
    assert fingerprint("a", b"two", small_options) != first
    assert fingerprint("a", b"one", replace(small_options, frame_stride=2)) != first
    # Where places are drawn from the name, the name decides too.
    drawn = replace(small_options, crop="random")
    assert fingerprint("a", b"one", drawn) != fingerprint("b", b"one", drawn)


def test_names_with_dots_and_folders(tmp_path: Path) -> None:
    for name in (
        "a.MP4",
        "a.txt",
        "a.b.mp4",
        "a.b.txt",
        "a.b.reference.1.png",
        "a.b.reference.2.JPG",
        "deep/c.webm",
        "deep/c.identity.txt",
        "lone.txt",
        ".hidden.mp4",
        "a.notes.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    clips = {name: sorted(loader.members) for name, loader in FolderClips(tmp_path)}
    assert clips == {
        "a": ["mp4", "txt"],
        "a.b": ["mp4", "reference.1.png", "reference.2.JPG", "txt"],
        "deep/c": ["identity.txt", "webm"],
    }
    with pytest.raises(InputError, match="holds no video"):
        FolderClips(tmp_path / "deep" / "..", VideoOptions()).__class__(_empty(tmp_path))
    with pytest.raises(InputError, match="is not a folder"):
        FolderClips(tmp_path / "a.txt")


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_names_of_shards(tmp_path: Path) -> None:
    for name in ("x-008.tar", "x-009.tar", "x-010.tar", "y-a.tar", "y-b.tar"):
        (tmp_path / name).write_bytes(b"")
    found = expand_shards([f"{tmp_path}/x-{{008..010}}.tar", f"{tmp_path}/y-{{b,a}}.tar"])
    assert [path.name for path in found] == ["x-008.tar", "x-009.tar", "x-010.tar", "y-b.tar", "y-a.tar"]
    assert [path.name for path in expand_shards(tmp_path / "x-*.tar")] == [
        "x-008.tar",
        "x-009.tar",
        "x-010.tar",
    ]
    for wrong, words in (
        ("x-{8..9}.tar", "no shard .*x-8.tar"),
        ("x-{9..8}.tar", "the smaller number first"),
        ("{x}.tar", "neither a range"),
    ):
        with pytest.raises(InputError, match=words):
            expand_shards(f"{tmp_path}/{wrong}")
    with pytest.raises(InputError, match="no shards were given"):
        expand_shards([])
    with pytest.raises(InputError, match=r"x-008.tar can't be read as a tar"):
        list(WebDatasetClips(tmp_path / "x-008.tar"))
