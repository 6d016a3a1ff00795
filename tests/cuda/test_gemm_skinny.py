"""GemmSkinny compiles without spills, and gives float64's product for every layout, size and dtype."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from device import TYPES, Kernels, each_device, launch_of, same_bits
from simt import EPILOGUE, INCLUDES, SIZE

from fusewright.codegen.launch import BufferArg, LaunchSpec
from fusewright.runtime.nvrtc import compile_cubin


@dataclass(frozen=True)
class Skinny:
    """A configuration of GemmSkinny, with what a launch needs of it. early: it may begin before the launch before it
    has ended, and reads b meanwhile."""

    element: str = "float"
    row_tiles: int = 1
    tiles: int = 4
    major_b: str = "K"
    early: bool = False

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles

    @property
    def columns(self) -> int:
        return 8 * self.tiles

    @property
    def step(self) -> int:
        return 512 // TYPES[self.element].itemsize

    def launch(self) -> LaunchSpec:
        """Of `source`, with the parameters a, b, M, N, K, bias, out, mask; line strides follow a and b."""
        written = BufferArg("out", torch.float32, written=True), BufferArg("mask", torch.uint8, written=True)
        operands = [arg for name in "ab" for arg in (BufferArg(name, TYPES[self.element]), SIZE)]
        args = *operands, SIZE, SIZE, SIZE, BufferArg("bias", torch.float32), *written
        stage = (2 * self.row_tiles + self.tiles) * 4096
        spec = launch_of(self.source(), 256, *args, shared_bytes=min(8, 98304 // stage) * stage)
        return replace(spec, early=True, ahead=("b",)) if self.early else spec

    def source(self) -> str:
        return f"""{INCLUDES.get(self.element, "")}#include "gemm_skinny.cuh"

using Element = {self.element};
using Accumulator = float;

{EPILOGUE}
using Gemm = fusewright::GemmSkinny<Element, {self.row_tiles}, {self.tiles}, fusewright::Major::{self.major_b}>;
static_assert(Gemm::kRows == {self.rows} && Gemm::kColumns == {self.columns} && Gemm::kStep == {self.step});

extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
kernel(const Element* __restrict__ a, int64_t a_row_stride, const Element* __restrict__ b, int64_t b_line_stride,
       int64_t M, int64_t N, int64_t K, const float* __restrict__ bias, float* __restrict__ out,
       uint8_t* __restrict__ mask) {{
    Gemm::run(a, a_row_stride, b, b_line_stride, M, N, K, Epilogue{{bias, out, mask, N}});
}}
"""


ALL = [
    Skinny(element, row_tiles, tiles, major)
    for element in ("float", "__half", "__nv_bfloat16")
    for row_tiles in (1, 2)
    for major in ("K", "MN")
    for tiles in (1, 2, 4)
    if major == "K" or tiles * TYPES[element].itemsize >= 4
]
# Those that need the most registers; bfloat16 needs what float16 does.
TIGHT = [s for s in ALL if s.row_tiles * s.tiles >= 4 and s.element != "__nv_bfloat16"]
SAMPLE = [
    Skinny("float", 1, 4, "K", early=True),
    Skinny("float", 2, 1, "MN", early=True),
    Skinny("__half", 1, 2, "MN", early=True),
    Skinny("__nv_bfloat16", 2, 2, "K", early=True),
]
MORE = [Skinny("float", 1, 1, "K"), Skinny("float", 1, 2, "K"), Skinny("float", 1, 2, "MN")]
SCHEDULES = {"schedules": 2}
# What the simulator compiles; on the GPU each is compiled when it is launched.
KERNELS = Kernels(s.launch() for s in (*SAMPLE, *MORE))
EVERY_KERNEL = Kernels(replace(s, early=True).launch() for s in ALL)


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
    skinny: Skinny, shape: tuple[int, int, int], device: str, kernels: Kernels = KERNELS, **options: int
) -> tuple[torch.Tensor, ...]:
    """Runs a product of random matrices: a, b [K, N], bias, and the buffers of results and masks, which are longer."""
    m, n, k = shape
    dtype = TYPES[skinny.element]
    a = lines(m, k, dtype, device, 0)
    b = lines(n, k, dtype, device, 1) if skinny.major_b == "K" else lines(k, n, dtype, device, 1)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(device)
    return (a, b.t() if skinny.major_b == "K" else b, bias, *multiply(skinny, a, b, bias, kernels, **options))


def multiply(
    skinny: Skinny, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor, kernels: Kernels = KERNELS, **options: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The buffers of results and masks. b: its lines."""
    (m, k), n = a.shape, bias.numel()
    out = torch.full((m * n + 64,), torch.nan, device=a.device)
    mask = torch.full((m * -(-n // 8) + 64,), 0xA5, device=a.device, dtype=torch.uint8)
    grid = (-(-m // skinny.rows) * -(-n // skinny.columns),)
    kernels.run(skinny.launch(), grid, a, a.stride(0), b, b.stride(0), m, n, k, bias, out, mask, **options)
    return out, mask


def error_of(skinny: Skinny, shape: tuple[int, int, int], device: str, **options: int) -> float:
    """The largest error over |a| · |b| + |bias|. Asserts that masks and the outside are right."""
    m, n, _ = shape
    a, b, bias, out, mask = (tensor.cpu() for tensor in product(skinny, shape, device, **options))
    results, bits = out[:-64].view(m, n), mask[:-64].view(m, -1)
    assert out[-64:].isnan().all() and (mask[-64:] == 0xA5).all()
    unpacked = (bits[:, :, None] >> torch.arange(8) & 1).reshape(m, -1)
    assert torch.equal(unpacked[:, :n] == 1, results > 0)
    assert not unpacked[:, n:].any()
    exact = (a.double() @ b.double() + bias.double()).relu()
    scale = a.double().abs() @ b.double().abs() + bias.double().abs()
    return float(((results.double() - exact).abs() / scale).max())


# One column, ragged everything, several blocks of rows and columns, more steps than the ring has stages.
SHAPES = [(1, 1, 1), (16, 33, 512), (17, 37, 70), (9, 20, 2347)]
REAL = [*SHAPES, (16, 4096, 4096), (33, 1001, 5003), (5, 304, 100), (32, 512, 16384)]
SIMULATED = [(s, shape) for s in SAMPLE for shape in SHAPES]


@pytest.mark.parametrize(
    ("device", "skinny", "shape"), each_device(SIMULATED, ((s, shape) for s in ALL for shape in REAL))
)
def test_product(skinny: Skinny, shape: tuple[int, int, int], device: str) -> None:
    assert error_of(skinny, shape, device, **SCHEDULES) < 5e-7


@pytest.mark.parametrize("skinny", SAMPLE, ids=str)
def test_no_products_leave_the_bias(skinny: Skinny, device: str) -> None:
    assert error_of(skinny, (10, 50, 0), device, **SCHEDULES) == 0


def relative_error(skinny: Skinny, a: torch.Tensor, b: torch.Tensor, **options: int) -> float:
    """Root mean square of what a product of positive matrices is off by. b: its lines."""
    n = b.shape[0] if skinny.major_b == "K" else b.shape[1]
    out, _ = multiply(skinny, a, b, torch.zeros(n, device=a.device), **options)
    exact = a.double() @ (b.double().t() if skinny.major_b == "K" else b.double())
    return float(((out[:-64].view(exact.shape) - exact) / exact).square().mean().sqrt())


@pytest.mark.parametrize(("device", "major", "k"), each_device([("K", 8192), ("MN", 8192)], [("K", 65536)]))
def test_error_does_not_grow_with_long_chains(major: str, k: int, device: str) -> None:
    """A single chain of 8192 products in (0, 1) has a relative error of about 1.2e-6, one of 65536 of 3.5e-6."""
    a, b = torch.rand(8, k, device=device), torch.rand(16, k, device=device)
    skinny = Skinny("float", 1, 2, major)
    assert relative_error(skinny, a, b if major == "K" else b.t().contiguous(), **SCHEDULES) < 4e-7


@pytest.mark.parametrize("exponent", [-100, -18, 40])
def test_accuracy_does_not_depend_on_magnitudes(exponent: int, device: str) -> None:
    a, b = torch.rand(8, 96, device=device), torch.rand(16, 96, device=device)
    assert relative_error(Skinny("float", 1, 2, "K"), a, b * 2.0**exponent, **SCHEDULES) < 2e-7


def test_tiny_numbers_are_not_lost(device: str) -> None:
    """Also below the smallest normal one, with large factors."""
    a, b = torch.rand(8, 96, device=device) * 2.0**20, torch.rand(16, 96, device=device) * 2.0**-130
    assert relative_error(Skinny("float", 1, 2, "K"), a, b, **SCHEDULES) < 2e-7


@pytest.mark.parametrize("skinny", SAMPLE, ids=str)
def test_values_that_are_not_finite_stay_in_their_rows_and_columns(skinny: Skinny, device: str) -> None:
    """Rows and k that do not exist count as zero, whatever lies there; an infinite weight harms its column alone, and
    leaves it infinite."""
    a, b, *_ = product(skinny, (3, 7, 40), device, **SCHEDULES)
    a.abs_()
    b[39, 6] = torch.inf
    out, _ = multiply(skinny, a, b.t() if skinny.major_b == "K" else b, torch.zeros(7, device=device), **SCHEDULES)
    out = out[:-64].view(3, 7)
    assert out[:, :6].isfinite().all() and (out[:, 6] == torch.inf).all()


def test_the_largest_numbers_do_not_overflow(device: str) -> None:
    largest = torch.finfo(torch.float32).max
    a, b = torch.full((2, 8), largest, device=device), torch.eye(8, device=device)
    out, _ = multiply(Skinny("float", 1, 1, "K"), a, b, torch.zeros(8, device=device), **SCHEDULES)
    assert (out[:-64] == largest).all()


def test_any_order_of_threads_gives_the_same() -> None:
    assert error_of(SAMPLE[0], (9, 40, 600), "cpu", schedules=6) < 5e-7


@pytest.mark.gpu
@pytest.mark.parametrize("skinny", SAMPLE, ids=str)
def test_the_same_twice(skinny: Skinny) -> None:
    first, second = (product(skinny, (skinny.rows, 1000, 4096), "cuda")[3] for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("skinny", ALL, ids=str)
def test_simulator_gives_the_bits_of_the_gpu(skinny: Skinny) -> None:
    """Over several blocks and once around the ring; whether or not the launch may begin early."""
    shape = skinny.rows + 1, skinny.columns + 3, 9 * skinny.step + 9
    early = replace(skinny, early=True)
    simulated = product(early, shape, "cpu", EVERY_KERNEL, schedules=1)
    for each in (skinny, early):
        real = product(each, shape, "cuda")
        assert all(itertools.starmap(same_bits, zip(simulated, real, strict=True)))
