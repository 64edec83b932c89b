"""Each clip of a source ends encoded or named; what is done stays done; the numbers are inference's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from proteus_deploy.errors import Cancelled, CheckpointError, InputError
from proteus_deploy.training.data import prepare as module
from proteus_deploy.training.data.avatar_clips import AvatarClips
from proteus_deploy.training.data.cache import PreparedSet
from proteus_deploy.training.data.clips import ClipLoader, ClipSample, FaceFinder
from proteus_deploy.training.data.encoding import EncodedClip, PrepareSettings, encode_clip
from proteus_deploy.training.data.folder import FolderClips
from proteus_deploy.training.data.networks import EncodingNetworks
from proteus_deploy.training.data.prepare import prepare
from proteus_deploy.training.data.report import DataReport, Note, Reason
from proteus_deploy.training.data.video_frames import VideoOptions


def small_avatars(count: int) -> AvatarClips:
    return AvatarClips(count, num_frames=5, size=32, photo_size=256)


def test_every_bad_clip_is_named_and_the_others_are_prepared(prepared: PreparedSet) -> None:
    report = prepared.report
    assert {one.name: one.reason for one in report.rejections} == {
        "faceless": Reason.NO_FACE,
        "cut short": Reason.UNREADABLE_VIDEO,
        "no caption": Reason.NO_CAPTION,
        "two people": Reason.SEVERAL_FACES,
    }
    assert [clip.name for clip in prepared.clips] == [*(f"good {index}" for index in range(7)), "no masks"]
    assert (report.seen, report.accepted, report.reused, prepared.encoded) == (12, 8, 0, 8)
    assert report.counts == {"no face": 1, "several faces": 1, "unreadable video": 1, "no caption": 1}
    assert report.notes[Note.NO_PERSON_MASK] == report.notes[Note.NO_HEAD_MASK] == 1
    text = report.text()
    for line in ("8 of 12 clips", "left out: 1 x no face", "two people: several faces", "no caption.txt"):
        assert line in text
    assert DataReport.from_document(json.loads(json.dumps(report.document()))) == report


def test_a_second_run_encodes_nothing(
    prepared: PreparedSet,
    clips_folder: Path,
    small_options: VideoOptions,
    networks: EncodingNetworks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module._Encoder, "__call__", lambda *_: pytest.fail("a clip was encoded again"))
    again = prepare(FolderClips(clips_folder, small_options), networks, prepared.folder, workers=3)
    assert again.clips == prepared.clips
    assert (again.encoded, again.report.reused) == (0, 8)
    assert again.report.rejections == prepared.report.rejections
    assert again.report.notes == prepared.report.notes
    assert PreparedSet.open(prepared.folder).clips == prepared.clips


def test_a_mended_clip_is_taken_and_only_that_one(
    prepared: PreparedSet, clips_folder: Path, small_options: VideoOptions, networks: EncodingNetworks
) -> None:
    caption = clips_folder / "no caption.txt"
    caption.write_text("a person talks", encoding="utf-8")
    try:
        source = FolderClips(clips_folder, small_options)
        mended = prepare(source, networks, prepared.folder, name="mended")
    finally:
        caption.unlink()
    assert (mended.encoded, mended.report.reused, len(mended.report.rejections)) == (1, 8, 3)


@pytest.mark.parametrize("how", ["cancelled", "killed"])
def test_an_interrupted_run_goes_on(
    how: str, networks: EncodingNetworks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, encoded, cancel = encode_clip, list[str](), Event()

    def watched(clip: ClipSample, *rest: object) -> EncodedClip:
        if how == "killed" and len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(clip.name)
        if how == "cancelled" and len(encoded) == 2:
            cancel.set()
        return real(clip, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "encode_clip", watched)
    with pytest.raises(Cancelled if how == "cancelled" else KeyboardInterrupt):
        prepare(small_avatars(4), networks, tmp_path, cancel=cancel)
    assert len(encoded) == 2
    assert not (tmp_path / "train.json").exists()
    how = "left alone"
    calls: list[tuple[str, int, int]] = []
    prepared = prepare(small_avatars(4), networks, tmp_path, report=lambda *call: calls.append(call))
    assert (prepared.encoded, prepared.report.reused) == (2, 2)
    assert len(encoded) == len(set(encoded)) == 4
    assert calls == [("preparing clips", done, 4) for done in (1, 2, 3, 4)]
    assert [clip.name for clip in prepared.clips] == [name for name, _ in small_avatars(4)]
    assert not list(tmp_path.glob(".partial-*"))


def test_the_key_follows_everything_that_decides_the_numbers(
    networks: EncodingNetworks, tmp_path: Path
) -> None:
    def key(settings: PrepareSettings, source: AvatarClips | None = None, hashed: str = "") -> str:
        cache = module._Cache(tmp_path, networks.resolve(settings), hashed or networks.hash)
        name, loader = next(iter(source or small_avatars(1)))
        found = cache.look_up(name, loader)
        assert isinstance(found, module._Job)
        return found.key

    plain = PrepareSettings()
    changed = (
        replace(plain, noise_variants=5),
        replace(plain, condition_noise=False),
        replace(plain, seed=1),
        replace(plain, storage="float32"),
        replace(plain, aml="published"),
        replace(plain, flow_preset="fast"),
        replace(plain, max_identity_length=5),
        replace(plain, keypoints=True),
    )
    keys = [key(plain), *map(key, changed), key(plain, hashed="other networks")]
    keys += [key(plain, AvatarClips(1)), key(plain, AvatarClips(1, first_clip=1))]
    assert len(set(keys)) == len(keys)
    # What is spelled out or left to the checkpoint is the same, and so is any device.
    assert key(replace(plain, max_sequence_length=64)) == key(replace(plain, dtype="fp32")) == keys[0]


def test_networks_are_told_apart_by_content(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = linked(tiny_checkpoint, tmp_path / "copy", "vae", "tokenizer", "face_encoder")
    (folder / "text_encoder").mkdir()
    for file in (tiny_checkpoint / "text_encoder").iterdir():
        (folder / "text_encoder" / file.name).write_bytes(file.read_bytes())
    same = EncodingNetworks(folder).hash
    assert same == EncodingNetworks(tiny_checkpoint).hash
    (folder / "text_encoder" / "config.json").write_text(
        (folder / "text_encoder" / "config.json").read_text() + "\n", encoding="utf-8"
    )
    assert EncodingNetworks(folder).hash != same


def test_a_checkpoint_without_transformer(
    tiny_checkpoint: Path, networks: EncodingNetworks, tmp_path: Path
) -> None:
    parts = ("vae", "text_encoder", "tokenizer", "face_encoder")
    folder = linked(tiny_checkpoint, tmp_path / "parts", *parts)
    with pytest.raises(InputError, match="max_sequence_length and max_identity_length"):
        prepare(small_avatars(1), folder, tmp_path / "cache")
    settings = PrepareSettings(max_sequence_length=64, max_identity_length=16)
    alone = prepare(small_avatars(1), folder, tmp_path / "cache", settings=settings)
    whole = prepare(small_avatars(1), networks, tmp_path / "cache")
    assert alone.clips == whole.clips
    assert whole.encoded == 0
    with pytest.raises(CheckpointError, match="has no face_encoder"):
        prepare(small_avatars(1), linked(tiny_checkpoint, tmp_path / "faceless", *parts[:3]), tmp_path)


@pytest.mark.slow
def test_spawned_workers_write_the_same_bytes(
    tiny_checkpoint: Path, networks: EncodingNetworks, tmp_path: Path
) -> None:
    here = prepare(small_avatars(3), networks, tmp_path / "here")
    there = prepare(small_avatars(3), tiny_checkpoint, tmp_path / "there", workers=2)
    assert there.encoded == 3
    for one, other in zip(here.clips, there.clips, strict=True):
        assert (one.name, one.file.name) == (other.name, other.file.name)
        assert one.file.read_bytes() == other.file.read_bytes()


def test_wrong_arguments(networks: EncodingNetworks, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers is -1"):
        prepare(small_avatars(1), networks, tmp_path, workers=-1)
    with pytest.raises(InputError, match="4 frames of 32x32"):
        prepare(AvatarClips(1, num_frames=4, size=32), networks, tmp_path)
    with pytest.raises(InputError, match="open them with the same dtype"):
        prepare(small_avatars(1), networks, tmp_path, settings=PrepareSettings(dtype="bf16"))
    with pytest.raises(InputError, match="noise_variants is 0"):
        PrepareSettings(noise_variants=0)


class _Unreadable:
    """A source of one clip whose disk fails."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[str, ClipLoader]]:
        yield "broken", self

    def fingerprint(self) -> str:
        return "broken"

    def load(self, find_faces: FaceFinder) -> ClipSample:
        raise OSError("input/output error")


def test_a_failing_disk_is_reported_and_not_remembered(networks: EncodingNetworks, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="broken: unreadable video: input/output error"):
        prepare(_Unreadable(), networks, tmp_path)
    assert not list(tmp_path.iterdir())


def linked(checkpoint: Path, folder: Path, *parts: str) -> Path:
    folder.mkdir()
    for part in parts:
        (folder / part).symlink_to(checkpoint / part)
    return folder
