"""Loads, stores and bit masks of every width and type touch exactly `count` elements."""

from __future__ import annotations

import pytest
import torch
from device import TYPES, Kernels, launch_of

from fusewright.codegen.launch import BufferArg, LaunchSpec, SizeArg
from fusewright.runtime.nvrtc import compile_cubin

VECTORS = [1, 2, 4, 8, 16]


def copy_source(element: str, vector: int) -> str:
    """Each lane copies V elements twice, through load_vector and store and through load and store_vector."""
    return f"""#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "vector.cuh"
using T = {element};
extern "C" __global__ void kernel(const T* x, T* wide, T* narrow, T* past, int64_t count) {{
    constexpr int V = {vector};
    const int64_t n = int64_t(threadIdx.x) * V;
    const int left = int(count - n);
    T values[V];
    fusewright::load(values, x + n, 1, left);
    fusewright::store_vector(wide + n, values, left);
    fusewright::load_vector(values, x + n, left);
    fusewright::store(narrow + 2 * n, 2, values, left);
    fusewright::store_vector(past + n, values, V);
}}
"""


def bits_source(vector: int) -> str:
    """Each lane copies V bits of one row; and reads every third bit from the fifth on."""
    return f"""#include "vector.cuh"
extern "C" __global__ void kernel(const uint8_t* x, uint8_t* y, uint8_t* bools, uint8_t* thirds, int64_t count) {{
    constexpr int V = {vector};
    const int64_t n = int64_t(threadIdx.x) * V;
    bool values[V];
    fusewright::load_bits(values, x, n, int(count - n));
    for (int i = 0; i < V; ++i) bools[n + i] = values[i];
    for (int i = 0; i < V; ++i) values[i] = n + i < count ? values[i] : true;
    fusewright::store_bits(y, n, values, int(count - n));
    fusewright::load_bits(values, x, 5 + 3 * n, 3, int(count - n));
    for (int i = 0; i < V; ++i) thirds[n + i] = values[i];
}}
"""


def copies(element: str, vector: int) -> LaunchSpec:
    written = (BufferArg(name, TYPES[element], written=True) for name in ("wide", "narrow", "past"))
    return launch_of(copy_source(element, vector), 32, BufferArg("x", TYPES[element]), *written, SizeArg(0))


def bits(vector: int) -> LaunchSpec:
    written = (BufferArg(name, torch.uint8, written=True) for name in ("y", "bools", "thirds"))
    return launch_of(bits_source(vector), 32, BufferArg("x", torch.uint8), *written, SizeArg(0))


KERNELS = Kernels([*(copies(element, vector) for element in TYPES for vector in VECTORS), *map(bits, VECTORS)])


@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("vector", [1, 4, 16])
def test_compiles_for_every_type(element: str, vector: int) -> None:
    assert compile_cubin(copy_source(element, vector), "sm_80").resources["kernel"].stack_bytes == 0


@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("vector", VECTORS)
def test_copies(element: str, vector: int, device: str) -> None:
    dtype, total = TYPES[element], 32 * vector
    for count in (total, total - 1, total // 2 + 1, 3, 0):
        x = torch.randint(0, 2 if dtype == torch.bool else 100, (total,), device=device).to(dtype)
        wide, narrow, past = (torch.ones(2 * total, device=device, dtype=dtype) for _ in range(3))
        KERNELS.run(copies(element, vector), (1,), x, wide, narrow, past, count)
        assert torch.equal(wide[:count], x[:count]) and (wide[count:] == 1).all()
        assert torch.equal(narrow[::2][:count], x[:count])
        assert (narrow[1::2] == 1).all() and (narrow[::2][count:] == 1).all()
        assert torch.equal(past[:count], x[:count]) and not past[count:total].any()


@pytest.mark.parametrize("vector", VECTORS)
def test_bits(vector: int, device: str) -> None:
    total = 32 * vector
    for count in (total, total - 1, total // 2 + 1, 3, 1, 0):
        x = torch.randint(256, (total // 8,), device=device, dtype=torch.uint8)
        y = torch.full((total // 8 + 8,), 0xA5, device=device, dtype=torch.uint8)
        bools = torch.full((total,), 7, device=device, dtype=torch.uint8)
        thirds = torch.full((total,), 7, device=device, dtype=torch.uint8)
        padded = torch.cat([x, torch.randint(256, (2 * total // 8 + 1,), device=device, dtype=torch.uint8)])
        KERNELS.run(bits(vector), (1,), padded, y, bools, thirds, count)
        expected = (x[:, None] >> torch.arange(8, device=device) & 1).flatten().to(torch.uint8)
        expected[count:] = 0
        assert torch.equal(bools, expected)
        every = (padded[:, None] >> torch.arange(8, device=device) & 1).flatten()
        assert torch.equal(thirds[:count], every[5::3][:count]) and not thirds[count:].any()
        written = -(-count // 8)
        assert (y[written:] == 0xA5).all()
        assert torch.equal(
            (y[:written, None] >> torch.arange(8, device=device) & 1).flatten()[:count], expected[:count]
        )
        assert count % 8 == 0 or y[written - 1] >> count % 8 == 0
