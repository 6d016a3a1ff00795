"""Products on Hopper's tensor cores as the compiler launches them: values, special values, alignment, precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, make_boxed_func
from gpu_support import AtenSeen, building, compiled, headline, problems, random, tf32_allowed
from torch import Tensor, nn

from fusewright import compiler
from fusewright.capture.backend import decompositions
from fusewright.capture.fx import from_fx
from fusewright.capture.joint import partition_joint
from fusewright.kernels.choose import candidates
from fusewright.kernels.gemm_sm90 import HalfProducts
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import GpuTarget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 6e-7}  # relative Frobenius
TF32_TOLERANCE = 5e-4
# Smaller than a step; ragged everywhere; several rounds of the ring; more tiles than multiprocessors.
SHAPES = [(8, 8, 136), (304, 520, 1000), (1000, 3000, 136), (4104, 2056, 136)]


class Always(HalfProducts):
    """Reads halves wherever it can, whatever would be faster."""

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        return 1.0

    def split(self, elements: float) -> float:
        return 0.0


class Rounded(Always):
    """And rounds right operands in registers."""

    def registers(self, m: float, n: float, k: float) -> float:
        return 0.0

    def split(self, elements: float) -> float:
        return 1e-3


def sm90(
    function: Callable[..., Any], tf32: bool = False, tile: str | None = None, rounded: bool = False
) -> Callable[..., Any]:
    """`function` with every product by the family (in tiles of `tile`), in forward and backward."""
    target, device = GpuTarget.of(torch.device("cuda")), torch.device("cuda", 0)
    always = (Rounded if rounded else Always)(target.chip, tf32, library=False)

    def compiler_of(capabilities: HalfProducts | None) -> Callable[..., Any]:
        def compile_fx(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            plan = compiler.plan(from_fx(module), (), capabilities)
            found = candidates(plan, target.chip, library=False, tensor_maps=True)
            programs = {name: several[0] for name, several in found.items()}
            for region in plan.regions:
                if region.gemm:
                    of_family = (p for p in found[region.name] if p.family == "gemm_sm90")
                    programs[region.name] = next(p for p in of_family if tile in (None, p.variant))
            return make_boxed_func(Executable(plan, programs, target, device))

        return compile_fx

    return aot_function(
        function,
        fw_compiler=compiler_of(None),
        bw_compiler=compiler_of(None),
        inference_compiler=compiler_of(always),
        partition_fn=partial(partition_joint, capabilities=always),
        decompositions=decompositions(),
    )


def headline_of(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu((x @ w + bias) * 2, 0.1)


def operand(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    return random(columns, rows, dtype=dtype).T if transposed else random(rows, columns, dtype=dtype)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


@pytest.mark.parametrize("majors", ["KK", "KM", "MK", "MM"])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "f16x3", "f16x1", "registers"])
def test_product_with_epilogue(kind: str, majors: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    tf32 = kind in ("f16x1", "registers")
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[dtype]
    for m, n, k in SHAPES:
        x, w = operand(m, k, majors[0] == "M", dtype), operand(k, n, majors[1] == "K", dtype)
        bias = random(n, dtype=dtype)
        call = sm90(headline_of, tf32=tf32, rounded=kind == "registers")
        found = call(x, w, bias)
        assert relative(found, headline_of(x.double(), w.double(), bias.double())) < tolerance, (m, n, k)
        assert torch.equal(found, call(x, w, bias))


@pytest.mark.parametrize("majors", ["KK", "KM", "MK", "MM"])
def test_rounding_in_registers_gives_the_bits_of_planes(majors: str) -> None:
    """Whatever the tile: the same halves and the same sums."""
    for m, n, k in SHAPES:
        x, w = operand(m, k, majors[0] == "M", torch.float32), operand(k, n, majors[1] == "K", torch.float32)
        expected = sm90(product, tf32=True, tile="128×128×64")(x, w)
        for tile in ("256×128×64 in registers", "128×128×64 in registers"):
            assert torch.equal(sm90(product, tf32=True, tile=tile, rounded=True)(x, w), expected), (m, n, k, tile)


@pytest.mark.parametrize("tile", ["128×256×64", "256×128×64", "128×128×64", "128×128×64 ping-pong"])
def test_tiles(tile: str) -> None:
    x, w = random(600, 520, dtype=torch.bfloat16), random(520, 392, dtype=torch.bfloat16)
    assert relative(sm90(product, tile=tile)(x, w), x.double() @ w.double()) < TOLERANCE[torch.bfloat16]


def heavy(x: Tensor, w: Tensor, row: Tensor, tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = x @ w
    return F.silu(y + row) + tile, F.gelu(y), y > 0


@pytest.mark.parametrize("majors", ["KK", "KM", "MK", "MM"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ping_pong_gives_the_bits_of_cooperation(dtype: torch.dtype, majors: str) -> None:
    """One tile; an odd number a block; many, with K of many stages."""
    ping_pong, together = (
        sm90(heavy, tf32=dtype == torch.float32, tile=f"128×128×64{how}") for how in (" ping-pong", "")
    )
    for m, n, k in (*SHAPES, (2824, 2056, 2056)):
        x, w = operand(m, k, majors[0] == "M", dtype), operand(k, n, majors[1] == "K", dtype)
        row, tile = random(n, dtype=dtype), random(m, n, dtype=dtype)
        found = ping_pong(x, w, row, tile)
        for expected in (together(x, w, row, tile), ping_pong(x, w, row, tile)):
            assert all(map(torch.equal, found, expected)), (m, n, k)


@pytest.mark.parametrize("tile", ["128×128×64 ping-pong", "128×128×64"])
def test_a_row_that_lost_bits_is_computed_in_float32(tile: str) -> None:
    """It is within the halves' range: only the product's flags tell of it, in each tile of its row of tiles."""
    x, w = random(1024, 2824).T, random(1024, 2056)  # rows of x that share an exponent
    x[1000] *= 2.0**-24
    found, exact = sm90(product, tf32=True, tile=tile)(x, w), x.double() @ w.double()
    assert relative(found, exact) < TF32_TOLERANCE
    assert relative(found[1000], exact[1000]) < TOLERANCE[torch.float32]


def test_rows_and_columns_of_any_magnitude() -> None:
    """Each line of x and of w has an exponent of its own, also beside a weight that is rounded in registers."""
    x, w = random(1000, 1024), random(2056, 1024)
    x *= torch.exp2(torch.randint(-40, 41, (1000, 1), device="cuda").float())
    for tf32, rounded, powers in ((False, False, 40), (True, False, 40), (True, True, 0)):
        scaled = w * torch.exp2(torch.randint(-powers, powers + 1, (2056, 1), device="cuda").float())
        found, exact = sm90(F.linear, tf32=tf32, rounded=rounded)(x, scaled), x.double() @ scaled.double().T
        norms = x.double().norm(dim=1)[:, None] * scaled.double().norm(dim=1)
        assert ((found.double() - exact).abs() / norms).max() < (2e-4 if tf32 else 3e-7)


@pytest.mark.parametrize("majors", ["KK", "KM", "MK", "MM"])
def test_float32_sizes_that_no_bulk_copy_takes(majors: str) -> None:
    """Odd lines, read one by one and padded in the planes; an odd result."""
    m, n, k = 333, 1001, 1003
    x, w = operand(m, k, majors[0] == "M", torch.float32), operand(k, n, majors[1] == "K", torch.float32)
    assert relative(sm90(product)(x, w), x.double() @ w.double()) < TOLERANCE[torch.float32]


def test_several_results_and_a_residual() -> None:
    def function(x: Tensor, w: Tensor, row: Tensor, tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x @ w
        return F.gelu(y + row), torch.relu(y) * tile, y > 0

    for dtype in (torch.float32, torch.bfloat16):
        inputs = [random(*s, dtype=dtype) for s in ((257, 264), (264, 520), (520,), (257, 520))]
        found, exact = sm90(function)(*inputs), function(*(t.double() for t in inputs))
        for a, b in zip(found[:2], exact[:2], strict=True):
            assert relative(a, b) < TOLERANCE[dtype] * 2
        assert (found[2] != exact[2]).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pointers_that_are_not_aligned(dtype: torch.dtype) -> None:
    def shifted(rows: int, columns: int) -> Tensor:
        return random(rows * columns + 1, dtype=dtype)[1:].view(rows, columns)

    x, w, bias = shifted(264, 520), shifted(520, 392), shifted(1, 392).view(-1)
    exact = headline_of(x.double(), w.double(), bias.double())
    for rounded in (False, True) if dtype == torch.float32 else (False,):
        call = sm90(headline_of, tf32=rounded, rounded=rounded)
        tolerance = TF32_TOLERANCE if rounded else TOLERANCE[dtype]
        assert relative(call(x, w, bias), exact) < tolerance
        assert relative(call(x.clone(), w.clone(), bias), exact) < tolerance


@pytest.mark.parametrize("k", [128, 512, 4096])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_float32_is_more_accurate_than_sgemm(draw: Callable[..., Tensor], k: int) -> None:
    x, w = draw(2048, k, device="cuda"), draw(k, 2048, device="cuda")
    exact, size = x.double() @ w.double(), x.double().abs() @ w.double().abs()
    found, theirs = sm90(product)(x, w), x @ w
    limit = 1.0 if k < 512 else 0.5
    assert relative(found, exact) < limit * relative(theirs, exact)
    error, other = ((t.double() - exact) for t in (found, theirs))
    assert (error.abs() / size).max() < limit * (other.abs() / size).max()
    assert abs(float((error * exact.sign()).mean() / exact.abs().mean())) < 5e-7


def test_one_product_is_as_accurate_as_tf32() -> None:
    x, w = random(2048, 1024), random(1024, 2048)
    exact = x.double() @ w.double()
    found = relative(sm90(product, tf32=True)(x, w), exact)
    with tf32_allowed():
        assert found < 1.05 * relative(x @ w, exact)


def specials() -> dict[str, tuple[Tensor, Tensor]]:
    """Operands of 640 × 512 and 512 × 768 with values that halves cannot hold."""
    found = {}

    def case(name: str, change: Callable[[Tensor, Tensor], None]) -> None:
        x, w = random(640, 512), random(512, 768)
        change(x, w)
        found[name] = x, w

    def put(x: Tensor, index: Any, value: Any) -> None:
        x[index] = value

    for value in (math.inf, -math.inf, math.nan):
        case(f"{value} in x", lambda x, w, v=value: put(x, (333, 17), v))
        case(f"{value} in w", lambda x, w, v=value: put(w, (500, 130), v))
    case("inf times zero", lambda x, w: (put(x, (5, 9), math.inf), put(w, 9, 0.0)))
    case("both infinities in a row", lambda x, w: (put(x, (5, 9), math.inf), put(x, (5, 10), -math.inf)))
    # Of one sign: where infinities of both may arise on the way, the order of summation decides what is left.
    case("largest numbers", lambda x, w: (put(x, 7, torch.finfo(torch.float32).max), w.abs_()))
    case("all largest", lambda x, w: (put(x, slice(None), torch.finfo(torch.float32).max), w.abs_()))
    case("denormals in a row", lambda x, w: put(x, 600, 1e-41))
    case("all denormals", lambda x, w: x.mul_(1e-40))
    case("zeros", lambda x, w: x.zero_())
    case("a huge element", lambda x, w: put(x, (100, 100), 1e20))
    case("a huge row", lambda x, w: x[100].mul_(2.0**60))
    case("a tiny row", lambda x, w: x[100].mul_(2.0**-60))
    case("a huge column of w", lambda x, w: w[:, 700].mul_(2.0**60))
    case("huge times tiny", lambda x, w: (x.mul_(2.0**100), w.mul_(2.0**-100)))
    return found


@pytest.mark.parametrize(("tf32", "rounded"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("transposed", [False, True])
def test_special_values_as_in_eager(transposed: bool, tf32: bool, rounded: bool) -> None:
    call = sm90(product, tf32, rounded=rounded)  # one executable: nothing of one call stays for the next
    for name, (x, w) in specials().items():
        if transposed:
            x, w = x.T.contiguous().T, w.T.contiguous().T
        found, eager = call(x, w), x @ w
        exact, size = x.double() @ w.double(), x.double().abs() @ w.double().abs()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found), kind(eager)), name
        finite = eager.isfinite() & (size > 1e-30)
        error = (found.double() - exact).abs()[finite] / size[finite]
        assert error.numel() == 0 or error.max() < (2e-3 if tf32 else 2e-6), name
        assert torch.equal(found.nan_to_num(), call(x, w).nan_to_num()), name


@pytest.mark.parametrize("power", [0, 10, 15, 20, 30])
def test_operands_that_are_large_where_the_other_is_small(power: int) -> None:
    """Halves lose the small ones' bits, and no large product hides it: an error of hundreds of times SGEMM's."""
    scale = torch.exp2(torch.randint(-power, power + 1, (1, 1024), device="cuda").float())
    x, w = random(640, 1024) * scale, random(1024, 768) / scale.T
    x[100] = 0
    exact, size = x.double() @ w.double(), x.double().abs() @ w.double().abs()
    error = ((sm90(product)(x, w).double() - exact).abs() / size.clamp(min=1e-30)).max()
    assert error <= 1.25 * ((x @ w - exact).abs() / size.clamp(min=1e-30)).max()


def test_float32_runs_without_aten_and_inside_a_graph() -> None:
    x, w, bias = random(512, 512), random(512, 768), random(768)
    call = sm90(headline_of)
    call(x, w, bias)
    with AtenSeen() as seen:
        call(x, w, bias)
    assert seen.compute == []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, w, bias)
    x.copy_(random(512, 512) * 1000)  # another exponent
    graph.replay()
    assert relative(y, headline_of(x.double(), w.double(), bias.double())) < TOLERANCE[torch.float32]


def families(executable: Executable) -> list[str]:
    """Of the regions, encodings aside."""
    return [executable.programs[r.name].family for r in executable.plan.regions]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_of_the_headline(dtype: torch.dtype) -> None:
    model = headline((1024, 2048, 4096), dtype)
    call = compiled(model, library=False)
    with building() as built:
        assert problems(call, model, 2, 1024, 2048, 4096) == ()
    assert [families(e).count("gemm_sm90") for e in built] == [1, 2]


def test_any_batch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU()).to("cuda", dtype)
        call = compiled(model, library=False, dynamic=True)
        with building() as built, torch.no_grad():
            for batch in (2048, 1000, 37, 4095):
                x = random(batch, 1024, dtype=dtype)
                exact = F.relu(F.linear(x.double(), model[0].weight.double(), model[0].bias.double()))
                assert relative(call(x), exact) < TOLERANCE[dtype] * 2, batch
        assert len(built) == 1 and families(built[0]) == ["gemm_sm90"]


def test_precision_follows_the_flags() -> None:
    call = compiled(product, library=False)
    x, w = random(2048, 2048), random(2048, 2048)
    exact = x.double() @ w.double()
    assert relative(call(x, w), exact) < TOLERANCE[torch.float32]
    with tf32_allowed():
        assert 1e-4 < relative(call(x, w), exact) < TF32_TOLERANCE
    assert relative(call(x, w), exact) < TOLERANCE[torch.float32]
