"""Checkpoint -> networks: each graph's module with the weight files it is filled from, checked as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.model.control import ControlEncoder, ControlNetwork
from proteus_deploy.model.networks import (
    Kernels,
    Network,
    TextEncoder,
    VaeDecoderChunk,
    VaeEncoder,
    cache_layout,
    transformer_networks,
    vae_on_meta,
)
from proteus_deploy.weights import RandomWeights, WeightSource, check_keys

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint


def _same(name: str) -> str:
    return name


class NetworkFactory:
    """Builds the networks of an opened checkpoint. Weight files are checked as a whole, once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        folded: bool = False,
        kernels: Kernels = "reference",
        attention: str = "torch",
    ) -> None:
        self.checkpoint = checkpoint
        self.folded = folded
        self.kernels: Kernels = kernels
        self.attention = attention
        self._transformer: WeightSource | None = None
        self._vae: WeightSource | None = None
        self._text: WeightSource | None = None
        self._control: WeightSource | None = None

    def __call__(self, graph: str) -> Network:
        """The network of one graph of the stage table."""
        if graph in ("identity_fusion", "identity_schedule", "denoiser"):
            controlnet = self.checkpoint.controlnet
            modules = transformer_networks(
                self.checkpoint.transformer,
                folded=self.folded,
                kernels=self.kernels,
                attention=self.attention,
                control_blocks=0 if controlnet is None else len(controlnet.config.residuals),
            )
            if self._transformer is None:
                self._transformer = self._checked("transformer", _shapes(modules.values(), _same))
            return Network(modules[graph], "transformer", _same, self._transformer)
        if graph in ("control_encoder", "controlnet"):
            return self._control_network(graph)
        if graph == "text_encoder":
            return self._text_network()
        if graph.startswith("vae_"):
            return self._vae_network(graph)
        return self._face_network(graph)

    def _checked(self, component: str, expected: Mapping[str, tuple[int, ...]]) -> WeightSource:
        return self._source(expected, lambda: self.checkpoint.weights(component))

    def _source(
        self, expected: Mapping[str, tuple[int, ...]], stored: Callable[[], WeightSource]
    ) -> WeightSource:
        seed = self.checkpoint.random_weights_seed
        if seed is not None:
            return RandomWeights(expected, seed=seed)
        store = stored()
        check_keys(expected, store)
        return store

    def _control_network(self, graph: str) -> Network:
        controlnet = self.checkpoint.controlnet
        if controlnet is None:
            raise InputError(
                f"graph {graph!r} is a control network's, and this checkpoint was opened without one"
            )
        with torch.device("meta"):
            modules = {
                "control_encoder": ControlEncoder(controlnet.config),
                "controlnet": ControlNetwork(controlnet.config),
            }
        if self._control is None:
            expected = _shapes(modules.values(), _same)
            self._control = self._source(expected, controlnet.weights)
        return Network(modules[graph], "controlnet", _same, self._control)

    def _vae_network(self, graph: str) -> Network:
        config = self.checkpoint.vae
        vae = vae_on_meta(config)
        if self._vae is None:
            self._vae = self._checked("vae", _shapes((vae,), _same))
        if graph == "vae_encoder":
            return Network(VaeEncoder(vae), "vae", _same, self._vae)
        paths = tuple(path for path, _ in cache_layout(vae, config["latent_channels"]))
        chunk = VaeDecoderChunk(vae, paths, first=graph != "vae_decoder_next")
        return Network(chunk, "vae", _same, self._vae)

    def _text_network(self) -> Network:
        with torch.device("meta"):
            module = TextEncoder(self.checkpoint.text_encoder)
        expected = _shapes((module,), _t5_key)
        if self._text is None:
            self._text = self._source(expected, lambda: _T5Weights(self.checkpoint.weights("text_encoder")))
        return Network(module, "text_encoder", _t5_key, self._text)

    def _face_network(self, graph: str) -> Network:
        from proteus_deploy.identity.networks import face_network

        return face_network(self.checkpoint, graph)


def _shapes(modules: Any, key_of: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    return {
        key_of(name): tuple(value.shape) for module in modules for name, value in module.state_dict().items()
    }


def _t5_key(name: str) -> str:
    """Published files hold the embedding once, as `shared`; the module names it twice."""
    key = name.removeprefix("t5.")
    return "shared.weight" if key == "encoder.embed_tokens.weight" else key


class _T5Weights:
    """T5 files hold the tied embedding under one of two names, or both."""

    _TIED = ("shared.weight", "encoder.embed_tokens.weight")

    def __init__(self, store: WeightSource) -> None:
        self.source = store.source
        self._store = store
        present = [key for key in store.keys() if key in self._TIED]  # noqa: SIM118 - a protocol, not a dict
        self._stored_as = present[0] if present else self._TIED[0]

    def keys(self) -> Iterator[str]:
        own = (key for key in self._store.keys() if key not in self._TIED)  # noqa: SIM118 - a protocol, not a dict
        yield from own
        yield self._TIED[0]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._store.shape(self._stored_as if key == self._TIED[0] else key)

    def tensor(self, key: str) -> Tensor:
        return self._store.tensor(self._stored_as if key == self._TIED[0] else key)
