"""Activations of every 16-bit number: as if float's own functions had been rounded, within a thirtieth of a unit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "softplus": F.softplus,
    "elu": F.elu,
    "celu": partial(F.celu, alpha=0.7),
}
DEVICES = [pytest.param("cpu", id="simulator"), pytest.param("cuda", marks=pytest.mark.gpu)]


def exact(name: str, x: torch.Tensor) -> torch.Tensor:
    """In float64, where eager's GELU cancels for negative arguments."""
    if name == "gelu":
        return x * torch.special.log_ndtr(x).exp()
    if name == "gelu_tanh":
        return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return ACTIVATIONS[name](x)


def unit(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A unit in the last place of `dtype` at x, in float64."""
    info = torch.finfo(dtype)
    exponent = x.abs().clamp(min=info.smallest_normal).frexp().exponent - 1
    return info.eps * 2.0 ** exponent.double()


def computed(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """By fusewright. Dynamo leaves a function alone that is not written in Python."""
    torch._dynamo.reset()
    options = {"simulate": x.device.type == "cpu"}
    return torch.compile(lambda x: function(x), backend="fusewright", options=options, fullgraph=True)(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_number(name: str, dtype: torch.dtype, device: str) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).to(device)
    found = computed(ACTIVATIONS[name], x)
    assert found.dtype == dtype
    right = exact(name, x.double())
    assert torch.equal(found.isnan(), right.isnan())
    infinite = right.isinf()
    assert torch.equal(found[infinite].double(), right[infinite])
    found, right, x = (t[right.isfinite()] for t in (found, right, x))
    error = (found.double() - right).abs()
    limit = unit(right, dtype) * (0.5 + 1 / 30)
    # What is below float's own normal numbers is 0, and so is GELU far from 0, as in eager.
    limit = torch.maximum(limit, torch.tensor(2.0**-24 if "gelu" in name and dtype == torch.bfloat16 else 2.0**-118))
    assert (error <= limit).all(), (x[error > limit][:5], (error / unit(right, dtype)).max())
