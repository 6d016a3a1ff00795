"""split_f16.cuh: what the compiler makes of it, the halves that it writes, and the patch of what they cannot hold."""

from __future__ import annotations

import pytest
import torch
from device import same_bits
from sm90_host import F16X3, PATCH, SPLIT, Kernel, Operand, Split, compiled, cubin, multiply

from fusewright.runtime.nvrtc import compile_cubin

pytestmark = pytest.mark.usefixtures("need_hopper")


@pytest.mark.parametrize("planes", [1, 2])
def test_split_compiles_without_spills(planes: int) -> None:
    for resources in compile_cubin(SPLIT.format(planes=planes), "sm_90a").resources.values():
        assert resources.spill_bytes == resources.stack_bytes == 0


def test_split_keeps_22_bits_and_finds_magnitudes(device: str) -> None:
    for shape in ((300, 1004), (33, 7), (2, 3000)) if device == "cuda" else ((20, 1004), (33, 7)):
        x = torch.randn(shape, device=device) * torch.exp2(torch.randint(-10, 1, shape, device=device))
        x = x.clamp(-3.9, 3.9)  # the largest that a sample may see
        x[0] = 2
        halved = Operand(F16X3, *shape, "K", device, x).halved
        scaled = torch.ldexp(x.double(), halved.exponent)
        assert 2.0**12 <= scaled[0].abs().max() <= scaled.abs().max() < 2.0**16
        residue = (scaled - halved.data[0].double() - halved.data[1].double() * 2.0**-11).abs()
        assert (residue <= scaled.abs() * 2.0**-22 + 2.0**-35).all()
        assert torch.equal(halved.lines.view(torch.float32), x.abs().amax(1))
        assert torch.equal(halved.columns.view(torch.float32), x.abs().amax(0))


# One element; less than a vector; ragged; of as many warps as there are; of more than a block holds, ragged too.
LENGTHS = [1, 3, 65, 1000, 1025, 3000, 4097, 8192, 8200, 17001]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("planes", [1, 2])
def test_lines_are_split_by_their_own_exponents(planes: int, length: int, device: str) -> None:
    split = Split(cubin(SPLIT.format(planes=planes), device), planes, by_line=True)
    generator = torch.Generator().manual_seed(length)
    for lines, stride in ((21, length), (3, length + 5), (1, length)):
        whole = torch.randn(lines, stride, generator=generator)
        whole *= torch.exp2(torch.randint(-60, 60, (lines, 1), generator=generator).float())
        if lines > 3:
            whole[3], whole[5], whole[6, 0], whole[7, length - 1] = 0, 2.0**-140, float("inf"), float("nan")
            whole[8], whole[9] = 3e38, whole[9] * 2.0**-135
        x = whole.to(device)[:, :length]
        halved = split.buffers(x)
        split.run(x, halved)
        found, sound = halved.lines.view(torch.float32), x.isfinite().all(1)
        own = (14 + 127 - (x.abs().amax(1, keepdim=True).view(torch.int32) >> 23)).clamp(max=126)
        lose = (torch.ldexp(x.double(), own).abs() < 2.0**-14) & (x != 0)
        most = lose.sum(1) > (~lose & (x != 0)).sum(1)
        expected = x.abs().amax(1).where(~(most & sound), torch.inf)
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))
        sound &= ~most
        scaled = torch.ldexp(x.double(), halved.exponents)[sound]
        largest = scaled.abs().amax(1)
        normal = x[sound].abs().amax(1) >= 2.0**-112  # below, the exponent is the largest that there is
        assert ((largest >= 2.0**14) & (largest < 2.0**15) | ~normal).all() and (largest < 2.0**15).all()
        hi = scaled.float().half()
        assert same_bits(halved.data[0][sound], hi)
        if planes == 2:
            assert same_bits(halved.data[1][sound], ((scaled.float() - hi.float()) * 2.0**11).half())
            residue = (scaled - halved.data[0][sound].double() - halved.data[1][sound].double() * 2.0**-11).abs()
            assert (residue <= scaled.abs() * 2.0**-22 + 2.0**-35).all()


@pytest.mark.gpu
def test_patch_recomputes_what_the_halves_cannot_hold() -> None:
    m, n, k = 1024, 768, 512
    x, w = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
    a, b = Operand(F16X3, m, k, "K", "cuda", x), Operand(F16X3, n, k, "K", "cuda", w)
    x[3, 7], x[200, 100], x[512] = float("inf"), float("nan"), x[512] * 2.0**40
    x[900] *= 2.0**-40
    w[700, 0] = float("-inf")
    for operand, values in ((a, x), (b, w)):  # the exponents are those of a call before
        operand.halved.lines.zero_(), operand.halved.columns.zero_()
        operand.split.run(values, operand.halved, look=False)
    bias = torch.zeros(n, device="cuda")
    out = multiply(F16X3, a, b, bias, 1.0, 1.0)
    source, threads, shared = PATCH
    patch = Kernel(compiled(source), "patch", shared)
    tiles = -(-m // 128) * -(-n // 128)
    lost = torch.zeros(tiles * 8, dtype=torch.uint8, device="cuda")
    arguments = [x, k, w, k, m, n, k, a.halved.words, b.halved.words, lost, bias, out, 1.0, 1.0]
    patch.launch((tiles, 1), threads, arguments)
    reference = x.double() @ w.double().T
    assert torch.equal(out.isnan(), reference.isnan()) and torch.equal(out.isinf(), reference.isinf())
    finite = reference.isfinite()
    error = (out.double() - reference).abs() / (x.double().abs() @ w.double().abs().T)
    assert error[finite].max() < 2e-6
