"""The cache of stage results: same bytes, budgets kept, damage named, requests apart."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from proteus_deploy import GenerateRequest, IdentityFeatures, InputError, Pipeline, StepEvent, Video
from proteus_deploy.cached_stages import CachedStages
from proteus_deploy.policies import EasyCache, MagCache, Plan
from proteus_deploy.stage_cache import StageCache, content_key
from proteus_deploy.stage_calls import Stage

SmallRequest = Callable[..., GenerateRequest]
ONE = 1000 * 4  # bytes of an entry of `numbers`
PLENTY = 1 << 24


def numbers(seed: int) -> dict[str, Tensor]:
    return {"out": torch.randn(1000, generator=torch.Generator().manual_seed(seed))}


def ask(cache: StageCache, seed: int) -> bool:
    """Whether the result of `seed` had to be computed; it is right either way."""
    computed: list[int] = []

    def compute() -> dict[str, Tensor]:
        computed.append(seed)
        return numbers(seed)

    found = cache.result(f"{seed:04d}", compute)
    assert list(found) == ["out"]
    assert torch.equal(found["out"], numbers(seed)["out"])
    return bool(computed)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the cache logs."""
    logged: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    logger, handler = logging.getLogger("proteus_deploy.stage_cache"), Keep()
    logger.addHandler(handler)
    yield logged
    logger.removeHandler(handler)


def test_the_longest_unused_entry_goes_first() -> None:
    cache = StageCache(3 * ONE)
    assert [ask(cache, seed) for seed in (1, 2, 3)] == [True] * 3
    assert not ask(cache, 1)
    assert ask(cache, 4)  # in place of 2
    assert [ask(cache, seed) for seed in (1, 3, 4)] == [False] * 3
    assert ask(cache, 2)
    counts = cache.counts
    assert (counts.hits, counts.folder_hits, counts.misses) == (4, 0, 5)
    assert (counts.entries, counts.bytes) == (3, 3 * ONE)
    cache.clear()
    assert (cache.counts.entries, cache.counts.bytes) == (0, 0)


@pytest.mark.parametrize("budget", [0, ONE - 1])
def test_what_exceeds_the_budget_is_not_kept(budget: int) -> None:
    cache = StageCache(budget)
    assert ask(cache, 1)
    assert ask(cache, 1)
    assert cache.counts.bytes == 0


def test_results_belong_to_the_caller() -> None:
    cache = StageCache(PLENTY)
    for _ in range(3):
        found = cache.result("key", lambda: numbers(1))
        assert torch.equal(found["out"], numbers(1)["out"])
        found["out"].zero_()


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    cache = StageCache(PLENTY, folder=tmp_path)
    with pytest.raises(ZeroDivisionError):
        cache.result("0001", lambda: {"out": torch.zeros(1 // 0)})
    assert ask(cache, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64])
def test_every_dtype_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    value = {"a": torch.arange(12).reshape(3, 4).to(dtype).t(), "b": torch.tensor(3).to(dtype)}
    for memory in (PLENTY, 0):
        cache = StageCache(memory, folder=tmp_path / str(memory))
        for _ in range(2):
            found = cache.result("key", lambda: value)
            assert all(torch.equal(found[name], value[name]) for name in value)
            assert all(found[name].dtype == dtype for name in value)


def test_a_folder_outlives_its_cache(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    assert ask(StageCache(PLENTY, folder=folder), 1)
    assert folder.stat().st_mode & 0o077 == 0
    again = StageCache(PLENTY, folder=folder)
    assert not ask(again, 1)
    assert not ask(again, 1)
    assert (again.counts.hits, again.counts.folder_hits) == (2, 1)
    again.clear()
    assert not list(folder.iterdir())


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def _of_another(file: Path) -> None:
    file.write_bytes((file.parent / "0002.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [_truncate, _flip, _of_another, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_named_and_replaced(
    tmp_path: Path, warnings: list[str], damage: Callable[[Path], object]
) -> None:
    for seed in (1, 2):
        ask(StageCache(0, folder=tmp_path), seed)
    damage(tmp_path / "0001.safetensors")
    assert ask(StageCache(0, folder=tmp_path), 1)
    assert len(warnings) == 1
    assert f"{tmp_path / '0001.safetensors'} can't be used (" in warnings[0]
    assert "it is computed again" in warnings[0]
    assert not ask(StageCache(0, folder=tmp_path), 1)
    assert len(warnings) == 1


def test_a_folder_keeps_its_budget(tmp_path: Path) -> None:
    ask(StageCache(0, folder=tmp_path), 1)
    size = (tmp_path / "0001.safetensors").stat().st_size
    cache = StageCache(0, folder=tmp_path, folder_bytes=3 * size)
    for age, seed in enumerate((1, 2, 3)):
        ask(cache, seed)
        os.utime(tmp_path / f"{seed:04d}.safetensors", (age, age))
    assert not ask(cache, 1)  # used now
    assert ask(cache, 4)
    assert {file.name[:4] for file in tmp_path.iterdir()} == {"0001", "0003", "0004"}
    nothing = StageCache(0, folder=tmp_path / "none", folder_bytes=0)
    assert ask(nothing, 1)
    assert not list((tmp_path / "none").iterdir())


def test_threads_share_a_cache() -> None:
    cache = StageCache(4 * ONE)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: ask(cache, index % 7), range(200)))
    counts = cache.counts
    assert counts.hits + counts.misses == 200
    assert counts.bytes == counts.entries * ONE <= 4 * ONE


@pytest.mark.parametrize("budget", [-1, 1.5, True, None, "1"])
def test_a_wrong_budget_is_refused(budget: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"memory_bytes is .*; a budget is a whole number of bytes from 0"):
        StageCache(budget)
    with pytest.raises(InputError, match="folder_bytes is"):
        StageCache(1, folder=tmp_path, folder_bytes=budget)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"can't make the cache folder .*file .*; choose another"):
        StageCache(1, folder=tmp_path / "file")


def test_a_key_is_its_content() -> None:
    value = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    key = content_key("stage", {"x": value}, {"weights": "w"})
    assert content_key("stage", {"x": value.t().contiguous().t()}, {"weights": "w"}) == key
    others = [
        content_key("other", {"x": value}, {"weights": "w"}),
        content_key("stage", {"y": value}, {"weights": "w"}),
        content_key("stage", {"x": value + 1}, {"weights": "w"}),
        content_key("stage", {"x": value.reshape(4, 3)}, {"weights": "w"}),
        content_key("stage", {"x": value.view(torch.int32)}, {"weights": "w"}),
        content_key("stage", {"x": value, "y": value}, {"weights": "w"}),
        content_key("stage", {"x": value}, {"weights": "v"}),
        content_key("stage", {"x": value}, {"weights": "w", "dtype": "fp32"}),
    ]
    assert len({key, *others}) == len(others) + 1


@pytest.fixture
def graphs_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pipeline], list[str]]:
    """graphs_run(pipeline) -> a list that grows by the name of every graph that the backend runs."""

    def watch(pipeline: Pipeline) -> list[str]:
        names: list[str] = []
        runner = pipeline.backend.runner

        def watched(name: str) -> Any:
            names.append(name)
            return runner(name)

        monkeypatch.setattr(pipeline.backend, "runner", watched)
        return names

    return watch


IN_FRONT = {"text_encoder", "identity_fusion", "identity_schedule"}


def test_a_cached_video_has_the_same_bytes(
    parity: Path,
    parity_pipeline: Pipeline,
    small_request: SmallRequest,
    identity: Callable[..., IdentityFeatures],
    graphs_run: Callable[[Pipeline], list[str]],
) -> None:
    cache = StageCache(PLENTY)
    want = parity_pipeline.generate(small_request()).frames
    with Pipeline.from_checkpoint(parity / "checkpoint", cache=cache) as pipeline:
        ran = graphs_run(pipeline)
        assert torch.equal(pipeline.generate(small_request()).frames, want)
        assert set(ran) >= IN_FRONT
        ran.clear()
        assert torch.equal(pipeline.generate(small_request()).frames, want)
        assert not IN_FRONT & set(ran)
        ran.clear()
        # Another person, the same words: the prompts are found, the identity isn't.
        other = small_request(identity=identity(9))
        assert torch.equal(pipeline.generate(other).frames, parity_pipeline.generate(other).frames)
        assert IN_FRONT & set(ran) == {"identity_fusion", "identity_schedule"}
        ran.clear()
        # Other timesteps: only the face tokens are new.
        longer = small_request(num_inference_steps=3)
        assert torch.equal(pipeline.generate(longer).frames, parity_pipeline.generate(longer).frames)
        assert IN_FRONT & set(ran) == {"identity_schedule"}


def test_pipelines_of_other_precision_or_weights_share_no_result(
    parity: Path, make_checkpoint: Callable[..., Path], small_request: SmallRequest, tmp_path: Path
) -> None:
    cache = StageCache(PLENTY, folder=tmp_path / "cache")
    openings: list[tuple[Path, str]] = [
        (parity / "checkpoint", "fp32"),
        (parity / "checkpoint", "bf16"),
        (make_checkpoint(), "fp32"),
    ]
    for folder, dtype in openings:
        with Pipeline.from_checkpoint(folder, dtype=dtype) as plain:
            want = plain.generate(small_request()).frames
        hits = cache.counts.hits
        with Pipeline.from_checkpoint(folder, dtype=dtype, cache=cache) as pipeline:
            assert torch.equal(pipeline.generate(small_request()).frames, want)
            assert cache.counts.hits == hits
            assert torch.equal(pipeline.generate(small_request()).frames, want)
            assert cache.counts.hits > hits


def test_a_folder_serves_the_next_process(parity: Path, small_request: SmallRequest, tmp_path: Path) -> None:
    videos = []
    for _ in range(2):
        cache = StageCache(0, folder=tmp_path)
        with Pipeline.from_checkpoint(parity / "checkpoint", cache=cache) as pipeline:
            videos.append(pipeline.generate(small_request()).frames)
    assert torch.equal(*videos)
    assert (cache.counts.misses, cache.counts.folder_hits) == (0, 5)


def test_a_replaced_stage_is_never_answered_for(parity: Path, small_request: SmallRequest) -> None:
    with Pipeline.from_checkpoint(parity / "checkpoint", cache=StageCache(PLENTY)) as pipeline:
        want = pipeline.generate(small_request()).frames
        real: Any = pipeline.stages["text_encoder"]
        pipeline.stages["text_encoder"] = lambda **inputs: {"text": real(**inputs)["text"] * 0.5}  # type: ignore[assignment]
        assert not torch.equal(pipeline.generate(small_request()).frames, want)


def test_interleaved_requests_share_a_cache_and_nothing_else(
    parity: Path,
    parity_pipeline: Pipeline,
    small_request: SmallRequest,
    identity: Callable[..., IdentityFeatures],
) -> None:
    """Two requests with other prompts, people and plans, step by step in turn, while entries are evicted."""
    cached = Plan(step_cache=MagCache(threshold=1, warmup=1, max_skips=1, ratios=(1.0,) * 4))
    requests = [
        small_request(num_inference_steps=4, plan=Plan(step_cache=EasyCache(threshold=5, warmup=2))),
        small_request(
            num_inference_steps=4,
            plan=cached,
            prompt="A man runs",
            identity=identity(9),
            identity_prompt="A man",
        ),
    ]
    alone = [parity_pipeline.generate(request) for request in requests]
    for budget in (PLENTY, 6000):
        together = Barrier(len(requests), timeout=300)

        def wait(event: StepEvent, together: Barrier = together) -> None:
            together.wait()

        def run(
            request: GenerateRequest, pipeline: Pipeline, wait: Callable[[StepEvent], None] = wait
        ) -> Video:
            return pipeline.generate(request, on_step=wait)

        with (
            Pipeline.from_checkpoint(parity / "checkpoint", cache=StageCache(budget)) as pipeline,
            ThreadPoolExecutor(len(requests)) as pool,
        ):
            for _ in range(2):
                videos = list(pool.map(run, requests, [pipeline] * 2))
                for got, want in zip(videos, alone, strict=True):
                    assert torch.equal(got.frames, want.frames)
                    assert got.metadata == want.metadata


def test_a_photo_is_found_by_its_pixels(identity: Callable[..., IdentityFeatures]) -> None:
    encoded: list[Any] = []
    features = identity(3, keypoints=torch.rand(5, 2))
    condition = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)

    def encode(photo: Any, *, face_index: int | None) -> Any:
        encoded.append(face_index)
        return features, condition

    backend: Any = SimpleNamespace(name="eager", dtype=torch.float32, device=torch.device("cpu"))
    stages = {name: Stage(name, backend) for name in ("face_parser", "image_tower")}
    encoder: Any = SimpleNamespace(encode=encode)
    cached = CachedStages(stages, backend, StageCache(PLENTY), lambda: "weights")
    photo = np.zeros((40, 30, 3), np.uint8)
    for face_index in (None, None, 0, 0, None):
        found, image = cached.read_photo(encoder, photo, face_index)
        assert torch.equal(found.id_cond, features.id_cond)
        assert all(map(torch.equal, found.id_vit_hidden, features.id_vit_hidden))
        assert found.keypoints is not None
        assert features.keypoints is not None
        assert torch.equal(found.keypoints, features.keypoints)
        assert image.dtype == np.uint8
        assert np.array_equal(image, condition)
    assert encoded == [None, 0]
    cached.read_photo(encoder, photo + 1, None)
    assert len(encoded) == 3
    stages["image_tower"] = Stage("image_tower", SimpleNamespace())
    for _ in range(2):
        cached.read_photo(encoder, photo, None)
    assert len(encoded) == 5


def test_a_cache_needs_to_know_the_weights(parity_pipeline: Pipeline, parity: Path) -> None:
    checkpoint = parity / "checkpoint"
    with pytest.raises(
        InputError, match="cache is given and weights isn't; use from_checkpoint or from_bundle"
    ):
        Pipeline(
            parity_pipeline.backend,
            parity_pipeline.config,
            {},
            {},
            checkpoint / "tokenizer",
            None,
            cache=StageCache(1),
        )
