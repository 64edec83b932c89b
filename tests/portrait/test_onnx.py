"""Portrait bundles: graphs beside PyTorch at every step, pictures, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from proteus_deploy._files import sha256_of
from proteus_deploy.bundle import Bundle, write_manifest
from proteus_deploy.cli.main import main
from proteus_deploy.errors import BackendError, BundleError, CheckFailed, CheckpointError, InputError
from proteus_deploy.portrait.checkpoint import PortraitCheckpoint
from proteus_deploy.portrait.decoding import Decoding, run_decoding
from proteus_deploy.portrait.gpt import Gpt
from proteus_deploy.portrait.onnx_bundle import DOCUMENT, PortraitBundle, write_document
from proteus_deploy.portrait.opening import open_painter
from proteus_deploy.portrait.painter import TorchPainter
from proteus_deploy.portrait.plan import DENSE, CacheSettings
from proteus_deploy.portrait.sampling import Sampling, draw_token, guide
from proteus_deploy.portrait.step_module import ConditionPair, DecodeStep, gives_up, state_names
from proteus_deploy.reporting import no_report
from proteus_deploy.stages import StageTable
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.tiny.portrait_checkpoint import RANDOM_GPT, write_random_portrait

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from proteus_deploy.export import portrait_onnx
from proteus_deploy.export.portrait_onnx import export_portrait
from proteus_deploy.export.portrait_verify import (
    TOLERANCES_OF,
    _long_caption,
    _verify_steps,
    record_reference,
    verify_portrait,
)
from proteus_deploy.export.verify import verify_bundle
from proteus_deploy.portrait.onnx_painter import OnnxPainter

if TYPE_CHECKING:
    from proteus_deploy.export.onnx_graph import ExportedGraph

LOGITS = Tolerance(1e-4, "absolute", "float32 on another runtime; these logits are around 1")
CAPTIONS = ["a woman", "a portrait of an old man with a white beard and round glasses"]
SAMPLING = Sampling(guidance_scale=2.0, top_k=0, seed=3)
# Of 96 positions 68 have slots, so 27 are given up; with fewer than 64 slots PyTorch breaks ties at random.
CACHES = {
    "adsa": CacheSettings("adsa", 0.7, cadence=1),
    "sink-window": CacheSettings("sink-window", 0.7, cadence=1),
    "dense": DENSE,
}


@pytest.fixture(scope="module")
def checkpoint(portrait_folder: Path) -> PortraitCheckpoint:
    return PortraitCheckpoint.open(portrait_folder)


@pytest.fixture(scope="module")
def bundle(checkpoint: PortraitCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> PortraitBundle:
    """The checkpoint with its own cache, exported once. Read it, don't write into it."""
    return export_portrait(checkpoint, tmp_path_factory.mktemp("portraits") / "adsa")


@pytest.fixture(scope="module")
def exported(
    checkpoint: PortraitCheckpoint, bundle: PortraitBundle, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], OnnxPainter]:
    """exported(policy) -> the painter of a bundle with that cache; all but the decoder is copied."""
    painters = {"adsa": OnnxPainter(bundle, threads=1)}

    def painter(policy: str) -> OnnxPainter:
        if policy not in painters:
            folder = tmp_path_factory.mktemp("portraits") / policy
            cache = replace(CACHES[policy], cadence=None)
            made = export_portrait(checkpoint, folder, cache=cache, graphs_from=bundle.folder)
            painters[policy] = OnnxPainter(made, threads=1)
        return painters[policy]

    return painter


@pytest.fixture
def copy(bundle: PortraitBundle, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(bundle.folder, tmp_path / "portrait"))


def kept(decoding: Decoding) -> Tensor:
    """Positions [layers, sequences, slots] of PyTorch's cache."""
    positions = decoding.cache.positions[:, 0, : decoding.cache.filled]
    return positions.reshape(len(decoding.cache.layers), -1, decoding.cache.filled)


def complete(folder: Path) -> None:
    """Write a changed bundle's hashes anew."""
    bundle = PortraitBundle.open(folder, hashes=False)
    more = {name: bundle.document[name] for name in ("checkpoint", "graphs", "versions")}
    write_document(
        folder,
        gpt=bundle.gpt,
        vq=bundle.vq,
        sampling=bundle.sampling,
        cache=bundle.cache,
        plan=bundle.plan,
        table=bundle.table,
        more=more,
    )


@pytest.mark.parametrize("kv_heads", [None, 1])
@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("policy", CACHES)
def test_the_module_is_the_cache_slot_for_slot(policy: str, window: int | None, kv_heads: int | None) -> None:
    """In PyTorch, before any export: the same logits from the same slots at all 64 steps. Padding goes first:
    of 27 that go, all of one sequence and 15 of the other."""
    config = replace(RANDOM_GPT, n_kv_head=kv_heads)
    torch.manual_seed(1)
    gpt = Gpt(config).eval().requires_grad_(False)
    settings = replace(CACHES[policy], window=window)
    features = torch.randn(2, 32, 128)
    valid = torch.arange(32) >= torch.tensor([[27], [15]])
    decoding = Decoding(gpt, settings, features, valid, guided=True, trim=False)
    plan = settings.plan(config.cls_token_num, config.block_size, config.grid_size)
    step, embeddings = DecodeStep(gpt, plan), ConditionPair(gpt)(features)
    state = _first_state(step, sequences=4)
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    seen, given_up = 0, 0
    for position in range(config.block_size):
        logits, *after = step(tokens, embeddings, torch.tensor(seen), valid.long(), *state)
        want = decoding.step(tokens[:, 0]) if position else decoding.prefill()
        assert float((logits - want).abs().max()) < 1e-5
        if gives_up(plan, config):
            given_up += int((after[0] >= 0).sum())
            state = [state[0], *after[2:]]
            assert torch.equal(state[1][..., : decoding.cache.filled], kept(decoding))
        else:
            state = after
        seen += tokens.shape[1]
        tokens = torch.randint(0, config.vocab_size, (2, 1))
        embeddings = torch.full((4, 1, config.dim), torch.nan)  # of the condition, so nobody looks at these
    assert given_up == (0 if policy == "dense" else (0 + 12) * 2 * config.n_layer)


def _first_state(step: DecodeStep, sequences: int) -> list[Tensor]:
    config, slots = step.gpt.config, step.plan.slots
    rows = (config.n_layer, sequences)
    shapes = {"give_up": rows, "positions": (*rows, slots), "inverse_norms": (*rows, slots)}
    layer = (sequences, config.kv_heads, slots, config.head_dim)
    whole = ("give_up", "positions")
    return [
        torch.full(shapes[name], -1) if name in whole else torch.zeros(shapes.get(name, layer))
        for name in state_names(step.plan, config)
    ]


@pytest.mark.parametrize("policy", CACHES)
def test_every_step_is_that_of_pytorch(
    policy: str, painter: TorchPainter, exported: Callable[[str], OnnxPainter]
) -> None:
    """Two captions of different length, with PyTorch's tokens; what is given up is the graph's own choice."""
    theirs = exported(policy)
    features, valid = painter.captions(CAPTIONS)
    assert len(set(valid.sum(dim=1).tolist())) == 2
    assert not bool(valid.any(dim=0)[0])  # padding that both share comes in all the same
    decoding = Decoding(painter.gpt, CACHES[policy], features, valid, guided=True, trim=False)
    ours = theirs.start(features, valid, guided=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    want, got = decoding.prefill(), ours.prefill()
    given_up = 0
    for position in range(64):
        assert_close(f"logits {position}", got, want, LOGITS)
        if ours.chooses:
            positions = torch.from_numpy(ours.value("next_positions"))
            assert torch.equal(positions[..., : decoding.cache.filled], kept(decoding))
            given_up += int((ours.value("given_up") >= 0).sum())
        if position < 63:
            tokens = draw_token(guide(want, 2.0), SAMPLING, generators)
            want, got = decoding.step(tokens), ours.step(tokens)
    assert ours.chooses == (policy != "dense")
    choices = (27 - (~valid).sum(dim=1)).clamp_min(0).tolist()  # once padding went
    assert choices[0] == 0 < choices[1]
    assert given_up == (sum(choices) * 2 * 2 if ours.chooses else 0)


@pytest.mark.parametrize("guidance_scale", [2.0, 1.0])
@pytest.mark.parametrize("policy", ["adsa", "dense"])
def test_the_same_seeds_draw_the_same_portraits(
    policy: str, guidance_scale: float, painter: TorchPainter, exported: Callable[[str], OnnxPainter]
) -> None:
    ours = exported(policy)
    sampling = replace(SAMPLING, guidance_scale=guidance_scale)
    features, valid = painter.captions(CAPTIONS)
    guided = guidance_scale > 1
    decoding = Decoding(painter.gpt, CACHES[policy], features, valid, guided=guided, trim=False)
    want = run_decoding(decoding, sampling, [3, 4], 64)
    if policy == "dense":  # padding counts for nothing then
        assert torch.equal(want, painter.draw_tokens(CAPTIONS, sampling=sampling, cache=DENSE))
    assert torch.equal(ours.draw_tokens(CAPTIONS, sampling=sampling), want)
    told: list[tuple[int, int]] = []
    pictures = ours.draw(
        CAPTIONS,
        sampling=sampling,
        cache=ours.cache,
        report=lambda _, done, total: told.append((done, total)),
    )
    assert told == [(done, 64) for done in range(1, 65)]
    for got, theirs in zip(pictures, painter.pictures(want), strict=True):
        assert got.shape == (16, 16, 3)
        assert abs(got.astype(int) - theirs.astype(int)).max() <= 1


def test_more_captions_than_a_batch_holds(bundle: PortraitBundle) -> None:
    narrow = replace(bundle.table.axes["B"], max=2)
    table = replace(bundle.table, axes={**bundle.table.axes, "B": narrow})
    whole, batches = OnnxPainter(bundle, threads=1), OnnxPainter(replace(bundle, table=table), threads=1)
    three = [*CAPTIONS, "a child"]
    told: list[tuple[int, int]] = []
    got = batches.draw_tokens(three, seeds=[5, 1, 9], report=lambda _, done, all_: told.append((done, all_)))
    assert torch.equal(got, whole.draw_tokens(three, seeds=[5, 1, 9]))
    assert told == [(done, 128) for done in range(1, 129)]
    assert len(batches.pictures(got)) == 3


def test_the_bundle_opens_as_a_painter(
    bundle: PortraitBundle, portrait_folder: Path, checkpoint: PortraitCheckpoint
) -> None:
    opened = open_painter(bundle.folder)
    assert isinstance(opened, OnnxPainter)
    assert isinstance(open_painter(portrait_folder), TorchPainter)
    assert opened.cache == replace(checkpoint.cache, cadence=1)
    assert opened.sampling == checkpoint.sampling
    assert (bundle.side, bundle.plan.slots, bundle.plan.prefix) == (16, 68, 35)
    assert bundle.document["parity"]["status"] == "measured"
    assert bundle.document["checkpoint"]["hash"] == checkpoint.hash
    assert set(bundle.document["files"]) == {
        file.relative_to(bundle.folder).as_posix()
        for file in bundle.folder.rglob("*")
        if file.is_file() and file.name != DOCUMENT
    }


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (CacheSettings("random", 0.7), "the policy 'random' can't be exported: its choices are drawn"),
        (CacheSettings("uniform", 0.7), "the policy 'uniform' can't be exported: there is no graph"),
        (CacheSettings("attention", 0.7), "the policy 'attention' can't be exported: it adds up attention"),
        (CacheSettings("adsa", 0.7, scope="head"), "the scope 'head' can't be exported"),
        (CacheSettings("adsa", 0.7, redundancy="seen"), "the redundancy 'seen' can't be exported"),
        (CacheSettings("adsa", 0.7, cadence=4), "the cadence 4 can't be exported"),
        (CacheSettings("adsa", 0.7, offload=True), "the offload True can't be exported"),
        (CacheSettings("adsa", 0.3), "choose a larger budget"),
    ],
)
def test_caches_that_no_graph_can_have(
    checkpoint: PortraitCheckpoint, tmp_path: Path, cache: CacheSettings, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_portrait(checkpoint, tmp_path / "portrait", cache=cache)
    assert not list(tmp_path.iterdir())


def test_a_model_of_classes_is_refused(tmp_path: Path) -> None:
    classes = replace(RANDOM_GPT, model_type="c2i", cls_token_num=1, num_classes=7)
    folder = write_random_portrait(tmp_path / "checkpoint", gpt=classes)
    with pytest.raises(CheckpointError, match="draws classes"):
        export_portrait(PortraitCheckpoint.open(folder), tmp_path / "portrait")


def test_what_a_painter_refuses(bundle: PortraitBundle) -> None:
    ours = OnnxPainter(bundle, threads=1)
    with pytest.raises(
        InputError, match=r"cache is CacheSettings\(policy='dense'.*export the checkpoint again"
    ):
        ours.draw(["a woman"], cache=DENSE)
    with pytest.raises(InputError, match="1 seeds for 2 images"):
        ours.draw(CAPTIONS, seeds=[1])
    with pytest.raises(InputError, match="say who is to be drawn"):
        ours.draw([" "])
    with pytest.raises(BackendError, match="device is 'tpu'; choose from cpu, cuda"):
        OnnxPainter(bundle, device="tpu")


def test_a_painter_takes_its_sessions_along(bundle: PortraitBundle) -> None:
    """At once, without the garbage collector: a video's loop needs the memory."""
    gc.collect()
    gc.disable()
    try:
        ours = OnnxPainter(bundle, threads=1)
        ours.draw(["a woman"])
        graphs = ours._graphs
        parts = [weakref.ref(part) for part in (ours, ours.captions, graphs, *graphs._sessions.values())]
        assert len(parts) == 7
        del ours, graphs
        assert [part() for part in parts] == [None] * 7
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "name", ["onnx/decoder.onnx", "onnx/text_encoder.onnx", "tokenizer/spiece.model", "reference.safetensors"]
)
def test_damaged_files(copy: Path, name: str) -> None:
    file = copy / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=rf"{name} has \d+ bytes, and portrait.json says \d+"):
        open_painter(copy)
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(BundleError, match=rf"{name} differs from portrait.json \(sha256\)"):
        open_painter(copy)
    assert isinstance(open_painter(copy, hashes=False), OnnxPainter)
    file.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_painter(copy)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema_version", 2, "field 'schema_version' is 2; this release reads 1"),
        ("gpt", None, "field 'gpt' is missing or not an object"),
        ("plan", {"policy": "adsa", "slots": 0}, "slots is 0"),
        ("cache", {"policy": "adsa", "size": 1}, "unexpected keyword argument 'size'"),
        ("stage_table", {"axes": {}}, "the table lacks 'graphs'"),
        ("files", {}, "onnx/text_encoder.onnx is not among 'files'"),
        ("files", {"../a": {"bytes": 1, "sha256": ""}}, "lists '../a', which can't be one of its files"),
        ("files", {"onnx/decoder.onnx": 3}, "must hold 'bytes' and 'sha256'"),
    ],
)
def test_damaged_documents(copy: Path, field: str, value: Any, message: str) -> None:
    document = json.loads((copy / DOCUMENT).read_text())
    (copy / DOCUMENT).write_text(json.dumps({**document, field: value}))
    with pytest.raises(BundleError, match=message):
        open_painter(copy)


def test_other_folders_are_no_bundle(portrait_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no portrait\.json"):
        OnnxPainter.open(tmp_path)
    with pytest.raises(BundleError, match="field 'kind' is None"):
        OnnxPainter.open(portrait_folder)


def test_verify_compares_every_graph(bundle: PortraitBundle) -> None:
    rows = {row.check: row for row in verify_portrait(bundle.folder)}
    graphs = {f"portrait {graph.name}" for graph in bundle.table.graphs}
    assert set(rows) == graphs | {"portrait choices"}
    assert all(row.status == "ok" for row in rows.values())
    assert rows["portrait choices"].detail == "96 of 96 the same"  # 27 steps, of which 3 give up padding


def test_the_recorded_caption_leaves_little_padding(painter: TorchPainter) -> None:
    for positions in (32, 20, 12):
        length = painter.captions.ids(_long_caption(painter.captions, positions)).shape[1]
        assert positions - 8 <= length <= positions - 3


def test_choices_that_an_image_never_comes_to_are_said_not_to_be_compared() -> None:
    """A reference of two steps, in which nothing but padding was given up."""

    class Computed:
        chooses = True
        given_up = -1

        def prefill(self) -> Tensor:
            return torch.ones(2, 5)

        def step(self, *_: Any) -> Tensor:
            return self.prefill()

        def value(self, name: str) -> Any:
            return {"given_up": torch.full((1, 2), self.given_up), "margin": torch.zeros(1, 2)}[name].numpy()

    reference = {
        "kept": torch.tensor([0, 1]),
        "logits": torch.ones(2, 2, 5),
        "given_up": torch.full((2, 1, 2), -1),
        "tokens": torch.zeros(1, dtype=torch.int64),
    }
    decoding: Any = Computed()
    decoder, choices = _verify_steps(decoding, reference, 2, TOLERANCES_OF, no_report)
    assert (decoder.check, decoder.status) == ("portrait decoder", "ok")
    assert (choices.check, choices.status, choices.error) == ("portrait choices", "not run", None)
    decoding.given_up = 40  # a position of the image, in the place of padding
    _, choices = _verify_steps(decoding, reference, 2, TOLERANCES_OF, no_report)
    assert (choices.check, choices.status) == ("portrait choices", "failed")


def test_verify_finds_another_rule(
    checkpoint: PortraitCheckpoint, bundle: PortraitBundle, painter: TorchPainter, copy: Path
) -> None:
    """Told what to give up, the graph computes the same logits; that it would choose otherwise is seen."""
    other = replace(bundle.cache, policy="random")
    plan = other.plan(32, 64, 8)
    record_reference(copy, painter.gpt, painter.vq, painter.captions, other, plan)
    complete(copy)
    rows = {row.check: row for row in verify_portrait(copy)}
    assert [check for check, row in rows.items() if row.status == "failed"] == ["portrait choices"]
    assert rows["portrait choices"].error == pytest.approx(0.5, abs=0.45)


def test_verify_finds_other_weights(bundle: PortraitBundle, copy: Path, tmp_path: Path) -> None:
    other = PortraitCheckpoint.open(write_random_portrait(tmp_path / "checkpoint", seed=1))
    theirs = TorchPainter(other)
    record_reference(copy, theirs.gpt, theirs.vq, theirs.captions, bundle.cache, bundle.plan)
    complete(copy)
    failed = [row.check for row in verify_portrait(copy) if row.status == "failed"]
    assert set(failed) >= {"portrait condition", "portrait vq_decoder", "portrait decoder"}
    assert "portrait text_encoder" not in failed


def test_an_export_that_differs_is_not_written(
    checkpoint: PortraitCheckpoint, bundle: PortraitBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(folder: Path, gpt: Gpt, *arguments: Any) -> None:
        gpt.output.weight.mul_(1.01)
        record_reference(folder, gpt, *arguments)

    monkeypatch.setattr(portrait_onnx, "record_reference", noisy)
    other = replace(checkpoint, sampling=SAMPLING)  # so that the reference is recorded anew
    with pytest.raises(CheckFailed, match=r"portrait decoder is 9\.9e-03 off, above 1e-04"):
        export_portrait(other, tmp_path / "portrait", graphs_from=bundle.folder)
    assert not list(tmp_path.iterdir())


def test_graphs_of_an_earlier_bundle(
    checkpoint: PortraitCheckpoint, bundle: PortraitBundle, tmp_path: Path
) -> None:
    """The same again is a copy; other sampling changes the document only; another checkpoint is refused."""
    same = export_portrait(checkpoint, tmp_path / "same", graphs_from=bundle.folder)
    assert same.document == bundle.document
    other = replace(checkpoint, sampling=SAMPLING)
    sampled = export_portrait(other, tmp_path / "sampled", graphs_from=bundle.folder)
    assert sampled.sampling == SAMPLING
    assert sampled.document["files"] == bundle.document["files"]
    foreign = PortraitCheckpoint.open(write_random_portrait(tmp_path / "checkpoint", seed=1))
    with pytest.raises(InputError, match=r"can't be reused: it has another checkpoint \(hash\)"):
        export_portrait(foreign, tmp_path / "foreign", graphs_from=bundle.folder)


@pytest.mark.parametrize("part", ["configs", "tokenizer"])
def test_graphs_of_the_same_weights_in_another_model(
    portrait_folder: Path, bundle: PortraitBundle, tmp_path: Path, part: str
) -> None:
    folder = Path(shutil.copytree(portrait_folder, tmp_path / "checkpoint"))
    document = json.loads((folder / DOCUMENT).read_text())
    if part == "configs":
        document["gpt"]["rope_base"] = 5000
    else:
        own = Path(shutil.copytree(folder / document["tokenizer"], folder / "own_tokenizer"))
        (own / "added_tokens.json").write_text("{}")
        document["tokenizer"] = own.name
    (folder / DOCUMENT).write_text(json.dumps(document))
    other = PortraitCheckpoint.open(folder)
    with pytest.raises(InputError, match=rf"can't be reused: it has another checkpoint \({part}\)"):
        export_portrait(other, tmp_path / "portrait", graphs_from=bundle.folder)
    assert not (tmp_path / "portrait").exists()


@pytest.fixture
def instant_portrait(bundle: PortraitBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the portrait take their graphs from the bundle."""
    from proteus_deploy.export.onnx_graph import ExportedGraph

    def take(graph: Any, table: Any, network: Any, destination: Path, **_: Any) -> ExportedGraph:
        shutil.copyfile(bundle.onnx_file(graph.name), destination)
        record = bundle.document["graphs"][graph.name]
        return ExportedGraph((destination.name,), record["opset"], record["operators"], 0)

    monkeypatch.setattr(portrait_onnx, "export_graph", take)


@pytest.fixture
def exported_words(
    portrait_folder: Path, parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The command that exports one graph of the video's and the portrait."""
    from proteus_deploy import bundle as video_bundle
    from proteus_deploy.export import export
    from proteus_deploy.stage_table import build_stage_table

    def build_one(*given: Any) -> StageTable:
        table = build_stage_table(*given)
        return replace(table, graphs=(table.graph("identity_schedule"),))

    monkeypatch.setattr(video_bundle, "_GRAPHS_OF", {"proteus": ()})
    monkeypatch.setattr(export, "build_stage_table", build_one)
    words = ["export", str(parity / "checkpoint"), "--output-dir", str(tmp_path / "bundle")]
    return [*words, "--reference", "none", "--portrait", str(portrait_folder)]


@pytest.mark.usefixtures("instant_portrait")
def test_a_bundle_takes_the_portrait_along(
    exported_words: list[str],
    bundle: PortraitBundle,
    checkpoint: PortraitCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "bundle"
    assert main(exported_words) == 0
    assert f"{folder / 'portrait'} draws portraits from text" in capsys.readouterr().out
    opened = Bundle.open(folder)
    assert opened.portrait == folder / "portrait"
    assert opened.manifest["portrait"] == {"hash": checkpoint.hash}
    assert {name for name in opened.manifest["files"] if name.startswith("portrait/")} == {
        "portrait/portrait.json",
        *(f"portrait/{name}" for name in bundle.document["files"]),
    }
    assert isinstance(open_painter(folder / "portrait"), OnnxPainter)

    def no_trace(*_: Any, **__: Any) -> None:
        raise AssertionError("a graph was traced again")

    monkeypatch.setattr(portrait_onnx, "export_graph", no_trace)
    hashed: list[Path] = []

    def hash_noted(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    for module in ("_files", "portrait.checkpoint", "export.portrait_onnx"):
        monkeypatch.setattr(f"proteus_deploy.{module}.sha256_of", hash_noted)
    again = [*exported_words, "--graphs-from", str(folder), "--overwrite"]
    assert main(again) == 0
    once = folder / "portrait/onnx/decoder.onnx", checkpoint.gpt_file
    assert [hashed.count(file) for file in once] == [1, 1]
    assert Bundle.open(folder).hash == opened.hash

    (folder / "portrait/onnx/decoder.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"portrait/onnx/decoder\.onnx has 0 bytes"):
        Bundle.open(folder)


def test_a_portrait_is_checked_before_any_work(
    exported_words: list[str], portrait_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_head = tmp_path / "checkpoint"
    shutil.copytree(portrait_folder, by_head)
    document = json.loads((by_head / DOCUMENT).read_text())
    document["cache"]["scope"] = "head"
    (by_head / DOCUMENT).write_text(json.dumps(document))
    assert main([*exported_words[:-1], str(by_head)]) == 2
    assert "the scope 'head' can't be exported" in capsys.readouterr().err
    assert main([*exported_words[:-1], str(tmp_path)]) == 2
    assert "has no portrait.json" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_verify_of_a_bundle_takes_its_portrait_in(
    parity_bundle: Path, bundle: PortraitBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Bundle.open(parity_bundle).portrait is None
    folder = Path(shutil.copytree(parity_bundle, tmp_path / "bundle"))
    shutil.copytree(bundle.folder, folder / "portrait")
    document = {**Bundle.open(parity_bundle).manifest, "portrait": {"hash": ""}}
    write_manifest(folder, document)
    files = ["--markdown", str(tmp_path / "report.md")]
    assert main(["verify", str(folder), *files]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "portrait decoder" in line]
    assert len(lines) == 1
    assert " ok " in lines[0]
    assert "- portrait choices: of mean cosine" in (tmp_path / "report.md").read_text()

    budget = tmp_path / "budget.json"
    budget.write_text(json.dumps({"graph": 0.5, "portrait decoder": 1e-3}))
    report = verify_bundle(Bundle.open(folder), ["onnxruntime"], budget=budget)
    bounds = {row.check: row.tolerance for row in report.rows}
    assert bounds["denoiser"] == bounds["portrait condition"] == bounds["portrait text_encoder"] == 0.5
    assert (bounds["portrait vq_decoder"], bounds["portrait decoder"]) == (0.5, 1e-3)
    assert bounds["portrait choices"] == TOLERANCES_OF["portrait choices"].bound
    assert report.reasons["portrait decoder"] == "from budget.json"
    budget.write_text(json.dumps({"portrait encoder": 1e-3}))
    with pytest.raises(InputError, match=r"'portrait encoder' is not a check; known are .*portrait decoder"):
        verify_bundle(Bundle.open(folder), ["onnxruntime"], budget=budget)
