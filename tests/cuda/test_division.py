"""Division by what is at least 1 gives the bits of IEEE division."""

from __future__ import annotations

import pytest
import torch
from device import DEVICES, Kernels, launch_of

from fusewright.codegen.launch import BufferArg, SizeArg
from fusewright.runtime.nvrtc import compile_cubin

SOURCE = """#include "division.cuh"
#include "vector.cuh"
extern "C" __global__ void kernel(const float* a, const float* b, float* quotients, float* reciprocals, int64_t n) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        quotients[i] = fusewright::from_one::quotient(a[i], b[i]);
        reciprocals[i] = fusewright::from_one::reciprocal(b[i]);
    }
}
"""
BUFFERS = [
    BufferArg(name, torch.float32, written=name.endswith("s")) for name in ("a", "b", "quotients", "reciprocals")
]
LAUNCH = launch_of(SOURCE, 256, *BUFFERS, SizeArg(0))
KERNELS = Kernels([LAUNCH])

ONE, INFINITY = 0x3F800000, 0x7F800000  # their bits
SPECIAL = [0.0, 2.0**-149, 2.0**-140, 2.0**-126, 2.0**-103, 2.0**-64, 0.3, 1.0, 3.0, 2.0**104, 2.0**126, 2.0**127]
EDGES = [1.0, 1 + 2.0**-23, 1.5, 2 - 2.0**-23, 3.0, 2.0**24, 2.0**125, 2.0**126, 2.0**126 * 1.5, 2.0**127]


def of_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def special() -> tuple[torch.Tensor, torch.Tensor]:
    """Each numerator with each denominator."""
    largest = torch.finfo(torch.float32).max
    a = torch.tensor([*SPECIAL, largest, torch.inf, torch.nan])
    b = torch.tensor([*EDGES, largest, torch.inf, torch.nan])
    pairs = torch.cartesian_prod(torch.cat([a, -a]), b)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def anything() -> tuple[torch.Tensor, torch.Tensor]:
    """Numerators of any bits."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (400_000,), generator=generator)
    return of_bits(bits), of_bits(torch.randint(ONE, INFINITY + 1, bits.shape, generator=generator))


def midpoints() -> tuple[torch.Tensor, torch.Tensor]:
    """Quotients beside the middle of two floats: a · 2^24 = b · m ± 1, with an odd m of 25 bits, and 24 in a and b."""
    b = torch.randint(2**22, 2**23, (400_000,), generator=torch.Generator().manual_seed(2)) * 2 + 1
    inverse = b
    for _ in range(4):  # modulo 2^3, 2^6, …
        inverse = inverse * (2 - b * inverse) % 2**24
    remainder = torch.where(torch.arange(len(b)) % 2 == 0, 1, -1)
    m = 2**24 + inverse * -remainder % 2**24
    a = (b * m + remainder) >> 24
    assert torch.equal(a << 24, b * m + remainder)
    short = a < 2**24
    assert short.float().mean() > 0.3
    return a[short].float(), b[short].float()


def mantissas() -> tuple[torch.Tensor, torch.Tensor]:
    """Each denominator in [1, 2), and as many numerators."""
    bits = torch.arange(ONE, ONE + 2**23)
    return of_bits(bits.flip(0)), of_bits(bits)


OPERANDS = {f.__name__: f for f in (special, anything, midpoints)}


def check(device: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """float64 holds enough bits that rounding its quotient to float32 gives the correctly rounded one."""
    quotients, reciprocals = torch.empty_like(a), torch.empty_like(a)
    found = [t.to(device) for t in (a, b, quotients, reciprocals)]
    KERNELS.run(LAUNCH, (64,), *found, len(a), schedules=1)
    for name, actual, numerator in (("a / b", found[2], a), ("1 / b", found[3], torch.ones_like(a))):
        exact = numerator.double() / b.double()
        expected, actual = exact.float(), actual.cpu()
        same = (actual.view(torch.int32) == expected.view(torch.int32)) | (actual.isnan() & expected.isnan())
        # A subnormal result may be rounded twice.
        twice = (expected.abs() <= 2.0**-126) & (expected.double() - actual.double()).abs().le(2.0**-149)
        wrong = ~(same | (twice & (actual.signbit() == expected.signbit())))
        assert not wrong.any(), (name, wrong.sum(), a[wrong][:5], b[wrong][:5], actual[wrong][:5], expected[wrong][:5])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operands", OPERANDS)
def test_division(operands: str, device: str) -> None:
    check(device, *OPERANDS[operands]())


@pytest.mark.gpu
def test_every_mantissa_on_the_gpu() -> None:
    """The hardware's approximation is its own; from one too small 1 / (2 - 2^-23) would round wrongly."""
    check("cuda", *mantissas())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_branch_is_left(arch: str) -> None:
    """The compiler's own division calls a function for operands out of range, which cubins name."""
    plain = SOURCE.replace("fusewright::from_one::quotient(a[i], b[i])", "a[i] / b[i]")
    assert b"slowpath" in compile_cubin(plain, arch).code
    assert b"slowpath" not in compile_cubin(SOURCE, arch).code
