"""`fusewright.linear`: a product and the epilogue on it, compiled once for each variation of the epilogue.

Dynamo traces, guards and caches, as for door 1. Here is what it leaves to do: to know an epilogue again that is made
anew for each call, to hold more variations than it does by default, and to report errors in terms of the user's code.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
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

import fusewright
from fusewright.capture import backend
from fusewright.capture.fx import call_of
from fusewright.capture.lowerings import no_product
from fusewright.capture.model import first_paragraph
from fusewright.errors import CannotFuse, EagerFailure, FusewrightError
from fusewright.fusion.one_kernel import one_kernel
from fusewright.settings import Settings


def with_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Callable[..., Any], operands: Any) -> Any:
    """What `fusewright.linear` computes."""
    return epilogue(F.linear(x, weight, bias), *operands)


def call(arguments: tuple[Any, ...], settings: Settings) -> Any:
    """`with_epilogue(*arguments)`, compiled. Raises CannotFuse, EagerFailure, and what the backend raises."""
    if _here.tries:
        return with_epilogue(*arguments)
    x, weight, _, epilogue, _ = arguments
    try:
        layout = (x.dim(), x.shape[-1:], x.dtype, x.device, weight.shape, weight.stride(), weight.dtype)
        return _compiled(_code(epilogue), layout, settings)(*arguments)
    except Exception as error:
        told = _told(error, arguments)
        if told is None:
            raise
        raise told.with_traceback(None) from None


class _Here(threading.local):
    """Of this thread. tries: a call that did not compile is tried in eager mode; a call inside it runs there, too."""

    tries = False


_here = _Here()

# By what stays when an epilogue is made anew for each call, such as a lambda in `forward`: its code.
_kept: WeakKeyDictionary[Any, dict[Hashable, _Calls]] = WeakKeyDictionary()


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


_numbers = itertools.count()


class _Calls:
    """`with_epilogue`, compiled once for each variation of the epilogue: its numbers, its functions, its gradients.

    Dynamo stops at the ninth. Here they may be the layers of a model, so it gets as much room as it has at most; once
    that is full, all are forgotten.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = f"linear{next(_numbers)}"
        self._begin()

    def _begin(self) -> None:
        # Dynamo keeps what it compiled, and counts it, by code object; which sizes change, by the code's name.
        code = with_epilogue.__code__.replace(co_name=self._name)
        function = FunctionType(code, with_epilogue.__globals__, "linear")
        self._run = torch.compile(function, backend=self._backend, fullgraph=True)

    def _backend(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        products = module.graph.find_nodes(op="call_function", target=F.linear)
        first = call_of(products[0]) if products else None  # it is traced before the epilogue
        check = functools.partial(one_kernel, call=first)
        return backend.fusewright(module, inputs, options=asdict(self._settings), check=check)

    def __call__(self, *arguments: Any) -> Any:
        with _Quiet():
            try:
                return self._run(*arguments)
            except FailOnRecompileLimitHit:
                return self._with_room(arguments)

    def _with_room(self, arguments: tuple[Any, ...]) -> Any:
        # Up to torch 2.11 all threads share the limit: one at a time may change it, and only to compile.
        with _limit, config.patch(recompile_limit=config.accumulated_recompile_limit):
            try:
                return self._run(*arguments)
            except FailOnRecompileLimitHit:
                self._begin()
                return self._run(*arguments)


_limit = threading.RLock()  # a custom operator in an epilogue may make a call of its own

_LOGS = [logging.getLogger(f"torch.{name}") for name in ("_dynamo.convert_frame", "_subclasses.fake_tensor")]


class _Quiet:
    """Drops this thread's warnings of the recompile limit, and tracebacks of an epilogue that fails when traced."""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        for log in _LOGS:
            log.addFilter(self._keep)

    def __exit__(self, *_: object) -> None:
        for log in _LOGS:
            log.removeFilter(self._keep)

    def _keep(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or threading.get_ident() != self._thread


def _told(error: Exception, arguments: tuple[Any, ...]) -> Exception | None:
    """A failure to compile in terms of what the user wrote; None if it is something else."""
    if not isinstance(error, (TorchDynamoException, AttributeError)):
        return None
    failure = _fails_in_eager(arguments)
    if failure is not None:
        return failure
    if isinstance(error, BackendCompilerFailed) and isinstance(error.inner_exception, FusewrightError):
        return no_product(*arguments[:2]) or error.inner_exception
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return CannotFuse(
            "Dynamo does not trace fusewright.linear from inside a transform of torch.func, such as vmap or grad; "
            "transform a function that fusewright.compile has compiled, or compile what transforms"
        )
    if isinstance(error, Unsupported):
        return CannotFuse(f"the epilogue is not a function of tensors alone: {first_paragraph(error)}")
    return None


_NOT_THE_USERS = tuple(f"{Path(m.__file__).parent}{os.sep}" for m in (torch, fusewright) if m.__file__)


def _fails_in_eager(arguments: tuple[Any, ...]) -> EagerFailure | None:
    _here.tries = True
    try:
        with torch.no_grad(), _WithoutEffects():  # type: ignore[no-untyped-call]
            with_epilogue(*arguments)
    except _Effect:
        return None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f for f in frames if not f.filename.startswith(_NOT_THE_USERS)]
        where = f" ({lines[-1].filename}:{lines[-1].lineno})" if lines else ""
        what = f"epilogue(F.linear(x, weight, bias), *operands) fails in eager mode{where}"
        return EagerFailure(f"{what}: {type(error).__name__}: {error}\nLet it run in plain PyTorch first.")
    finally:
        _here.tries = False
    return None


class _Effect(Exception):
    """An operator overwrites a tensor or draws random numbers."""


class _WithoutEffects(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops before the state of tensors or generators changes: the caller may catch the error and go on."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable or torch.Tag.nondeterministic_seeded in function.tags:
            raise _Effect
        return function(*args, **(kwargs or {}))
