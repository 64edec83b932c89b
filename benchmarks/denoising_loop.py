"""The loop that `bench` times: identity in, final latents out, in the published form or in ours.

    published   MIF and TAII run again in every step, as the authors' transformer does, and identity attention
                keeps its form
    exact       MIF once, TAII once for all timesteps, identity attention folded: the same result
    a plan      like exact, with the policies of a plan

Prompt and identity features are given: text encoder and image tower are stages with times of their own.
Axes: B videos of one person, F latent frames, C latent channels, h and w latent pixels, L text tokens,
P identity-prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.denoising import StepCondition, StepResult, denoising_steps
from proteus_deploy.errors import ComputationError
from proteus_deploy.model.identity_fusion import combine_text_and_identity
from proteus_deploy.policies.plan_run import PlanRun
from proteus_deploy.schedulers import Stepper
from proteus_deploy.stage_calls import Stages, stages_of
from proteus_deploy.stage_table import VAE_SPATIAL, latent_frames, sample_size

if TYPE_CHECKING:
    from proteus_deploy.model.config import TransformerConfig
    from proteus_deploy.policies.plan import Plan
    from proteus_deploy.runtime.backend import Backend

__all__ = ["LoopInputs", "VideoSize", "run_loop"]


@dataclass(frozen=True)
class VideoSize:
    """Frames and pixels of a video."""

    num_frames: int
    height: int
    width: int

    @classmethod
    def of(cls, config: TransformerConfig) -> VideoSize:
        """The size that a checkpoint was made for."""
        _, height, width = sample_size(config.backbone)
        return cls(config.backbone.sample_frames, VAE_SPATIAL * height, VAE_SPATIAL * width)


@dataclass(frozen=True, eq=False)
class LoopInputs:
    """Made from a seed, float32 on the CPU, the same for every candidate.

    identity: what the identity stages take beside text and timesteps. identity_text [1, P, d_text]; None for
    checkpoints without MIF. text [2B, L, d_text], image [2B, F, C, h, w], noise [B, F, C, h, w].
    """

    identity: Mapping[str, Tensor]
    identity_text: Tensor | None
    text: Tensor
    image: Tensor
    noise: Tensor

    @property
    def rows(self) -> int:
        """Of the denoiser under guidance: 2B."""
        return len(self.text)

    @classmethod
    def make(
        cls,
        config: TransformerConfig,
        size: VideoSize,
        *,
        image_tokens: int,
        videos: int = 1,
        seed: int = 0,
    ) -> LoopInputs:
        """Random features of plausible scale for so many videos of that size."""
        backbone, generator = config.backbone, torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        identity = {f"hidden_{index}": normal(1, image_tokens, config.image_dim) for index in range(5)}
        identity["id_cond"] = normal(1, 1, config.identity_dim)
        fusion = config.fusion
        frames = latent_frames(size.num_frames, backbone)
        grid = (frames, backbone.latent_channels, size.height // VAE_SPATIAL, size.width // VAE_SPATIAL)
        image = torch.zeros(videos, *grid)
        image[:, 0] = normal(videos, *grid[1:])
        return cls(
            identity,
            None if fusion is None else normal(1, fusion.queries, fusion.width),
            normal(2 * videos, backbone.max_text_seq_length, backbone.text_embed_dim),
            torch.cat((image, image)),
            normal(videos, *grid),
        )


def run_loop(
    config: TransformerConfig,
    scheduler: Mapping[str, Any],
    backend: Backend,
    inputs: LoopInputs,
    *,
    steps: int,
    plan: Plan | None = None,
    guidance_scale: float = 6.0,
    published: bool = False,
    on_step: Callable[[StepResult], None] | None = None,
) -> Tensor:
    """Final latents [B, F, C, h, w] float32 on the CPU, under guidance.

    scheduler: what scheduler_config.json holds.
    published: repeat the identity stages in every step.
    """
    stages = stages_of(backend, config, None)
    stepper = Stepper(scheduler, None, steps)
    make: type[_Exact] = _Published if published else _Exact
    condition: StepCondition = make(stages, config, inputs, stepper.timesteps)
    policy = PlanRun(plan, stepper.timesteps.tolist(), guided=True)
    latents = (inputs.noise * stepper.init_noise_sigma).to(backend.device, backend.dtype)
    with torch.inference_mode():
        for done in denoising_steps(
            stages["denoiser"], condition, stepper, policy, latents, lambda *_: guidance_scale
        ):
            latents = done.latents
            if not done.finite:
                raise ComputationError(
                    f"the latents hold NaN or infinity after step {done.index + 1}, on backend "
                    f"{backend.name!r} in {backend.dtype}"
                )
            if on_step is not None:
                on_step(done)
        return latents.float().cpu()


class _Exact:
    """What doesn't depend on the step is computed when the condition is made."""

    def __init__(
        self, stages: Stages, config: TransformerConfig, inputs: LoopInputs, timesteps: Tensor
    ) -> None:
        device, dtype = stages["denoiser"].backend.device, stages["denoiser"].backend.dtype
        self._stages, self._inputs, self.timesteps = stages, inputs, timesteps
        self.gate = torch.tensor([config.identity_attention.scale])
        self.image = inputs.image.to(device, dtype)
        self._prompt = inputs.text.to(device, dtype)
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(inputs.noise))]
        with torch.inference_mode():
            self._prepare()

    def _prepare(self) -> None:
        self._text, fused = self._fuse()
        self._tokens = self._schedule(fused, self.timesteps)

    @property
    def text(self) -> Tensor:
        """Of the denoiser, [2B, L, d_text]."""
        return self._text

    def face_tokens(self, index: int, rows: int) -> Tensor:  # noqa: ARG002 - one identity serves all rows
        return self._tokens[index : index + 1]

    def side(self, index: int, timestep: int) -> Hashable:  # noqa: ARG002 - as the loop asks
        """Nothing is asked for besides."""
        return ()

    def side_inputs(self, index: int, timestep: int, latents: Tensor) -> Mapping[str, Tensor]:  # noqa: ARG002 - as the loop asks
        """None: a bundle with room for some idles."""
        return {}

    def _fuse(self) -> tuple[Tensor, Tensor | None]:
        """(text of the denoiser, fused tokens): MIF."""
        if self._inputs.identity_text is None:
            return self._prompt, None
        fused = self._stages["identity_fusion"](
            identity_text=self._inputs.identity_text, **self._inputs.identity
        )["fused"]
        mask = torch.ones(self._prompt.shape[:2], dtype=torch.int64, device=self._prompt.device)
        return combine_text_and_identity(self._prompt, mask, fused), fused

    def _schedule(self, fused: Tensor | None, timesteps: Tensor) -> Tensor:
        """Face tokens [T, Q, d_face] of these timesteps: TAII."""
        stage = self._stages["identity_schedule"]
        known = {**self._inputs.identity, "timesteps": timesteps}
        if fused is not None:
            known["fused"] = fused
        wanted = {name: known[name] for name in stage.inputs if name != "timesteps"}
        most = stage.backend.table.axes["T"].max
        return torch.cat([stage(timesteps=part, **wanted)["face_tokens"] for part in timesteps.split(most)])


class _Published(_Exact):
    """MIF and TAII with every step, for that step."""

    def _prepare(self) -> None:
        self._fused: Tensor | None = None

    @property
    def text(self) -> Tensor:
        """MIF, once more: a step asks for the text once, before the face tokens."""
        text, self._fused = self._fuse()
        return text

    def face_tokens(self, index: int, rows: int) -> Tensor:  # noqa: ARG002 - one identity serves all rows
        return self._schedule(self._fused, self.timesteps[index : index + 1])
