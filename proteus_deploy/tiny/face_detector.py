"""A face detector in SCRFD's format, computed by hand for the drawn portraits; it is no detector for photos.

A pixel is skin when six linear conditions on its colour hold. Where a head-shaped region is skin and no part
of the ring around it is (below the chin anything goes: necks), a face is reported: convolutions of the skin
map give both shares for heads of several sizes, the largest difference in its neighbourhood wins. The place
is refined below a cell by a parabola through neighbouring responses, the size by one through neighbouring
kernels.

SCRFD's contract: input [1, 3, 640, 640], RGB, (v - 127.5) / 128; nine outputs, for strides 8, 16 and 32:
score [n, 1], box [n, 4] and landmarks [n, 10], with n = 2 anchors in each cell, as distances in strides from
the cell's corner. Each stride looks for heads of its own range of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proteus_deploy.tiny.portrait import HEAD_ASPECT, LANDMARKS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["constant", "detector_model", "model_proto", "tensor_info"]

_SIDE = 640
_OPSET = 17
_IR_VERSION = 8
_SCALE_STEP = 1.1
# Half widths of heads, in pixels of the 640 x 640 input, from and up to which each stride looks.
_HALF_WIDTHS = {8: (12.0, 30.0), 16: (30.0, 72.0), 32: (72.0, 190.0)}
# The skin map is made this much finer than the cells.
_FINER = 4
# A response of 1 is a perfect head; drawn ones reach 0.7 and more (eyes and mouth are no skin).
_LEAST_RESPONSE = 0.63
# Ears and soft edges let kernels win that are this much too large, in the median of the drawn portraits.
_OVERSIZE = 1.075
_SCORE_SLOPE = 1.8
# Each row: red, green, blue and a constant, on 0..1; skin when all results are positive.
_SKIN_CONDITIONS = (
    (1.0, 0.0, 0.0, -0.36),
    (1.0, -1.0, 0.0, -0.05),
    (1.0, 0.0, -1.0, -0.09),
    (0.0, -0.62, 1.0, 0.0),
    (1.0, -1.07, 0.0, 0.0),
    (-1.0, 1.75, 0.0, 0.0),
)
_SKIN_SHARPNESS = 40.0


def constant(name: str, values: Any) -> Any:
    """A float32 initialiser."""
    import numpy as np
    from onnx import numpy_helper

    return numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)


def tensor_info(name: str, shape: Sequence[int | str]) -> Any:
    """A float32 input or output."""
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def model_proto(
    name: str, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]
) -> Any:
    """A checked ONNX model, of a version that every onnxruntime of the last years reads."""
    import onnx
    from onnx import helper

    graph = helper.make_graph(nodes, name, inputs, outputs, weights)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="proteus_deploy"
    )
    model.ir_version = _IR_VERSION
    onnx.checker.check_model(model)
    return model


def detector_model() -> Any:
    """The ONNX model; nothing in it is random."""
    graph = _Graph()
    skin = _skin_map(graph)
    heads = [_level(graph, skin, stride) for stride in _HALF_WIDTHS]
    # All scores first, then all boxes, then all landmarks.
    names = [head[kind] for kind in range(3) for head in heads]
    widths = [width for width in (1, 4, 10) for _ in heads]
    cells = [2 * (_SIDE // stride) ** 2 for _ in range(3) for stride in _HALF_WIDTHS]
    outputs = [
        tensor_info(name, [count, width]) for name, count, width in zip(names, cells, widths, strict=True)
    ]
    return model_proto(
        "tiny_detector", graph.nodes, [tensor_info("image", [1, 3, _SIDE, _SIDE])], outputs, graph.weights
    )


class _Graph:
    """Collects nodes and initialisers under counted names."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, values: Any) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(constant(name, values))
        return name

    def bytes(self, values: Any) -> str:
        return self._exact(values, "uint8")

    def integers(self, values: Sequence[int]) -> str:
        return self._exact(values, "int64")

    def _exact(self, values: Any, dtype: str) -> str:
        import numpy as np
        from onnx import numpy_helper

        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, dtype=dtype), name))
        return name

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name


def _skin_map(graph: _Graph) -> str:
    """[1, 1, 640, 640], 1 where the colour is skin, 0 where not."""
    import numpy as np

    conditions = np.array(_SKIN_CONDITIONS)
    # From SCRFD's scale back to 0..1: v = (x * 128 + 127.5) / 255.
    kernel = conditions[:, :3] * (128 / 255)
    offset = conditions[:, :3].sum(axis=1) * 0.5 + conditions[:, 3]
    kernel, offset = kernel * _SKIN_SHARPNESS, offset * _SKIN_SHARPNESS + 0.5
    each = graph.add("Conv", "image", graph.weight(kernel[:, :, None, None]), graph.weight(offset))
    weakest = graph.add("ReduceMin", each, axes=[1], keepdims=1)
    return graph.add("Clip", weakest, graph.weight(np.array(0.0)), graph.weight(np.array(1.0)))


def _head_masks(half_width: float) -> NDArray[np.bool_]:
    """[6, rows, columns], odd: the inside of a head of this half width, then five parts of its ring."""
    import numpy as np

    reach_x, reach_y = int(np.ceil(1.42 * half_width)), int(np.ceil(1.42 * HEAD_ASPECT * half_width))
    y, x = np.mgrid[-reach_y : reach_y + 1, -reach_x : reach_x + 1]
    x, y = x / half_width, y / (HEAD_ASPECT * half_width)
    radius = np.hypot(x, y)
    ring = (radius > 1.03) & (radius < 1.4)
    # The upper part belongs to the hair, which may hang deep or not: only the very top is ring.
    side, jaw, top = (y > -0.4) & (y < 0.45) & (np.abs(y - 0.08) > 0.2), (y > 0.45) & (y < 1.1), y < -0.8
    inside = (radius < 0.99) & (y > -0.35)
    parts = [side & (x < 0), side & (x > 0), jaw & (x < -0.62), jaw & (x > 0.62), top]
    return np.stack([inside, *(ring & part for part in parts)])


def _half_widths(stride: int) -> list[float]:
    least, most = _HALF_WIDTHS[stride]
    # One more at either end: the ends only serve as neighbours, they never win.
    sizes = [least / _SCALE_STEP]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * _SCALE_STEP)
    return [*sizes, sizes[-1] * _SCALE_STEP]


def _response(graph: _Graph, pooled: str, masks: NDArray[np.bool_]) -> str:
    """[1, 1, cells, cells]: the share of skin inside a head, less that of the ring's most skin-like part."""
    import numpy as np

    rows, columns = masks.shape[1:]
    kernel = graph.add("Cast", graph.bytes(masks[:, None]), to=1)
    sums = graph.add(
        "Conv",
        pooled,
        kernel,
        # Samples stand at (k + 1/2) * fine; a cell answers for the sample next to its middle.
        strides=[_FINER, _FINER],
        pads=[rows // 2 - _FINER // 2, columns // 2 - _FINER // 2, rows // 2, columns // 2],
    )
    counts = np.maximum(1, masks.sum(axis=(1, 2)))
    shares = graph.add("Mul", sums, graph.weight(1 / counts[None, :, None, None]))
    inside = graph.add("Slice", shares, graph.integers([0]), graph.integers([1]), graph.integers([1]))
    parts = graph.add("Slice", shares, graph.integers([1]), graph.integers([6]), graph.integers([1]))
    return graph.add("Sub", inside, graph.add("ReduceMax", parts, axes=[1], keepdims=1))


def _scores(graph: _Graph, best: str, stride: int) -> str:
    """[1, 1, cells, cells]: 0.5 and more where a face is, 0 where a neighbour responds better."""
    import numpy as np

    # A face is the best response among the cells that its head covers.
    reach = 2 * max(1, round(1.2 * _HALF_WIDTHS[stride][0] / stride)) + 1
    around = graph.add("MaxPool", best, kernel_shape=[reach, reach], pads=[reach // 2] * 4, strides=[1, 1])
    peak = graph.add("Cast", graph.add("Equal", best, around), to=1)
    excess = graph.add("Sub", best, graph.weight(np.array(_LEAST_RESPONSE)))
    score = graph.add("Mul", excess, graph.weight(np.array(_SCORE_SLOPE)))
    score = graph.add("Add", score, graph.weight(np.array(0.5)))
    score = graph.add("Clip", score, graph.weight(np.array(0.0)), graph.weight(np.array(1.0)))
    return graph.add("Mul", score, peak)


def _level(graph: _Graph, skin: str, stride: int) -> tuple[str, str, str]:
    """Scores, boxes and landmarks of one stride; see the module's text."""
    import numpy as np

    fine = stride // _FINER
    cells = _SIDE // stride
    sizes = _half_widths(stride)
    pooled = graph.add("AveragePool", skin, kernel_shape=[fine, fine], strides=[fine, fine])
    responses = [_response(graph, pooled, _head_masks(size / fine)) for size in sizes]
    every = graph.add("Concat", *responses, axis=1)  # [1, S, cells, cells]
    inner = graph.add(
        "Slice", every, graph.integers([1]), graph.integers([len(sizes) - 1]), graph.integers([1])
    )
    best = graph.add("ReduceMax", inner, axes=[1], keepdims=1)
    # Which kernel won, as ones and zeros over the sizes; the ends get zeros.
    won = graph.add("Cast", graph.add("Equal", inner, best), to=1)
    won = graph.add("Pad", won, graph.integers([0, 1, 0, 0, 0, 1, 0, 0]))

    def chosen(values: str) -> str:
        return graph.add("ReduceSum", graph.add("Mul", values, won), graph.integers([1]), keepdims=1)

    def shifted(amount: int, axis: int) -> str:
        """The responses of the next (1) or last (-1) kernel or cell along an axis; zero beyond the edge."""
        length = len(sizes) if axis == 1 else cells
        before, after = [0] * 4, [0] * 4
        (after if amount > 0 else before)[axis] = 1
        padded = graph.add("Pad", every, graph.integers([*before, *after]))
        start = 1 if amount > 0 else 0
        return graph.add(
            "Slice", padded, graph.integers([start]), graph.integers([start + length]), graph.integers([axis])
        )

    middle = chosen(every)

    def vertex(axis: int) -> str:
        """Where a parabola through three responses peaks: -0.5..0.5 steps from the middle one."""
        last, following = chosen(shifted(-1, axis)), chosen(shifted(1, axis))
        slope = graph.add("Sub", following, last)
        twice = graph.add("Add", middle, middle)
        bend = graph.add("Sub", twice, graph.add("Add", last, following))
        # The vertex is slope / (2 * bend); a flat top has none, so the bend is kept off zero.
        doubled = graph.add("Max", graph.add("Add", bend, bend), graph.weight(np.array(1e-3)))
        ratio = graph.add("Div", slope, doubled)
        return graph.add("Clip", ratio, graph.weight(np.array(-0.5)), graph.weight(np.array(0.5)))

    # Half width of the head in strides: the kernel's, times step ** vertex.
    logs = chosen(graph.weight(np.log(np.array(sizes) / (_OVERSIZE * stride))[None, :, None, None]))
    grown = graph.add("Mul", vertex(1), graph.weight(np.array(np.log(_SCALE_STEP))))
    half = graph.add("Exp", graph.add("Add", logs, grown))
    # Middle of the head, in strides from the cell's corner. The cell's sample stands half a sample off the
    # middle of the cell.
    rest = graph.weight(np.array(0.5 + 0.5 / _FINER - 0.5 / stride))
    x, y = graph.add("Add", vertex(3), rest), graph.add("Add", vertex(2), rest)

    score = _scores(graph, best, stride)

    def spot(point: tuple[float, float]) -> tuple[str, str]:
        """A place given in head units, in strides from the cell's corner."""
        across = graph.add("Mul", half, graph.weight(np.array(point[0])))
        down = graph.add("Mul", half, graph.weight(np.array(point[1] * HEAD_ASPECT)))
        return graph.add("Add", x, across), graph.add("Add", y, down)

    left, top = spot((-1.0, -1.0))
    right, bottom = spot((1.0, 1.0))
    edges = [graph.add("Neg", left), graph.add("Neg", top), right, bottom]
    marks = [coordinate for point in LANDMARKS for coordinate in spot(point)]
    # The second anchor of a cell never holds a face.
    nothing = graph.add("Mul", score, graph.weight(np.array(0.0)))

    def rows(channels: list[str], width: int, kind: str) -> str:
        joined = graph.add("Concat", *channels, axis=1)
        last = graph.add("Transpose", joined, perm=[0, 2, 3, 1])
        return graph.add("Reshape", last, graph.integers([-1, width]), output=f"{kind}_{stride}")

    return (
        rows([score, nothing], 1, "score"),
        rows(edges * 2, 4, "box"),
        rows(marks * 2, 10, "landmarks"),
    )
