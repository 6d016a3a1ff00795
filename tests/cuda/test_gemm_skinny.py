"""GemmSkinny compiles without spills, and gives float64's product for every layout, size and number of splits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from device import TYPES, Kernels, each_device, launch_of, same_bits
from simt import INCLUDES, SIZE

from fusewright.codegen.launch import BufferArg, LaunchSpec
from fusewright.runtime.nvrtc import compile_cubin


@dataclass(frozen=True)
class Skinny:
    """A configuration of GemmSkinny, with what a launch needs of it."""

    element: str = "float"
    rows: int = 16
    major_b: str = "K"

    @property
    def accumulator(self) -> str:
        return "double" if self.element == "double" else "float"

    @property
    def columns(self) -> int:
        return 64 if self.element == "double" else 128

    @property
    def step(self) -> int:
        return 128 // TYPES[self.element].itemsize

    @property
    def panel(self) -> int:
        return 2048 // TYPES[self.accumulator].itemsize

    def launch(self) -> LaunchSpec:
        """Of `source`, with the parameters a, b, M, N, K, k per split, bias, out, mask; line strides follow a and b."""
        element, accumulator = TYPES[self.element], TYPES[self.accumulator]
        written = BufferArg("out", accumulator, written=True), BufferArg("mask", torch.uint8, written=True)
        operands = [arg for name in "ab" for arg in (BufferArg(name, element), SIZE)]
        args = *operands, SIZE, SIZE, SIZE, SIZE, BufferArg("bias", accumulator), *written
        shared = self.rows * 2048 + 4 * self.columns * 8 * 16
        return launch_of(self.source(), 256, *args, shared_bytes=shared)

    def source(self) -> str:
        """out = a · b + bias of the splits' rows, and the bits of what is positive: [splits, M, ceil(N / 8)] bytes."""
        return f"""{INCLUDES.get(self.element, "")}#include "gemm_skinny.cuh"

using Element = {self.element};
using Accumulator = {self.accumulator};

struct Epilogue {{
    const Accumulator* __restrict__ bias;
    Accumulator* __restrict__ out;
    uint8_t* __restrict__ mask;
    int64_t N;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const Accumulator (&sums)[V]) const {{
        Accumulator values[V];
        bool positive[V];
        fusewright::load(values, bias + n, 1, count);
#pragma unroll
        for (int i = 0; i < V; ++i) {{
            values[i] += sums[i];
            positive[i] = values[i] > 0;
        }}
        fusewright::store(out + m * N + n, 1, values, count);
        fusewright::store_bits(mask + m * ((N + 7) / 8), n, positive, count);
    }}
}};

using Gemm = fusewright::GemmSkinny<Element, Accumulator, {self.rows}, fusewright::Major::{self.major_b}>;
static_assert(Gemm::kColumns == {self.columns} && Gemm::kPanel == {self.panel} && Gemm::kStep == {self.step});

extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
kernel(const Element* __restrict__ a, int64_t a_row_stride, const Element* __restrict__ b, int64_t b_line_stride,
       int64_t M, int64_t N, int64_t K, int64_t k_per_split, const Accumulator* __restrict__ bias,
       Accumulator* __restrict__ out, uint8_t* __restrict__ mask) {{
    Gemm::run(a, a_row_stride, b, b_line_stride, M, N, K, k_per_split, Epilogue{{bias, out, mask, N}});
}}
"""


ALL = [
    Skinny(element, rows, major)
    for element in ("float", "__half", "__nv_bfloat16", "double")
    for rows in ((8,) if element == "double" else (8, 16))
    for major in ("K", "MN")
]
SCHEDULES = {"schedules": 2}
# Those that need the most registers; bfloat16 needs what float16 does.
TIGHT = [s for s in ALL if (s.rows == 16 or s.element == "double") and s.element != "__nv_bfloat16"]
KERNELS = Kernels(skinny.launch() for skinny in ALL)


@pytest.mark.parametrize(
    ("skinny", "arch"), [*((s, "sm_90a") for s in TIGHT), *((s, "sm_80") for s in TIGHT[:2])], ids=str
)
def test_fits_in_registers(skinny: Skinny, arch: str) -> None:
    resources = compile_cubin(skinny.source(), arch).resources["kernel"]
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)


def lines(count: int, length: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """A view [count, length] into a larger tensor that is NaN elsewhere; its lines start at multiples of 16 bytes."""
    values = torch.rand(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    whole = torch.full((count + 1, (length // 8 + 2) * 8), torch.nan, device=device, dtype=dtype)
    return whole[:count, :length].copy_(values.to(dtype))


def product(
    skinny: Skinny, shape: tuple[int, int, int], splits: int, device: str, **options: int
) -> tuple[torch.Tensor, ...]:
    """Runs a product of random matrices: a, b [K, N], bias, and the buffers of results and masks, which are longer."""
    m, n, k = shape
    dtype, accumulator = TYPES[skinny.element], TYPES[skinny.accumulator]
    a = lines(m, k, dtype, device, 0)
    b = lines(n, k, dtype, device, 1) if skinny.major_b == "K" else lines(k, n, dtype, device, 1)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=accumulator).to(device)
    out = torch.full((splits * m * n + 64,), torch.nan, device=device, dtype=accumulator)
    mask = torch.full((splits * m * -(-n // 8) + 64,), 0xA5, device=device, dtype=torch.uint8)
    grid = -(-m // skinny.rows) * -(-n // skinny.columns), splits
    per_split = -(-k // (splits * skinny.step)) * skinny.step
    sizes = m, n, k, per_split, bias, out, mask
    KERNELS.run(skinny.launch(), grid, a, a.stride(0), b, b.stride(0), *sizes, **options)
    return a, b.t() if skinny.major_b == "K" else b, bias, out, mask


def error_of(skinny: Skinny, shape: tuple[int, int, int], splits: int, device: str, **options: int) -> float:
    """The largest error of the splits' sum over |a| · |b| + |bias|. Asserts that masks and the outside are right."""
    m, n, _ = shape
    a, b, bias, out, mask = (tensor.cpu() for tensor in product(skinny, shape, splits, device, **options))
    results, bits = out[:-64].view(splits, m, n), mask[:-64].view(splits * m, -1)
    assert out[-64:].isnan().all() and (mask[-64:] == 0xA5).all()
    unpacked = (bits[:, :, None] >> torch.arange(8) & 1).reshape(splits, m, -1)
    assert torch.equal(unpacked[:, :, :n] == 1, results > 0)
    assert not unpacked[:, :, n:].any()
    exact = a.double() @ b.double() + splits * bias.double()
    scale = a.double().abs() @ b.double().abs() + splits * bias.double().abs()
    return float(((results.double().sum(0) - exact).abs() / scale).max())


# One column, ragged everything, several blocks of rows and columns, several panels, splits with nothing to do.
SHAPES = [((1, 1, 1), 1), ((16, 128, 512), 1), ((17, 131, 70), 2), ((3, 40, 1100), 1), ((9, 203, 333), 5)]
REAL = [*SHAPES, ((16, 4096, 4096), 8), ((33, 1001, 5003), 3), ((5, 300, 100), 16)]
SIMULATED = [
    *((s, (3, 7, 2 * s.panel + 33), 1) for s in ALL),
    *((s, shape, splits) for s in (ALL[2], ALL[3], ALL[6], ALL[7]) for shape, splits in SHAPES),
]


@pytest.mark.parametrize(
    ("device", "skinny", "shape", "splits"), each_device(SIMULATED, ((s, *c) for s in ALL for c in REAL))
)
def test_product(skinny: Skinny, shape: tuple[int, int, int], splits: int, device: str) -> None:
    bound = (4e-16 if skinny.element == "double" else 2e-7) * 5
    assert error_of(skinny, shape, splits, device, **SCHEDULES) < bound


@pytest.mark.parametrize("skinny", [ALL[0], ALL[3]], ids=str)
def test_no_products_leave_the_bias(skinny: Skinny, device: str) -> None:
    assert error_of(skinny, (10, 50, 0), 1, device, **SCHEDULES) == 0


@pytest.mark.parametrize(("device", "major", "k"), each_device([("K", 8192), ("MN", 8192)], [("K", 65536)]))
def test_error_does_not_grow_with_long_chains(major: str, k: int, device: str) -> None:
    """A single chain of 8192 products in (0, 1) has a relative error of about 1.2e-6, one of 65536 of 3.5e-6."""
    skinny = Skinny("float", 8, major)
    m, n = 8, 16
    a, b = torch.rand(m, k, device=device), torch.rand(n, k, device=device)
    b = b if major == "K" else b.t().contiguous()
    bias, out = torch.zeros(n, device=device), torch.empty(m, n, device=device)
    mask = torch.empty(m, n // 8, device=device, dtype=torch.uint8)
    KERNELS.run(skinny.launch(), (1,), a, k, b, b.stride(0), m, n, k, k, bias, out, mask, **SCHEDULES)
    exact = a.double() @ (b.double().t() if major == "K" else b.double())
    assert float(((out - exact) / exact).square().mean().sqrt()) < 4e-7


@pytest.mark.parametrize("skinny", [ALL[0], ALL[7]], ids=str)
def test_values_that_are_not_finite_stay_in_their_rows_and_columns(skinny: Skinny, device: str) -> None:
    """Rows and k that do not exist count as zero, whatever lies there; an infinite weight harms its column alone."""
    a, b, *_ = product(skinny, (3, 7, 40), 1, device, **SCHEDULES)
    b[39, 6] = torch.inf
    out, bias = torch.zeros(3, 7, device=device), torch.zeros(7, device=device)
    mask, stride = torch.zeros(3, dtype=torch.uint8, device=device), max(b.stride())
    KERNELS.run(
        skinny.launch(),
        (1,),
        a,
        a.stride(0),
        b.t() if b.stride(0) == 1 else b,
        stride,
        3,
        7,
        40,
        64,
        bias,
        out,
        mask,
        **SCHEDULES,
    )
    assert out[:, :6].isfinite().all() and out[:, 6].isinf().all()


def test_any_order_of_threads_gives_the_same() -> None:
    assert error_of(ALL[0], (9, 140, 600), 2, "cpu", schedules=6) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("skinny", ALL, ids=str)
def test_simulator_gives_the_bits_of_the_gpu(skinny: Skinny) -> None:
    shape = skinny.rows + 1, skinny.columns + 3, 521
    simulated, real = (product(skinny, shape, 2, device, schedules=1) for device in ("cpu", "cuda"))
    assert all(itertools.starmap(same_bits, zip(simulated, real, strict=True)))
