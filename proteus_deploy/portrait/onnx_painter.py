"""A portrait bundle on ONNX Runtime: captions to pictures. PyTorch only draws the tokens.

Axes: B images, n new positions, P positions of the condition, C width, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError
from proteus_deploy.onnxruntime_session import device_name, find_provider, open_session
from proteus_deploy.portrait.captions import CaptionEncoder
from proteus_deploy.portrait.onnx_bundle import PortraitBundle
from proteus_deploy.portrait.painter import TokenPainter, check_captions, to_pictures
from proteus_deploy.portrait.plan import CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.stages import Graph, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["OnnxDecoding", "OnnxPainter"]

_NEXT = "next_"  # what an output that becomes an input is called


class OnnxPainter(TokenPainter):
    """Draws with the cache that the bundle was exported with; see `Painter`.

    device: cpu or cuda. threads: of ONNX Runtime for one operator; None leaves that to it.
    Graphs are loaded on first use. Raises BackendError where ONNX Runtime or the device is absent.
    """

    def __init__(self, bundle: PortraitBundle, *, device: str = "cpu", threads: int | None = None) -> None:
        self.bundle = bundle
        self.sampling, self.cache = bundle.sampling, bundle.cache
        self.device = device_name(device)
        self._graphs = _Graphs(bundle, find_provider(device), threads)
        self.captions: CaptionEncoder = _GraphCaptions(self._graphs)

    @classmethod
    def open(
        cls, folder: str | Path, *, device: str = "cpu", threads: int | None = None, hashes: bool = True
    ) -> OnnxPainter:
        """Open a folder that holds a portrait bundle. Raises BundleError naming the file at fault.

        hashes: False leaves the sha256 out, for files that were checked already.
        """
        return cls(PortraitBundle.open(folder, hashes=hashes), device=device, threads=threads)

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
        """As `draw`, the pictures' code numbers int64 [B, tokens]."""
        import torch

        from proteus_deploy.portrait.decoding import choose_seeds, run_decoding

        check_captions(captions)
        if cache is not None and cache != self.cache:
            raise InputError(
                f"cache is {cache}, but the graph in {self.bundle.folder} was made for {self.cache}; leave "
                "it out, or export the checkpoint again with that cache"
            )
        sampling = sampling or self.sampling
        seeds = choose_seeds(sampling, len(captions), seeds)
        features, valid = self.captions(captions)
        most, total = self.bundle.table.axes["B"].max, self.bundle.gpt.block_size
        starts = range(0, len(captions), most)
        drawn = []
        for done, start in enumerate(starts):
            some = slice(start, start + most)
            decoding = self.start(features[some], valid[some], guided=sampling.guidance_scale > 1)

            def say(phase: str, count: int, _: int, before: int = done * total) -> None:
                report(phase, before + count, len(starts) * total)

            drawn.append(run_decoding(decoding, sampling, seeds[some], total, report=say, cancel=cancel))
        return torch.cat(drawn)

    def start(self, features: Tensor, valid: Tensor, *, guided: bool) -> OnnxDecoding:
        """Decoding from features [B, P, W] and which of the positions hold something, bool [B, P]."""
        embeddings = self.run("condition", features=features.numpy())["embeddings"]
        return OnnxDecoding(
            self._graphs.session("decoder"),
            self.bundle.table.graph("decoder"),
            embeddings,
            valid.long().numpy(),
            device=self.device,
            guided=guided,
        )

    def pictures(self, tokens: Tensor) -> list[NDArray[np.uint8]]:
        """Code numbers int64 [B, tokens] as pictures uint8 [H, W, 3]."""
        import torch

        most = self.bundle.table.axes["B"].max
        decoded = [self.run("vq_decoder", codes=some.numpy())["pixels"] for some in tokens.split(most)]
        return [picture for some in decoded for picture in to_pictures(torch.from_numpy(some))]

    def run(self, graph: str, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Named arrays through a graph of the bundle."""
        return self._graphs.run(graph, inputs)


class OnnxDecoding:
    """Decoding position by position; see `decoding.Steps` and `step_module.DecodeStep`.

    embeddings: float32 [2 B, P, C] of the condition. valid: int64 [B, P]. The graph always computes both
    halves of guidance; without `guided` the second is dropped.

    seen: positions that came in. chooses: whether the graph gives up positions.
    """

    def __init__(
        self,
        session: Any,
        graph: Graph,
        embeddings: NDArray[np.float32],
        valid: NDArray[np.int64],
        *,
        device: str,
        guided: bool,
    ) -> None:
        self.seen = 0
        self._session, self._graph, self._device, self._guided = session, graph, device, guided
        self._embeddings, self._valid = embeddings, valid
        self.chooses = any(spec.name == "give_up" for spec in graph.inputs)
        self._outputs: dict[str, Any] = {
            spec.name: _ort_value(_empty(spec.name.removeprefix(_NEXT), spec, len(valid)), device)
            for spec in graph.outputs
            if spec.name.startswith(_NEXT)
        }

    def prefill(self) -> Tensor:
        """Logits [2 B or B, V] of the first token."""
        import numpy as np

        nothing = np.zeros(self._valid.shape, np.int64)
        return self._run(nothing, self._embeddings, None)

    def step(self, tokens: Tensor, give_up: NDArray[np.int64] | None = None) -> Tensor:
        """Take in tokens int64 [B]; logits [2 B or B, V] of the next ones.

        give_up: int64 [layers, 2 B], positions that go in place of those that the rule names.
        """
        nothing = self._embeddings[:, :1] * 0
        return self._run(tokens.unsqueeze(1).numpy(), nothing, give_up)

    def value(self, output: str) -> NDArray[Any]:
        """An output of the last step, or of the state before the first one."""
        found: NDArray[Any] = self._outputs[output].numpy()
        return found

    def _run(
        self, tokens: NDArray[np.int64], embeddings: NDArray[np.float32], give_up: NDArray[np.int64] | None
    ) -> Tensor:
        import numpy as np
        import torch

        feeds: dict[str, NDArray[Any]] = {
            "tokens": tokens,
            "embeddings": embeddings,
            "seen": np.array(self.seen),
            "valid": self._valid,
        }
        if self.chooses:
            spec = self._graph.input("give_up")
            feeds["give_up"] = _empty("give_up", spec, len(tokens)) if give_up is None else give_up
        values = {name: _ort_value(array, "cpu") for name, array in feeds.items()}
        values |= {
            name.removeprefix(_NEXT): value for name, value in self._outputs.items() if name.startswith(_NEXT)
        }
        self._outputs = self._bound(values)
        self.seen += tokens.shape[1]
        logits = torch.from_numpy(self.value("logits"))
        return logits if self._guided else logits[: len(tokens)]

    def _bound(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One run in which the cache stays where it is: only logits and choices come to the host."""
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        names = [spec.name for spec in self._graph.outputs]
        for name in names:
            binding.bind_output(name, self._device if name.startswith(_NEXT) else "cpu")
        self._session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))


class _Graphs:
    """A bundle's graphs on ONNX Runtime, loaded on first use.

    Painter and captions share them and don't know each other, so the sessions go when the painter does.
    """

    def __init__(self, bundle: PortraitBundle, provider: str, threads: int | None) -> None:
        self.bundle, self._provider, self._threads = bundle, provider, threads
        self._sessions: dict[str, Any] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [spec.name for spec in self.bundle.table.graph(graph).outputs]
        return dict(zip(names, self.session(graph).run(names, inputs), strict=True))

    def session(self, graph: str) -> Any:
        """Raises BackendError with ONNX Runtime's reason where it can't load the graph."""
        if graph not in self._sessions:
            file = self.bundle.onnx_file(graph)
            self._sessions[graph] = open_session(file, self._provider, self._threads)
        return self._sessions[graph]


class _GraphCaptions(CaptionEncoder):
    """The bundle's text encoder."""

    def __init__(self, graphs: _Graphs) -> None:
        bundle = graphs.bundle
        super().__init__(
            bundle.folder, bundle.tokenizer, length=bundle.gpt.cls_token_num, width=bundle.gpt.caption_dim
        )
        self._graphs = graphs

    def encode(self, ids: Tensor) -> Tensor:
        import torch

        return torch.from_numpy(self._graphs.run("text_encoder", {"input_ids": ids.numpy()})["features"])


def _empty(name: str, spec: TensorSpec, images: int) -> NDArray[Any]:
    """A part of the state before the first step; see `step_module.state_names`."""
    import numpy as np

    if name in ("give_up", "positions"):
        return np.full(spec.shape({"B": images}), -1, np.int64)
    return np.zeros(spec.shape({"B": images}), np.float32)


def _ort_value(array: NDArray[Any], device: str) -> Any:
    import numpy as np
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device)
