"""The doors that Python code comes in by: `compile` for a whole model, `linear` for one fused call.

Both are `torch.compile` with our backend: Dynamo traces, guards and caches, and everything after it is as for
`torch.compile(model, backend="fusewright")`.
"""

from __future__ import annotations

import functools
import logging
import threading
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import config
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException, Unsupported
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.errors import CannotFuse, EagerFailure, FusewrightError
from fusewright.fusion.plan import Encode, Fallback, FusionPlan, Region, Step
from fusewright.runtime.frozen import thaw
from fusewright.settings import Settings

__all__ = ["compile", "linear", "thaw"]


def compile(
    model: Callable[..., Any] | None = None, *, fullgraph: bool = False, dynamic: bool | None = None, **settings: Any
) -> Any:
    """Compiles a module or function with fusewright; without `model`, returns a decorator.

    fullgraph, dynamic: as for `torch.compile`. settings: the fields of `fusewright.settings.Settings`. Raises
    UnknownSetting, InvalidSetting, UnknownArch; the first call compiles, and raises what the backend raises.
    """
    Settings.of(settings, also=("fullgraph", "dynamic"))
    if model is None:
        return functools.partial(compile, fullgraph=fullgraph, dynamic=dynamic, **settings)
    return torch.compile(model, backend="fusewright", fullgraph=fullgraph, dynamic=dynamic, options=settings)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epilogue: Callable[..., Any] | None = None,
    operands: Sequence[Any] = (),
    **settings: Any,
) -> Any:
    """`epilogue(x @ weight.T + bias, *operands)` in one kernel, with gradients that are fused as well.

    x: [..., K]. weight: [N, K]. bias: [N]. epilogue: a function of tensors; its first argument is [..., N]. It may use
    further tensors, given as operands or closed over, and gradients flow into all of them. settings: as for `compile`.

    The epilogue is traced at its first call with a layout of weights, and again when what Python does in it changes; a
    second batch size makes the batch dynamic. Inside `torch.compile` the operators join those around the call, and the
    surrounding compiler fuses them. On the CPU Inductor compiles the call, or with `simulate` the simulator runs it.

    Raises CannotFuse, which names the operator, if the epilogue does not fit into the product's kernel; EagerFailure if
    the call fails in plain PyTorch, too; UnknownSetting, InvalidSetting, UnknownArch, MixedDevices.
    """
    epilogue = _as_it_is if epilogue is None else epilogue
    arguments = (x, weight, bias, epilogue, operands)
    if torch.compiler.is_compiling():
        return _linear(*arguments)
    chosen = Settings.of(settings) if settings else _DEFAULT
    try:
        layout = (x.dim(), x.shape[-1:], x.dtype, x.device, weight.shape, weight.stride(), weight.dtype)
        return _compiled(_code(epilogue), layout, chosen)(*arguments)
    except Exception as error:
        told = _told(error, arguments)
        if told is None:
            raise
        raise told.with_traceback(None) from None


def _as_it_is(y: Tensor) -> Tensor:
    return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Callable[..., Any], operands: Any) -> Any:
    return epilogue(F.linear(x, weight, bias), *operands)


# By what stays when an epilogue is made anew for each call, such as a lambda in `forward`: its code.
_kept: WeakKeyDictionary[Any, dict[Hashable, _Calls]] = WeakKeyDictionary()

_DEFAULT = Settings()


def _compiled(code: Any, layout: Hashable, settings: Settings) -> _Calls:
    """The compiled calls of an epilogue. Each layout of weights has its own, so that only batches become dynamic."""
    calls = _kept.setdefault(code, {})
    found = calls.get((layout, settings))
    if found is None:
        found = calls[layout, settings] = _Calls(settings)
    return found


def _code(function: Any) -> Any:
    """What tells epilogues apart: the code of a Python function, else the type. Dynamo's guards tell the rest."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else type(function)


class _Calls:
    """`_linear`, which Dynamo compiles once for each variation of the epilogue: its numbers, functions, gradients.

    Dynamo stops at the ninth. Here they may be the layers of a model, so it gets as much room as it has at most; once
    that is full, all are forgotten.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._begin()

    def _begin(self) -> None:
        self._variations = 0
        self._crowded = False
        self._make_room = config._make_closure_patcher(recompile_limit=config.accumulated_recompile_limit)
        # Dynamo keeps what it compiled, and counts it, by code object.
        function = FunctionType(_linear.__code__.replace(), _linear.__globals__, "linear")
        self._run = torch.compile(function, backend=self._backend, fullgraph=True)

    def _backend(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from fusewright.capture.backend import fusewright

        self._variations += 1
        self._crowded = self._crowded or self._variations >= config.recompile_limit
        return fusewright(module, inputs, options=asdict(self._settings), check=one_kernel)

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._call(arguments)
        except FailOnRecompileLimitHit:
            self._begin()
            return self._call(arguments)

    def _call(self, arguments: Sequence[Any]) -> Any:
        restore = self._make_room() if self._crowded else None
        _here.calls = True
        try:
            return self._run(*arguments)
        finally:
            _here.calls = False
            if restore:
                restore()


class _Here(threading.local):
    """Of this thread. calls: an epilogue is called, and may be traced."""

    calls = False


class _Quiet(logging.Filter):
    """Drops the traceback that torch logs of an epilogue that fails when it is traced: the error says it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _here.calls


_here = _Here()
logging.getLogger("torch._subclasses.fake_tensor").addFilter(_Quiet())


def _told(error: Exception, arguments: tuple[Any, ...]) -> Exception | None:
    """A failure to compile in terms of what the user wrote; None if it is something else."""
    if not isinstance(error, (TorchDynamoException, AttributeError)):
        return None
    failure = _fails_in_eager(arguments)
    if failure is not None:
        return failure
    if isinstance(error, BackendCompilerFailed) and isinstance(error.inner_exception, FusewrightError):
        return _no_product(*arguments[:2]) or error.inner_exception
    if isinstance(error, Unsupported):
        reason = str(error).strip().split("\n\n")[0]
        return CannotFuse(f"the epilogue is not a function of tensors alone: {reason}")
    return None


def _fails_in_eager(arguments: tuple[Any, ...]) -> EagerFailure | None:
    try:
        with torch.no_grad(), _WithoutEffects():  # type: ignore[no-untyped-call]
            _linear(*arguments)
    except _Effect:
        return None
    except Exception as error:
        torch_itself = str(Path(torch.__file__).parent)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f for f in frames if f.filename != __file__ and not f.filename.startswith(torch_itself)]
        where = f" ({lines[-1].filename}:{lines[-1].lineno})" if lines else ""
        what = f"epilogue(F.linear(x, weight, bias), *operands) fails in eager mode{where}"
        return EagerFailure(f"{what}: {type(error).__name__}: {error}\nLet it run in plain PyTorch first.")
    return None


class _Effect(Exception):
    """An operator overwrites a tensor or draws random numbers."""


class _WithoutEffects(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops before the state of tensors or generators changes: the caller may catch the error and go on."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable or torch.Tag.nondeterministic_seeded in function.tags:
            raise _Effect
        return function(*args, **(kwargs or {}))


def _no_product(x: Tensor, weight: Tensor) -> CannotFuse | None:
    """The refusal of operands that no kernel multiplies, whatever the epilogue."""
    from fusewright.capture.lowerings import MATMUL_DTYPES

    if weight.dim() == 2 and {x.dtype, weight.dtype} <= MATMUL_DTYPES:
        return None
    given = " and ".join(
        f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in (("x", x), ("weight", weight))
    )
    dtypes = ", ".join(sorted(str(d).removeprefix("torch.") for d in MATMUL_DTYPES))
    return CannotFuse(f"no kernel multiplies {given}: fusewright.linear takes a weight [N, K], and of dtypes {dtypes}")


def one_kernel(plan: FusionPlan, backward: bool) -> None:
    """Raises CannotFuse if something runs as ATen, or, but in a backward, in another kernel than the product's."""
    products = [r for r in plan.regions if r.gemm]
    product = min(products, key=lambda r: r.origins, default=None)  # the first that is called
    apart: Sequence[Step] = plan.fallbacks
    if product and not backward:
        allowed = [product, *_operands(plan, product)]
        apart = [s for s in plan.steps if s not in allowed]
    if apart:
        operators = [o for step in apart for o in step.operators] or [step.name for step in apart]
        reasons = [s.reason for s in apart if isinstance(s, Fallback) and s.operators]
        reasons += [r.reason for r in plan.refusals if set(r.operators) & set(operators)]
        raise CannotFuse(_refusal(operators, reasons or [_AT_ITS_PLACE]))
    if not (product or backward):
        raise CannotFuse(
            "the epilogue's results do not depend on the product; let them, or compute them without fusewright.linear"
        )


_AT_ITS_PLACE = "the kernel computes results of the product's shape, each element from what lies at its place"


def _operands(plan: FusionPlan, product: Region) -> list[Step]:
    """The steps that make what the product multiplies: casts under autocast, copies, halves (a backward's as well)."""
    assert product.gemm is not None
    wanted = {product.gemm.a.buffer, product.gemm.b.buffer, *(e.buffer for e in product.gemm.encoded or ())}
    made: list[Step] = []
    for step in reversed(plan.steps):
        makes = isinstance(step, Region) and step is not product and wanted.issuperset(step.writes())
        if makes or isinstance(step, Encode):
            wanted.update(step.reads())
            made.append(step)
    return made


def _refusal(operators: Sequence[str], reasons: Sequence[str]) -> str:
    return (
        f"{', '.join(dict.fromkeys(operators))} cannot be fused with the product: {'; '.join(dict.fromkeys(reasons))}. "
        "Apply it to what fusewright.linear returns, or use fusewright.compile, which lets it run apart"
    )
