"""Errors of float32 products beside cuBLAS's on the same tensors, by inputs and depth. Writes results/accuracy.json.

    python benchmarks/accuracy.py [--quick] [--seconds S]

Errors are against float64. "float32": our split products (F16x3; below their least depth the CUDA cores) over cuBLAS
SGEMM. "tf32": F16x1 over cuBLAS with TF32 allowed. There each matrix has one exponent; "…, by line": w lies along K, as
a Linear's weight does, and each row has its own. "tf32, as they lie": floats that copies round to TF32. Each figure is
the worst ratio of all seeds; `bias` is ours alone, the relative signed mean of the error.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor

import measure
from fusewright import compiler
from fusewright.capture.fx import from_fx
from fusewright.kernels.choose import candidates
from fusewright.kernels.gemm_sm90 import HalfProducts
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import GpuTarget

# cuBLAS splits K where tiles are few, and then sums in shorter chains: these are enough tiles.
M, N = 2048, 2048
DEPTHS = (1, 7, 16, 31, 64, 128, 129, 512, 1000, 4096, 16384)
QUICK_DEPTHS = (31, 128, 512, 4096)
SEEDS = 5
EXACT, HALF_ULP = 1e-12, 2.0**-24

Draw = Callable[[int], tuple[Tensor, Tensor]]


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda")


def uniform(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, device="cuda")


def powers(rows: int, columns: int, largest: int) -> Tensor:
    return torch.exp2(torch.randint(-largest, largest + 1, (rows, columns), device="cuda").float())


def outliers(k: int) -> tuple[Tensor, Tensor]:
    x = normal(M, k)
    x[:, torch.randperm(k, device="cuda")[: max(1, k // 100)]] *= 100
    return x, normal(k, N)


def spread(largest: int) -> Draw:
    return lambda k: (normal(M, k) * powers(M, k, largest), normal(k, N) * powers(k, N, largest))


def opposed(largest: int) -> Draw:
    """One operand is large where the other is small."""

    def draw(k: int) -> tuple[Tensor, Tensor]:
        scale = powers(1, k, largest)
        return normal(M, k) * scale, normal(k, N) / scale.T

    return draw


def tiny_rows(k: int) -> tuple[Tensor, Tensor]:
    x = normal(M, k)
    x[::7] *= 1e-12
    return x, normal(k, N)


def cancelling(k: int) -> tuple[Tensor, Tensor]:
    x, w = normal(M, k), normal(k, N)
    half = k // 2
    x[:, half : 2 * half], w[half : 2 * half] = x[:, :half], -w[:half] * (1 + 1e-4 * normal(half, N))
    return x, w


def integers(k: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(-8, 9, shape, device="cuda").float() for shape in ((M, k), (k, N)))  # type: ignore[return-value]


FAMILIES: dict[str, Draw] = {
    "normal": lambda k: (normal(M, k), normal(k, N)),
    "uniform(-1, 1)": lambda k: (2 * uniform(M, k) - 1, 2 * uniform(k, N) - 1),
    "uniform(0, 1)": lambda k: (uniform(M, k), uniform(k, N)),
    "after ReLU": lambda k: (torch.relu(normal(M, k)), normal(k, N)),
    "outlier columns ×100": outliers,
    "powers 2^±10": spread(10),
    "powers 2^±20": spread(20),
    "powers 2^±60": spread(60),
    "opposed 2^±10": opposed(10),
    "opposed 2^±20": opposed(20),
    "tiny rows": tiny_rows,
    "cancelling": cancelling,
    "identity": lambda k: (torch.eye(M, k, device="cuda"), normal(k, N)),
    "integers": integers,
}


class Always(HalfProducts):
    """Reads halves wherever sums of them are accurate enough, whatever would be faster."""

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        return max(super().gain(m, n, k, direct), -1.0) + 1.0

    def split(self, elements: float) -> float:
        return 0.0


class Never(HalfProducts):
    """Reads no halves."""

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        return -1.0


@dataclass(frozen=True)
class Method:
    """along: the right operand lies along K."""

    tf32: bool = False
    along: bool = False
    kind: type[HalfProducts] = Always

    def operand(self, w: Tensor) -> Tensor:
        return w.T.contiguous() if self.along else w


METHODS = {
    "float32": Method(),
    "float32, by line": Method(along=True),
    "tf32": Method(tf32=True),
    "tf32, by line": Method(tf32=True, along=True),
    "tf32, as they lie": Method(tf32=True, along=True, kind=Never),
}


def ours(method: Method) -> Callable[[Tensor, Tensor], Tensor]:
    """The product by the Hopper family, or by the CUDA cores where it refuses."""
    device = torch.device("cuda", 0)
    target = GpuTarget.of(device)

    def compile_fx(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        plan = compiler.plan(from_fx(module), (), method.kind(target.chip, method.tf32, library=False))
        found = candidates(plan, target.chip, library=False, tensor_maps=True)
        chosen = {n: next((p for p in ps if p.family == "gemm_sm90"), ps[0]) for n, ps in found.items()}
        return make_boxed_func(Executable(plan, chosen, target, device))

    def product(x: Tensor, w: Tensor) -> Tensor:
        return x @ (w.T if method.along else w)

    return aot_function(product, fw_compiler=compile_fx, inference_compiler=compile_fx)  # type: ignore[no-any-return]


def errors(found: Tensor, exact: Tensor, size: Tensor) -> dict[str, float]:
    """componentwise: largest |error| / (|A|·|B|); the others relative to the result, `bias` signed."""
    error = found.double() - exact
    finite = error.isfinite() & exact.isfinite() & found.isfinite()
    error, exact, size = (torch.where(finite, t, 0.0) for t in (error, exact, size))
    own = (error.abs() / exact.abs()).flatten()[:: (1 << 2) | 1]
    own = own[own.isfinite()].sort().values
    places = {"median": 0.5, "p99.9": 0.999}
    return {
        "componentwise": float((error.abs() / size.clamp(min=1e-300)).max()),
        "frobenius": float(error.norm() / exact.norm().clamp(min=1e-300)),
        **{name: float(own[int(q * (len(own) - 1))]) if len(own) else 0.0 for name, q in places.items()},
        "bias": float((error * exact.sign()).mean() / exact.abs().mean().clamp(min=1e-300)),
    }


def one(family: str, k: int, seeds: int, calls: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> dict[str, Any]:
    """By method and metric: the worst ratio to cuBLAS's error; `bias`: ours."""
    worst: dict[str, dict[str, float]] = {name: {} for name in METHODS}
    for seed in range(seeds):
        torch.manual_seed(1000 * k + seed)
        x, w = FAMILIES[family](k)
        exact, size = x.double() @ w.double(), x.double().abs() @ w.double().abs()
        theirs = {}
        for allowed in (False, True):
            torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
            theirs[allowed] = errors(x @ w, exact, size)
        for name, method in METHODS.items():
            mine = errors(calls[name](x, method.operand(w)), exact, size)
            ratios = {m: _ratio(mine[m], theirs[method.tf32][m]) for m in mine if m != "bias"}
            for metric, value in (ratios | {"bias": abs(mine["bias"])}).items():
                worst[name][metric] = max(worst[name].get(metric, 0.0), value)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return worst


def _ratio(ours: float, theirs: float) -> float:
    """Where cuBLAS is exact (a product of one factor, integers), half an ulp is the yardstick."""
    if theirs < EXACT:
        return ours / HALF_ULP if ours >= EXACT else 1.0
    return ours / theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four depths, two seeds")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no other product after this time")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    depths, seeds = (QUICK_DEPTHS, 2) if options.quick else (DEPTHS, SEEDS)
    report: dict[str, Any] = {"environment": measure.environment(), "size": [M, N], "seeds": seeds, "products": {}}
    for k in depths:
        calls = {name: ours(method) for name, method in METHODS.items()}
        for family in FAMILIES:
            if time.monotonic() > end:
                continue
            report["products"].setdefault(family, {})[str(k)] = one(family, k, seeds, calls)
        measure.write("accuracy", report)
        print(
            k,
            json.dumps(
                {f: _short(by_depth[str(k)]) for f, by_depth in report["products"].items() if str(k) in by_depth}
            ),
        )


def _short(found: dict[str, dict[str, float]]) -> list[str]:
    return [f"{v['frobenius']:.2f} {v['componentwise']:.2f} {v['bias']:.0e}" for v in found.values()]


if __name__ == "__main__":
    main()
