"""A whole model → its inference, forward and backward graphs, without running it.

Doors 2 (files) and `explain` read a model this way: Dynamo traces it once with its first dimension dynamic, and the
compiled function that would run it only returns empty tensors.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from keyword import iskeyword
from types import FunctionType
from typing import Any, cast

import sympy
import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch.utils import _pytree as pytree

from fusewright.capture.backend import decompositions
from fusewright.capture.fx import from_fx
from fusewright.capture.interrupts import postponed
from fusewright.capture.joint import partition_joint
from fusewright.capture.metadata import reads_numbers, size_of
from fusewright.errors import CannotCapture
from fusewright.ir.graph import Graph, Output
from fusewright.passes.format import Capabilities

log = logging.getLogger(__name__)

_SHOWN = 7  # rows, where the file's own batch is one that Dynamo takes for a constant


@dataclass(frozen=True)
class Saved:
    """Where an input of backward comes from: ("argument" of the model | "output" of forward | "gradient" of that result
    | "size", its index)."""

    kind: str
    index: int


@dataclass(frozen=True)
class CapturedModel:
    """What one model computes.

    arguments: for each graph input the Python expression that gives it inside `forward` (`x`, `self.gemm.weight`), or
    None for a size. inference, forward: graphs over those inputs; forward also returns what backward saves.
    saved: where each input of backward comes from. Backward's outputs are the gradients of the arguments, in order.
    result: the structure that the model returns, an `OutputIndex` in the place of each tensor.
    sizes: the value of each size symbol in the inputs that the model was captured with.
    capabilities: those by which products of the forward and backward graphs read halves of their operands.
    constants: what is no tensor among the arguments and defaults of `forward`, by the expression that gives it there.
    """

    arguments: tuple[str | None, ...]
    inference: Graph
    forward: Graph | None
    backward: Graph | None
    saved: tuple[Saved, ...]
    outputs: int
    result: Any
    sizes: Mapping[sympy.Symbol, int]
    capabilities: Capabilities | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)


class _Recorder:
    """A Dynamo backend that keeps graphs and runs nothing."""

    def __init__(self, model: nn.Module, capabilities: Capabilities | None, names: Sequence[str]) -> None:
        """names: as `_decorated` gives them."""
        self.model = model
        self.capabilities = capabilities
        self.names = names
        self.arguments: list[str | None] = []
        self.graph: Graph | None = None
        self.sizes: dict[sympy.Symbol, int] = {}
        self.split: tuple[fx.GraphModule, fx.GraphModule, int] | None = None
        self.tangents: list[str] = []
        self.returned: list[Any] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        self.arguments = [_expression(p, self.model, self.names) for p in module.graph.find_nodes(op="placeholder")]
        symbolic = {size_of(i): int(i.node.hint) for i in inputs if isinstance(i, torch.SymInt)}
        self.sizes = {s: value for s, value in symbolic.items() if isinstance(s, sympy.Symbol)}
        compiled: Callable[..., Any] = aot_autograd(
            fw_compiler=self.record,
            inference_compiler=self.record,
            partition_fn=self.partition,
            decompositions=decompositions(),
        )(module, inputs)
        return compiled

    def check(self, module: fx.GraphModule) -> None:
        if reads_numbers(module):
            raise CannotCapture(
                "the model computes with a number or a size that a tensor's values give, as .item() and nonzero() do; "
                'take that out, or run the model in process: torch.compile(model, backend="fusewright")'
            )

    def partition(self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        self.check(joint)
        forward, backward = partition_joint(
            joint, inputs, num_fwd_outputs=num_fwd_outputs, capabilities=self.capabilities, **options
        )
        self.split = (forward, backward, num_fwd_outputs)
        self.tangents = [p.name for p in joint.graph.find_nodes(op="placeholder") if "tangents" in str(p.target)]
        return forward, backward

    def record(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.check(module)
        self.graph = from_fx(module)
        values = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in module.graph.output_node().args[0]]  # type: ignore[union-attr]

        def run(*arguments: Any) -> list[Any]:
            self.returned = [_empty_like(v) for v in values]
            return self.returned

        boxed: Callable[..., Any] = make_boxed_func(run)
        return boxed


def capture(
    model: nn.Module, inputs: Sequence[Any], *, training: bool = True, capabilities: Capabilities | None = None
) -> CapturedModel:
    """Traces `model(*inputs)`. training: also with gradients of every floating parameter and input.

    capabilities: products of the training graphs may read halves of their operands where that pays.

    Sizes equal to the first dimension of the first tensor input become symbols where the model lets them. Raises
    CannotCapture where the model is not one graph.
    """
    batch = _batch(inputs)
    if batch is None or batch > 1:
        return _capture(model, inputs, training, capabilities)
    # Dynamo takes sizes of 0 and 1 for constants, so it is shown a larger batch, if the model takes one.
    try:
        captured = _capture(model, _with_batch(inputs, batch), training, capabilities)
    except Exception as error:
        log.info("captured for a batch of %d alone: with more rows, %s", batch, error)
        return _capture(model, inputs, training, capabilities)
    return replace(captured, sizes={s: batch if size == _SHOWN else size for s, size in captured.sizes.items()})


def _capture(
    model: nn.Module, inputs: Sequence[Any], training: bool, capabilities: Capabilities | None
) -> CapturedModel:
    training = training and any(
        t.is_floating_point() for t in (*model.parameters(), *pytree.tree_leaves(list(inputs))) if _is_tensor(t)
    )
    inference = _record(model, _detached(inputs, False), capabilities, grad=False)
    result, outputs = _result(inference)  # before training, whose inputs are leaves: torch lets nobody write to them
    joint = _record(model, _detached(inputs, True), capabilities, grad=True) if training else None
    recorded = inference[0]
    assert recorded.graph is not None
    base = CapturedModel(
        arguments=tuple(recorded.arguments),
        inference=recorded.graph,
        forward=None,
        backward=None,
        saved=(),
        outputs=outputs,
        result=result,
        sizes=recorded.sizes,
        capabilities=capabilities,
        constants=_constants(model, inputs),
    )
    if joint is None or joint[0].split is None:
        return base
    recorder = joint[0]
    assert recorder.split is not None
    forward, backward, count = recorder.split
    if recorder.arguments != inference[0].arguments or count != outputs:
        raise CannotCapture("the model computes something else in training than in inference; it changes its inputs")
    differentiable = _differentiable(result, joint[1])
    if len(recorder.tangents) != len(differentiable):
        raise CannotCapture("two results of the model share memory; return a copy of one of them")
    gradients = dict(zip(recorder.tangents, differentiable, strict=True))
    return _with_training(replace(base, sizes={**recorder.sizes, **base.sizes}), forward, backward, gradients)


def _constants(model: nn.Module, inputs: Sequence[Any]) -> dict[str, Any]:
    """As CapturedModel has them."""
    bound = inspect.signature(undecorated(type(model).forward)).bind(model, *inputs)
    bound.apply_defaults()
    found: dict[str, Any] = {}

    def collect(expression: str, value: Any) -> None:
        if value is None or type(value) in (bool, int, float, str):
            found[expression] = value
        elif type(value) in (tuple, list):
            for i, one in enumerate(value):
                collect(f"{expression}[{i}]", one)
        elif type(value) is dict:
            for key, one in value.items():
                if type(key) in (bool, int, str):  # of which repr is what one writes
                    collect(f"{expression}[{key!r}]", one)

    for name, value in list(bound.arguments.items())[1:]:
        collect(name, value)
    return found


def _differentiable(result: Any, returned: Any) -> list[int]:
    """The outputs that have gradients. result: the structure; returned: what the model returned with gradients on."""
    leaves = zip(pytree.tree_leaves(result), pytree.tree_leaves(returned), strict=True)
    return sorted({place.index for place, leaf in leaves if isinstance(place, OutputIndex) and leaf.requires_grad})


def _with_training(
    base: CapturedModel, forward: fx.GraphModule, backward: fx.GraphModule, gradients: Mapping[str, int]
) -> CapturedModel:
    """Drops from forward's outputs what backward can have as an argument of the model. gradients: which result each
    of the placeholders for gradients belongs to."""
    names = [n.name if isinstance(n, fx.Node) else None for n in forward.graph.output_node().args[0]]  # type: ignore[union-attr]
    graph = from_fx(forward)
    kept: list[Output] = list(graph.outputs[: base.outputs])
    saved: list[Saved] = []
    for placeholder in backward.graph.find_nodes(op="placeholder"):
        if placeholder.name not in names[base.outputs :]:
            saved.append(Saved("gradient", gradients[placeholder.name]))
            continue
        value = graph.outputs[names.index(placeholder.name, base.outputs)]
        if value is not None and value.op == "size":
            saved.append(Saved("size", 0))
        elif value in graph.inputs:
            saved.append(Saved("argument", graph.inputs.index(value)))
        else:
            saved.append(Saved("output", len(kept)))
            kept.append(value)
    forward_graph = Graph(graph.inputs, tuple(kept), graph.origins)
    return replace(base, forward=forward_graph, backward=from_fx(backward), saved=tuple(saved))


def _record(
    model: nn.Module, inputs: Sequence[Any], capabilities: Capabilities | None, *, grad: bool
) -> tuple[_Recorder, Any]:
    _check_decorators(type(model).forward)
    recorder = _Recorder(model, capabilities, _decorated(type(model), len(inputs)))
    torch._dynamo.reset()
    _mark_batch(inputs)
    required = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in required:
            p.requires_grad_(p.is_floating_point())
        with torch.set_grad_enabled(grad), postponed():
            returned = torch.compile(model, backend=recorder, fullgraph=True)(*inputs)
    except Unsupported as error:
        raise CannotCapture(
            f"the model is not one graph: {first_paragraph(error)}; let it be one, or run it in process, where each of "
            'its graphs is compiled: torch.compile(model, backend="fusewright")'
        ) from None
    except BackendCompilerFailed as error:
        inner = error.inner_exception if hasattr(error, "inner_exception") else error
        raise inner from None
    finally:
        for p, flag in required:
            p.requires_grad_(flag)
        torch._dynamo.reset()
    check_returned(returned)
    if recorder.graph is None:
        raise CannotCapture("the model computes nothing on tensors")
    return recorder, returned


def first_paragraph(error: Exception) -> str:
    """What torch says and where in the user's code, without its explanation, advice, links and other frames."""
    said = re.split(r"\n\n|\n  (?:Explanation|Hint):", str(error).strip())[0].strip()
    frames = getattr(error, "real_stack", None)
    return f"{said} ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else said


def check_returned(returned: Any) -> None:
    """Raises CannotCapture for anything but tensors and, beside them, None."""
    leaves = pytree.tree_flatten_with_path(returned)[0]
    tensors = any(_is_tensor(leaf) for _, leaf in leaves)
    for path, leaf in leaves:
        if not (_is_tensor(leaf) or (leaf is None and tensors)):
            where = f"what the model returns{' at ' if path else ''}{pytree.keystr(path)}"
            raise CannotCapture(f"{where} is a value of type {type(leaf).__name__}; let forward return tensors")


def _batch(inputs: Sequence[Any]) -> int | None:
    """The first dimension of the first tensor that has dimensions."""
    return next((t.shape[0] for t in pytree.tree_leaves(list(inputs)) if _is_tensor(t) and t.dim()), None)


def _with_batch(inputs: Sequence[Any], batch: int) -> list[Any]:
    """The inputs with `_SHOWN` rows in each tensor that has `batch` of them; values do not matter to a trace."""

    def resized(leaf: Any) -> Any:
        if not (_is_tensor(leaf) and leaf.dim() and leaf.shape[0] == batch):
            return leaf
        return leaf.new_zeros((_SHOWN, *leaf.shape[1:]))

    return pytree.tree_map(resized, list(inputs))  # type: ignore[no-any-return]


def _mark_batch(inputs: Sequence[Any]) -> None:
    batch = _batch(inputs) or 0
    for tensor in pytree.tree_leaves(list(inputs)):
        if _is_tensor(tensor) and tensor.dim() and tensor.shape[0] == batch > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _result(recorded: tuple[_Recorder, Any]) -> tuple[Any, int]:
    """The structure that the model returns, each tensor replaced by the index of the output it is."""
    recorder, returned = recorded
    addresses = [t.data_ptr() if _is_tensor(t) and t.numel() else id(t) for t in recorder.returned]

    def index(leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf
        address = leaf.data_ptr() if leaf.numel() else id(leaf)
        if address not in addresses:
            raise CannotCapture(
                "the model returns one of its inputs or parameters, or a view of one; return a new tensor"
            )
        return OutputIndex(addresses.index(address))

    structure = pytree.tree_map(index, returned)
    used = {leaf.index for leaf in pytree.tree_leaves(structure) if isinstance(leaf, OutputIndex)}
    if used != set(range(len(addresses))):
        raise CannotCapture("the model changes one of its inputs or buffers; return the new value instead")
    return structure, len(addresses)


@dataclass(frozen=True)
class OutputIndex:
    """Stands for output `index` of the graph in the structure that a model returns."""

    index: int


def _check_decorators(forward: Callable[..., Any]) -> None:
    """Raises CannotCapture for decorators of torch's that do not switch gradients off: inference would be traced as
    training, or not at all."""
    function: Any = forward
    while function is not undecorated(forward):
        cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
        context = getattr(cells["ctx_factory"].cell_contents, "__self__", None)
        if not isinstance(context, torch.no_grad) and not (isinstance(context, torch.inference_mode) and context.mode):
            name = f"@torch.{type(context).__name__}" if context is not None else "a decorator of torch's"
            raise CannotCapture(f"{name} on forward is not supported; @torch.no_grad and @torch.inference_mode are")
        function = function.__wrapped__


def undecorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` without torch's own decorators, such as `@torch.no_grad()`."""

    def plain(function: Any) -> bool:
        return not isinstance(function, FunctionType) or "ctx_factory" not in function.__code__.co_freevars

    return cast("Callable[..., Any]", inspect.unwrap(forward, stop=plain))


def _decorated(model: type[nn.Module], count: int) -> list[str]:
    """The names of `self` and `count` arguments of a `forward` under one of torch's decorators; none of a plain one."""
    plain = undecorated(model.forward)
    if plain is model.forward:
        return []
    parameters = inspect.signature(plain).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    return [*names, *(f"{rest[0]}[{i}]" for i in range(count + 1 - len(names)))]


def member(parent: nn.Module | None, name: str) -> str:
    """How a module's child is reached: as an item of a list, by its name, or by one that is none of Python's."""
    items = getattr(type(parent), "__getitem__", None) in (nn.ModuleList.__getitem__, nn.Sequential.__getitem__)
    if parent is not None and items and name.isdecimal() and [*parent._modules][int(name) :][:1] == [name]:
        return f"[{name}]"
    return f".{name}" if name.isidentifier() and not iskeyword(name) else f"._modules[{name!r}]"


def _expression(placeholder: fx.Node, model: nn.Module, names: Sequence[str]) -> str | None:
    """Dynamo's name for where an input comes from, as the Python that `forward` would write.

    names: as `_decorated` gives them. There Dynamo sees the decorator's: the model is its `fn`, all else in its `args`.
    """
    if isinstance(placeholder.meta.get("example_value"), torch.SymInt):
        return None
    source = placeholder.meta["grapharg"].source
    name = source.name() if callable(source.name) else source.name
    name = re.sub(r"^[LG]\['(\w+)'\]", r"\1", name)
    if names:
        name = re.sub(r"^fn\b", names[0], name)
        name = re.sub(r"^args\[(\d+)\]", lambda place: names[1 + int(place[1])], name)
    this = next(iter(inspect.signature(undecorated(type(model).forward)).parameters), "")
    parts = re.match(r"(\w*)((?:\._modules\['[^']*'\])*)(.*)", name, re.DOTALL)
    assert parts  # whatever the name is
    start, path, rest = parts.groups()
    module: nn.Module | None = model if start == this else None
    for child in re.findall(r"\['([^']*)'\]", path):
        start += member(module, child)
        module = None if module is None else module._modules.get(child)
    return start + re.sub(r"\._(?:modules|parameters|buffers)\['([A-Za-z_]\w*)'\]", _attribute, rest)


def _attribute(item: re.Match[str]) -> str:
    return item[0] if iskeyword(item[1]) else f".{item[1]}"


def _detached(inputs: Sequence[Any], requires_grad: bool) -> list[Any]:
    def leaf(value: Any) -> Any:
        if not _is_tensor(value):
            return value
        return value.detach().requires_grad_(requires_grad and value.is_floating_point())

    return pytree.tree_map(leaf, list(inputs))  # type: ignore[no-any-return]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _empty_like(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return int(value.node.hint) if isinstance(value, torch.SymInt) else value

    def size(s: Any) -> int:
        return int(s.node.hint) if isinstance(s, torch.SymInt) else int(s)

    return torch.empty_strided(
        [size(s) for s in value.shape], [size(s) for s in value.stride()], dtype=value.dtype, device=value.device
    )
