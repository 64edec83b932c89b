"""Stages as callables: the named inputs of the contract, with the derivable ones filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proteus_deploy.adapters.inputs import ADAPTER_INPUTS, idle_adapters
from proteus_deploy.errors import InputError
from proteus_deploy.model.config import TransformerConfig
from proteus_deploy.model.control_config import RESIDUAL
from proteus_deploy.model.transformer import rotary_tables
from proteus_deploy.runtime.backend import ONE_FOR_ALL, bind_sizes
from proteus_deploy.stages import Graph, TensorSpec
from proteus_deploy.vae_decode import Tiling, decode

if TYPE_CHECKING:
    from proteus_deploy.runtime.backend import Backend


class Stage:
    """One stage on a backend: `stage(**named_inputs) -> named outputs`; shapes are the graph's contract."""

    def __init__(self, name: str, backend: Backend) -> None:
        self.name = name
        self.backend = backend

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(spec.name for spec in self.backend.table.graph(self.name).inputs)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Floating point inputs are cast to the stage's precision and moved to its device.

        Raises InputError when names, types, shapes or whole numbers break the contract.
        """
        _check_tensors(self.name, inputs)
        graph = self.backend.table.graph(self.name)
        if self.backend.checks_ranges:
            self.backend.table.check(bind_sizes(graph, inputs))
        _check_whole_numbers(graph, inputs)
        return self.backend.runner(self.name)(**_cast(graph_dtypes(graph), inputs, self.backend))


class StepStage(Stage):
    """A network of every step: the rotary tables, from the latents' shape, are filled in when they are not
    passed."""

    def __init__(self, name: str, backend: Backend, config: TransformerConfig) -> None:
        super().__init__(name, backend)
        self._config = config
        self._tables: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        _check_tensors(self.name, inputs)
        if "rotary_cos" in self.inputs and "rotary_cos" not in inputs:
            if "latents" not in inputs or inputs["latents"].ndim != 5:
                raise InputError(f"{self.name}: latents [B, F, C, h, w] are needed to make the rotary tables")
            cos, sin = self._rotary(inputs["latents"])
            inputs = {**inputs, "rotary_cos": cos, "rotary_sin": sin}
        return super().__call__(**inputs)

    def _rotary(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        backbone = self._config.backbone
        _, frames, _, height, width = latents.shape
        grid = (
            frames // (backbone.patch_size_t or 1),
            height // backbone.patch_size,
            width // backbone.patch_size,
        )
        if grid not in self._tables:
            cos, sin = rotary_tables(backbone, *grid)
            self._tables[grid] = cos.to(self.backend.device), sin.to(self.backend.device)
        return self._tables[grid]


class DenoiserStage(StepStage):
    """latents, text, timestep, face_tokens -> velocity.

    The gate (default: the checkpoint's `local_face_scale`) and the rotary tables are filled in when they are
    not passed; so are adapters and residuals of a control network that change nothing, where the graph must
    have some.
    """

    def __init__(self, backend: Backend, config: TransformerConfig) -> None:
        super().__init__("denoiser", backend, config)
        self._zeros: Tensor | None = None

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        _check_tensors(self.name, inputs)
        inputs = dict(inputs)
        inputs.setdefault("identity_gate", torch.tensor([self._config.identity_attention.scale]))
        graph = self.backend.table.graph("denoiser")
        needed = [spec.name for spec in graph.inputs if not spec.optional]
        first = ADAPTER_INPUTS[0]
        if first in needed and first not in inputs:
            inputs |= idle_adapters(graph, self.backend.dtype, self.backend.device)
        latents = inputs.get("latents", torch.empty(1))
        residuals = [name for name in needed if name.startswith(RESIDUAL) and name not in inputs]
        if residuals and latents.ndim == 5:
            zeros = self._no_control(graph.input(residuals[0]), latents)
            inputs |= dict.fromkeys(residuals, zeros)
        rows = latents.shape[0] if latents.ndim else 1
        for name in ONE_FOR_ALL:
            value = inputs.get(name)
            if value is None or value.shape[:1] != (1,):
                continue
            axes = graph.input(name).axes
            if axes[0] == "B" and value.ndim == len(axes):
                inputs[name] = value.expand(rows, *[-1] * (value.ndim - 1))
        return super().__call__(**inputs)

    def _no_control(self, spec: TensorSpec, latents: Tensor) -> Tensor:
        """A residual that changes nothing: one for all blocks, kept for the next step."""
        rows, frames, _, height, width = latents.shape
        patch = self._config.backbone.patch_size
        shape = spec.shape({"B": rows, "f": frames, "y": height // patch, "x": width // patch})
        if self._zeros is None or self._zeros.shape != shape:
            self._zeros = torch.zeros(shape, dtype=self.backend.dtype, device=self.backend.device)
        return self._zeros


class VaeDecoderStage(Stage):
    """latents [1, C, F, h, w], divided by the scaling factor -> frames [1, 3, F', 8h, 8w]."""

    def __init__(self, backend: Backend, tiling: Tiling | None) -> None:
        super().__init__("vae_decoder", backend)
        self.tiling = tiling

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("latents",)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        if set(inputs) != {"latents"}:
            raise InputError(f"vae_decoder takes 'latents'; got {', '.join(map(repr, sorted(inputs)))}")
        _check_tensors(self.name, inputs)
        if inputs["latents"].ndim != 5:
            raise InputError(
                f"vae_decoder: input 'latents' has shape {list(inputs['latents'].shape)}; "
                "the contract is [1, C, F, h, w]"
            )
        latents = inputs["latents"].to(self.backend.device, self.backend.dtype)
        return {"frames": decode(self.backend, latents, tiling=self.tiling)}


class UnknownStage(InputError, KeyError):
    """A stage was asked for that the checkpoint or bundle hasn't."""

    __str__ = Exception.__str__  # KeyError's own shows the message in quotes


class Stages(dict[str, Stage]):
    """Stages by name; one may be replaced by a callable of the same contract. Raises UnknownStage."""

    def __missing__(self, name: str) -> Stage:
        raise UnknownStage(f"there is no stage {name!r}; the stages are {', '.join(self)}")


def stages_of(backend: Backend, config: TransformerConfig, tiling: Tiling | None) -> Stages:
    """Every stage of the backend's table, by name."""
    special: Mapping[str, Stage] = {
        "controlnet": StepStage("controlnet", backend, config),
        "denoiser": DenoiserStage(backend, config),
        "vae_decoder": VaeDecoderStage(backend, tiling),
    }
    return Stages({name: special.get(name) or Stage(name, backend) for name in backend.table.stages})


def _check_tensors(stage: str, inputs: Mapping[str, object]) -> None:
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{stage}: input {name!r} is a {type(value).__module__}.{type(value).__name__}; "
                "stages take torch tensors: use torch.as_tensor"
            )


def _check_whole_numbers(graph: Graph, inputs: Mapping[str, Tensor]) -> None:
    """Token ids and timesteps index tables: beyond their ends there is a crash or another row."""
    for spec in graph.inputs:
        value = inputs.get(spec.name)
        if not spec.high or value is None or not value.numel():
            continue
        lowest, highest = (int(bound) for bound in value.to(torch.int64).aminmax())
        if lowest < 0 or highest >= spec.high:
            raise InputError(
                f"{graph.name}: input {spec.name!r} holds {lowest if lowest < 0 else highest}; "
                f"it must be 0 to {spec.high - 1}"
            )


def graph_dtypes(graph: Graph) -> dict[str, str]:
    """{input: "float" | "float32" | "int64"}."""
    return {spec.name: spec.dtype for spec in graph.inputs}


def _cast(dtypes: Mapping[str, str], inputs: Mapping[str, Tensor], backend: Backend) -> dict[str, Tensor]:
    targets = {"float": backend.dtype, "float32": torch.float32, "int64": torch.int64}
    return {
        name: value.to(backend.device, targets[dtypes[name]]) if name in dtypes else value
        for name, value in inputs.items()
    }
