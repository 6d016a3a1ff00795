"""What the tests of the whole compiler on a GPU share: the model, compilation, oracles and what they look at."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright import compiler
from fusewright.runtime.executable import Executable
from fusewright.tools.comparison import GRADIENT, Judge

DEVICE = "cuda"
OPTIONS: dict[str, Any] = {}  # passed to every compilation
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL, FULL = (256, 512, 768), (1024, 8192, 8192)  # batch, inputs, outputs


class Headline(nn.Module):
    """The example architecture."""

    def __init__(self, inputs: int, outputs: int, multiplier: float = 2.0, slope: float = 0.1) -> None:
        super().__init__()
        self.gemm = nn.Linear(inputs, outputs)
        self.multiplier = multiplier
        self.activation = nn.LeakyReLU(slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.gemm(x) * self.multiplier)


def headline(sizes: tuple[int, int, int] = SMALL, dtype: torch.dtype = torch.float32, **settings: float) -> nn.Module:
    return Headline(sizes[1], sizes[2], **settings).to(DEVICE, dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Tensor:
    return torch.randn(shape, device=device or DEVICE).to(dtype)


def compiled(model: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend="fusewright", fullgraph=True, dynamic=dynamic, options=OPTIONS | options)


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Products may round to TF32. (pytest's monkeypatch cannot undo it: torch's flags are no plain attributes.)"""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextmanager
def building() -> Iterator[list[Executable]]:
    """Collects the executables that are built inside, in order: a graph's forward before its backward."""
    original, built = compiler.build, []

    def build(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        built.append(getattr(made, "executable", made))
        return made

    compiler.build = build
    try:
        yield built
    finally:
        compiler.build = original


def launches(executable: Executable) -> int:
    return sum(len(p.launches) + (p.library is not None) for p in executable.programs.values())


def gradients(call: Any, model: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The output of one forward and the gradients of one backward, by name. `call` is `model` or its compilation."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = call(x)
    y.backward(g)
    parameters = {GRADIENT + name: p.grad for name, p in model.named_parameters()}
    return {"output": y.detach(), GRADIENT + "x": x.grad, **parameters}


def oracle(model: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    exact = copy.deepcopy(model).double()
    return gradients(exact, exact, x.double(), g.double())


def problems(call: Any, model: nn.Module, seeds: int, batch: int, inputs: int, outputs: int) -> tuple[str, ...]:
    """What is wrong with a compilation of `model`, by several metrics against float64, beside eager's errors."""
    judge = Judge()
    for seed in range(seeds):
        torch.manual_seed(seed)
        dtype = next(model.parameters()).dtype
        x, g = random(batch, inputs, dtype=dtype), random(batch, outputs, dtype=dtype)
        judge.add(gradients(call, model, x, g), gradients(model, model, x, g), oracle(model, x, g))
    return judge.verdict().problems


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal bit for bit, but for NaNs."""
    return all(torch.equal(a[n], b[n]) for n in a) and a.keys() == b.keys()


def distance(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest magnitude."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).abs().max() / exact.abs().max().clamp(min=1e-300))


# What a compiled call may ask ATen for, beside views: memory, and answers about sizes.
ALLOCATIONS = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"})


class AtenSeen(TorchDispatchMode):
    """Records the ATen operators that run inside. compute: those that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.every: list[str] = []
        self.compute: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or torch.compile would run eagerly under this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.every.append(name)
        if not func.is_view and name not in ALLOCATIONS:
            self.compute.append(str(func))
        return func(*args, **(kwargs or {}))
