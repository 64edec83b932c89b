"""Request -> video: the chain of stages and the denoising loop.

The same chain runs on every backend. Axes: B videos, 2B rows under guidance (negative prompts first),
F latent frames, C latent channels, h and w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, Never, Self

import torch
from torch import Tensor

from proteus_deploy.adapters.inputs import check_adapters
from proteus_deploy.bundle import Bundle
from proteus_deploy.cached_stages import CachedStages
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.conditioning import Condition, Conditioner
from proteus_deploy.denoising import denoising_steps
from proteus_deploy.errors import Cancelled, ComputationError, InputError
from proteus_deploy.guidance import guidance_scale
from proteus_deploy.model.config import TransformerConfig
from proteus_deploy.policies.plan_run import PlanRun
from proteus_deploy.policies.reuse import Prediction, keep
from proteus_deploy.request import GenerateRequest, request_digest, resolve_request
from proteus_deploy.runtime import open_bundle_backend
from proteus_deploy.runtime.backend import Backend, Quantizer, refits, resolve_dtype, short_dtype
from proteus_deploy.schedulers import Stepper
from proteus_deploy.size_ranges import check_ranges
from proteus_deploy.stage_cache import StageCache
from proteus_deploy.stage_calls import Stages, stages_of
from proteus_deploy.stage_table import VAE_SPATIAL, latent_frames
from proteus_deploy.vae_decode import Tiling, chunks, decode
from proteus_deploy.video import Video

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.identity.encoder import IdentityEncoder
    from proteus_deploy.identity.features import IdentityFeatures
    from proteus_deploy.request import Photo

__all__ = ["SHARED_IN_BATCH", "GenerateRequest", "LoopStart", "Pipeline", "ProgressEvent", "StepEvent"]

# Fields in which the requests of one batch must agree.
SHARED_IN_BATCH = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "use_dynamic_cfg",
    "dynamic_cfg",
    "scheduler",
    "max_sequence_length",
    "identity_scale",
    "plan",
)

Phase = Literal["identity", "text", "schedule", "denoise", "decode"]


@dataclass(frozen=True, eq=False)
class StepEvent:
    """After one denoising step: index 0..total-1, its timestep, latents [B, F, C, h, w] and wall seconds.

    computed: False where the request's plan let the step reuse an earlier one.
    prediction: what the step began with, and the velocities before guidance.
    All tensors are copies: they stay as they are, and changing them changes nothing in the run.
    """

    index: int
    total: int
    timestep: int
    latents: Tensor
    seconds: float
    computed: bool = True
    prediction: Prediction | None = None


@dataclass(frozen=True)
class ProgressEvent:
    """`done` of `total` parts of a phase are finished."""

    phase: Phase
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class LoopStart:
    """What a denoising loop begins with: resolved requests of one batch, and noise [B, F, C, h, w].

    stepper and condition remember where a loop is: each start is for one loop. vae_scale: latents are divided
    by it before they are decoded.
    """

    requests: list[GenerateRequest]
    config: TransformerConfig
    vae_scale: float
    stepper: Stepper
    condition: Condition
    latents: Tensor

    @property
    def request(self) -> GenerateRequest:
        """The first, with which the others agree in what a batch shares."""
        return self.requests[0]


class Pipeline:
    """Stages bound to a backend; a context manager. Opened with `from_checkpoint` or `from_bundle`."""

    def __init__(
        self,
        backend: Backend,
        config: TransformerConfig,
        vae: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        tokenizer: Path,
        face_encoder: Path | None,
        *,
        vae_tiling: bool | Tiling = False,
        low_memory: bool = False,
        cache: StageCache | None = None,
        weights: Callable[[], str] | None = None,
        base: Callable[[], str] | None = None,
        controlnet: Callable[[], str | None] | None = None,
    ) -> None:
        """low_memory: networks are loaded for their part of a request and released after it, so that no more
        than the denoiser (and the network of a control video) is there of the stages while it runs; every
        request loads (and compiles) them again.
        cache: None, or where results of text and identity stages are kept (stage_cache.py); weights() is then
        the hash of the weights, by which it tells networks apart.
        base: the hash of the checkpoint, by which adapters know theirs; None takes all that fit.
        controlnet: the hash of the control network, for the metadata of videos that it had a part in.
        """
        self.backend = backend
        self.config = config
        if not isinstance(vae_tiling, bool | Tiling):
            raise InputError(
                f"vae_tiling is {vae_tiling!r}; it must be True, False or a Tiling(height, width)"
            )
        self.tiling = Tiling.for_vae(dict(vae)) if vae_tiling is True else (vae_tiling or None)
        self.stages: Stages = stages_of(backend, config, self.tiling)
        self._vae = vae
        self._scheduler = scheduler
        self._low_memory = low_memory
        self._base = base
        self._controlnet = controlnet
        if cache is not None and weights is None:
            raise InputError(
                "cache is given and weights isn't; use from_checkpoint or from_bundle, which know them, or "
                "pass weights=lambda: their hash"
            )
        cached = CachedStages(self.stages, backend, cache, weights or str)
        self._conditioner = Conditioner(self.stages, backend, config, vae, tokenizer, face_encoder, cached)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        compiled: bool = False,
        frozen: bool = False,
        attention: str = "torch",
        vae_tiling: bool | Tiling = False,
        low_memory: bool = False,
        cache: StageCache | None = None,
        quantize: Quantizer | None = None,
        controlnet: str | Path | None = None,
    ) -> Pipeline:
        """The PyTorch reference on a checkpoint folder. Weights are read on first use of each stage.

        dtype: None for float32, or bfloat16 where a compiled pipeline runs on a CPU with AMX.
        compiled: through torch.compile, identity attention in its folded form. frozen: with it on a CPU,
        weights are laid out for the processor, once more for each size, but for the text encoder's.
        attention: of the denoiser, a name of `kernels.joint_attention.attention_with`.
        low_memory: see `Pipeline`.
        cache: keeps results of text and identity stages across requests; its first use hashes the folder.
        quantize: a recipe's layers, `export.torch_quantizer.TorchQuantizer` (docs/quantize-torch.md).
        controlnet: folder of a control network, for requests with a control video (docs/control.md).
        Raises CheckpointError, BackendError or InputError.
        """
        from proteus_deploy.runtime.eager import EagerBackend, default_dtype

        if frozen and low_memory:
            raise InputError(
                "low_memory releases networks within each request, and frozen ones would be compiled again "
                "for the next; leave one of the two out"
            )
        checkpoint = Checkpoint.open(folder, controlnet=controlnet)
        precision = default_dtype(device, compiled=compiled) if dtype is None else resolve_dtype(dtype)
        backend = EagerBackend(
            checkpoint,
            dtype=precision,
            device=device,
            compiled=compiled,
            frozen=frozen,
            folded=compiled,
            attention=attention,
            quantize=quantize,
        )
        return cls(
            backend,
            checkpoint.transformer,
            checkpoint.vae,
            checkpoint.scheduler,
            checkpoint.tokenizer,
            checkpoint.face_encoder,
            vae_tiling=vae_tiling,
            low_memory=low_memory,
            cache=cache,
            weights=lambda: checkpoint.hash + ("" if quantize is None else f" {quantize.hash}"),
            base=lambda: checkpoint.hash,
            controlnet=lambda: checkpoint.controlnet_hash,
        )

    @classmethod
    def from_bundle(
        cls,
        folder: str | Path | Bundle,
        *,
        backend: str | Backend = "onnxruntime",
        device: str | torch.device | None = None,
        vae_tiling: bool | Tiling = False,
        low_memory: bool = False,
        cache: StageCache | None = None,
    ) -> Pipeline:
        """An exported bundle on the named backend: onnxruntime, openvino or tensorrt.

        backend: or an opened backend of this bundle, whose device is then its own.
        low_memory: see `Pipeline`. cache: keeps results of text and identity stages across requests.
        Raises BundleError or BackendError. No other backend is tried in its place.
        """
        bundle = folder if isinstance(folder, Bundle) else Bundle.open(folder)
        faces = bundle.folder / "face_encoder"
        name = str(device) if isinstance(device, torch.device) else device
        return cls(
            open_bundle_backend(bundle, backend, device=name) if isinstance(backend, str) else backend,
            bundle.transformer,
            bundle.config("vae"),
            bundle.config("scheduler"),
            bundle.folder / "tokenizer",
            faces if faces.is_dir() else None,
            vae_tiling=vae_tiling,
            low_memory=low_memory,
            cache=cache,
            weights=lambda: bundle.hash,
            base=lambda: str(bundle.manifest["checkpoint"]["hash"]),
            controlnet=lambda: bundle.controlnet_hash,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release every network."""
        self.backend.close()

    @property
    def identity_encoder(self) -> IdentityEncoder:
        """Photo -> IdentityFeatures and condition image, on this pipeline's stages."""
        return self._conditioner.identity_encoder

    @torch.inference_mode()
    def encode_photo(
        self, photo: Photo, *, face_index: int | None = None
    ) -> tuple[IdentityFeatures, NDArray[np.uint8]]:
        """Features and condition image, [H, W, 3] uint8, of the person in a photo.

        A pipeline with a cache keeps them, so that requests with the same picture find them. Raises
        PhotoError, InputError.
        """
        found = self._conditioner.read_photo(photo, face_index)
        self._make_room_for()
        return found

    def generate(
        self,
        request: GenerateRequest,
        *,
        initial_latents: Tensor | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        on_progress: Callable[[ProgressEvent], None] | None = None,
        cancel: Event | None = None,
    ) -> Video:
        """One video.

        initial_latents: [1, F, C, h, w] noise in place of the seed's own.
        cancel: looked at between phases, between steps and between VAE chunks and tiles.
        Raises InputError for a bad request, PhotoError for the photo, Cancelled when `cancel` was set,
        ComputationError when the latents stop being finite.
        """
        videos = self.generate_batch(
            [request],
            initial_latents=initial_latents,
            on_step=on_step,
            on_progress=on_progress,
            cancel=cancel,
        )
        return videos[0]

    @torch.inference_mode()
    def generate_batch(
        self,
        requests: Sequence[GenerateRequest],
        *,
        initial_latents: Tensor | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        on_progress: Callable[[ProgressEvent], None] | None = None,
        cancel: Event | None = None,
    ) -> list[Video]:
        """Several videos of one size in one batch, each with its own prompts, photo and seed.

        The requests must agree in size, frames, steps, guidance, scheduler and plan. Each video is the one
        that `generate` gives for its request, up to rounding. initial_latents: [B, F, C, h, w].
        """
        if isinstance(requests, GenerateRequest) or not isinstance(requests, Sequence):
            raise InputError(
                f"generate_batch was given a {type(requests).__name__}; pass a list of GenerateRequest, "
                "or one request to generate()"
            )
        watch = _Watch(on_progress, cancel)
        start = self._start(requests, watch, initial_latents)
        resolved, shared, stepper, condition = start.requests, start.request, start.stepper, start.condition
        policy = PlanRun(shared.plan, stepper.timesteps.tolist(), guided=shared.guided)
        latents, total = start.latents, len(stepper.timesteps)
        self._make_room_for("denoiser", *(("controlnet",) if condition.control is not None else ()))
        watch.check()
        for done in denoising_steps(
            self.stages["denoiser"], condition, stepper, policy, latents, partial(guidance_scale, shared)
        ):
            latents = done.latents
            if not done.finite:
                self._refuse_broken_latents(done.index, total)
            if on_step is not None:
                with torch.inference_mode(False):
                    copy, prediction = latents.clone(), policy.prediction().copy()
                on_step(
                    StepEvent(done.index, total, done.timestep, copy, done.seconds, done.computed, prediction)
                )
            watch("denoise", done.index + 1, total)
        steps = policy.record()
        self._make_room_for("vae_decoder")
        videos = [self._finish(one, row, steps, watch) for one, row in zip(resolved, latents, strict=True)]
        self._make_room_for()
        return videos

    def start(self, request: GenerateRequest, *, initial_latents: Tensor | None = None) -> LoopStart:
        """Everything that a denoising loop of one video begins with, for who runs the loop; no gradients.

        Raises InputError, PhotoError.
        """
        with torch.no_grad():
            return self._start([request], _Watch(None, None), initial_latents)

    def _start(
        self, requests: Sequence[GenerateRequest], watch: _Watch, initial_latents: Tensor | None
    ) -> LoopStart:
        resolved = self._checked(requests)
        shared = resolved[0]
        watch.check()
        stepper = Stepper(self._scheduler, shared.scheduler, shared.num_inference_steps)
        condition = self._conditioner.prepare(resolved, stepper.timesteps, watch)
        latents = self._initial_latents(resolved, condition.generators, initial_latents)
        latents = latents * stepper.init_noise_sigma
        scale = float(self._vae["scaling_factor"])
        return LoopStart(resolved, self.config, scale, stepper, condition, latents)

    def check(self, request: GenerateRequest) -> GenerateRequest:
        """The request with every field filled in, before any work; raises InputError as `generate` would.

        Its photo isn't opened.
        """
        return self._checked([request], warn=False)[0]

    def _checked(self, requests: Sequence[GenerateRequest], *, warn: bool = True) -> list[GenerateRequest]:
        resolved = [resolve_request(request, self.config, warn=warn) for request in requests]
        shared = _common_settings(resolved)
        if self.backend.checks_ranges:
            check_ranges(shared, len(resolved), self.backend.table, self.config.backbone)
        for request in resolved:
            self._check_adapters(request)
            if request.control is not None and "controlnet" not in self.stages:
                raise InputError(
                    "control was given, and there is no control network here; open the checkpoint with "
                    "controlnet=FOLDER, or export the bundle with --controlnet FOLDER"
                )
        return resolved

    @torch.inference_mode()
    def preview(self, event: StepEvent, row: int = 0) -> NDArray[np.uint8]:
        """One frame, [H, W, 3] uint8, of what video `row` of the batch is going to be, as a step sees it.

        The step's velocity gives the clean latents it points to, a x - s v; the decoder's first chunk of
        them is drawn, two latent frames or three. Raises InputError for an event without a prediction, and
        where `low_memory` keeps the decoder out of memory during the loop.
        """
        if event.prediction is None or self._low_memory:
            why = (
                "the pipeline was opened with low_memory"
                if self._low_memory
                else "the event has no prediction"
            )
            raise InputError(f"a step can't be previewed: {why}")
        step = event.prediction
        clean = keep("clean", step.positive[row], step.latents[row], step.levels)
        clean = clean[: chunks(clean.shape[0])[0][1]]  # with a graph that the video needs anyway
        latents = clean.to(self.backend.device, self.backend.dtype).transpose(0, 1)[None]
        frames = decode(self.backend, latents / self._vae["scaling_factor"], tiling=self.tiling)
        picture = (frames[0, :, -1] / 2 + 0.5).clamp(0, 1) * 255
        return picture.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()

    def _make_room_for(self, *stages: str) -> None:
        """Release the networks of every other stage, where memory is short."""
        if self._low_memory:
            for graph in self.backend.table.graphs:
                if graph.stage not in stages:
                    self.backend.release(graph.name)

    def _check_adapters(self, request: GenerateRequest) -> None:
        check_adapters(
            request.adapters, self.backend.table, self.config.backbone, merged=refits(self.backend)
        )
        for use in request.adapters:
            if use.adapter.base is not None and self._base is not None:
                use.adapter.check_base(self._base())

    def _refuse_broken_latents(self, index: int, total: int) -> Never:
        raise ComputationError(
            f"the latents hold NaN or infinity after step {index + 1} of {total}, on backend "
            f"{self.backend.name!r} in {short_dtype(self.backend.dtype)}; use bf16 or fp32 where this is "
            "fp16, else check the weights with: proteus-deploy verify"
        )

    def _finish(
        self, request: GenerateRequest, latents: Tensor, steps: dict[str, list[int]], watch: _Watch
    ) -> Video:
        frames = self._decode(latents, request, watch)
        metadata = {"request": request_digest(request), "seed": request.seed, "backend": self.backend.name}
        metadata["dtype"] = short_dtype(self.backend.dtype)
        if request.plan is not None:
            metadata["steps"] = steps
        if request.control is not None and self._controlnet is not None:
            metadata["controlnet"] = self._controlnet()
        return Video(frames, request.fps, metadata)

    def _decode(self, latents: Tensor, request: GenerateRequest, watch: _Watch) -> Tensor:
        """[F, C, h, w] -> frames [1, F', 3, H, W] float32 in [0, 1]."""
        step = self.config.backbone.temporal_compression_ratio
        padding = latents.shape[0] - ((request.num_frames or 0) - 1) // step - 1
        # Frames that only pad to a whole temporal patch (CogVideoX 1.5) stand in front.
        kept = latents[padding:].transpose(0, 1)[None] / self._vae["scaling_factor"]
        watch.check()
        frames = decode(
            self.backend, kept, tiling=self.tiling, on_part=lambda done, total: watch("decode", done, total)
        )
        with torch.inference_mode(False):  # the caller gets a tensor that can be changed and trained on
            return (frames / 2 + 0.5).clamp(0, 1).transpose(1, 2).contiguous()

    def _initial_latents(
        self, requests: Sequence[GenerateRequest], generators: list[torch.Generator], given: Tensor | None
    ) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        shared, backbone = requests[0], self.config.backbone
        shape = (
            len(requests),
            latent_frames(shared.num_frames or 0, backbone),
            backbone.latent_channels,
            (shared.height or 0) // VAE_SPATIAL,
            (shared.width or 0) // VAE_SPATIAL,
        )
        if given is None:
            one_or_all = generators[0] if len(generators) == 1 else generators
            device, dtype = self.backend.device, self.backend.dtype
            noise: Tensor = randn_tensor(shape, generator=one_or_all, device=device, dtype=dtype)
            return noise
        if not isinstance(given, Tensor):
            raise InputError(
                f"initial_latents are a {type(given).__module__}.{type(given).__name__}; "
                "pass a torch tensor: use torch.as_tensor"
            )
        if tuple(given.shape) != shape:
            raise InputError(
                f"initial_latents have shape {list(given.shape)}; this request needs {list(shape)}"
            )
        return given.to(self.backend.device, self.backend.dtype)


class _Watch:
    """Reports progress and raises Cancelled at the next boundary after `cancel` was set."""

    def __init__(self, report: Callable[[ProgressEvent], None] | None, cancel: Event | None) -> None:
        self._report = report
        self._cancel = cancel

    def check(self) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("cancelled by the caller")

    def __call__(self, phase: Phase, done: int, total: int) -> None:
        if self._report is not None:
            self._report(ProgressEvent(phase, done, total))
        if phase != "decode" or done < total:  # a finished video is handed over
            self.check()


def _common_settings(requests: Sequence[GenerateRequest]) -> GenerateRequest:
    """The first request, after checking that all agree in what a batch shares."""
    if not requests:
        raise InputError("no requests were given; pass at least one")
    for name in SHARED_IN_BATCH:
        values = {getattr(request, name) for request in requests}
        if len(values) > 1:
            raise InputError(f"requests in one batch must agree in {name}; found {sorted(map(str, values))}")
    cache = requests[0].plan.step_cache if requests[0].plan is not None else None
    if cache is not None and cache.needs_latents and len(requests) > 1:
        raise InputError(
            f"the plan's {cache.kind} chooses steps by a video's own latents, so {len(requests)} videos "
            "can't share its choice; make them one by one, or choose a cache that is calibrated beforehand"
        )
    return requests[0]
