"""Functions for results that are rounded to 16 bits, at every argument that 16 bits can hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device import DEVICES, Kernels, launch_of

from fusewright.codegen.launch import BufferArg, SizeArg
from fusewright.runtime.nvrtc import compile_cubin

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "normal_cdf": lambda x: torch.special.log_ndtr(x).exp(),
    "reciprocal": torch.reciprocal,
}
LEAST = {"log1p": 0, "reciprocal": 1}  # arguments
SOURCE = """#include "narrow.cuh"
#include "vector.cuh"
extern "C" __global__ void kernel(const float* x, float* y, int64_t n) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        y[i] = fusewright::narrow::FUNCTION(x[i]);
}
"""
BUFFERS = [BufferArg("x", torch.float32), BufferArg("y", torch.float32, written=True)]
LAUNCHES = {f: launch_of(SOURCE.replace("FUNCTION", f), 256, *BUFFERS, SizeArg(0)) for f in FUNCTIONS}
KERNELS = Kernels(LAUNCHES.values())


def every(dtype: torch.dtype) -> torch.Tensor:
    """All values of a 16-bit type, infinities and NaN among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_value(function: str, dtype: torch.dtype, device: str) -> None:
    x = every(dtype).float()
    x = x[(x >= LEAST.get(function, -torch.inf)) | x.isnan()]
    found = torch.empty_like(x).to(device)
    KERNELS.run(LAUNCHES[function], (64,), x.to(device), found, len(x), schedules=1)
    y, exact = found.cpu().double(), FUNCTIONS[function](x.double())
    assert torch.equal(y.isnan(), exact.isnan())
    # The largest float, too, is far beyond what rounds to a 16-bit number.
    least, most = (2.0**-27 if function == "normal_cdf" else 2.0**-126), 2.0**128 * (1 - 2.0**-18)
    regular = (exact.abs() >= least) & (exact.abs() < most)
    error = ((y - exact).abs() / exact.abs())[regular].max()
    assert error < 2.0**-17, error.log2()
    assert (y.abs() <= exact.abs() * 1.1)[exact.abs() < least].all() and not (y * exact < 0).any()
    assert torch.equal(y[exact.isinf()], exact[exact.isinf()])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_branch_is_left(arch: str) -> None:
    """Beside the loop's: neighbouring values are computed side by side."""
    for function, launch in LAUNCHES.items():
        assert b"slowpath" not in compile_cubin(launch.source, arch).code, function
