"""One graph of the stage table -> one ONNX file, with its weights read one at a time.

The module is traced on fake tensors, so tracing costs no weight memory; initialisers keep the state
dict's names and are filled from the checkpoint while the file is written. Peak memory is the largest
single tensor and the graph itself.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.export.half_norms import widen_norms
from proteus_deploy.export.qdq import Quantisation, insert_qdq
from proteus_deploy.model.networks import Network, fill_computed_buffers, parameter_dtype
from proteus_deploy.reporting import no_report
from proteus_deploy.stages import Graph, StageTable, split_axis

if TYPE_CHECKING:
    import onnx_ir

# 20 has Gelu and is read by every runtime in use; the bfloat16 form of Conv came with 22.
OPSET = {torch.float32: 20, torch.float16: 20, torch.bfloat16: 22}
# A protobuf message ends at 2 GiB and is built whole in memory, so larger weights go beside the graph.
EMBED_LIMIT_BYTES = 256 << 20
# Operation of torch -> function that writes its ONNX nodes with onnxscript.
Translations = Mapping[Callable[..., Any], Callable[..., Any]]

_FOLD_LIMIT = 4096  # elements: shapes, axes and small tables, never a weight


@dataclass(frozen=True)
class ExportedGraph:
    """What was written: file names relative to the ONNX file's folder, opset, operators and their count.

    custom_operators: those that are not ONNX's own, as domain::name; few backends can run them.
    """

    files: tuple[str, ...]
    opset: int
    operators: dict[str, int]
    parameters: int
    custom_operators: tuple[str, ...] = ()


def require_onnx() -> None:
    """Raises BackendError when the exporter's packages are absent."""
    try:
        import onnx_ir  # noqa: F401 - presence is the question
        import onnxscript  # noqa: F401 - the same
    except ImportError as error:
        raise BackendError(
            'exporting needs onnx and onnxscript; pip install "proteus-deploy[onnx]"'
        ) from error


def export_graph(
    graph: Graph,
    table: StageTable,
    network: Network,
    destination: Path,
    *,
    dtype: torch.dtype,
    translations: Translations | None = None,
    quantisation: Quantisation | None = None,
    report: Callable[[int, int], None] = no_report,
) -> ExportedGraph:
    """Trace `network` and write `destination` (and `destination`.data for large weights), atomically.

    translations: nodes for operations that torch doesn't translate. quantisation: which layers get codes.
    report(done, total) counts written weights. Raises BackendError when the ONNX packages are absent.
    """
    model = traced_model(graph, table, network, dtype=dtype, translations=translations)
    return write_model(model, network, destination, dtype=dtype, quantisation=quantisation, report=report)


def traced_model(
    graph: Graph,
    table: StageTable,
    network: Network,
    *,
    dtype: torch.dtype,
    translations: Translations | None = None,
) -> onnx_ir.Model:
    """The graph, simplified; initialisers that stand for weights have no value yet."""
    require_onnx()
    if dtype not in OPSET:
        raise InputError(f"dtype {dtype} can't be exported; choose float32, float16 or bfloat16")
    module, fakes = _fake_module(network.module, dtype)
    model = _trace(module, graph, table, dtype, fakes, translations)
    _simplify(model)
    if dtype == torch.float16:
        widen_norms(model)
    _strip_machine_traces(model)
    return model


def write_model(
    model: onnx_ir.Model,
    network: Network,
    destination: Path,
    *,
    dtype: torch.dtype,
    quantisation: Quantisation | None = None,
    report: Callable[[int, int], None] = no_report,
) -> ExportedGraph:
    """Quantise a traced model (in place), fill in its weights and write it, as `export_graph` does."""
    if quantisation is not None:
        insert_qdq(model, quantisation, network, dtype)
    _fill_weights(model, network, dtype, report)
    files = _save(model, destination)
    operators: dict[str, int] = {}
    for node in model.graph:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    custom = {f"{node.domain}::{node.op_type}" for node in model.graph if node.domain}
    parameters = sum(1 for _ in network.module.parameters())
    return ExportedGraph(
        files,
        model.graph.opset_imports[""],
        dict(sorted(operators.items())),
        parameters,
        tuple(sorted(custom)),
    )


def _fake_module(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Give the meta module fake parameters of the export's dtypes; computed buffers stay real values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = {
        name: (value.shape, parameter_dtype(name, value, dtype))
        for name, value in module.state_dict().items()
    }
    with mode:
        state = {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in shapes.items()}
    module.load_state_dict(state, assign=True)
    fill_computed_buffers(module, "cpu")
    return module.eval().requires_grad_(False), mode


def trace_sizes(graph: Graph, table: StageTable) -> dict[str, int]:
    """Symbol values to trace with: opt, but never 0 or 1 for a dynamic symbol, which tracing would fix."""
    return {
        symbol: max(table.axes[symbol].opt, 2) if table.is_dynamic(symbol) else table.axes[symbol].opt
        for symbol in graph.symbols
    }


def dynamic_shapes(graph: Graph, table: StageTable) -> tuple[dict[int, Any], ...]:
    """torch.export's dynamic dimensions of each input, from the table's ranges."""
    symbols = {
        symbol: torch.export.Dim(symbol, min=table.axes[symbol].min, max=table.axes[symbol].max)
        for symbol in graph.symbols
        if table.is_dynamic(symbol)
    }
    shapes = []
    for spec in graph.inputs:
        dims: dict[int, Any] = {}
        for index, axis in enumerate(spec.axes):
            if isinstance(axis, str):
                factor, symbol = split_axis(axis)
                if symbol in symbols:
                    dims[index] = symbols[symbol] if factor == 1 else factor * symbols[symbol]
        shapes.append(dims)
    return tuple(shapes)


def _trace(
    module: nn.Module,
    graph: Graph,
    table: StageTable,
    dtype: torch.dtype,
    mode: Any,
    translations: Translations | None,
) -> onnx_ir.Model:
    kinds = {"float": dtype, "float32": torch.float32, "int64": torch.int64}
    sizes = trace_sizes(graph, table)
    with mode:
        examples = tuple(torch.empty(spec.shape(sizes), dtype=kinds[spec.dtype]) for spec in graph.inputs)
    shapes = dynamic_shapes(graph, table)
    # One entry per argument of forward: *args takes a tuple of its own.
    with warnings.catch_warnings(), _quiet_registry():
        # The exporter says once per repeated axis name that it merged the two, which is what names are for.
        warnings.filterwarnings("ignore", message=".*shares the same shape constraints.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET[dtype],
            custom_translation_table=dict(translations) if translations else None,
            dynamic_shapes=group_variadic(module, shapes),
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
        )
    assert program is not None
    return program.model


@contextmanager
def _quiet_registry() -> Iterator[None]:
    """The exporter warns about each torchvision operator it can't register; no network here uses one."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def group_variadic(module: nn.Module, shapes: tuple[dict[int, Any], ...]) -> tuple[Any, ...]:
    """torch.export wants the shapes of *args as one nested tuple."""
    import inspect

    parameters = list(inspect.signature(module.forward).parameters.values())
    for index, parameter in enumerate(parameters):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*shapes[:index], tuple(shapes[index:])) if shapes[index:] else shapes
    return shapes


def _simplify(model: onnx_ir.Model) -> None:
    """Inline, fold shape arithmetic, drop what is unused.

    Initialisers have no value here, so nothing can be folded into a weight: a Linear's transpose stays a
    node and the weight keeps its name and layout, which refit, adapters and quantisation rely on.
    """
    import onnx_ir.passes.common as common
    from onnx_ir import passes
    from onnxscript import optimizer, rewriter

    for value in model.graph.initializers.values():
        value.const_value = None
    common.InlinePass()(model)
    for _ in range(2):  # folded shapes uncover further rewrites
        optimizer.fold_constants_ir(
            model, onnx_shape_inference=True, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT
        )
        rewriter.rewrite(model)
        common.RemoveUnusedNodesPass()(model)
    passes.Sequential(
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.TopologicalSortPass(),
    )(model)


def _strip_machine_traces(model: onnx_ir.Model) -> None:
    """Remove source paths and stack traces: the same model must give the same bytes anywhere."""
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        value.doc_string = None
        value.metadata_props.clear()


def _fill_weights(
    model: onnx_ir.Model, network: Network, dtype: torch.dtype, report: Callable[[int, int], None]
) -> None:
    """Attach a reader to each initialiser that names a parameter; constants have values already."""
    import onnx_ir
    from onnx_ir import tensor_adapters

    expected = network.module.state_dict()
    pending = [value for value in model.graph.initializers.values() if value.const_value is None]
    buffers = dict(network.module.named_buffers())
    done = 0

    def reader(name: str) -> Callable[[], onnx_ir.TensorProtocol]:
        def read() -> onnx_ir.TensorProtocol:
            nonlocal done
            if name in expected:
                target = parameter_dtype(name, expected[name], dtype)
                tensor = network.source.tensor(network.key_of(name)).to(target)
            else:
                tensor = buffers[name]
            done += 1
            report(done, len(pending))
            return tensor_adapters.TorchTensor(tensor.contiguous(), name=name)

        return read

    for value in pending:
        name = value.name
        if name is None or (name not in expected and name not in buffers):
            raise InputError(f"the traced graph asks for {name!r}, which is not a parameter of the network")
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = onnx_ir.LazyTensor(
            reader(name), dtype=value.dtype, shape=value.shape, name=name, cache=False
        )


def _save(model: onnx_ir.Model, destination: Path) -> tuple[str, ...]:
    import onnx_ir

    weight_bytes = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    if weight_bytes <= EMBED_LIMIT_BYTES:
        with atomic_file(destination) as temporary:
            onnx_ir.save(model, temporary)
        return (destination.name,)
    data_name = f"{destination.name}.data"
    # onnx_ir writes both files itself. The caller writes into a folder that only appears when it is whole.
    onnx_ir.save(model, destination, external_data=data_name, size_threshold_bytes=1024)
    return destination.name, data_name
