"""Results that several servers share: in a folder, and in an S3 store (moto's server, over HTTP)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.serving.jobs import Claim, JobNotFound
from proteus_deploy.serving.results import ResultFolder, Results, portrait_name, video_name
from proteus_deploy.serving.shared_results import SharedResults, open_results

Saving = Callable[[bytes], Callable[[Path], None]]
NewClaim = Callable[..., Claim]


@pytest.fixture(scope="module")
def s3_address() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket; credentials and endpoint come from the environment, as in production."""
    import botocore.session

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"videos-{time.monotonic_ns()}"
    botocore.session.get_session().create_client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/results"


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/mounted"
    found: str = request.getfixturevalue("bucket")
    return found


@pytest.fixture
def two(url: str, tmp_path: Path) -> tuple[Results, Results]:
    """The results as two servers see them."""
    return open_results(url, tmp_path / "one"), open_results(url, tmp_path / "two")


def test_one_writes_and_the_other_reads(
    two: tuple[Results, Results], new_claim: NewClaim, saving: Saving
) -> None:
    here, there = two
    result = here.write(new_claim(3), saving(b"video"), {"frames": 5})
    assert (result.bytes, result.facts) == (5, {"frames": 5})
    for results in two:
        assert results.path(result.name).read_bytes() == b"video"
    there.remove([result.name, "video_gone.mp4"])
    with pytest.raises(JobNotFound):
        there.path(result.name)
    with pytest.raises(InputError, match="outside"):
        there.path("../secret")


def test_sweeping_leaves_the_young_to_their_commit(
    two: tuple[Results, Results], new_claim: NewClaim, saving: Saving
) -> None:
    here, there = two
    kept, orphan = (here.write(new_claim(), saving(b"x")) for _ in range(2))
    assert there.sweep(lambda: {kept.name}, older_than_s=60) == []
    time.sleep(1.1)  # S3 dates objects to the second
    assert there.sweep(lambda: {kept.name}) == [orphan.name]
    assert there.path(kept.name).read_bytes() == b"x"


def test_a_portrait_goes_where_its_video_goes(
    two: tuple[Results, Results], new_claim: NewClaim, saving: Saving
) -> None:
    here, there = two
    kept, orphan = new_claim(), new_claim()
    for claim in (kept, orphan):
        here.write_portrait(claim, b"png")
    name = here.write(kept, saving(b"x")).name
    time.sleep(1.1)  # S3 dates objects to the second
    assert there.sweep(lambda: {name}) == [portrait_name(video_name(orphan))]
    for results in two:
        assert results.path(portrait_name(name)).read_bytes() == b"png"
    here.remove([name])
    there.remove([name])  # its copies
    for results in two:
        with pytest.raises(JobNotFound):
            results.path(portrait_name(name))


def test_a_failed_write_stores_nothing(bucket: str, tmp_path: Path, new_claim: NewClaim) -> None:
    def save(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    results = open_results(bucket, tmp_path)
    with pytest.raises(OSError, match="disk full"):
        results.write(new_claim(), save)
    assert list(tmp_path.iterdir()) == []
    assert results.sweep(set) == []


def test_copies_are_bounded(tmp_path: Path, new_claim: NewClaim, saving: Saving) -> None:
    """What was used longest ago goes; what is asked for again is fetched again."""
    import fsspec

    (tmp_path / "store").mkdir()
    files = fsspec.filesystem("file")
    results = SharedResults(files, str(tmp_path / "store"), tmp_path / "copies", kept_bytes=25)
    names = []
    for age_s in (30, 20, 10):
        names.append(results.write(new_claim(), saving(b"0123456789")).name)
        used_s = time.time() - age_s
        os.utime(tmp_path / "copies" / names[-1], (used_s, used_s))
    assert {file.name for file in (tmp_path / "copies").iterdir()} == set(names[1:])
    assert results.path(names[0]).read_bytes() == b"0123456789"
    assert {file.name for file in (tmp_path / "copies").iterdir()} == {names[0], names[2]}
    large = results.write(new_claim(), saving(bytes(100)))
    assert [file.name for file in (tmp_path / "copies").iterdir()] == [large.name]


@pytest.mark.parametrize("url", ["memory://videos", "/mnt/videos", "s3://", "nonsense://x/y"])
def test_what_can_not_be_shared(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="results can't be kept at"):
        open_results(url, tmp_path)


def test_what_can_not_be_written(tmp_path: Path, bucket: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="results can't be written at"):
        open_results(f"file://{tmp_path}/file", tmp_path)
    with pytest.raises(InputError, match="results can't be written at"):
        open_results(bucket.replace("s3://videos", "s3://other"), tmp_path)


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(BackendError, match="s3:// need a package that isn't installed: Install s3fs"):
        open_results("s3://bucket/results", tmp_path)


def test_without_a_url_they_stay_here(tmp_path: Path) -> None:
    assert isinstance(open_results(None, tmp_path), ResultFolder)
