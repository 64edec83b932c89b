"""diffusers' CogVideoX schedulers behind one step function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from proteus_deploy.errors import InputError
from proteus_deploy.policies.reuse import Levels

if TYPE_CHECKING:
    from torch import Generator, Tensor

_CLASSES = {"dpm": "CogVideoXDPMScheduler", "ddim": "CogVideoXDDIMScheduler"}


class Stepper:
    """A schedule of timesteps and the update from one to the next.

    Holds what DPM-Solver++ remembers between steps; make a new one for every video.
    """

    def __init__(self, config: Mapping[str, Any], name: str | None, steps: int) -> None:
        """config: scheduler_config.json; name: "dpm", "ddim" or None for the config's own class."""
        import diffusers

        class_name = _CLASSES[name] if name is not None else config["_class_name"]
        if steps > config["num_train_timesteps"]:
            raise InputError(
                f"num_inference_steps is {steps}; the schedule has {config['num_train_timesteps']} timesteps"
            )
        self._scheduler = getattr(diffusers, class_name).from_config(dict(config))
        self._scheduler.set_timesteps(steps)
        self._remembers = class_name == _CLASSES["dpm"]
        self._previous: Tensor | None = None
        self.timesteps: Tensor = self._scheduler.timesteps.cpu()

    @property
    def remembered(self) -> Tensor | None:
        """What the next step needs of the last one (DPM-Solver++'s clean prediction), to go on elsewhere."""
        return self._previous

    def recall(self, remembered: Tensor | None) -> None:
        """Go on where another stepper of the same schedule was."""
        self._previous = remembered

    @property
    def init_noise_sigma(self) -> float:
        return float(self._scheduler.init_noise_sigma)

    def scale_input(self, latents: Tensor, index: int) -> Tensor:
        return self._scheduler.scale_model_input(latents, self.timesteps[index])  # type: ignore[no-any-return]

    def levels(self, index: int) -> Levels:
        """How much signal and how much noise the latents before step `index` hold."""
        signal = float(self._scheduler.alphas_cumprod[int(self.timesteps[index])])
        return Levels(signal**0.5, (1 - signal) ** 0.5)

    def step(self, velocity: Tensor, index: int, latents: Tensor, generators: list[Generator]) -> Tensor:
        """latents after step `index`. Random numbers come from `generators`, one per video."""
        timestep = self.timesteps[index]
        generator = generators[0] if len(generators) == 1 else generators
        if not self._remembers:
            updated = self._scheduler.step(
                velocity, timestep, latents, generator=generator, return_dict=False
            )
            return cast("Tensor", updated[0])
        before = self.timesteps[index - 1] if index else None
        latents, self._previous = self._scheduler.step(
            velocity, self._previous, timestep, before, latents, generator=generator, return_dict=False
        )
        return latents
