"""The doors that Python code comes in by: `compile` for a whole model, `linear` for one fused call.

Both are `torch.compile` with our backend: Dynamo traces, guards and caches, and everything after it is as for
`torch.compile(model, backend="fusewright")`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusewright.errors import InvalidSetting
from fusewright.runtime.frozen import thaw
from fusewright.settings import Settings

__all__ = ["compile", "linear", "thaw"]


def compile(
    model: Callable[..., Any] | None = None, *, fullgraph: bool = False, dynamic: bool | None = None, **settings: Any
) -> Any:
    """Compiles a module or function with fusewright; without `model`, returns a decorator.

    fullgraph, dynamic: as for `torch.compile`. settings: the fields of `fusewright.settings.Settings`. Raises
    UnknownSetting, InvalidSetting (for what is no model, too), UnknownArch; the first call compiles, and raises what
    the backend raises.
    """
    Settings.of(settings, also=("fullgraph", "dynamic"))
    if not (model is None or callable(model)):
        what = f"{model!r} of type {type(model).__name__}"
        raise InvalidSetting(
            f"fusewright.compile takes a module or a function, not {what}; model files are for `fusewright optimize`"
        )
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
    the call fails in plain PyTorch, too; UnknownSetting, InvalidSetting, UnknownArch, MixedDevices; FrozenGradients and
    CannotReplay where `freeze` or `cuda_graphs` is set.
    """
    from fusewright.capture import epilogues  # imports Dynamo

    arguments = (x, weight, bias, _as_it_is if epilogue is None else epilogue, operands)
    if torch.compiler.is_compiling():
        return epilogues.with_epilogue(*arguments)
    return epilogues.call(arguments, Settings.of(settings) if settings else _DEFAULT)


_DEFAULT = Settings()


def _as_it_is(y: Tensor) -> Tensor:
    return y
