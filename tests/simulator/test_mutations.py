"""No barrier, fence or wait of a shipped kernel is idle, and the simulator would notice the loss of any one.

Each is deleted in turn; then some run must report an error or compute something else. `hold_registers` is none: it
tells NVRTC's compiler what the host's compiler knows anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fusewright import compiler
from fusewright.capture.fx import from_fx
from fusewright.chip import CHIPS
from fusewright.codegen.launch import BufferArg, LaunchSpec, SizeArg, TensorMapArg
from fusewright.errors import FusewrightError
from fusewright.ir.encoding import Halves
from fusewright.kernels.choose import candidates
from fusewright.kernels.gemm_sm90 import HalfProducts
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import Run, SimulatorTarget
from fusewright.simulator.simulate import Simulator
from fusewright.simulator.toolchain import DEVICE_CODE
from kernels import launch

SYNCHRONISES = re.compile(
    r"\b(?:fusewright::)?(?:__syncthreads(?P<value>_or|_and|_count)?|__syncwarp|__threadfence\w*|named_barrier_\w+"
    r"|copy_async_(?:wait|commit)|fence_\w+|mbarrier_\w+|wgmma_(?:fence|commit|wait)|cluster_sync"
    r"|tensor_store_(?:commit|wait\w*)|launch_before_wait)(?:<[^<>;]*>)?\("
)
DEFINITIONS_ONLY = {"approximate.cuh", "async.cuh", "launch.cuh", "mma.cuh", "sm90.cuh", "sm90_ptx.cuh"}


@dataclass(frozen=True)
class Mutant:
    """One deletion. text: the file without it."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """The statements of a file, and the barriers whose value is used: of those the thread's own share is left."""
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), source)
    for found in SYNCHRONISES.finditer(code):
        depth, end = 1, found.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(code[end], 0)
            end += 1
        if not found["value"] and code[end] != ";":
            continue  # a definition
        left = source[found.end() - 1 : end] if found["value"] else ""
        yield Mutant(file, source.count("\n", 0, found.start()) + 1, source[: found.start()] + left + source[end:])


def simulated_files() -> list[Path]:
    return [path for path in sorted(DEVICE_CODE.glob("*.cuh")) if path.name not in DEFINITIONS_ONLY]


MUTANTS = [mutant for path in simulated_files() for mutant in mutants_of(path.name, path.read_text())]


# ---- What runs each file's kernels, on shapes just large enough to need every barrier -------------------------------

GEMM = """#include "gemm_simt.cuh"
struct Epilogue {
    float* out;
    int64_t N;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&sums)[V]) const {
        fusewright::store_vector(out + m * N + n, sums, count);
    }
};
using Gemm = fusewright::GemmSimt<float, float, 64, 64, 16, fusewright::Major::K, fusewright::Major::MN, true>;
static_assert(Gemm::kThreads == 32 && Gemm::kSharedBytes == 33792);
extern "C" __global__ void gemm(const float* a, const float* b, float* out, int64_t n) {
    Gemm::run(a, n, 1, b, n, 1, n, n, n, Epilogue{out, n});
}
"""


def gemm(simulator: Simulator) -> None:
    n = 64
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.zeros(n, n)
    (kernel,) = simulator.load([launch(GEMM, 32, 33792)], schedules=3)
    kernel([a, b, out, n], (1,))
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)


GEMM_SKINNY = """#include "gemm_skinny.cuh"
struct Epilogue {
    float* out;
    int64_t N;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&sums)[V]) const {
        fusewright::store(out + m * N + n, 1, sums, count);
    }
    __device__ __forceinline__ void prefetch(int64_t, int) const {}
};
using Gemm = fusewright::GemmSkinny<float, 1, 4, fusewright::Major::K>;
static_assert(Gemm::kStages == 4 && Gemm::kStep == 128 && Gemm::kSharedBytes == 98304);
extern "C" __global__ void gemm_skinny(const float* a, const float* b, float* out, int64_t m, int64_t n, int64_t k) {
    Gemm::run(a, k, b, k, m, n, k, Epilogue{out, n});
}
"""


def gemm_skinny(simulator: Simulator) -> None:
    """Six steps of k through four stages: at the end copies past the last step are on their way to the first stage."""
    m, n, k = 5, 32, 700
    a, b, out = torch.randn(m, k), torch.randn(n, k), torch.zeros(m, n)
    (kernel,) = simulator.load([replace(launch(GEMM_SKINNY, 256, 98304), early=True, ahead=("b",))], schedules=3)
    kernel([a, b, out, m, n, k], (1,))
    torch.testing.assert_close(out.double(), a.double() @ b.double().t(), rtol=1e-4, atol=1e-4)


COLUMN_SUM = """#include "column_sum.cuh"
struct Functor {
    static constexpr int kColumnSums = 1;
    const float* x;
    float* out;
    int64_t cols;
    template <int V, class A>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, A (&sums)[1][V]) const {
        for (int i = 0; i < V; ++i)
            if (i < count) sums[0][i] += x[m * cols + n + i];
    }
    template <int V, class A>
    __device__ __forceinline__ void finish(int64_t split, int64_t n, int count, const A (&sums)[1][V]) const {
        fusewright::store(out + split * cols + n, 1, sums[0], count);
    }
};
extern "C" __global__ void column_sum(const float* x, float* out, int64_t rows, int64_t cols) {
    fusewright::ColumnSum<Functor, 64, 4>::run(rows, cols, rows, Functor{x, out, cols});
}
"""


def column_sum(simulator: Simulator) -> None:
    x, out = torch.randn(50, 37), torch.zeros(37)
    (kernel,) = simulator.load([launch(COLUMN_SUM, 64)], schedules=3)
    kernel([x, out, 50, 37], (2, 1))
    torch.testing.assert_close(out.double(), x.double().sum(0), rtol=1e-5, atol=1e-5)


SPLIT = '#include "split_f16.cuh"\nextern "C" __global__ void '
MATRIX = "const float* x, int64_t lines, int64_t length, int* halves"
SAMPLE = (
    f"{SPLIT}sample({MATRIX}, int* largest) {{"
    "fusewright::SplitF16::sample({x, length, lines, length, halves, 2}, largest); }"
)
HALVES = (
    f"{SPLIT}halves({MATRIX}, const int* seen, int64_t count) {{"
    "fusewright::SplitF16::split({x, length, lines, length, halves, 2}, seen, int(count), blockIdx.x, gridDim.x); }"
)
LINES = (
    f"{SPLIT}lines({MATRIX}) {{"
    "fusewright::SplitLines::split({x, length, lines, length, halves, 2, true}, blockIdx.x, gridDim.x); }"
)
OUT_OF_RANGE = (
    SPLIT
    + """out_of_range(const int* halves, const uint8_t* lost, int* out, int64_t n) {
    const auto x = fusewright::SplitOperand::of(halves, {2, n, 8}, true);
    const fusewright::SplitPatch<256, 64, 64, 256, 256> patch{x, {x.exponent, nullptr}, lost, n, 1};
    out[threadIdx.x] = patch.anywhere(); }"""
)


def split_f16(simulator: Simulator) -> None:
    launches = [launch(SAMPLE, 256), launch(HALVES, 256), launch(OUT_OF_RANGE, 64), launch(LINES, 256)]
    sample, split, out_of_range, split_lines = simulator.load(launches, schedules=3)
    x, halves = torch.randn(20, 300), torch.ones(Halves(20, 300, 2).words, dtype=torch.int32)
    row, column = torch.arange(20)[:, None], torch.arange(300)
    x[3, 5], x[9, 140] = float("inf"), 50.0
    expected = [
        x.where((column // 128 == row % 8) & (row // 8 % 2 == block) & x.isfinite(), 0).abs().max() for block in (0, 1)
    ]
    sampled = torch.zeros(2, dtype=torch.int32)
    sample([x, 20, 300, halves, sampled], (2,))
    assert torch.equal(sampled.view(torch.float32), torch.stack(expected)) and expected[1] == 50
    assert not halves[-321:-1].any() and halves[:-321].all()

    x, seen = torch.randn(9, 70), torch.arange(1.0, 1001.0).flip(0)
    x[4, 3] = 1e6
    layout = Halves(9, 70, 2)
    halves = torch.zeros(layout.words, dtype=torch.int32)
    split([x, 9, 70, halves, seen.view(torch.int32), 1000], (1,))
    assert halves[-1] == 3  # 1000 · 2^3 < 2^13
    planes = halves[: layout.plane].view(torch.float16).view(2, 9, 128)[:, :, :70]
    assert torch.equal(planes[0], (x * 8).half())
    found = planes[0].double() + planes[1].double() * 2**-11
    assert ((found - 8 * x.double()).abs() <= 8 * x.double().abs() * 2**-22).logical_or(x > 1e5).all()
    assert torch.equal(halves[layout.plane : layout.plane + 9].view(torch.float32), x.abs().amax(1))
    assert torch.equal(halves[-71:-1].view(torch.float32), x.abs().amax(0))

    for shape, blocks in (((5, 1100), 1), ((3, 8300), 2)):  # four lines at once, and one that is read twice
        x, layout = torch.randn(shape) * torch.arange(1.0, 1 + shape[0])[:, None], Halves(*shape, 2, by_line=True)
        halves = torch.zeros(layout.words, dtype=torch.int32)
        split_lines([x, *shape, halves], (blocks,))
        assert torch.equal(halves[layout.plane :].view(torch.float32), x.abs().amax(1))
        hi = halves[: layout.plane].view(torch.float16).view(2, shape[0], layout.padded)[0, :, : shape[1]]
        assert torch.equal(hi, torch.ldexp(x, 15 - torch.frexp(x.abs().amax(1, True)).exponent).half())

    found = torch.zeros(64, dtype=torch.int32)
    halves = torch.zeros(Halves(200, 8, 2).words, dtype=torch.int32)
    for place, lost in ((150, 0), (None, 1)):
        halves[200 * 64 : 200 * 65] = torch.ones(200).view(torch.int32)
        if place is not None:
            halves[200 * 64 + place] = torch.tensor(1e6).view(torch.int32)
        out_of_range([halves, torch.tensor([0] * 7 + [lost], dtype=torch.uint8), found, 200], (1,))
        assert found.all()


GEMM_SM90 = """#include "gemm_sm90.cuh"
template <int kProducts_, int kCluster_, int kSplitK_, bool kPingPong_> struct Config {
    using Element = __half;
    static constexpr int kProducts = kProducts_, kTileM = 128, kTileN = 128, kStages = 2, kCluster = kCluster_;
    static constexpr int kSplitK = kSplitK_, kPromote = 64, kGroup = 8, kVector = 4;
    static constexpr fusewright::Major kMajorA = fusewright::Major::K, kMajorB = fusewright::Major::K;
    static constexpr bool kScaled = false, kPingPong = kPingPong_, kWhole = false;
    static constexpr bool kByLineA = false, kByLineB = false;
};
struct Epilogue {
    float* out;
    int64_t N;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&sums)[V]) const {
        fusewright::store(out + m * N + n, 1, sums, count);
    }
};
using Gemm = fusewright::GemmSm90<Config<PRODUCTS, CLUSTER, SPLIT_K, PING_PONG>>;
extern "C" __global__ void __launch_bounds__(Gemm::kThreads, 1)
gemm(const __grid_constant__ fusewright::TensorMap a, const __grid_constant__ fusewright::TensorMap b, float* out,
     int64_t m, int64_t n, int64_t k) {
    Gemm::run({a, b, m, n, k, {nullptr, nullptr}, {nullptr, nullptr}}, Epilogue{out, n});
}
"""


def gemm_sm90(simulator: Simulator) -> None:
    """Of each cluster's two tiles, four steps of k through two stages: one product, three, one whose K blocks share,
    and one in ping-pong."""
    n, k = 136, 200
    launches, calls = [], []
    kinds = ((1, 2, 1, "false"), (3, 1, 1, "false"), (1, 1, 2, "false"), (1, 1, 1, "true"))
    for products, cluster, split_k, ping_pong in kinds:
        planes, m, size = products // 2 + 1, 128 * cluster - 8, cluster * split_k
        a, b = torch.randn(planes, m, k).half(), torch.randn(planes, n, k).half()
        maps = [
            TensorMapArg(name, x.dtype, (k, rows, planes), (k, k * rows), (64, 64, 1))
            for name, x, rows in (("a", a, m), ("b", b, n))
        ]
        source = GEMM_SM90.replace("PRODUCTS", str(products)).replace("CLUSTER", str(cluster))
        source = source.replace("PING_PONG", ping_pong).replace("SPLIT_K", str(split_k))
        args = (*maps, BufferArg("out", torch.float32, written=True), SizeArg(0), SizeArg(0), SizeArg(0))
        stage = 32768 * planes
        shared = 2 * stage + 8 * 16 * 8 * 4 * 4 + 6 * 8 + 1024
        launches.append(LaunchSpec("gemm", source, (1, 1, 1), (384, 1, 1), args, shared, (size, 1, 1), early=True))
        calls.append((a, b, m, size))
    for kernel, (a, b, m, size) in zip(simulator.load(launches), calls, strict=True):
        out = torch.zeros(m, n)
        kernel([a, b, out, m, n, k], (size, 1, 1))
        hi, lo = (a.double()[0], b.double()[0].T), (a.double()[-1], b.double()[-1].T)
        expected = hi[0] @ hi[1]
        if len(a) == 2:
            expected += 2.0**-11 * (hi[0] @ lo[1] + lo[0] @ hi[1])
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


GEMM_SM90_REGISTERS = """#include "gemm_sm90_registers.cuh"
struct Config {
    using Element = __half;
    static constexpr int kProducts = 1, kTileM = 128, kTileN = 128, kStages = 2, kCluster = 1;
    static constexpr int kSplitK = 1, kPromote = 64, kGroup = 8, kVector = 4;
    static constexpr fusewright::Major kMajorA = fusewright::Major::MAJOR, kMajorB = fusewright::Major::K;
    static constexpr bool kScaled = true, kPingPong = false, kWhole = false;
    static constexpr bool kByLineA = false, kByLineB = false;
};
struct Epilogue {
    float* out;
    int64_t pitch;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&sums)[V]) const {
        fusewright::store(out + m * pitch + n, 1, sums, count);
    }
};
using Gemm = fusewright::GemmSm90Registers<Config>;
extern "C" __global__ void __launch_bounds__(Gemm::kThreads, 1)
gemm(const __grid_constant__ fusewright::TensorMap a, const __grid_constant__ fusewright::TensorMap b, float* out,
     int64_t m, int64_t n, int64_t k, const int* exponent, const int* magnitudes, uint8_t* lost) {
    Gemm::run({a, b, m, n, k, {exponent, nullptr}, {exponent, magnitudes}, lost}, Epilogue{out, m});
}
"""


def gemm_sm90_registers(simulator: Simulator) -> None:
    """As above, A read along k or across it; two of its rows are beyond the halves, and their warps say so."""
    m, n, k = 120, 136, 200
    launches = []
    for major, lines, length in (("K", m, k), ("MN", k, m)):
        args = (
            TensorMapArg("a", torch.float32, (length, lines, 1), (length, k * m), (32, 64, 1)),
            TensorMapArg("b", torch.float16, (k, n, 1), (k, k * n), (64, 64, 1)),
            BufferArg("out", torch.float32, written=True),
            *[SizeArg(0)] * 3,
            *(BufferArg(name, torch.int32) for name in ("exponent", "magnitudes")),
            BufferArg("lost", torch.uint8, written=True),
        )
        shared = 2 * (32768 + 16384) + 8 * 16 * 8 * 4 * 4 + 6 * 8 + 1024
        source = GEMM_SM90_REGISTERS.replace("MAJOR", major)
        launches.append(LaunchSpec("gemm", source, (1, 1, 1), (384, 1, 1), args, shared, early=True))
    a, b, exponent = torch.randn(m, k), torch.randn(n, k).half(), torch.zeros(1, dtype=torch.int32)
    a[20], a[50] = a[20] * 2.0**-9, a[50] * 2.0**30  # small sums beside the largest of b, in the second warp
    magnitudes = b.float().abs().amax(1)
    magnitudes[60] = 2.0**11
    for kernel, stored in zip(simulator.load(launches), (a, a.T.contiguous()), strict=True):
        out, lost = torch.zeros(n, m), torch.full((2, 8), 7, dtype=torch.uint8)
        kernel([stored, b, out, m, n, k, exponent, magnitudes.view(torch.int32), lost], (1, 1, 1))
        rest = [i for i in range(m) if i != 50]
        torch.testing.assert_close(out[:, rest].double(), b.double() @ a[rest].half().double().T, rtol=1e-5, atol=1e-4)
        assert lost.tolist() == [[0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]]


RUNS: Mapping[str, Callable[[Simulator], None]] = {
    "gemm_simt.cuh": gemm,
    "gemm_skinny.cuh": gemm_skinny,
    "column_sum.cuh": column_sum,
    "split_f16.cuh": split_f16,
    "gemm_sm90.cuh": gemm_sm90,
    "gemm_sm90_registers.cuh": gemm_sm90_registers,
    "lost_bits.cuh": gemm_sm90_registers,
}


def test_every_file_that_synchronises_is_run() -> None:
    assert {mutant.file for mutant in MUTANTS} <= RUNS.keys()
    assert len(MUTANTS) >= 3


@pytest.mark.parametrize("file", RUNS)
def test_unchanged_kernels_pass(file: str) -> None:
    torch.manual_seed(0)
    RUNS[file](Simulator())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, BaseException | None]:
    """What each mutant led to: an error, or None. They are compiled side by side."""
    root = tmp_path_factory.mktemp("mutants")

    def outcome(index: int) -> BaseException | None:
        mutant = MUTANTS[index]
        folder = root / str(index)
        folder.mkdir()
        for path in DEVICE_CODE.glob("*.cuh"):
            (folder / path.name).write_text(mutant.text if path.name == mutant.file else path.read_text())
        try:
            RUNS[mutant.file](Simulator(device_code=folder))
        except (FusewrightError, AssertionError) as error:
            return error
        return None

    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(outcome, range(len(MUTANTS))))
    return {str(mutant): error for mutant, error in zip(MUTANTS, found, strict=True)}


@pytest.mark.parametrize("mutant", [str(mutant) for mutant in MUTANTS])
def test_every_deletion_is_noticed(outcomes: Mapping[str, BaseException | None], mutant: str) -> None:
    error = outcomes[mutant]
    print(f"{mutant} → {type(error).__name__}: {error}".splitlines()[0])
    assert error is not None, f"{mutant} was deleted, and nothing failed"
    # A mutant that does not compile proves nothing.
    assert "could not compile" not in str(error), str(error)


def test_nothing_is_left_of_a_launch_that_failed(outcomes: Mapping[str, BaseException | None]) -> None:
    """The copies and products of a mutant never end, in memory that the next launch may use again."""
    torch.manual_seed(0)
    RUNS["gemm_sm90_registers.cuh"](Simulator())


# ---- Generated code -------------------------------------------------------------------------------------------------

GENERATORS = {"kernels/base.py", "kernels/split_f16.py"}  # whose text has barriers of its own


class Always(HalfProducts):
    """Reads halves whatever would be faster."""

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Replacing(SimulatorTarget):
    """Runs `text` in the place of `source`."""

    source: str = ""
    text: str = ""

    def load(self, launches: Sequence[LaunchSpec]) -> list[Run]:
        runs = super().load(launches)  # compiled once, whatever is replaced
        for i, original in enumerate(launches):
            if original.source == self.source:
                runs[i : i + 1] = super().load([replace(original, source=self.text)])
        return runs


def test_every_generator_of_barriers_is_run() -> None:
    package = DEVICE_CODE.parent
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if SYNCHRONISES.search(p.read_text())}
    assert found == GENERATORS


def test_every_deletion_from_generated_code_is_noticed() -> None:
    """A product of halves, of which a row must be computed again: in several tiles, all by one block. A split by line
    beside a sample, another split and a patch, which wait for the launch before them, and the patch's barrier."""
    torch.manual_seed(0)
    x, w = torch.randn(24, 136), torch.randn(136, 300)
    x[3, 5] = float("inf")
    chip = replace(CHIPS["sm_90a"], multiprocessors=1)
    plan = compiler.plan(from_fx(make_fx(lambda a, b: [a @ b])(x, w)), (), Always(chip, True, library=False))
    programs = {n: p[0] for n, p in candidates(plan, chip, library=False, tensor_maps=True).items()}

    def error(source: str = "", text: str = "") -> BaseException | None:
        target = Replacing(chip, 1, source, text)
        try:
            (found,) = Executable(plan, programs, target, torch.device("cpu"))(x, w)
            torch.testing.assert_close(found.double(), x.double() @ w.double(), rtol=1e-4, atol=1e-4)
        except (FusewrightError, AssertionError) as caught:
            return caught
        return None

    assert error() is None
    specs = [spec for program in programs.values() for spec in program.launches]
    mutants = [(s.source, m) for s in specs for m in mutants_of(s.kernel, s.source)]
    assert len(mutants) == 4
    for source, mutant in mutants:
        caught = error(source, mutant.text)
        print(mutant, "→", type(caught).__name__, str(caught).partition("\n")[0])
        assert caught is not None and "could not compile" not in str(caught), str(mutant)
