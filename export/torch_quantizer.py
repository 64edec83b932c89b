"""A recipe for PyTorch: the networks of a checkpoint with quantised layers, eager or compiled.

    quantizer = TorchQuantizer(Recipe.load("int8"), ActivationStatistics.load(folder))
    pipeline = Pipeline.from_checkpoint(checkpoint, quantize=quantizer)

Weights are read, and quantised, one at a time, from the checkpoint's own numbers: the same codes that an
exported graph of the recipe holds. What stays high is as the recipe says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.export.input_scaling import InputScaling, scale_inputs
from proteus_deploy.export.quantize import (
    OPERANDS,
    GraphPlan,
    LayerPlan,
    is_folded,
    plan_module,
    require_statistics,
)
from proteus_deploy.export.quantized_linear import (
    FoldedLinear,
    Fp8Linear,
    Int8Linear,
    QuantizedLinear,
    SimulatedAttention,
    SimulatedLinear,
    TimestepGroups,
    WeightOnlyLinear,
)
from proteus_deploy.export.recipe import Recipe
from proteus_deploy.export.weight_quantizers import quantise_weight
from proteus_deploy.model.config import TRAIN_TIMESTEPS
from proteus_deploy.model.networks import parameter_dtype

if TYPE_CHECKING:
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.model.networks import Network

__all__ = ["TorchQuantizer"]

_FP8_CAPABILITY = (8, 9)
# Their weights are used without a call of the module, which a replacement of it would not see.
_USED_DIRECTLY = ("patch_embed.proj",)


class TorchQuantizer:
    """Puts a recipe's layers into networks before their weights are read.

    simulate: products of 8-bit codes are computed with the numbers that the codes stand for, in the
    precision of the layer. Without it, they are products of the codes, and what has none on a device is
    refused. Weights without quantised activations are dequantised at every call, either way.
    """

    def __init__(
        self, recipe: Recipe, statistics: ActivationStatistics | None = None, *, simulate: bool = False
    ) -> None:
        """Raises InputError where the recipe needs statistics and there are none."""
        require_statistics(recipe, statistics)
        self.recipe, self.statistics, self.simulate = recipe, statistics, simulate
        self.name = f"{recipe.name}-simulated" if simulate else recipe.name

    @property
    def hash(self) -> str:
        """sha256 (hex) of all that decides the results."""
        statistics = "" if self.statistics is None else self.statistics.hash
        return hashlib.sha256(f"{self.recipe.hash} {statistics} {self.simulate}".encode()).hexdigest()

    def check_runs_on(self, device: torch.device) -> None:
        """Raises BackendError that names the layers and the format which this device has no products of."""
        if self.simulate:
            return
        for graph, rules in self.recipe.graphs.items():
            for rule in rules.rules:
                if rule.activation == "fp8_e4m3" and not _multiplies_fp8(device):
                    raise BackendError(
                        f"recipe {self.recipe.name!r}: {graph}/{rule.layers} multiplies fp8_e4m3 codes, "
                        "which PyTorch does on CUDA devices from sm89 on, and the device is "
                        f"{_words(device)}; simulate it (simulate=True, --simulate), or take another recipe"
                    )
            for attention in rules.attention:
                if attention.format == "none":
                    continue
                raise BackendError(
                    f"recipe {self.recipe.name!r}: PyTorch has no attention of {attention.format} codes "
                    f"with fixed scales for {graph}/{attention.layers}; simulate it "
                    "(simulate=True, --simulate), or take recipe 'fp8' with the attention 'triton-fp8'"
                )

    def __call__(self, graph: str, network: Network, dtype: torch.dtype, device: torch.device) -> None:
        """Replace layers of `network`, whose weights aren't read yet, in place.

        dtype: of the network. Raises InputError where rules or statistics don't fit it, BackendError where
        the device has no product of a layer's sizes.
        """
        if graph not in self.recipe.graphs:
            return
        plan = plan_module(self.recipe, graph, network.module)

        def read(layer: str) -> Tensor:
            return network.source.tensor(network.key_of(f"{layer}.weight")).float()

        scalings = scale_inputs(plan, read, self.statistics, dtype=dtype)
        groups = self._timestep_groups(network.module, scalings, device)
        for layer in plan.quantised:
            replacement = self._layer(layer, network, scalings[layer.leader], dtype, device, groups)
            network.module.set_submodule(layer.name, replacement)
        self._quantise_attention(plan, network.module)

    def _layer(
        self,
        layer: LayerPlan,
        network: Network,
        scaling: InputScaling,
        dtype: torch.dtype,
        device: torch.device,
        groups: TimestepGroups | None,
    ) -> QuantizedLinear:
        rule, name = layer.rule, f"{layer.name}.weight"
        assert rule is not None
        assert rule.weight != "none"
        if layer.name in _USED_DIRECTLY:
            raise InputError(
                f"recipe {self.recipe.name!r}: {layer.name} is no layer that PyTorch calls; let the recipe "
                "keep it"
            )
        linear = network.module.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        own = parameter_dtype(name, linear.weight, dtype)
        weight = network.source.tensor(network.key_of(name)).float()
        if scaling.multiplier is not None:
            weight = weight / scaling.multiplier
        codes = quantise_weight(
            weight, rule.weight, rule.granularity, rule.block_size, scale_dtype=own, name=name
        )
        return self._form(layer)(
            codes,
            scaling,
            bias=linear.bias,
            dtype=own,
            device=device,
            groups=groups if scaling.factors is not None else None,
        )

    def _form(self, layer: LayerPlan) -> type[QuantizedLinear]:
        rule = layer.rule
        assert rule is not None
        if is_folded(layer.name):
            return FoldedLinear
        if rule.activation == "none":
            return WeightOnlyLinear
        if self.simulate:
            return SimulatedLinear
        return {"int8": Int8Linear, "fp8_e4m3": Fp8Linear}[rule.activation]

    def _timestep_groups(
        self, module: nn.Module, scalings: Mapping[str, InputScaling], device: torch.device
    ) -> TimestepGroups | None:
        """Put before the denoiser's table of timesteps; None where no input is scaled by timestep."""
        if all(scaling.factors is None for scaling in scalings.values()):
            return None
        assert self.statistics is not None
        starts = torch.tensor(self.statistics.groups)
        table = torch.bucketize(torch.arange(TRAIN_TIMESTEPS), starts, right=True) - 1
        groups = TimestepGroups(module.get_submodule("time_table"), table.to(device))
        module.set_submodule("time_table", groups)
        return groups

    def _quantise_attention(self, plan: GraphPlan, module: nn.Module) -> None:
        from proteus_deploy.model.transformer import JointAttention

        for attention in plan.attention:
            if attention.format is None:
                continue
            assert self.statistics is not None
            query, key, value = (
                float(self.statistics.amax(f"{plan.graph}/{attention.name}.{operand}").max())
                for operand in OPERANDS
            )
            part = module.get_submodule(attention.name)
            assert isinstance(part, JointAttention)
            part.attention = SimulatedAttention((query, key, value))


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def _words(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} (sm{major}{minor})"
