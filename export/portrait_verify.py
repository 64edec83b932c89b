"""Is a portrait bundle still the model? What PyTorch computed for one caption, against ONNX Runtime.

The decoder is told the recorded tokens and the recorded positions to give up, so that each step starts where
PyTorch's did: two positions whose redundancies differ in the last bit may go in either order, and from then
on two runs have little in common. What the graph would have given up by itself is compared apart, in the
measure that the rule itself goes by.

Axes: T steps, K steps whose logits are kept, L layers, P positions of a condition, V codes; two sequences,
the caption's and that of none.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proteus_deploy.errors import BundleError
from proteus_deploy.export.verify import Row
from proteus_deploy.portrait.captions import CaptionEncoder
from proteus_deploy.portrait.decoding import Decoding
from proteus_deploy.portrait.gpt import Gpt
from proteus_deploy.portrait.onnx_bundle import GRAPHS, PortraitBundle
from proteus_deploy.portrait.plan import CachePlan, CacheSettings
from proteus_deploy.portrait.sampling import Sampling, draw_token, guide
from proteus_deploy.portrait.vq import VqModel
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.testing import TOLERANCES, Tolerance, error_order, relative_error

if TYPE_CHECKING:
    from proteus_deploy.portrait.onnx_painter import OnnxDecoding

__all__ = ["GRAPH_CHECKS", "TOLERANCES_OF", "record_reference", "verify_portrait"]

_CAPTION = "a portrait of a woman with brown hair who smiles"
_SAMPLING = Sampling(guidance_scale=2.0, top_k=0, seed=7)
_LEAST_STEPS = 64
_LEAST_CHOICES = 32  # of each layer and sequence, once the cache is full
_PADDING = 3  # positions at least that the recorded caption leaves empty
_KEPT = 32  # first and last steps whose logits are recorded; all of an image would take gigabytes

_GRAPH = TOLERANCES["bundle", "graph", "fp32"]
GRAPH_CHECKS = tuple(f"portrait {graph}" for graph in GRAPHS)
TOLERANCES_OF: Mapping[str, Tolerance] = {
    **dict.fromkeys(GRAPH_CHECKS, _GRAPH),
    "portrait choices": TOLERANCES["portrait", "choice"],
}


def record_reference(
    folder: Path,
    gpt: Gpt,
    vq: VqModel,
    captions: CaptionEncoder,
    settings: CacheSettings,
    plan: CachePlan,
    report: Report = no_report,
) -> None:
    """Write `reference.safetensors`: one caption through PyTorch, as far as a full cache has made choices.

    ids int64 [1, N] and features float32 [1, P, W] of the caption, valid int64 [1, P], embeddings float32
    [2, P, C], tokens int64 [T - 1], logits float32 [K, 2, V] of the steps in `kept` (int64 [K]), given_up
    int64 [T, L, 2] (-1 while there was room, and for padding), pixels float32 [1, 3, H, W] of the tokens,
    over and over.
    """
    from safetensors.torch import save_file

    config = gpt.config
    caption = _long_caption(captions, config.cls_token_num)
    features, valid = captions([caption])
    decoding = Decoding(gpt, settings, features, valid, guided=True, trim=False)
    choices = plan.slots - config.cls_token_num + 1 + int((~valid).sum())  # the step of the first one
    steps = min(config.block_size, max(_LEAST_STEPS, choices + _LEAST_CHOICES))
    kept = [step for step in range(steps) if step < _KEPT or step >= steps - _KEPT]
    generators = [torch.Generator().manual_seed(_SAMPLING.seed)]
    logits, tokens, given_up = [decoding.prefill()], [], [_none_given_up(config.n_layer)]
    for step in range(1, steps):
        guided = guide(logits[-1], _SAMPLING.guidance_scale)
        tokens.append(draw_token(guided, _SAMPLING, generators))
        before = _positions(decoding)
        logits.append(decoding.step(tokens[-1]))
        # The sum of the positions is missing what went (padding's number is -1), and has what came.
        came = decoding.cache.seen - 1
        full = decoding.cache.rule is not None and before.shape[-1] == plan.slots
        gone = before.sum(dim=-1) + came - _positions(decoding).sum(dim=-1)
        given_up.append(gone.unflatten(0, (config.n_layer, 2)) if full else _none_given_up(config.n_layer))
        report("reference of the portrait", step + 1, steps)
    embeddings = gpt.embed_condition(torch.cat([features, gpt.empty_condition(features)]))
    drawn = torch.cat(tokens)
    with torch.no_grad():
        pixels = vq.decode(_whole(drawn, config.block_size))
    found = {
        "ids": captions.ids(caption),
        "features": features,
        "valid": valid.long(),
        "embeddings": embeddings,
        "tokens": drawn,
        "kept": torch.tensor(kept),
        "logits": torch.stack([logits[step] for step in kept]),
        "given_up": torch.stack(given_up),
        "pixels": pixels,
    }
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "reference.safetensors")


def verify_portrait(
    folder: str | Path,
    *,
    tolerances: Mapping[str, Tolerance] = TOLERANCES_OF,
    hashes: bool = True,
    report: Report = no_report,
) -> tuple[Row, ...]:
    """Compare every graph of a portrait bundle on ONNX Runtime with the recorded reference.

    tolerances: one for each check of `TOLERANCES_OF`.
    hashes: False leaves the sha256 of its files out, where they were checked already.
    Raises BundleError for a damaged bundle; figures outside their bounds are rows, not errors.
    """
    from proteus_deploy.portrait.onnx_painter import OnnxPainter

    bundle = PortraitBundle.open(folder, hashes=hashes)
    painter, reference = OnnxPainter(bundle), _load(bundle.reference)
    tokens, features = reference["tokens"], reference["features"]
    steps = len(tokens) + 1
    text = painter.captions.encode(reference["ids"])
    embeddings = painter.run("condition", features=features.numpy())["embeddings"]
    codes = _whole(tokens, bundle.gpt.block_size)
    pixels = painter.run("vq_decoder", codes=codes.numpy())["pixels"]
    single = {
        "text_encoder": (text, features[:, -text.shape[1] :]),
        "condition": (embeddings, reference["embeddings"]),
        "vq_decoder": (pixels, reference["pixels"]),
    }
    rows = [
        _row(f"portrait {name}", relative_error(got, want), tolerances, f"{list(want.shape)}")
        for name, (got, want) in single.items()
    ]
    decoding = painter.start(features, reference["valid"] != 0, guided=True)
    return (*rows, *_verify_steps(decoding, reference, steps, tolerances, report))


def _verify_steps(
    decoding: OnnxDecoding,
    reference: Mapping[str, Tensor],
    steps: int,
    tolerances: Mapping[str, Tolerance],
    report: Report,
) -> list[Row]:
    wanted = dict(zip(reference["kept"].tolist(), reference["logits"], strict=True))
    given_up, tokens = reference["given_up"], reference["tokens"]
    errors: dict[int, float] = {}
    margins, same, choices = [0.0], 0, 0
    for step in range(steps):
        told = given_up[step]
        logits = (
            decoding.step(tokens[step - 1 : step], told.numpy() if decoding.chooses else None)
            if step
            else decoding.prefill()
        )
        if step in wanted:
            errors[step] = relative_error(logits, wanted[step])
        if decoding.chooses:
            own = torch.from_numpy(decoding.value("given_up"))
            same, choices = same + int((own == told)[told >= 0].sum()), choices + int((told >= 0).sum())
            margins.append(float(decoding.value("margin").max()))
            if bool(((own >= 0) != (told >= 0)).any()):
                margins.append(float("nan"))  # one of the two had room, and the other none
        report("verify the portrait", step + 1, steps)
    worst = max(errors, key=lambda step: error_order(errors[step]))
    detail = f"worst of {len(errors)} steps: step {worst + 1}"
    rows = [_row("portrait decoder", errors[worst], tolerances, detail)]
    margin = max(margins, key=error_order)
    if choices or margin != 0:  # NaN, too: where the graph chose, and PyTorch gave up padding
        detail = f"{same} of {choices} the same"
        rows.append(_row("portrait choices", margin, tolerances, detail))
    elif decoding.chooses:
        tolerance = tolerances["portrait choices"]
        detail = "an image gives up less than the padding of the recorded caption"
        rows.append(
            Row("onnxruntime", "portrait choices", None, tolerance.bound, "not run", tolerance.kind, detail)
        )
    return rows


def _long_caption(captions: CaptionEncoder, positions: int) -> str:
    """Words that fill the condition but for a few positions: both padding and other things are given up."""
    text, words = "", cycle(_CAPTION.split())
    while captions.ids(longer := f"{text} {next(words)}").shape[1] <= positions - _PADDING:
        text = longer
    return text


def _row(check: str, error: float, tolerances: Mapping[str, Tolerance], detail: str) -> Row:
    tolerance = tolerances[check]
    # NaN compares false with everything, so it fails here.
    status = "ok" if error <= tolerance.bound else "failed"
    return Row("onnxruntime", check, error, tolerance.bound, status, tolerance.kind, detail)  # type: ignore[arg-type]


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file} can't be read ({error}); export the portrait again") from error


def _positions(decoding: Decoding) -> Tensor:
    """int64 [L 2, slots in use]."""
    return decoding.cache.positions[:, 0, : decoding.cache.filled].clone()


def _none_given_up(layers: int) -> Tensor:
    return torch.full((layers, 2), -1)


def _whole(tokens: Tensor, count: int) -> Tensor:
    """[1, count]: the tokens over and over, as many as an image has."""
    return tokens[torch.arange(count) % len(tokens)].unsqueeze(0)
