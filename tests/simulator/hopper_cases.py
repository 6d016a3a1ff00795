"""Hopper's instructions one by one: tiny kernels (hopper_kernels.py), and what must come out of them by an independent
formulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from hopper_kernels import ELEMENTS, map_of, run

Result = tuple[torch.Tensor, torch.Tensor]  # what the kernel wrote, and what it must have written
Case = Callable[[str], Result]  # of a device
CASES: dict[str, Case] = {}
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # a [64, k], b [k, n] of one dtype, c [64, n] float32


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def words(image: torch.Tensor) -> torch.Tensor:
    return image.contiguous().view(torch.uint8).flatten().view(torch.int32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- The tensor cores' sums -----------------------------------------------------------------------------------------


def exponent(x: torch.Tensor, least: int) -> torch.Tensor:
    """Of each number; `least` for subnormal ones, far below all for zeros."""
    found = (torch.frexp(x).exponent - 1).clamp(min=least)
    return found.where(x != 0, -5000)


def toward_zero(x: torch.Tensor) -> torch.Tensor:
    """float32; what is too large for it becomes infinite, and zeros are positive."""
    rounded = x.float()
    down = torch.nextafter(rounded, torch.zeros_like(rounded)).where(rounded.double().abs() > x.abs(), rounded)
    return down.where(x.abs() < 2.0**128, rounded) + 0.0


def fused_sum(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """c [M, N] + a [M, k] · b [k, N] as one sum of k + 1 terms: cut off 25 bits below the largest exponent, exact, then
    rounded toward zero. Of floats the upper 19 bits count (TF32)."""
    if a.dtype == torch.float32:
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    least = -14 if a.dtype == torch.float16 else -126
    terms = a.double()[:, :, None] * b.double()[None]
    exponents = exponent(a.double(), least)[:, :, None] + exponent(b.double(), least)[None]
    largest = torch.maximum(exponents.amax(1), exponent(c.double(), -126)).clamp(min=-500)
    quantum = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), largest - 25)
    total = (terms / quantum[:, None]).trunc().sum(1) + (c.double() / quantum).trunc()
    plain = terms.sum(1) + c.double()  # exact enough to tell infinities and NaNs, which follow IEEE's rules
    found = toward_zero(total * quantum).where(plain.isfinite(), plain.float())
    found.view(torch.int32)[plain.isnan()] = 0x7FFFFFFF  # the only one that tensor cores know
    return found


# ---- Matrices in shared memory, as PTX describes them ---------------------------------------------------------------


def offset(major: str, swizzle: int, row: torch.Tensor, k: torch.Tensor, leading: int, stride: int) -> torch.Tensor:
    """Bytes from the start of the matrix to element (row, k); row is m of A, n of B."""
    if major == "K" and swizzle:
        at = row // 8 * stride + row % 8 * swizzle + k * 2
    elif major == "K":
        at = row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
    elif swizzle:
        line = swizzle // 2
        at = row // line * leading + row % line * 2 + k // 8 * stride + k % 8 * swizzle
    else:
        at = row // 8 * stride + row % 8 * 2 + k // 8 * leading + k % 8 * 16
    return at ^ ((at >> 7 & max(swizzle // 16 - 1, 0)) << 4)


class Matrix:
    """A matrix [rows, K] of 16-bit numbers in shared memory, its descriptor there, and how far on the next 16 k lie."""

    def __init__(self, values: torch.Tensor, major: str, swizzle: int, start: int) -> None:
        rows, depth = values.shape
        if major == "K":
            leading, stride = rows * 16, 8 * max(swizzle, 16)
            self.step = 32 if swizzle else 2 * leading
        else:
            line = max(swizzle, 16)
            leading, stride = (depth * line, 8 * line) if swizzle else (128, depth * 16)
            self.step = 2 * stride if swizzle else 2 * leading
        at = offset(major, swizzle, torch.arange(rows)[:, None], torch.arange(depth)[None], leading, stride)
        self.bytes = -(-(int(at.max()) + 2) // 1024) * 1024
        image = torch.zeros(self.bytes // 2, dtype=values.dtype)
        image[at.flatten() // 2] = values.flatten()
        self.image, self.start = image, start
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
        bits = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62
        self.descriptor = bits - (bits >> 63 << 64)


def accumulators(c: torch.Tensor) -> torch.Tensor:
    """[64, N] → what each of 128 threads holds."""
    thread, i = torch.arange(128)[:, None], torch.arange(c.shape[1] // 2)[None]
    return c[thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2]


def multiply(
    device: str, kernel: str, a: Matrix, b: Matrix, c: torch.Tensor, steps: int = 1, accumulate: bool = True
) -> torch.Tensor:
    """Returns what the 128 threads hold in the end."""
    image = words(torch.cat([a.image, b.image])).to(device)
    c = accumulators(c).contiguous().to(device)
    d = torch.zeros_like(c)
    run(
        kernel, 128,
        [image, image.numel(), a.descriptor, b.descriptor, a.step >> 4, b.step >> 4, steps, int(accumulate), c, d],
    )  # fmt: skip
    return d.cpu()


def rounded(device: str, kernel: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Result:
    """a [64, k], b [k, N], c [64, N]: the product and what it must be. Of floats each counts as two numbers of 16 bits,
    for where they lie."""
    lines = [x.contiguous().view(torch.float16) if x.dtype == torch.float32 else x for x in (a, b.T)]
    first = Matrix(lines[0], "K", 0, 0)
    result = multiply(device, kernel, first, Matrix(lines[1], "K", 0, first.bytes), c)
    return result, accumulators(fused_sum(c, a, b))


def operands(dtype: torch.dtype, k: int = 16, n: int = 128) -> Operands:
    return random(64, k).to(dtype), random(k, n, seed=1).to(dtype), random(64, n, seed=2)


def operands_of_every_magnitude(dtype: torch.dtype, k: int = 16, n: int = 128) -> Operands:
    def wide(*shape: int, seed: int, range: int) -> torch.Tensor:
        powers = torch.randint(-range, range, shape, generator=torch.Generator().manual_seed(seed + 9))
        return torch.ldexp(random(*shape, seed=seed), powers)

    factors, sums = (12, 30) if dtype == torch.float16 else (20, 45)
    a, b, c = wide(64, k, seed=0, range=factors), wide(k, n, seed=1, range=factors), wide(64, n, seed=2, range=sums)
    if dtype != torch.float16:
        a[:8], b[:, :16], c[:8] = a[:8] * 2.0**-80, b[:, :16] * 2.0**-60, c[:8] * 2.0**-120  # subnormal sums
        a[0], b[:, 20] = a[0] * 2.0**-50, b[:, 20] * 2.0**80  # subnormal factors
    return a.to(dtype), b.to(dtype), c


def operands_that_cancel(dtype: torch.dtype, k: int = 16, n: int = 128) -> Operands:
    """Large terms cancel, and what was cut off shows; signs and carries of truncation."""
    a, b, c = random(64, k).to(dtype), random(k, n, seed=1).to(dtype), torch.zeros(64, n)
    a[:, k // 2 :], b[k // 2 :] = -a[:, : k // 2], b[: k // 2]
    a[:, 0] *= 2.0 ** torch.arange(64)[:, None].fmod(12)[:, 0]
    a[:, k // 2] = -a[:, 0]
    b[3] += 2.0**-9
    c[:, ::2] = random(64, n // 2, seed=3) * 2.0**-12
    return a, b, c


def subnormal_operands(dtype: torch.dtype, k: int = 16, n: int = 128) -> Operands:
    down = 0 if dtype == torch.float16 else 112  # from the smallest normal number of float16 to the others'
    a, b, c = operands(dtype, k, n)
    b[:, ::2] *= 2.0 ** (-17 - down)
    b[:, 1::4] *= 2.0**down
    return a * 2.0 ** (-16 - down), b, c * 2.0 ** (-24 - down)


def operands_beyond_the_range(dtype: torch.dtype, k: int = 16, n: int = 128) -> Operands:
    a, b, c = operands(dtype, k, n)
    a[0, 0], a[1, 1], a[2, 2], a[3, 3] = torch.inf, -torch.inf, torch.nan, torch.inf
    b[3, :5], b[4, 6], c[8, :3], c[9, 4] = 0.0, torch.inf, -torch.inf, torch.nan
    return a, b, c


def operands_that_overflow(dtype: torch.dtype, k: int = 16, n: int = 128) -> Operands:
    """Sums, not factors. float16's products are too small for that."""
    a, b, c = operands(dtype, k, n)
    a[::2] *= 2.0**64
    b[:, ::2] *= 2.0**63
    return a, b, c


def zeros(dtype: torch.dtype, k: int = 16, n: int = 128) -> Operands:
    a, b, c = torch.zeros(64, k, dtype=dtype), random(k, n).to(dtype), torch.zeros(64, n)
    a[::2], c[:, ::2] = -0.0, -0.0
    return a, b, c


@case
def sums_of_normal_numbers(device: str) -> Result:
    return rounded(device, "half_k_k", *operands(torch.float16))


@case
def sums_of_every_magnitude(device: str) -> Result:
    return rounded(device, "half_k_k", *operands_of_every_magnitude(torch.float16))


@case
def sums_of_bfloat16(device: str) -> Result:
    return rounded(device, "bfloat16_k_k", *operands_of_every_magnitude(torch.bfloat16, n=256))


@case
def sums_of_floats(device: str) -> Result:
    return rounded(device, "float_k_k", *operands_of_every_magnitude(torch.float32, k=8))


@case
def sums_of_floats_beyond_the_range(device: str) -> Result:
    return rounded(device, "float_k_k", *operands_beyond_the_range(torch.float32, k=8))


@case
def sums_that_cancel(device: str) -> Result:
    return rounded(device, "half_k_k", *operands_that_cancel(torch.float16))


@case
def sums_of_subnormal_factors(device: str) -> Result:
    return rounded(device, "half_k_k", *subnormal_operands(torch.float16))


@case
def sums_beyond_the_range(device: str) -> Result:
    return rounded(device, "half_k_k", *operands_beyond_the_range(torch.float16))


@case
def sums_that_overflow(device: str) -> Result:
    return rounded(device, "bfloat16_k_k", *operands_that_overflow(torch.bfloat16, n=256))


@case
def sums_of_zeros(device: str) -> Result:
    return rounded(device, "half_k_k", *zeros(torch.float16))


@case
def chains_of_products(device: str) -> Result:
    """Several steps into the same accumulators, the first of which ignores what they held: scale-d."""
    a, b = random(64, 64).half(), random(64, 128, seed=1).half()
    first = Matrix(a, "K", 128, 0)
    second = Matrix(b.T, "K", 128, first.bytes)
    result = multiply(device, "half_k_k", first, second, torch.full((64, 128), torch.nan), 4, accumulate=False)
    expected = torch.zeros(64, 128)
    for k in range(0, 64, 16):
        expected = fused_sum(expected, a[:, k : k + 16], b[k : k + 16])
    return result, accumulators(expected)


@case
def factors_from_registers(device: str) -> Result:
    a, b, c = random(64, 16).half(), random(16, 128, seed=1).half(), random(64, 128, seed=2)
    plain = Matrix(a, "K", 0, 0)
    plain.image, plain.descriptor = a.flatten(), 0
    second = Matrix(b.T, "K", 32, 2048)
    return multiply(device, "from_registers", plain, second, c), accumulators(fused_sum(c, a, b))


# ---- The same by single warps, of every type: mma.sync --------------------------------------------------------------


def tiles(device: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """c [64, N] + a [64, k] · b [k, N], in steps of 32 bytes of k."""
    d = torch.zeros_like(c, device=device)
    lines = [x.contiguous().view(torch.int32).to(device) for x in (a, b.T)]
    kernel, steps = f"tiles_of_{ELEMENTS[a.dtype].strip('_')}", lines[0].shape[1] // 8
    run(kernel, 32, [*lines, c.shape[1], steps, c.to(device), d], grid=4 * c.shape[1] // 8)
    return d.cpu()


def by_tiles(device: str, make: Callable[[torch.dtype, int], Operands], dtypes: Iterable[torch.dtype]) -> Result:
    """Of every dtype, one after the other: products of one step."""
    made = [make(dtype, 32 // dtype.itemsize) for dtype in dtypes]
    expected = [fused_sum(c, a, b) for a, b, c in made]
    return torch.stack([tiles(device, *operands) for operands in made]), torch.stack(expected)


@case
def tiles_of_normal_numbers(device: str) -> Result:
    return by_tiles(device, operands, ELEMENTS)


@case
def tiles_of_every_magnitude(device: str) -> Result:
    return by_tiles(device, operands_of_every_magnitude, ELEMENTS)


@case
def tiles_that_cancel(device: str) -> Result:
    return by_tiles(device, operands_that_cancel, ELEMENTS)


@case
def tiles_of_subnormal_factors(device: str) -> Result:
    return by_tiles(device, subnormal_operands, ELEMENTS)


@case
def tiles_beyond_the_range(device: str) -> Result:
    return by_tiles(device, operands_beyond_the_range, ELEMENTS)


@case
def tiles_that_overflow(device: str) -> Result:
    return by_tiles(device, operands_that_overflow, (torch.bfloat16, torch.float32))


@case
def tiles_of_zeros(device: str) -> Result:
    return by_tiles(device, zeros, ELEMENTS)


@case
def chains_of_tiles(device: str) -> Result:
    """Four steps into the same accumulators."""
    results, expected = [], []
    for dtype in ELEMENTS:
        k = 32 // dtype.itemsize
        a, b, sums = operands(dtype, 4 * k)
        results.append(tiles(device, a, b, sums))
        for step in range(0, 4 * k, k):
            sums = fused_sum(sums, a[:, step : step + k], b[step : step + k])
        expected.append(sums)
    return torch.stack(results), torch.stack(expected)


# ---- Layouts --------------------------------------------------------------------------------------------------------


def layouts(device: str, swizzle: int) -> Result:
    """All four transposition cases of one swizzle, with small integers, whose sums are exact."""
    results, expected = [], []
    for major_a in ("K", "MN"):
        for major_b in ("K", "MN"):
            steps = max(swizzle // 32, 1) if "K" in (major_a, major_b) else 2
            a, b = ((random(n, 16 * steps, seed=n) * 3).round().half() for n in (64, 128))
            first = Matrix(a, major_a, swizzle, 0)
            second = Matrix(b, major_b, swizzle, first.bytes)
            kernel = f"half_{major_a}_{major_b}".lower()
            results.append(multiply(device, kernel, first, second, torch.zeros(64, 128), steps))
            expected.append(accumulators(a.float() @ b.float().T))
    return torch.stack(results), torch.stack(expected)


@case
def descriptors_without_swizzle(device: str) -> Result:
    return layouts(device, 0)


@case
def descriptors_swizzled_by_32(device: str) -> Result:
    return layouts(device, 32)


@case
def descriptors_swizzled_by_64(device: str) -> Result:
    return layouts(device, 64)


@case
def descriptors_swizzled_by_128(device: str) -> Result:
    return layouts(device, 128)


# ---- Bulk tensor copies ---------------------------------------------------------------------------------------------

BOXES = [((32, 5, 2), 0), ((16, 12, 2), 32), ((32, 9, 1), 64), ((64, 16, 1), 128)]  # box, swizzle; 16-bit elements


def tensor() -> torch.Tensor:
    """[4, 21, 104] of a tensor with longer lines and planes."""
    return (
        torch.arange(4 * 24 * 112, dtype=torch.int32).to(torch.int16).view(torch.float16).view(4, 24, 112)[:, :21, :104]
    )


def box_of(x: torch.Tensor, box: tuple[int, int, int], at: tuple[int, int, int]) -> torch.Tensor:
    """What lies in the box [z, y, x], zeros outside of the tensor."""
    z, y, i = (torch.arange(n) + first for n, first in zip(reversed(box), reversed(at), strict=True))
    inside = ((z >= 0) & (z < x.shape[0]))[:, None, None] & ((y >= 0) & (y < x.shape[1]))[None, :, None]
    inside = inside & ((i >= 0) & (i < x.shape[2]))
    bits = x.contiguous().view(torch.int16)
    found = bits[z.clamp(0, x.shape[0] - 1)][:, y.clamp(0, x.shape[1] - 1)][:, :, i.clamp(0, x.shape[2] - 1)]
    return found.where(inside, 0)


def in_shared_memory(values: torch.Tensor, swizzle: int) -> torch.Tensor:
    """16-bit values of a box as they lie in shared memory, as words."""
    line = values.shape[-1] * 2
    at = torch.arange(values.numel() * 2 // 16) * 16
    at = at ^ ((at >> 7 & max(swizzle // 16 - 1, 0)) << 4)
    chunks = values.reshape(-1, 8)
    image = torch.empty_like(chunks)
    image[at // 16] = chunks
    assert swizzle in (0, line)
    return words(image)


def loaded(device: str, at: tuple[int, int, int]) -> Result:
    results, expected = [], []
    for box, swizzle in BOXES:
        x = tensor()
        count = box[0] * box[1] * box[2] * 2
        out = torch.zeros(count // 4, dtype=torch.int32, device=device)
        there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
        run("load", 64, [(map_of(x, box, swizzle), there), *at, count, out])
        results.append(out.cpu())
        expected.append(in_shared_memory(box_of(x, box, at), swizzle))
    return torch.cat(results), torch.cat(expected)


@case
def loads_within_the_tensor(device: str) -> Result:
    return loaded(device, (8, 3, 1))


@case
def loads_across_its_end(device: str) -> Result:
    return loaded(device, (88, 17, 3))


@case
def loads_before_its_beginning(device: str) -> Result:
    return loaded(device, (-8, -2, -1))


@case
def loads_beside_it(device: str) -> Result:
    return loaded(device, (0, 21, 0))


@case
def floats_rounded_to_tf32(device: str) -> Result:
    """Ties, subnormal numbers, the largest ones, infinities and NaN among them."""
    x = random(1, 64, 32) * torch.exp2(
        torch.randint(-140, 120, (1, 64, 32), generator=torch.Generator().manual_seed(1))
    )
    bits = x.view(torch.int32)
    bits[:, ::2] = bits[:, ::2] & ~0x1FFF | 0x1000
    x[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max])
    out = torch.zeros(x.numel(), dtype=torch.int32, device=device)
    arg = replace(map_of(x, (32, 64, 1), 128), tf32=True)
    run("load", 64, [(arg, x.to(device)), 0, 0, 0, x.numel() * 4, out])
    nearest = (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).where(x.isfinite(), bits)
    nearest[x.isnan()] = 0x7FFFE000
    return out.cpu(), in_shared_memory(nearest.view(torch.int16), 128)


@case
def multicast_boxes(device: str) -> Result:
    x, box = tensor().contiguous(), (64, 8, 1)
    count = 64 * 8 * 2
    out = torch.zeros(4, 2 * count // 4, dtype=torch.int32, device=device)
    run("multicast", 64, [(map_of(x, box, 128), x.to(device)), count, out], grid=4, cluster=2)
    rows = [torch.cat([in_shared_memory(box_of(x, box, (0, 8 * rank, z)), 128) for rank in range(2)]) for z in (0, 1)]
    return out.cpu(), torch.stack([rows[0], rows[0], rows[1], rows[1]])


# ---- The others -----------------------------------------------------------------------------------------------------


@case
def matrices_stored(device: str) -> Result:
    values = torch.arange(32 * 8, dtype=torch.int16).view(32, 4, 2)
    out = torch.zeros(2 * 32 * 12, dtype=torch.int32, device=device)
    run("matrices", 32, [values.view(torch.int32).to(device), out])
    matrix = values.permute(1, 0, 2).reshape(4, 8, 8)  # [matrix, row, column]
    expected = torch.zeros(2, 32, 24, dtype=torch.int16)
    expected[0, :, :8], expected[1, :, :8] = matrix.reshape(32, 8), matrix.transpose(1, 2).reshape(32, 8)
    return out.cpu(), words(expected)


@case
def barrier_phases(device: str) -> Result:
    x = tensor()
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
    out = torch.zeros(12, dtype=torch.int32, device=device)
    run("phases", 1, [(map_of(x, (64, 8, 1), 128), there), 1024, out])
    # Of the phase in progress and the one before it: in phase 0 that of parity 1 is over, and so on.
    return out.cpu(), torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0], dtype=torch.int32)


@case
def arrivals_across_a_cluster(device: str) -> Result:
    out = torch.zeros(8, dtype=torch.int32, device=device)
    run("remote", 32, [4, out], grid=8, cluster=4)
    return out.cpu(), torch.tensor([1, 2, 3, 4, 1, 2, 3, 4], dtype=torch.int32)


@case
def stores_across_a_cluster(device: str) -> Result:
    values = random(8, 4, 32, 4)  # of each block, for each block of its cluster
    out = torch.zeros(8, 4, 32, 4, device=device)
    run("stores_remote", 32, [4, values.to(device), out], grid=8, cluster=4)
    return out.cpu(), values.view(2, 4, 4, 32, 4).transpose(1, 2).reshape(8, 4, 32, 4)


@case
def registers_moved(device: str) -> Result:
    out = torch.zeros(384, dtype=torch.int32, device=device)
    run("registers", 384, [out])
    return out.cpu(), torch.arange(384, dtype=torch.int32)


@case
def stores_clipped(device: str) -> Result:
    """Two boxes of each kind, the second from the same shared memory once the first has been read."""
    results, expected = [], []
    for box, swizzle in BOXES:
        x = torch.zeros(4, 24, 112, dtype=torch.float16)[:, :21, :104]
        there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).zero_()
        boxes = torch.randint(1, 2**15, (2, *reversed(box)), generator=torch.Generator().manual_seed(1)).to(torch.int16)
        image = torch.cat([in_shared_memory(values, swizzle) for values in boxes]).to(device)
        at, beside = (88, 17 - box[1], 3), box[1]
        run("store", 64, [(map_of(x, box, swizzle, True), there), image, image.numel() // 2, *at, beside])
        wide = torch.zeros(8, 64, 256, dtype=torch.int16)
        for turn, values in enumerate(boxes):
            y = 8 + at[1] + turn * beside
            wide[at[2] : at[2] + box[2], y : y + box[1], at[0] : at[0] + box[0]] = values
        results.append(there.cpu().contiguous().view(torch.int16).flatten())
        expected.append(wide[:4, 8 : 8 + 21, :104].flatten())
    return torch.cat(results), torch.cat(expected)


# ---- Comparison ----------------------------------------------------------------------------------------------------


def differences(one: torch.Tensor, other: torch.Tensor) -> str:
    bits = [t.contiguous().view(torch.int16 if t.dtype == torch.int16 else torch.int32).flatten() for t in (one, other)]
    wrong = (bits[0] != bits[1]).nonzero().flatten()
    first = [(int(i), one.flatten()[i].item(), other.flatten()[i].item()) for i in wrong[:4]]
    return f"{len(wrong)} of {one.numel()} differ: {first}" if len(wrong) else ""
