"""What a compiled graph is called with, brought into the form that it was compiled for: kernels take that on trust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusewright.capture.fx import host_numbers
from fusewright.capture.metadata import type_of
from fusewright.errors import UnexpectedTensor
from fusewright.ir.graph import TensorType, contiguous
from fusewright.ir.size import same

Run = Callable[..., Any]
Bring = Callable[[Any], Any]

_PLAIN = (Tensor, nn.Parameter)


def bringing(run: Run, graph: fx.GraphModule, device: torch.device, *, backward: bool) -> Run:
    """`run`, a compiled `graph`, for the arguments that come.

    Numbers on the CPU, as which Python floats that change come, are brought to `device`. Dynamo guards the layout of a
    forward's arguments. Those of a backward are whatever hooks on saved tensors and the loss make of them, so each is
    laid out as its placeholder says; raises UnexpectedTensor for what cannot be.
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
    if not changes:
        return run

    def call(*arguments: Any) -> Any:
        brought = list(arguments)
        for i, bring in changes:
            brought[i] = bring(brought[i])
        return run(*brought)

    return call


def lay_out(fake: Tensor) -> Bring | None:
    """Gives a tensor the layout of a fake one; None where no layout can be told from that."""
    type = type_of(fake)
    assert type is not None
    if fake.layout is not torch.strided:
        return None
    dtype = type.dtype
    plain = contiguous(type.shape, dtype, type.device)
    if all(same(a, b) for a, b in zip(type.stride, plain.stride, strict=True)):

        def packed(t: Tensor) -> Tensor:
            t = materialised(t)
            return t.contiguous() if t.dtype == dtype else _refuse(t, type)

        return packed
    if not all(isinstance(n, int) for n in (*type.shape, *type.stride)):
        return None
    shape, stride = type.shape, type.stride

    def strided(t: Tensor) -> Tensor:
        t = materialised(t)
        if t.dtype != dtype or t.shape != shape:
            _refuse(t, type)
        if t.stride() == stride:
            return t
        return torch.empty_strided(shape, stride, dtype=dtype, device=t.device).copy_(t)

    return strided


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


def _refuse(t: Tensor, type: TensorType) -> Tensor:
    raise UnexpectedTensor(
        f"the backward of a compiled graph was given {t.dtype} {list(t.shape)} for {type.dtype} "
        f"{list(type.shape)}; a hook on saved tensors, or on a gradient, must keep dtypes and shapes"
    )


def tangents(graph: fx.GraphModule) -> Sequence[Tensor]:
    """The fake gradients that a backward takes, which come last."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    return [p.meta["val"] for p in placeholders if "tangents" in p.name]
