"""Every operation of which kernels are made, one a kernel, on the simulator and on the GPU; and how far apart they are.

The scalar primitives are those of `ir/primitives.py`: none can be forgotten.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from fusewright.chip import arch_of
from fusewright.codegen.launch import BufferArg, LaunchSpec, SizeArg
from fusewright.ir.primitives import PRIMITIVES
from fusewright.runtime import driver
from fusewright.runtime.nvrtc import cached_cubin
from fusewright.simulator.simulate import Simulator

COUNT = 1 << 20
BLOCKS, THREADS = 128, 256
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_C_TYPES = {torch.float32: "float", torch.float64: "double"}
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}

# Primitives whose results are IEEE's, and those of integers, which have no rounding to compare.
_EXACT = ["add", "sub", "mul", "div", "neg", "abs", "sign", "fmod", "minimum", "maximum", "fmin", "fmax", "copysign",
          "nextafter", "ldexp", "sqrt", "floor", "ceil", "trunc", "round", "lt", "le", "gt", "ge", "eq", "ne",
          "signbit", "where", "cast", "copy"]  # fmt: skip
_INTEGER = ["gcd", "lcm", "and", "or", "xor", "not", "left_shift", "right_shift"]


def _of_primitive(name: str) -> str:
    """The primitive as an expression of a, b and c."""
    if name == "where":
        return "a < b ? b : c"
    return (PRIMITIVES[name].cuda or "{0}").format("a", "b", "c")


# Expressions of a, b and c that give the same bits in both places.
EXACT: Mapping[str, str] = {
    **{name: _of_primitive(name) for name in _EXACT},
    "fused": "fma(a, b, c)",
    "chain": "a * b + c / b",
}
# The same, in other types than the operands': for float32 alone.
CONVERTED: Mapping[str, str] = {
    "half": "__half2float(__float2half_rn(a))",
    "bfloat16": "__bfloat162float(__float2bfloat16_rn(a))",
    "half_product": "__half2float(__hmul(__float2half_rn(a), __float2half_rn(b)))",
    "half_fused": "__half2float(__hfma(__float2half_rn(a), __float2half_rn(b), __float2half_rn(c)))",
    "bfloat16_fused": "__bfloat162float(__hfma(__float2bfloat16_rn(a), __float2bfloat16_rn(b), __nv_bfloat16(c)))",
    "integer": "float(__float2int_rn(a * 1024))",
    "shuffled": "__shfl_xor_sync(~0u, a, 5)",
}
# Held to exact values instead, in both places, by tests/cuda/test_narrow.py; and what is made of erf, which is here.
_NARROW = [p.narrow for p in PRIMITIVES.values() if p.narrow]
_COMPOSED = ["normal_cdf"]
# Transcendental functions: what is left.
CLOSE: Mapping[str, str] = {
    **{name: _of_primitive(name) for name in PRIMITIVES if name not in (*_EXACT, *_INTEGER, *_NARROW, *_COMPOSED)},
    "sigmoid": "T(1) / (T(1) + exp(-a))",
}
# Polynomials of degree b.
POLYNOMIALS = tuple(name for name in CLOSE if name.startswith(("chebyshev", "hermite", "laguerre", "legendre")))
# Of these a result below 1 counts as 1: they are 0 at places that no float is, and terms cancel beside them.
VANISHING = (*POLYNOMIALS, "lgamma", "digamma", "zeta")


@functools.lru_cache(maxsize=2)
def operands(name: str, dtype: torch.dtype, count: int = COUNT) -> list[torch.Tensor]:
    """What `name` is tried on: a quarter each of any bits at all, [-1, 1], a few units around 0, and up to hundreds."""
    generator = torch.Generator().manual_seed(5)
    integer = _INTEGERS[dtype]

    def draw(shift: int) -> torch.Tensor:
        bounds = torch.iinfo(integer)
        bits = torch.randint(bounds.min, bounds.max, (count // 4,), generator=generator, dtype=integer).view(dtype)
        special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-40, 65504, 65520])
        bits[: len(special)] = special.roll(shift).to(dtype)
        unit = torch.rand(count // 4, generator=generator, dtype=dtype) * 2 - 1
        normal, wide = torch.randn(2, count // 4, generator=generator, dtype=dtype)
        return torch.stack([bits, unit, 3 * normal, 60 * wide], 1).flatten()

    a, b, c = draw(0), draw(1), draw(2)
    if name in POLYNOMIALS:
        b = torch.randint(0, 20, (count,), generator=generator).to(dtype)
    elif name == "ldexp":  # an integer of its operand
        b = b.nan_to_num().clamp(-300, 300)
    elif name == "zeta":  # as many terms as its argument is below 9
        a, b = 1 + a.nan_to_num().abs(), b.nan_to_num().clamp(-100, 100)
    elif name == "integer":
        a = a.nan_to_num().clamp(-(2.0**20), 2.0**20)
    return [a, b, c]


def launches(expressions: Mapping[str, str], dtype: torch.dtype) -> list[LaunchSpec]:
    """One source with a kernel for each expression."""
    kernels = []
    for name, expression in expressions.items():
        body = re.sub(r"\b([abc])\b", r"\1[i]", expression)
        kernels.append(
            f'extern "C" __global__ void f_{name}(const T* a, const T* b, const T* c, T* out, int64_t n) {{\n'
            "    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;\n"
            f"    for (int64_t i = first; i < n; i += gridDim.x * blockDim.x) out[i] = T({body});\n}}\n"
        )
    headers = ("vector.cuh", "integer.cuh", "special.cuh")
    head = "".join(f'#include "{name}"\n' for name in headers) + "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"
    source = f"{head}using T = {_C_TYPES[dtype]};\n{''.join(kernels)}"
    buffers = tuple(BufferArg(name, dtype, written=name == "out") for name in ("a", "b", "c", "out"))
    shape = (BLOCKS, 1, 1), (THREADS, 1, 1)
    return [LaunchSpec(f"f_{name}", source, *shape, (*buffers, SizeArg(0))) for name in expressions]


def simulated(
    expressions: Mapping[str, str], dtype: torch.dtype, count: int = COUNT, fill: float = 0.0
) -> list[torch.Tensor]:
    """The results of each expression over `operands`; behind them one more element, which keeps `fill`."""
    specs, results = launches(expressions, dtype), []
    for name, kernel in zip(expressions, Simulator().load(specs), strict=True):
        results.append(torch.full((count + 1,), fill, dtype=dtype))
        kernel([*operands(name, dtype, count), results[-1], count], (BLOCKS,))
    return results


def on_gpu(expressions: Mapping[str, str], dtype: torch.dtype, count: int = COUNT) -> list[torch.Tensor]:
    """As `simulated`, with 0 behind them."""
    specs, results = launches(expressions, dtype), []
    cubin = cached_cubin(specs[0].source, arch_of(torch.cuda.get_device_capability()))
    for name, spec in zip(expressions, specs, strict=True):
        inputs, out = [t.cuda() for t in operands(name, dtype, count)], torch.zeros(count + 1, dtype=dtype).cuda()
        kernel = driver.load(cubin, spec)
        kernel.launch([*(t.data_ptr() for t in inputs), out.data_ptr(), count], (BLOCKS, 1, 1), 0)
        results.append(out.cpu())
    return results


@dataclass(frozen=True)
class Difference:
    """ulps: the most, in steps of the format. same: the share of equal results. nans: how many are NaN in one place
    alone. at: the operands of the largest difference, and the results there, the simulator's first."""

    ulps: int
    same: float
    nans: int
    at: tuple[float, ...]


def compare(name: str, mine: torch.Tensor, theirs: torch.Tensor) -> Difference:
    """Of the simulator's results and the GPU's. Zeros of different signs are 0 ulps apart and not the same."""
    count = len(mine) - 1
    mine, theirs, nan = mine[:-1], theirs[:-1], mine[:-1].isnan()
    both = nan | theirs.isnan()
    steps = _steps(mine, theirs)
    if name in VANISHING:
        small = torch.maximum(mine.abs(), theirs.abs()) < 1
        one = (mine.double() - theirs.double()).abs() / torch.finfo(mine.dtype).eps
        steps = one.where(small, steps)
    steps = steps.where(~both, 0.0)
    at = int(steps.argmax())
    bits = _INTEGERS[mine.dtype]
    equal = (mine.view(bits) == theirs.view(bits)) | (nan & theirs.isnan())
    places = [*(float(x[at]) for x in operands(name, mine.dtype, count)), float(mine[at]), float(theirs[at])]
    return Difference(
        round(float(steps[at])), float(equal.double().mean()), int((nan != theirs.isnan()).sum()), tuple(places)
    )


def _steps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many numbers of the format lie between two, as float64; both infinities are numbers here."""
    magnitudes = [x.abs().view(_INTEGERS[x.dtype]) for x in (one, other)]
    beside, across = (magnitudes[0] - magnitudes[1]).abs().double(), magnitudes[0].double() + magnitudes[1].double()
    return beside.where(one.signbit() == other.signbit(), across)


def differences(expressions: Mapping[str, str], dtype: torch.dtype) -> dict[str, Difference]:
    """Of each expression; both compilers work at once."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(partial(run, expressions, dtype)) for run in (simulated, on_gpu)]
        mine, theirs = (run.result() for run in runs)
    return {name: compare(name, *pair) for name, *pair in zip(expressions, mine, theirs, strict=True)}


def of_dtype(dtype: torch.dtype) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The exact and the close expressions."""
    return (EXACT | CONVERTED if dtype == torch.float32 else EXACT), CLOSE
