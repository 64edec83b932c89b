"""Janus as a painter: transformers' model and published layout, our decoding loop, cache and sampling.

A caption becomes a user's turn of the checkpoint's own chat template, then the token that begins an image.
The language model writes image tokens through heads of their own (`generation_embeddings`,
`generation_aligner`, `generation_head`); guidance compares with a prompt that has padding for all but the
tokens of beginning, as in transformers' `generate(generation_mode="image")`.

Axes: B images of prompts of one length, 2 B sequences under guidance (those with the caption first), P prompt
positions, V codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import CheckpointError
from proteus_deploy.portrait.decoding import choose_seeds, run_decoding
from proteus_deploy.portrait.painter import TokenPainter, check_captions, to_pictures, weight_dtype
from proteus_deploy.portrait.plan import CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.weights import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["JanusDecoding", "JanusPainter", "is_janus"]

_USUAL_GUIDANCE = 5.0  # transformers' own, where generation_config.json names none


def is_janus(folder: str | Path) -> bool:
    """Whether a folder has a config.json that says so. Raises CheckpointError for one that can't be read."""
    file = Path(folder) / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "janus"


class JanusPainter(TokenPainter):
    """A Janus checkpoint in PyTorch, for drawing only; see `painter.Painter`.

    folder: as transformers publishes it: config.json, safetensors, tokenizer.json, a chat template.
    dtype: of language model and heads; the tokenizer of images stays in float32. sampling, cache: what is
    drawn with unless told otherwise, by default with the guidance of generation_config.json and all codes.

    Captions whose prompts have as many tokens are drawn side by side, others after them, so there is no
    padding and an image's cache doesn't depend on the images beside it.

    Raises CheckpointError naming what is missing or doesn't fit, InputError for another dtype. Nothing is
    downloaded.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        sampling: Sampling | None = None,
        cache: CacheSettings | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not is_janus(self.folder):
            raise CheckpointError(
                f"{self.folder} has no config.json of model_type janus; use a Janus checkpoint in "
                "transformers' layout"
            )
        self.tokenizer = _load_tokenizer(self.folder)
        self.model = _load_model(self.folder, dtype).to(device)
        guidance = self.model.generation_config.guidance_scale
        guidance = _USUAL_GUIDANCE if guidance is None else float(guidance)
        self.sampling = sampling or Sampling(guidance_scale=guidance, top_k=0)
        self.cache = cache or CacheSettings()
        self._telling = Lock()

    @property
    def grid_size(self) -> int:
        """Tokens of an image, across and down."""
        return int(self.model.config.vq_config.num_patches)

    def draw_tokens(
        self,
        captions: Sequence[str],
        *,
        sampling: Sampling | None = None,
        cache: CacheSettings | None = None,
        seeds: Sequence[int] | None = None,
        report: Report = no_report,
        cancel: Event | None = None,
    ) -> Tensor:
        """As `draw`, the pictures' code numbers int64 [number of captions, tokens]."""
        check_captions(captions)
        sampling, cache = sampling or self.sampling, cache or self.cache
        seeds = choose_seeds(sampling, len(captions), seeds)
        prompts = [self.prompt(caption) for caption in captions]
        by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        count = self.grid_size**2
        tokens = torch.zeros(len(captions), count, dtype=torch.int64, device=self.model.device)
        for group, rows in enumerate(by_length.values()):

            def report_all(phase: str, done: int, _: int, before: int = group * count) -> None:
                report(phase, before + done, len(by_length) * count)

            ids = torch.tensor([prompts[row] for row in rows], device=self.model.device)
            decoding = JanusDecoding(self, cache, ids, guided=sampling.guidance_scale > 1)
            with ExitStack() as stack:
                if cache.policy == "attention":  # the model's attention is set to another function meanwhile
                    stack.enter_context(self._telling)
                stack.enter_context(decoding.observing())
                tokens[rows] = run_decoding(
                    decoding,
                    sampling,
                    [seeds[row] for row in rows],
                    count,
                    report=report_all,
                    cancel=cancel,
                )
        return tokens

    def prompt(self, caption: str) -> list[int]:
        """Token ids of a caption's prompt, up to the one that begins an image."""
        turn = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
        text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids: list[int] = self.tokenizer(text + self.tokenizer.boi_token).input_ids
        return ids

    @torch.no_grad()
    def pictures(self, tokens: Tensor) -> list[NDArray[np.uint8]]:
        """Code numbers int64 [any, tokens] as pictures uint8 [H, W, 3], RGB."""
        vq = self.model.model.vqmodel
        return list(to_pictures(torch.cat([vq.decode(some) for some in tokens.split(16)])))


class JanusDecoding:
    """Decoding of prompts int64 [B, P], position by position: `decoding.Steps`.

    The whole prompt is the cache's prefix.
    """

    def __init__(self, painter: JanusPainter, cache: CacheSettings, prompts: Tensor, *, guided: bool) -> None:
        from proteus_deploy.portrait.transformers_cache import EvictingCache

        self._model, self._guided = painter.model, guided
        self._language = painter.model.model.language_model
        if guided:
            tokenizer = painter.tokenizer
            begins = (prompts == tokenizer.bos_token_id) | (
                prompts == tokenizer.convert_tokens_to_ids(tokenizer.boi_token)
            )
            prompts = torch.cat([prompts, prompts.where(begins, tokenizer.pad_token_id)])
        self._prompts = prompts
        grid = painter.grid_size
        plan = cache.plan(prompts.shape[1], grid**2, grid)
        self.cache = EvictingCache(plan, self._language.config)

    def observing(self) -> AbstractContextManager[None]:
        """Around all steps; only the policy "attention" needs it."""
        needed = self.cache.plan.policy == "attention"
        return self.cache.observing(self._language) if needed else nullcontext()

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Logits [2 B or B, V] of the first token."""
        return self._forward(self._language.get_input_embeddings()(self._prompts))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Take in tokens int64 [B]; logits [2 B or B, V] of the next ones."""
        tokens = torch.cat([tokens, tokens]) if self._guided else tokens
        return self._forward(self._model.prepare_embeddings_for_image_generation(tokens[:, None]))

    def _forward(self, embeddings: Tensor) -> Tensor:
        out = self._language(inputs_embeds=embeddings, past_key_values=self.cache, use_cache=True)
        logits: Tensor = self._model.model.generation_head(out.last_hidden_state[:, -1])
        return logits.float()


def _load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; download the whole folder")
    try:
        # Not AutoTokenizer: the published files name a class that would split text differently.
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # its parsers raise anything, a bare Exception included
        raise CheckpointError(
            f"{folder} has a tokenizer that can't be read ({type(error).__name__}: {str(error)[:200]}); "
            "download it again"
        ) from error
    if tokenizer.chat_template is None and (folder / "chat_template.json").is_file():
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{folder} has no chat template; copy chat_template.jinja into it")
    for name in ("bos_token", "pad_token", "boi_token"):
        if not isinstance(getattr(tokenizer, name, None), str):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'} has no {name}; Janus' prompts begin, are padded and end "
                "with bos_token, pad_token and boi_token"
            )
    return tokenizer


def _load_model(folder: Path, dtype: str) -> Any:
    from transformers import JanusForConditionalGeneration

    kind = weight_dtype(dtype)
    try:
        with _no_progress_bars():
            loaded: Any = JanusForConditionalGeneration.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",
                dtype="auto",
                output_loading_info=True,
            )
    except ImportError:  # a package is missing; the message of transformers says which
        raise
    except Exception as error:  # configuration, weights and safetensors have errors of their own
        raise CheckpointError(
            f"{folder} can't be read as a Janus model ({type(error).__name__}: {str(error)[:300]}); a file "
            "in it is damaged or missing: download the folder again"
        ) from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:8])}; is it another network?")
    config = model.config
    if config.vision_config.num_image_tokens != config.vq_config.num_patches**2:
        raise CheckpointError(
            f"{folder / 'config.json'}: an image has {config.vision_config.num_image_tokens} tokens "
            f"(num_image_tokens), but {config.vq_config.num_patches} x {config.vq_config.num_patches} patches"
        )
    # What reads pictures is of no use here.
    del model.model.vision_model, model.model.aligner, model.model.vqmodel.encoder
    for name, weight in model.named_parameters():  # buffers, which hold angles, stay in float32
        weight.data = weight.data.to(torch.float32 if name.startswith("model.vqmodel.") else kind)
    return model.requires_grad_(False).eval()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as library_logging

    logging: Any = library_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
