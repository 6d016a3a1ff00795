"""What a compiled graph is called with, brought into the form that it was compiled for: kernels take that on trust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusewright.capture.fx import host_numbers
from fusewright.capture.metadata import size_of, type_of
from fusewright.errors import UnexpectedTensor
from fusewright.ir.graph import TensorType, contiguous, same_layout
from fusewright.ir.size import evaluate_typical

Run = Callable[..., Any]
Bring = Callable[[Any], Any]

_PLAIN = (Tensor, nn.Parameter)


def bringing(run: Run, graph: fx.GraphModule, device: torch.device, *, backward: bool) -> Run:
    """`run`, a compiled `graph`, for the arguments that come.

    Numbers on the CPU, as which Python floats that change come, are brought to `device`. Dynamo guards the layout of a
    forward's arguments. Those of a backward are whatever hooks on saved tensors and the loss make of them, so each is
    laid out as its placeholder says. Raises UnexpectedTensor for what cannot be, and for dual tensors.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    numbers = host_numbers(graph) if device.type != "cpu" else []
    changes: list[tuple[int, Bring]] = [(i, lambda t: t.to(device, non_blocking=True)) for i in numbers]
    for i, placeholder in enumerate(placeholders):
        value = placeholder.meta.get("val")
        if not isinstance(value, Tensor) or i in numbers:
            continue
        if backward:
            changes.append((i, lay_out(value) or materialised))
        elif value.is_neg() or value._is_zerotensor():
            changes.append((i, materialised))

    places = _changing(placeholders) if backward else []

    def call(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_duals(arguments)
        if not changes:
            return run(*arguments)
        brought = list(arguments)
        for i, bring in changes:
            brought[i] = bring(brought[i])
        if places:
            _agree(brought, places)
        return run(*brought)

    return call


def _changing(placeholders: Sequence[fx.Node]) -> list[tuple[Any, int, int | None]]:
    """Every size that changes and is given several times: its symbol, the argument, and the dimension of a tensor."""
    found: list[tuple[Any, int, int | None]] = []
    for i, placeholder in enumerate(placeholders):
        value = placeholder.meta.get("val")
        type = type_of(value)
        sizes = type.shape if type else (size_of(value),)
        found += [(s, i, d if type else None) for d, s in enumerate(sizes) if isinstance(s, sympy.Symbol)]
    return found if len(found) > len({symbol for symbol, *_ in found}) else []


def _agree(arguments: Sequence[Any], places: Sequence[tuple[Any, int, int | None]]) -> None:
    known: dict[Any, int] = {}
    for symbol, i, dim in places:
        size = arguments[i] if dim is None else arguments[i].shape[dim]
        if known.setdefault(symbol, size) != size:
            shapes = ", ".join(str(list(a.shape)) for a in arguments if isinstance(a, Tensor))
            raise UnexpectedTensor(
                f"the backward of a compiled graph was given tensors whose sizes disagree, {known[symbol]} and {size} "
                f"among {shapes}; a hook on saved tensors, or on a gradient, must keep shapes"
            )


def _refuse_duals(arguments: Sequence[Any]) -> None:
    """Derivatives in forward mode would be lost."""
    for a in arguments:
        if isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None:  # type: ignore[no-untyped-call]
            raise UnexpectedTensor(
                "a compiled graph was given a dual tensor, but fusewright compiles gradients in reverse mode only: "
                "call the model without torch.compile where derivatives in forward mode are needed"
            )


def lay_out(fake: Tensor) -> Bring | None:
    """Gives a tensor the layout of a fake one; None where no layout can be told from that. What it returns raises
    UnexpectedTensor."""
    type = type_of(fake)
    assert type is not None
    if fake.layout is not torch.strided:
        return None
    static = all(isinstance(n, int) for n in (*type.shape, *type.stride))
    if not (static or type.dense):
        return None
    order = sorted(range(len(type.shape)), key=lambda d: -evaluate_typical(type.stride[d]))
    packed = not static or same_layout(type, contiguous(type.shape, type.dtype, type.device))
    in_order, back = order == sorted(order), [order.index(d) for d in range(len(order))]

    def call(given: Any) -> Tensor:
        t: Tensor = materialised(given)
        if not _fits(t, type):
            raise UnexpectedTensor(
                f"the backward of a compiled graph was given {t.dtype} {list(t.shape)} on {t.device} for {type.dtype} "
                f"{list(type.shape)} on {type.device}; a hook on saved tensors, or on a gradient, must keep them"
            )
        if packed:
            return t.contiguous() if in_order else t.permute(order).contiguous().permute(back)
        if t.stride() == type.stride:
            return t
        return torch.empty_strided(t.shape, type.stride, dtype=t.dtype, device=t.device).copy_(t)

    return call


def _fits(t: Tensor, type: TensorType) -> bool:
    """Whether a tensor is what a type says but for its layout; sizes that change may be any."""
    if t.dtype != type.dtype or t.device != type.device:
        return False
    return t.shape == type.shape or (
        t.dim() == len(type.shape)
        and all(n == m for n, m in zip(t.shape, type.shape, strict=True) if isinstance(m, int))
    )


def materialised(t: Any) -> Any:
    """A tensor whose memory holds what it says: no lazy negation, no zeros without memory."""
    if type(t) not in _PLAIN and isinstance(t, Tensor) and is_traceable_wrapper_subclass(t):
        raise UnexpectedTensor(
            f"the backward of a compiled graph was given a {type(t).__name__}, but it was compiled for plain tensors; "
            "call the model without torch.compile there"
        )
    if isinstance(t, Tensor) and (t.is_neg() or t._is_zerotensor()):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
    return t


def tangents(graph: fx.GraphModule) -> Sequence[Tensor]:
    """The fake gradients that a backward takes, which come last."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    return [p.meta["val"] for p in placeholders if "tangents" in p.name]
