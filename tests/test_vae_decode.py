"""Tiled and chunked decoding against diffusers' own, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy import Cancelled, InputError, Pipeline
from proteus_deploy.runtime.backend import Backend
from proteus_deploy.testing import TOLERANCES, assert_close
from proteus_deploy.vae_decode import Tiling, chunks, decode, output_frames

# Tiles of 6 x 5 latent pixels: the overlaps of a sixth and a fifth are whole latent pixels.
TILES = Tiling(6, 5)


@pytest.fixture(scope="module")
def vae(parity: Path) -> Any:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX.from_pretrained(parity / "checkpoint" / "vae", torch_dtype=torch.float32)


@pytest.fixture
def tiled_vae(vae: Any) -> Iterator[Any]:
    vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=40)
    yield vae
    vae.disable_tiling()


def latents_of(frames: int, height: int, width: int) -> Tensor:
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(frames))


@torch.no_grad()
def oracle(vae: Any, latents: Tensor) -> Tensor:
    frames: Tensor = vae.decode(latents).sample
    return frames


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 7])
def test_chunks_without_tiles(parity_pipeline: Pipeline, vae: Any, frames: int) -> None:
    latents = latents_of(frames, 4, 6)
    got = decode(parity_pipeline.backend, latents)
    assert got.shape == (1, 3, output_frames(frames), 32, 48)
    assert_close("frames", got, oracle(vae, latents), TOLERANCES["vae", "frames"])


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(2, 12, 9), (5, 11, 8), (3, 6, 10), (2, 10, 5), (4, 7, 6), (3, 16, 13)],
    ids=["two by two", "one-pixel borders", "wide", "high", "just larger", "four by three"],
)
def test_tiles_match_diffusers(
    parity_pipeline: Pipeline, tiled_vae: Any, frames: int, height: int, width: int
) -> None:
    latents = latents_of(frames, height, width)
    got = decode(parity_pipeline.backend, latents, tiling=TILES)
    want = oracle(tiled_vae, latents)
    assert_close("frames", got, want, TOLERANCES["vae", "frames"])
    plain = decode(parity_pipeline.backend, latents)
    assert not torch.allclose(plain, want, atol=1e-4), "tiles must show, or this test sees nothing"


def test_a_video_that_fits_one_tile_is_not_cut(parity_pipeline: Pipeline, tiled_vae: Any) -> None:
    latents = latents_of(3, 6, 5)
    got = decode(parity_pipeline.backend, latents, tiling=TILES)
    assert torch.equal(got, decode(parity_pipeline.backend, latents))
    assert_close("frames", got, oracle(tiled_vae, latents), TOLERANCES["vae", "frames"])


@pytest.mark.parametrize("tiling", [Tiling(5, 7, 0.0, 0.0), Tiling(3, 4, 0.5, 0.3), Tiling(2, 2)])
def test_other_tile_sizes_leave_no_pixel_unwritten(
    parity_pipeline: Pipeline, tiling: Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = latents_of(2, 8, 9)
    decode(parity_pipeline.backend, latents, tiling=tiling)  # loads the networks
    monkeypatch.setattr(torch, "empty", lambda *shape: torch.full(shape, float("nan")))
    assert decode(parity_pipeline.backend, latents, tiling=tiling).isfinite().all()


class Spy:
    """A backend that remembers what its graphs were given and what they still hold."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.shapes: list[tuple[int, ...]] = []

    def runner(self, graph: str) -> Any:
        run = self.backend.runner(graph)

        def call(**inputs: Tensor) -> dict[str, Tensor]:
            self.shapes.append(tuple(inputs["latents"].shape))
            return run(**inputs)

        return call


@pytest.mark.parametrize(("frames", "tiling"), [(8, TILES), (9, TILES), (8, None), (9, None)])
def test_the_decoder_never_gets_more_than_one_chunk_of_one_tile(
    parity_pipeline: Pipeline, frames: int, tiling: Tiling | None
) -> None:
    spy = Spy(parity_pipeline.backend)
    decode(spy, latents_of(frames, 11, 9), tiling=tiling)  # type: ignore[arg-type]
    height, width = (tiling.height, tiling.width) if tiling else (11, 9)
    assert max(shape[2] for shape in spy.shapes) == (3 if frames % 2 else 2)
    assert max(shape[3] for shape in spy.shapes) == height
    assert max(shape[4] for shape in spy.shapes) == width
    assert len(spy.shapes) == 4 * (9 if tiling else 1)


def test_every_chunk_of_every_tile_is_reported(parity_pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    decode(
        parity_pipeline.backend,
        latents_of(5, 11, 8),
        tiling=TILES,
        on_part=lambda *part: seen.append(part),
    )
    assert seen == [(done, 12) for done in range(1, 13)]


def test_work_stops_at_the_chunk_after_which_the_caller_says_so(parity_pipeline: Pipeline) -> None:
    spy = Spy(parity_pipeline.backend)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        decode(spy, latents_of(5, 11, 8), tiling=TILES, on_part=stop)  # type: ignore[arg-type]
    assert len(spy.shapes) == 3


@pytest.mark.parametrize("frames", range(2, 30))
def test_chunks_cover_every_latent_frame_once(frames: int) -> None:
    parts = chunks(frames)
    assert [index for start, stop in parts for index in range(start, stop)] == list(range(frames))
    assert all(stop - start == 2 for start, stop in parts[1:])
    assert parts[0][1] == 2 + frames % 2
    assert output_frames(frames) == (4 * frames - 3 if frames % 2 else 4 * frames)


def test_one_latent_frame_is_an_image_and_refused(parity_pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="1 latent frame"):
        decode(parity_pipeline.backend, latents_of(1, 4, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 8), "too small"),
        ((4, 4, 1.0, 0.0), "below 1"),
        ((4, 4, 0.0, -0.1), "at least 0"),
        ((2, 2, 0.6, 0.0), "don't advance"),
    ],
)
def test_tiles_that_make_no_sense_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tiling(*arguments)


def test_the_default_tile_is_half_of_the_vaes_sample_size() -> None:
    tiling = Tiling.for_vae({"sample_height": 480, "sample_width": 720})
    assert (tiling.height, tiling.width, tiling.stride) == (30, 45, (25, 36))
