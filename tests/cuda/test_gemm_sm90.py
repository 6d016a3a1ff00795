"""gemm_sm90.cuh and split_f16.cuh: what the compiler makes of them, and on a Hopper GPU what they compute."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from sm90_host import PATCH, SHARED_LIMIT, SPLIT, Gemm, GemmConfig, Kernel, Split

from fusewright.runtime.nvrtc import compile_cubin

BF16 = GemmConfig(element="__nv_bfloat16", out="__nv_bfloat16", vector=8)
F16 = GemmConfig(out="__half", vector=8)
F16X1 = GemmConfig(scaled=True)
F16X3 = GemmConfig(products=3, tile=(128, 128), stages=3, promote=32, scaled=True)
KINDS = {"bf16": BF16, "f16": F16, "f16x1": F16X1, "f16x3": F16X3}
TOLERANCE = {"bf16": 4e-3, "f16": 5e-4, "f16x1": 5e-4, "f16x3": 6e-7}  # relative Frobenius
MAJORS = [("K", "K"), ("K", "MN"), ("MN", "K"), ("MN", "MN")]
# Smaller than a step; ragged everywhere; several rounds of the ring; more tiles than multiprocessors, an odd number.
SHAPES = [(8, 8, 8), (304, 520, 1000), (1000, 3000, 72), (4104, 2056, 136)]

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@cache
def cubin(source: str) -> bytes:
    return compile_cubin(source, "sm_90a").code


@pytest.mark.parametrize("majors", [("K", "K"), ("MN", "MN")])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_spills_or_warnings(kind: str, majors: tuple[str, str]) -> None:
    config = replace(KINDS[kind], major_a=majors[0], major_b=majors[1])
    resources = compile_cubin(config.source(), "sm_90a").resources["gemm"]
    assert resources.spill_bytes == resources.stack_bytes == 0
    assert resources.registers == 168  # 65536 for 384 threads, which setmaxnreg then moves between the roles
    assert config.shared_bytes <= SHARED_LIMIT


@pytest.mark.parametrize("planes", [1, 2])
def test_split_compiles_without_spills(planes: int) -> None:
    for resources in compile_cubin(SPLIT.format(planes=planes), "sm_90a").resources.values():
        assert resources.spill_bytes == resources.stack_bytes == 0


class Operand:
    """A float32 matrix [rows, k] as a product wants it stored: in K-major or MN-major order, split or rounded."""

    def __init__(self, config: GemmConfig, rows: int, k: int, major: str, values: torch.Tensor | None = None) -> None:
        stored = torch.randn((rows, k) if major == "K" else (k, rows), device="cuda") if values is None else values
        self.exponent = None
        if config.scaled:
            self.split = Split(cubin(SPLIT.format(planes=config.products // 2 + 1)), config.products // 2 + 1)
            self.halved = self.split.buffers(stored)
            self.split.run(stored, self.halved)
            self.data, self.exponent = self.halved.data, self.halved.exponent
        else:
            stored = stored.to(torch.bfloat16 if config.element == "__nv_bfloat16" else torch.float16)
            self.data = stored
        self.values = stored if major == "K" else stored.T


def multiply(
    config: GemmConfig, a: Operand, b: Operand, bias: torch.Tensor, factor: float, slope: float
) -> torch.Tensor:
    dtype = {"float": torch.float32, "__half": torch.float16, "__nv_bfloat16": torch.bfloat16}[config.out]
    out = torch.full((a.values.shape[0], b.values.shape[0]), float("nan"), dtype=dtype, device="cuda")
    gemm = Gemm(config, cubin(config.source()))
    gemm.prepare(a.data, b.data, out, bias, factor, slope, (a.exponent, b.exponent), a.values.shape[1])()
    return out


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return ((result.double() - reference).norm() / reference.norm()).item()


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("majors", MAJORS)
@pytest.mark.parametrize("kind", KINDS)
def test_product_with_epilogue(kind: str, majors: tuple[str, str], cluster: int) -> None:
    config = replace(KINDS[kind], major_a=majors[0], major_b=majors[1], cluster=cluster)
    for m, n, k in SHAPES:
        a, b = Operand(config, m, k, majors[0]), Operand(config, n, k, majors[1])
        bias = torch.randn(n, device="cuda")
        result = multiply(config, a, b, bias, 2.0, 0.1)
        reference = (a.values.double() @ b.values.double().T + bias.double()) * 2
        reference = torch.where(reference > 0, reference, reference * 0.1)
        assert relative(result, reference) < TOLERANCE[kind], (m, n, k)
        assert torch.equal(result, multiply(config, a, b, bias, 2.0, 0.1))


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(256, 128), (128, 128)])
def test_other_tiles(tile: tuple[int, int]) -> None:
    config = replace(BF16, tile=tile)
    a, b = Operand(config, 600, 520, "K"), Operand(config, 392, 520, "K")
    result = multiply(config, a, b, torch.zeros(392, device="cuda"), 1.0, 1.0)
    assert relative(result, a.values.double() @ b.values.double().T) < TOLERANCE["bf16"]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "f16x3"])
def test_rows_of_any_length(kind: str) -> None:
    """The result's rows need no alignment, and nothing past them is written."""
    config = replace(KINDS[kind], aligned=False)
    a, b = Operand(config, 333, 1000, "K"), Operand(config, 1001, 1000, "K")
    result = multiply(config, a, b, torch.zeros(1001, device="cuda"), 1.0, 1.0)
    assert relative(result, a.values.double() @ b.values.double().T) < TOLERANCE[kind]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("k", [128, 512, 4096])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_three_products_are_more_accurate_than_sgemm(draw: object, k: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    a = Operand(F16X3, 2048, k, "K", draw(2048, k, device="cuda"))  # type: ignore[operator]
    b = Operand(F16X3, 2048, k, "K", draw(2048, k, device="cuda"))  # type: ignore[operator]
    reference = a.values.double() @ b.values.double().T
    ours = relative(multiply(F16X3, a, b, torch.zeros(2048, device="cuda"), 1.0, 1.0), reference)
    theirs = relative(a.values @ b.values.T, reference)
    assert ours < theirs * (1.0 if k < 512 else 0.5)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("power", [-100, 0, 100])
def test_scales_are_undone(power: int) -> None:
    a = Operand(F16X3, 128, 256, "K", torch.randn(128, 256, device="cuda") * 2.0**power)
    b = Operand(F16X3, 128, 256, "K", torch.randn(128, 256, device="cuda") * 2.0**-power)
    reference = a.values.double() @ b.values.double().T
    assert relative(multiply(F16X3, a, b, torch.zeros(128, device="cuda"), 1.0, 1.0), reference) < TOLERANCE["f16x3"]


@hopper
@pytest.mark.gpu
def test_split_keeps_22_bits_and_finds_magnitudes() -> None:
    for shape in ((300, 1004), (33, 7), (2, 3000)):
        x = torch.randn(shape, device="cuda") * torch.exp2(torch.randint(-10, 1, shape, device="cuda"))
        x[0] = 2
        halved = Operand(F16X3, *shape, "K", x).halved
        scaled = torch.ldexp(x.double(), halved.exponent)
        assert 2.0**12 <= scaled[0].abs().max() <= scaled.abs().max() < 2.0**16
        residue = (scaled - halved.data[0].double() - halved.data[1].double() * 2.0**-11).abs()
        assert (residue <= scaled.abs() * 2.0**-22 + 2.0**-35).all()
        assert torch.equal(halved.lines.view(torch.float32), x.abs().amax(1))
        assert torch.equal(halved.columns.view(torch.float32), x.abs().amax(0))


@hopper
@pytest.mark.gpu
def test_patch_recomputes_what_the_halves_cannot_hold() -> None:
    m, n, k = 1024, 768, 512
    x, w = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
    a, b = Operand(F16X3, m, k, "K", x), Operand(F16X3, n, k, "K", w)
    x[3, 7], x[200, 100], x[512] = float("inf"), float("nan"), x[512] * 2.0**40
    x[900] *= 2.0**-40
    w[700, 0] = float("-inf")
    for operand, values in ((a, x), (b, w)):  # the exponents are those of a call before
        operand.halved.lines.zero_(), operand.halved.columns.zero_()
        operand.split.run(values, operand.halved, look=False)
    bias = torch.zeros(n, device="cuda")
    out = multiply(F16X3, a, b, bias, 1.0, 1.0)
    source, threads, shared = PATCH
    patch = Kernel(cubin(source), "patch", shared)
    tiles = -(-m // 128) * -(-n // 128)
    lost = torch.zeros(tiles * 8, dtype=torch.uint8, device="cuda")
    arguments = [x, k, w, k, m, n, k, a.halved.words, b.halved.words, lost, bias, out, 1.0, 1.0]
    patch.launch((tiles, 1), threads, arguments)
    reference = x.double() @ w.double().T
    assert torch.equal(out.isnan(), reference.isnan()) and torch.equal(out.isinf(), reference.isinf())
    finite = reference.isfinite()
    error = (out.double() - reference).abs() / (x.double().abs() @ w.double().abs().T)
    assert error[finite].max() < 2e-6
