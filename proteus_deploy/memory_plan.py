"""Peak memory of a request, predicted from a bundle's graphs: each stage, and each way of keeping networks.

Nothing is run. Weights are counted by their type, activations by walking each graph at the request's sizes
(graph_memory.py). What a runtime adds is an assumption, which the plan names; docs/inspect.md says how far
predictions were from measured peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError
from proteus_deploy.graph_memory import Fusion, GraphMemory, graph_memory
from proteus_deploy.onnx_shapes import read_model
from proteus_deploy.stage_table import VAE_SPATIAL, latent_frames, sample_size
from proteus_deploy.vae_decode import Tiling, chunks, output_frames

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.model.config import BackboneConfig
    from proteus_deploy.stages import Graph, StageTable

_FLOAT32 = 4
_BEFORE, _DENOISE, _DECODE = "before the loop", "denoising", "decoding"


@dataclass(frozen=True)
class Runtime:
    """What a backend does with memory: assumptions.

    embedded: bytes taken for a byte of weights inside the ONNX file; external: for one in the file beside it.
    activations: bytes taken for a byte that has to be there at one time. on_host: video and networks share
    one memory. streams: weights can stay in host memory. text: the assumptions as sentences.
    """

    fusion: Fusion
    embedded: float
    external: float
    activations: float
    on_host: bool
    streams: bool
    text: str


RUNTIMES: Mapping[str, Runtime] = {
    "onnxruntime": Runtime(
        Fusion(),
        embedded=3.0,
        external=1.05,
        activations=2.5,
        on_host=True,
        streams=False,
        text="attention writes its scores; quantised weights are dequantised for each call; weights inside a "
        "graph's file are held 3 times, those beside it 1.05 times; the arena takes 2.5 bytes for each byte "
        "of activations in use (factors found by measuring, see docs/inspect.md)",
    ),
    "eager": Runtime(
        Fusion(attention=True),
        embedded=1.25,
        external=1.25,
        activations=2.0,
        on_host=True,
        streams=False,
        text="a lower bound: attention is fused and writes no scores, weights take 1.25 bytes a byte and "
        "activations 2; PyTorch's own packages and the workspace of its convolutions come on top, and "
        "measured peaks of the VAE were several times higher (see docs/inspect.md)",
    ),
    "tensorrt": Runtime(
        Fusion(attention=True, dequantize=True),
        embedded=1.0,
        external=1.0,
        activations=1.0,
        on_host=False,
        streams=True,
        text="attention and Q/DQ are fused; everything else is written once, no workspace; with weight "
        "streaming the two largest weights are on the GPU; not measured: no GPU was at hand",
    ),
}


@dataclass(frozen=True)
class RequestSize:
    """One video under guidance. None takes the checkpoint's own size."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int = 50


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage. weights: by ONNX type. held: what its open networks take; activations: the most
    while one of them runs; at: graph and node where that is. streamed: weights on the GPU while streaming."""

    stage: str
    graphs: tuple[str, ...]
    weights: Mapping[str, int]
    weight_bytes: int
    activations: int
    at: str
    held: int
    streamed: int

    @property
    def peak(self) -> int:
        """With only this stage's networks there."""
        return self.held + self.activations


@dataclass(frozen=True)
class PolicyMemory:
    """A way of keeping networks. peak: bytes; phase: when. fits: None where no device memory was given."""

    policy: str
    peak: int
    phase: str
    fits: bool | None


@dataclass(frozen=True)
class MemoryPlan:
    backend: str
    assumptions: str
    symbols: Mapping[str, int]
    device_bytes: int | None
    stages: tuple[StageMemory, ...]
    tiled_decoder: StageMemory
    policies: tuple[PolicyMemory, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_memory(
    bundle: Bundle, size: RequestSize, *, backend: str = "onnxruntime", device_bytes: int | None = None
) -> MemoryPlan:
    """Raises InputError for a backend without assumptions or a size that the bundle can't serve."""
    if backend not in RUNTIMES:
        raise InputError(
            f"no memory plan for backend {backend!r}: what it keeps is not known; choose from "
            f"{', '.join(RUNTIMES)}"
        )
    runtime = RUNTIMES[backend]
    backbone = bundle.transformer.backbone
    symbols = request_symbols(bundle.table, backbone, size)
    tiling = Tiling.for_vae(bundle.config("vae"))
    latent = symbols["h"], symbols["w"]
    tile = {"h": min(latent[0], tiling.height), "w": min(latent[1], tiling.width)}
    used = _graphs_used(bundle.table, symbols["frames"])

    def stage(name: str, sizes: Mapping[str, int]) -> StageMemory:
        return _stage(bundle, name, [graph for graph in used if graph.stage == name], sizes, runtime)

    names = dict.fromkeys(graph.stage for graph in used)
    stages = tuple(stage(name, symbols) for name in names)
    tiled = stage("vae_decoder", {**symbols, **tile})
    video = 3 * output_frames(symbols["frames"]) * latent[0] * latent[1] * VAE_SPATIAL**2 * _FLOAT32
    policies = _policies(stages, tiled, runtime, video, device_bytes)
    return MemoryPlan(backend, runtime.text, symbols, device_bytes, stages, tiled, policies)


def request_symbols(table: StageTable, backbone: BackboneConfig, size: RequestSize) -> dict[str, int]:
    """Sizes of all axes for a request, and "frames": latent frames. Raises InputError outside the ranges."""
    _, rows, columns = sample_size(backbone)
    height = size.height or rows * VAE_SPATIAL
    width = size.width or columns * VAE_SPATIAL
    frames = latent_frames(size.num_frames or backbone.sample_frames, backbone)
    pixels = VAE_SPATIAL * backbone.patch_size
    for name, value in (("height", height), ("width", width)):
        if value < pixels or value % pixels:
            raise InputError(f"{name} is {value}; it must be a multiple of {pixels}")
    if frames < 2:
        raise InputError(f"num_frames is {size.num_frames}; a video has at least 2 latent frames, 5 frames")
    symbols = table.sizes("max")  # text of full length, one photo
    symbols |= {"B": 2, "I": 1, "f": frames // (backbone.patch_size_t or 1)}
    symbols |= {"y": height // pixels, "x": width // pixels}
    symbols |= {"h": height // VAE_SPATIAL, "w": width // VAE_SPATIAL}
    symbols["T"] = min(max(size.num_inference_steps, table.axes["T"].min), table.axes["T"].max)
    table.check(symbols)
    return {**symbols, "frames": frames}


def _graphs_used(table: StageTable, frames: int) -> list[Graph]:
    """Of the decoder's graphs only those that a video of that many latent frames needs."""
    parts = chunks(frames)
    first = f"vae_decoder_first_{parts[0][1] - parts[0][0]}"
    unused = {"vae_decoder_first_2", "vae_decoder_first_3"} - {first}
    if len(parts) == 1:
        unused.add("vae_decoder_next")
    return [graph for graph in table.graphs if graph.name not in unused]


def predict_graph(bundle: Bundle, graph: Graph, symbols: Mapping[str, int], fusion: Fusion) -> GraphMemory:
    """What one graph of the bundle needs at the given sizes of its axes."""
    shapes = {spec.name: spec.shape(symbols) for spec in graph.inputs}
    return graph_memory(read_model(bundle.onnx_file(graph.name)), shapes, fusion)


def _stage(
    bundle: Bundle, name: str, graphs: Sequence[Graph], symbols: Mapping[str, int], runtime: Runtime
) -> StageMemory:
    """The networks of a stage stay open beside each other; one of them runs at a time."""
    found = {graph.name: predict_graph(bundle, graph, symbols, runtime.fusion) for graph in graphs}
    return combine(name, found, runtime)


def combine(name: str, found: Mapping[str, GraphMemory], runtime: Runtime) -> StageMemory:
    """The memory of a stage from that of its graphs."""
    weights: dict[str, int] = {}
    for graph in found.values():
        for dtype, count in graph.weights.items():
            weights[dtype] = weights.get(dtype, 0) + count
    weight_bytes = sum(weights.values())
    widest = max(found, key=lambda graph: found[graph].activations)
    activations = int(runtime.activations * found[widest].activations)
    outside = sum(graph.external for graph in found.values())
    held = int(runtime.external * outside + runtime.embedded * (weight_bytes - outside))
    streamed = 2 * max(graph.largest_weight for graph in found.values())
    at = f"{widest}: {found[widest].at}"
    return StageMemory(name, tuple(found), weights, weight_bytes, activations, at, held, streamed)


def _policies(
    stages: Sequence[StageMemory],
    tiled: StageMemory,
    runtime: Runtime,
    video: int,
    device_bytes: int | None,
) -> tuple[PolicyMemory, ...]:
    """All resident, released after use, tiled decoder, both, and streamed weights where there are any."""
    found = []

    def add(policy: str, keep: Callable[[StageMemory], int], *, together: bool, tiles: bool) -> None:
        chosen = [tiled if stage.stage == tiled.stage else stage for stage in stages]
        # Parts of a tile beside their concatenation, beside the video: see vae_decode.py.
        share = 1.0 if not tiles else tiled.activations / max(_of(stages, tiled.stage).activations, 1)
        host = int(video * (1 + 2 * share)) if runtime.on_host else 0
        chosen = chosen if tiles else list(stages)
        phases: dict[str, int] = {}
        everything = sum(keep(stage) for stage in chosen)
        for phase in (_BEFORE, _DENOISE, _DECODE):
            active = [stage for stage in chosen if _phase(stage) == phase]
            if not active:
                continue
            kept = everything if together else sum(keep(stage) for stage in active)
            running = kept + max(stage.activations for stage in active)
            phases[phase] = running + (host if phase == _DECODE else 0)
        phase = max(phases, key=lambda name: phases[name])
        fits = None if device_bytes is None else phases[phase] <= device_bytes
        found.append(PolicyMemory(policy, phases[phase], phase, fits))

    def whole(stage: StageMemory) -> int:
        return stage.held

    add("all resident", whole, together=True, tiles=False)
    add("all resident, --vae-tiling", whole, together=True, tiles=True)
    add("--low-memory", whole, together=False, tiles=False)
    add("--low-memory, --vae-tiling", whole, together=False, tiles=True)
    if runtime.streams:
        add("weight streaming", lambda stage: stage.streamed, together=True, tiles=False)
        add("weight streaming, --vae-tiling", lambda stage: stage.streamed, together=True, tiles=True)
    return tuple(found)


def _of(stages: Sequence[StageMemory], name: str) -> StageMemory:
    return next(stage for stage in stages if stage.stage == name)


def _phase(stage: StageMemory) -> str:
    """--low-memory releases networks twice: before the loop and behind it (pipeline.py)."""
    phases = {"denoiser": _DENOISE, "controlnet": _DENOISE, "vae_decoder": _DECODE}
    return phases.get(stage.stage, _BEFORE)
