"""GemmSimt compiles without spills everywhere, and gives float64's product for every layout and size."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from device import TYPES, Kernels, each_device, same_bits
from simt import Gemm

from fusewright.runtime.nvrtc import compile_cubin

LAYOUTS = [("K", "K", True), ("K", "MN", True), ("MN", "MN", True), ("MN", "K", True), ("Strided", "Strided", False)]
LARGE = [Gemm("float", 256, 128, 8, *layout) for layout in LAYOUTS]
MEDIUM = [Gemm("float", 128, 128, 8, *layout) for layout in LAYOUTS]
SMALL = [Gemm("float", 64, 64, 16, *layout, micro_m=8, micro_n=4) for layout in LAYOUTS]
TINY = Gemm("float", 32, 32, 16, micro_m=4, micro_n=4)
OTHERS = [
    TINY,
    Gemm(major_a="MN", major_b="MN", vectorised=False),
    Gemm("double", 64, 64, micro_m=4, micro_n=4),
    Gemm("double", 64, 64, major_a="MN", micro_m=4, micro_n=4),
    Gemm("double", 64, 64, vectorised=False, micro_m=4, micro_n=4),
    Gemm("__half"),
    Gemm("__nv_bfloat16", major_a="MN", major_b="MN"),
    Gemm(unroll=2),
]
ALL = LARGE + MEDIUM + SMALL + OTHERS
# Without guards, of sizes that are multiples of the tile alone.
WHOLE = [replace(gemm, whole=True) for gemm in (*MEDIUM, TINY, OTHERS[-1])]
KERNELS = Kernels(gemm.launch() for gemm in ALL + WHOLE)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("gemm", ALL + WHOLE, ids=str)
def test_fits_in_registers(gemm: Gemm, arch: str) -> None:
    resources = compile_cubin(gemm.source(), arch).resources["kernel"]
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)


def operand(rows: int, k: int, major: str, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """A view [rows, k] into a larger tensor that is NaN elsewhere; its longer strides are multiples of 16 bytes."""
    values = torch.rand(rows, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    first, second = (k, rows) if major == "MN" else (rows, k)
    shape = first + 1, (second // 8 + 2) * 8, 3 if major == "Strided" else 1
    view = torch.full(shape, torch.nan, device=device, dtype=dtype)[:first, :second, -1]
    view = view.t() if major == "MN" else view
    return view.copy_(values.to(dtype))


def product(gemm: Gemm, shape: tuple[int, int, int], device: str, seed: int = 0, **options: int) -> list[torch.Tensor]:
    """Runs a product of random matrices: a, b, bias, and the buffers of the result and its mask, which are longer."""
    m, n, k = shape
    dtype, accumulator = TYPES[gemm.element], TYPES[gemm.accumulator]
    a = operand(m, k, gemm.major_a, dtype, device, seed)
    b = operand(n, k, gemm.major_b, dtype, device, seed + 1).t()
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed + 2), dtype=accumulator).to(device)
    out = torch.full((m * n + 64,), torch.nan, device=device, dtype=accumulator)
    mask = torch.full((m * -(-n // 8) + 64,), 0xA5, device=device, dtype=torch.uint8)
    strides = a.stride(0), a.stride(1), b.stride(0), b.stride(1)
    KERNELS.run(
        gemm.launch(), (gemm.grid(m, n),), a, *strides[:2], b, *strides[2:], m, n, k, bias, out, mask, **options
    )
    return [a, b, bias, out, mask]


def error_of(gemm: Gemm, shape: tuple[int, int, int], device: str, **options: int) -> float:
    """The largest error over |a| · |b| + |bias|. Asserts that the bits of the mask and the shape's bounds are right."""
    m, n, _ = shape
    a, b, bias, out, mask = (tensor.cpu() for tensor in product(gemm, shape, device, **options))
    result, bits = out[: m * n].view(m, n), mask[:-64].view(m, -1)
    assert out[m * n :].isnan().all() and (mask[-64:] == 0xA5).all()
    unpacked = (bits[:, :, None] >> torch.arange(8) & 1).reshape(m, -1)
    assert torch.equal(unpacked[:, :n] == 1, result > 0)
    assert not unpacked[:, n:].any()
    exact = (a.double() @ b.double() + bias).clamp(min=0)
    scale = a.double().abs() @ b.double().abs() + bias.abs()
    return float(((result - exact).abs() / scale).max())


SHAPES = [(128, 128, 64), (1, 1, 1), (5, 3, 7), (129, 131, 33), (300, 1000, 257), (1040, 72, 520), (64, 200, 1)]
# For the simulator: one full tile, ragged tiles around a full one; products in several blocks of K, many tiles.
SIMULATED = [
    *((gemm, (gemm.tile_m, gemm.tile_n, 2 * gemm.tile_k)) for gemm in ALL),
    *((gemm, (gemm.tile_m + 1, gemm.tile_n + 3, gemm.tile_k + 1)) for gemm in ALL),
    *((gemm, (5, 3, 520)) for gemm in SMALL),
    (TINY, (300, 72, 21)),
]


@pytest.mark.parametrize(("device", "gemm", "shape"), each_device(SIMULATED, itertools.product(ALL, SHAPES)))
def test_product(gemm: Gemm, shape: tuple[int, int, int], device: str) -> None:
    assert error_of(gemm, shape, device) < (4e-16 if gemm.element == "double" else 2e-7) * 5


@pytest.mark.parametrize("gemm", WHOLE, ids=str)
def test_whole_tiles_need_no_guards(gemm: Gemm, device: str) -> None:
    for k in (0, gemm.tile_k, 9 * gemm.tile_k):
        shape = gemm.tile_m, 2 * gemm.tile_n, k
        unguarded, guarded = (product(g, shape, device)[2:] for g in (gemm, replace(gemm, whole=False)))
        assert all(itertools.starmap(same_bits, zip(unguarded, guarded, strict=True)))


@pytest.mark.parametrize("gemm", ALL, ids=str)
def test_no_products_leave_the_bias(gemm: Gemm, device: str) -> None:
    assert error_of(gemm, (40, 50, 0), device) == 0


@pytest.mark.parametrize(("device", "gemm", "k"), each_device([(TINY, 8192)], [(TINY, 8192), (Gemm(), 65536)]))
def test_error_does_not_grow_with_long_chains(gemm: Gemm, k: int, device: str) -> None:
    """A single chain of 8192 products in (0, 1) has a relative error of about 1.2e-6, one of 65536 of 3.5e-6."""
    m, n = gemm.tile_m, gemm.tile_n
    a, b = torch.rand(m, k, device=device), torch.rand(n, k, device=device)
    bias, out = torch.zeros(n, device=device), torch.empty(m, n, device=device)
    mask = torch.empty(m, n // 8, device=device, dtype=torch.uint8)
    KERNELS.run(gemm.launch(), (1,), a, k, 1, b, 1, k, m, n, k, bias, out, mask, schedules=1)
    exact = a.double() @ b.double().t()
    assert float(((out - exact) / exact).square().mean().sqrt()) < 4e-7


def test_any_order_of_threads_gives_the_same() -> None:
    assert error_of(TINY, (40, 70, 33), "cpu", schedules=8) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("gemm", ALL, ids=str)
def test_simulator_gives_the_bits_of_the_gpu(gemm: Gemm) -> None:
    shape = gemm.tile_m + 1, gemm.tile_n + 3, 521
    simulated, real = (product(gemm, shape, device, schedules=1) for device in ("cpu", "cuda"))
    assert all(itertools.starmap(same_bits, zip(simulated, real, strict=True)))
