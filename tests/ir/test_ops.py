"""Every row of the operator table against the ATen operator of its name: a new row is tested by being there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fusewright.capture.fx import from_fx
from fusewright.ir import reference, rules
from fusewright.ir.ops import ROWS
from graphs import check

SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.5, -2.5, 3.0, -3.0, 6.0]
SPECIAL += [1e-30, -1e-30, 1e30, -1e30, 0.1, -0.9, 19.0, 21.0, -40.0, 88.8, -104.0]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
# ATen multiplies by 1/6 rounded to float32.
INEXACT = {"hardsigmoid_backward": 1e-7}
NAN_AT_INFINITY = {"aten::gelu"}
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
MIXED = [
    (torch.float32, torch.int64),
    (torch.bfloat16, torch.float32),
    (torch.int32, torch.int64),
    (torch.bool, torch.float16),
    (torch.uint8, torch.int8),
]
# Numbers for arguments of these names; anything else that is a number gets NUMBER.
NUMBERS: dict[str, list[Any]] = {
    "exponent": [2, 3, 0.5, -0.5, -1, -2, 2.7, 0],
    "approximate": ["none", "tanh"],
    "rounding_mode": [None, "floor", "trunc"],
    "is_result": [False],
    "self_is_result": [False],
    "min": [None, -0.5],
    "max": [0.5],
    "min_val": [-0.5],
    "max_val": [2.0],
    "threshold": [2.0],
    "alpha": [1, 2],
    "weight": [0.3, 0.8],
    "lambd": [0.5],
    "other": [2, -3, 1.5],
    "negative_slope": [0.1, 0.0, -0.5],
    "decimals": [0, 2, -1],
    "eps": [None, 0.1],
    "n": [0, 1, 2, 3],
}
NUMBER: list[Any] = [1, 1.5]


def overloads(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name)
    found = []
    for overload in packet.overloads():
        schema = getattr(packet, overload)._schema
        plain = [str(r.type) for r in schema.returns] == ["Tensor"] and not any(a.alias_info for a in schema.arguments)
        if plain and not any(a.name == "out" for a in schema.arguments):
            found.append(getattr(packet, overload))
    return found


def values(dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    if dtype == torch.bool:
        return torch.tensor([True, False])
    return torch.tensor([0, 1, 2, 3, 7, 100] + ([-1, -2, -7] if dtype != torch.uint8 else []), dtype=dtype)


def samples(overload: Any, dtypes: tuple[torch.dtype, ...]) -> Iterator[list[Any]]:
    """Positional arguments: tensors that broadcast against each other to every pair of values, and some numbers."""
    choices: list[list[Any]] = []
    tensors = 0
    for argument in overload._schema.arguments:
        type = str(argument.type)
        if type in ("Tensor", "Optional[Tensor]"):
            dtype = dtypes[tensors % len(dtypes)]
            flat = values(torch.bool if argument.name in ("condition", "mask") else dtype)
            if tensors and overload._schema.name.endswith("_backward"):
                # Gradients at NaN and −0 differ between ATen's own kernels.
                flat = flat[~flat.isnan() & ~((flat == 0) & flat.signbit())]
            if "polynomial" in overload._schema.name and dtype.is_floating_point:
                # Of NaN, ATen returns what memory held; a degree beyond int64 is undefined.
                flat = flat[flat.abs() < 2**62] if argument.name == "n" else flat[~flat.isnan()]
            if tensors == 2:
                flat = flat[:6]  # three large factors overflow or not by the order of rounding
            choices.append([flat.reshape(-1, *[1] * tensors)])
            tensors += 1
        else:
            choices.append(NUMBERS.get(argument.name, NUMBER))
    combinations = itertools.product(*choices)
    everything = dtypes in ((torch.float32,), (torch.int64,))
    for combination in itertools.islice(combinations, None if everything else 2):
        yield list(combination)


def traced(overload: Any, arguments: list[Any]) -> Any:
    """The graph of one call; tensors are its inputs."""
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        filled = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return [call(overload, filled)]

    tensors = [arguments[i] for i in places]
    graph = from_fx(make_fx(run, tracing_mode="fake")(*tensors))
    rules.check(graph)
    return graph, tensors


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    tolerance = max(TOLERANCE.get(expected.dtype, 0), INEXACT.get(name, 0))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def call(overload: Any, arguments: list[Any]) -> torch.Tensor:
    named = [(a, v) for a, v in zip(overload._schema.arguments, arguments, strict=True)]
    positional = [v for a, v in named if not a.kwarg_only]
    return overload(*positional, **{a.name: v for a, v in named if a.kwarg_only})  # type: ignore[no-any-return]


def eager(overload: Any, arguments: list[Any]) -> torch.Tensor | None:
    """None where ATen itself refuses. 16-bit floats are computed in float32 and rounded once; what ATen's vector code
    makes NaN at infinity on some CPUs (AVX-512), in float64.

    Beside a wider operand too: ldexp multiplies by a power of two rounded to its exponent's dtype.
    """
    try:
        call(overload, [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments])
        result = call(overload, arguments)
        narrow = [isinstance(a, torch.Tensor) and a.is_floating_point() and a.itemsize == 2 for a in arguments]
        if overload._schema.name in NAN_AT_INFINITY:
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
            return call(overload, wide).to(result.dtype)
        if result.is_floating_point() and any(narrow):
            wide = [a.float() if n else a for a, n in zip(arguments, narrow, strict=True)]
            return call(overload, wide).to(result.dtype)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return result


@pytest.mark.parametrize("name", ROWS)
def test_row_computes_what_aten_computes(name: str) -> None:
    compared = 0
    for overload in overloads(name):
        count = sum(str(a.type) == "Tensor" for a in overload._schema.arguments)
        kinds: list[tuple[torch.dtype, ...]] = [(d,) for d in DTYPES]
        if count > 1 and not name.endswith("_backward"):
            kinds += MIXED + [pair[::-1] for pair in MIXED]
        for dtypes in kinds:
            for arguments in samples(overload, dtypes):
                expected = eager(overload, arguments)
                if expected is None or expected.dtype not in {*DTYPES, torch.int8}:
                    continue
                graph, tensors = traced(overload, arguments)
                if any(n.op == "aten" for n in graph.nodes()):
                    assert not ROWS[name].widens and expected.itemsize == 2, f"{overload}{dtypes} was left to ATen"
                    continue
                try:
                    assert_equal(reference.run(graph, tensors)[0], expected, name)
                except AssertionError as error:
                    numbers = [a for a in arguments if not isinstance(a, torch.Tensor)]
                    raise AssertionError(f"{overload} {dtypes} {numbers}: {error}") from None
                compared += 1
    assert compared >= 2


# `X_backward` differentiates `X`; these rows are the derivative of an operator of another name.
FORWARD = {"threshold_backward": "relu"}
BACKWARD = [name for name in ROWS if name.endswith("_backward") and name != "native_dropout_backward"]


@pytest.mark.parametrize("name", BACKWARD)
def test_gradient_through_the_joint_graph(name: str) -> None:
    forward = getattr(torch.ops.aten, FORWARD.get(name, name.removesuffix("_backward"))).default
    x = torch.linspace(-4, 4, 45, dtype=torch.float64).reshape(5, 9) + 0.01
    tolerance = INEXACT.get(name, 1e-9)
    record = check(lambda x: forward(x * 2) * 3, x.requires_grad_(), tolerance=tolerance)
    assert len(record.plans) == 2
    assert not record.fallbacks
    assert [len(p.steps) for p in record.plans] == [1, 1]


@pytest.mark.parametrize("shapes", [((4, 1), (5,)), ((), (3,)), ((1, 5, 1), (4, 1, 3)), ((0, 3), (1, 3)), ((2,), (2,))])
def test_operands_broadcast(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    record = check(lambda x, y: torch.where(x > y, x * y, y - x), x, y)
    assert not record.plans[0].fallbacks


@pytest.mark.parametrize("number", [2, 2.5, True, -1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.bfloat16, torch.float64])
def test_numbers_promote_as_in_eager(number: Any, dtype: torch.dtype) -> None:
    x = values(dtype)
    check(lambda x: (x * number, x + number, x > number, torch.where(x > 0, x, number)), x, tolerance=8e-3)


def test_scalar_tensors_promote_as_in_eager() -> None:
    x, s = torch.randn(5, dtype=torch.float32), torch.tensor(1.1, dtype=torch.float64)
    check(lambda x, s: (x * s, s + x, torch.maximum(x, s.float())), x, s, tolerance=1e-6)
