"""float32 matrices as fp16 halves and powers of two: the launches that make them, and how products read them.

Where the format stage has exponents by line, they follow from the lines. One for the whole matrix comes from a sample
of it in the same step, so nothing is kept that could go stale. What lies beyond the halves' range is found while
splitting and told by the magnitudes of lines and columns, which the patch reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fusewright.chip import Chip
from fusewright.codegen.launch import Arg, BufferArg, LaunchSpec, Size, SizeArg, TensorMapArg
from fusewright.codegen.text import call
from fusewright.fusion.plan import Buffer, Encode, Encoded, Matrix
from fusewright.ir.size import evaluate_typical
from fusewright.kernels.base import WAIT, Program, boolean
from fusewright.kernels.gemm_simt import Guard, blocks, major, smaller

FAMILY = "split_f16"
HEADER = "split_f16.cuh"
PANEL, PANEL_BYTES = 64, 128  # lines of one bulk copy, and what it takes of each
SAMPLES, LOST = "samples", "lost"

# Of split_f16.cuh: threads of its kernels, columns and lines that a block of the split takes at a time.
_THREADS, _COLUMNS, _LINES = 256, 512, 8
_SAMPLE_BLOCKS = 2  # a multiprocessor, for each matrix
_SPLIT_BLOCKS = 8  # a multiprocessor, for each matrix
_OF_WARP, _ROWS_OF_BLOCKS = 1024, 16  # by line: elements that a warp holds; at most, as many blocks as a sample has
_SHARE = 1 / 32  # of a matrix, in the sample: an eighth to a sixty-fourth
_BANDWIDTH = 0.8  # of the chip's, that the split reaches
_WARPS = 8  # of a product, that say whether they lost bits
_BY_LINE = ", /*ByLine*/true"  # for structures where it is false unless given


@dataclass(frozen=True)
class Operand:
    """A matrix of a product as it lies in memory: `lines` lines of `length` elements, along K or along the other axis.

    name: "a" or "b". extent: of the axis that is not K.
    """

    name: str
    matrix: Matrix

    @property
    def k(self) -> int:
        """The place of K among the matrix's dimensions."""
        return 1 if self.name == "a" else 0

    @property
    def major(self) -> str:
        return major(self.matrix, self.k)

    @property
    def extent(self) -> Size:
        return self.matrix.shape[1 - self.k]

    @property
    def line_stride(self) -> Size:
        return self.matrix.stride[1 - self._axis]

    @property
    def itemsize(self) -> int:
        """Bytes of an element, as products read it."""
        return self.matrix.dtype.itemsize

    @property
    def _axis(self) -> int:
        """The dimension that is contiguous."""
        return self.k if self.major == "K" else 1 - self.k

    def tensor_map(self, lines: int = PANEL) -> TensorMapArg:
        """lines: that one bulk copy brings."""
        m = self.matrix
        extents = m.shape[self._axis], m.shape[1 - self._axis]
        return _tensor_map(m.buffer, m.dtype, *extents, self.line_stride, 1, lines, m.offset)


@dataclass(frozen=True)
class SplitOperand(Operand):
    """A float32 operand whose halves are read in its place, or which is rounded in registers where there are none."""

    encoded: Encoded

    @property
    def major(self) -> str:
        # Lines of `a` as it is run along K, those of its transpose along M; with `b` it is the other way round.
        return "K" if (self.name == "a") != self.encoded.transposed else "MN"

    @property
    def itemsize(self) -> int:
        return 2 if self.encoded.halves.planes else super().itemsize

    @property
    def line_stride(self) -> Size:
        return self.encoded.halves.padded if self.encoded.halves.planes else super().line_stride

    def tensor_map(self, lines: int = PANEL) -> TensorMapArg:
        h = self.encoded.halves
        if not h.planes:
            return super().tensor_map()
        return _tensor_map(self.encoded.buffer, torch.float16, h.length, h.lines, h.padded, h.planes, lines)

    def parameter(self) -> tuple[str, Arg]:
        return f"const int* __restrict__ {self.name}_halves", BufferArg(self.encoded.buffer, torch.int32)

    def device(self) -> str:
        """The C++ of what a kernel knows of the operand, from the parameters `parameter` and M, N, K."""
        extent = "M" if self.name == "a" else "N"
        lines, length = (extent, "K") if self.major == "K" else ("K", extent)
        halves = self.encoded.halves
        layout = f"{{{halves.planes}, {lines}, {length}{_BY_LINE if halves.by_line else ''}}}"
        along_k = boolean(self.major == "K")
        return f"fusewright::SplitOperand::of({self.name}_halves, {layout}, /*AlongK*/{along_k})"


def _tensor_map(
    buffer: str, dtype: torch.dtype, length: Size, lines: Size, stride: Size, planes: int, panel: int, offset: Size = 0
) -> TensorMapArg:
    box = (PANEL_BYTES // dtype.itemsize, panel, 1)
    return TensorMapArg(buffer, dtype, (length, lines, planes), (stride, stride * lines), box, 128, offset)


# ---- Making halves


def encode_program(step: Encode, chip: Chip) -> Program:
    """Whatever the number of matrices, one launch that splits those with exponents by line and looks at a sample of the
    others, and one that splits these."""
    by_line = [i for i, r in enumerate(step.results) if r.halves.by_line]
    sampled = [i for i, r in enumerate(step.results) if not r.halves.by_line]
    count = _SAMPLE_BLOCKS * chip.multiprocessors
    samples = Buffer(SAMPLES, (len(sampled) * count,), (1,), torch.int32, torch.device("meta"))
    rest, all_in_order = _part(step, sampled), _part(step, [*sampled, *by_line])
    launches = [_split_lines(all_in_order, len(sampled), count) if by_line else _sample(rest, count)]
    if sampled:
        launches.append(_split(rest, count, chip))
    cost = sum(
        split_seconds(evaluate_typical(r.halves.lines * r.halves.length), r.halves.planes, chip, r.halves.by_line)
        for r in step.results
    )
    return Program(FAMILY, step, tuple(launches), (samples,) if sampled else (), cost)


def _part(step: Encode, matrices: Sequence[int]) -> Encode:
    return replace(
        step,
        matrices=tuple(step.matrices[i] for i in matrices),
        results=tuple(step.results[i] for i in matrices),
    )


def split_seconds(elements: float, planes: int, chip: Chip, by_line: bool = False) -> float:
    """Predicted, for the sample and the split of a matrix; without planes for the sample alone, by line without it."""
    read = (planes > 0) + (0.0 if by_line else _SHARE)
    return elements * (4 * read + 2 * planes) / (chip.bandwidth * _BANDWIDTH)


def _sample(step: Encode, count: int) -> LaunchSpec:
    body = [f"fusewright::SplitMatrix matrix = {_matrix(step, 0)};", *_look(step, len(step.matrices))]
    text = _text(
        step,
        _kernel("sample", step),
        "Looks at a sample of each matrix, for its power of two.",
        ["int* __restrict__ samples"],
        body,
    )
    args = (*_matrix_args(step), BufferArg(SAMPLES, torch.int32, written=True))
    grid = (count, len(step.matrices), 1)
    return _launch(_kernel("sample", step), text, grid, args)


def _look(step: Encode, matrices: int) -> list[str]:
    """A row of blocks for each of the first so many matrices, the first of which is `matrix`."""
    return [
        *(f"if (blockIdx.y == {i}) matrix = {_matrix(step, i)};" for i in range(1, matrices)),
        "fusewright::SplitF16::sample(matrix, samples + blockIdx.y * gridDim.x);",
    ]


def _split_lines(step: Encode, sampled: int, count: int) -> LaunchSpec:
    """Rows of `count` blocks: one for each of the first `sampled` matrices, some for each of the others."""
    lines = range(sampled, len(step.matrices))
    name = _kernel("split_lines", _part(step, lines))
    if sampled:
        name += "_" + _kernel("sample", _part(step, range(sampled)))
    body = [f"fusewright::SplitMatrix matrix = {_matrix(step, 0)};"]
    if sampled:
        body += [
            f"if (blockIdx.y < {sampled}) {{",
            *("    " + line for line in _look(step, sampled)),
            "    return;",
            "}",
            f"matrix = {_matrix(step, sampled)};",
        ]
    body.append(f"int64_t row = blockIdx.y{f' - {sampled}' if sampled else ''}, rows = rows{sampled};")
    for i in lines[1:]:
        body += [
            "if (row >= rows) {",
            f"    row -= rows, rows = rows{i};",
            f"    matrix = {_matrix(step, i)};",
            "}",
        ]
    body.append("fusewright::SplitLines::split(matrix, int(row * gridDim.x + blockIdx.x), int(rows * gridDim.x));")
    comment = "float32 → fp16 halves by each line's own power of two, and the largest magnitude of every line."
    parameters = [*(["int* __restrict__ samples"] if sampled else []), *(f"int64_t rows{i}" for i in lines)]
    if sampled:
        comment += "\n// Looks at a sample of other matrices."
    text = _text(step, name, comment, parameters, body, ", fusewright::SplitLines::kBlocks")
    rows = [_rows_of_blocks(step.results[i], count) for i in lines]
    args: list[Arg] = _matrix_args(step)
    if sampled:
        args.append(BufferArg(SAMPLES, torch.int32, written=True))
    args += [SizeArg(r) for r in rows]
    return _launch(name, text, (count, sampled + sum(rows), 1), tuple(args))


def _rows_of_blocks(result: Encoded, count: int) -> Size:
    """A block holds some lines at once; where it depends on a size how many, as if it were one: blocks too many have
    nothing to do."""
    length = result.halves.length
    at_once = next((n for n in (8, 4, 2) if length * n <= 8 * _OF_WARP), 1) if isinstance(length, int) else 1
    return smaller(blocks(result.halves.lines, at_once * count), _ROWS_OF_BLOCKS)


def _split(step: Encode, count: int, chip: Chip) -> LaunchSpec:
    """The matrices' blocks follow each other in one grid."""
    counts = [_split_blocks(r, chip) for r in step.results]
    body = [
        f"fusewright::SplitMatrix matrix = {_matrix(step, 0)};",
        "int64_t block = blockIdx.x, blocks = blocks0;",
    ]
    for i in range(1, len(counts)):
        body += [
            "if (block >= blocks) {",
            f"    block -= blocks, blocks = blocks{i}, samples += samples_each;",
            f"    matrix = {_matrix(step, i)};",
            "}",
        ]
    body.append("fusewright::SplitF16::split(matrix, samples, int(samples_each), int(block), int(blocks));")
    parameters = ["const int* __restrict__ samples", "int64_t samples_each"]
    parameters += [f"int64_t blocks{i}" for i in range(len(counts))]
    comment = "float32 → fp16 halves, and the largest magnitude of every line and column."
    text = _text(step, _kernel("split", step), comment, parameters, body)
    args = (*_matrix_args(step), BufferArg(SAMPLES, torch.int32), SizeArg(count), *(SizeArg(c) for c in counts))
    grid = (sum(counts), 1, 1)
    return _launch(_kernel("split", step), text, grid, args)


def _split_blocks(result: Encoded, chip: Chip) -> Size:
    if not result.halves.planes:
        return 1
    strips = blocks(result.halves.length, _COLUMNS)
    filling = blocks(_SPLIT_BLOCKS * chip.multiprocessors, strips)
    return strips * smaller(blocks(result.halves.lines, _LINES), filling)


def _kernel(part: str, step: Encode) -> str:
    """Steps of as many matrices and planes share a kernel."""
    return "_".join([part, *(f"f16x{r.halves.planes}" for r in step.results)])


def _text(
    step: Encode, name: str, comment: str, parameters: Sequence[str], body: Sequence[str], bounds: str = ""
) -> str:
    declared = [
        f"{kind}{i}"
        for i in range(len(step.matrices))
        for kind in ("const float* __restrict__ x", "int64_t stride", "int64_t lines", "int64_t length", "int* halves")
    ]
    return "\n".join(
        [
            f'#include "{HEADER}"',
            '#include "launch.cuh"',
            "",
            f"// {comment}",
            f'extern "C" __global__ void __launch_bounds__({_THREADS}{bounds})',
            *call(name, [*declared, *parameters], " {"),
            *("    " + line for line in (WAIT, *body)),
            "}",
            "",
        ]
    )


def _matrix(step: Encode, i: int) -> str:
    halves = step.results[i].halves
    by_line = _BY_LINE if halves.by_line else ""
    return f"{{x{i}, stride{i}, lines{i}, length{i}, halves{i}, /*Planes*/{halves.planes}{by_line}}}"


def _matrix_args(step: Encode) -> list[Arg]:
    args: list[Arg] = []
    for matrix, result in zip(step.matrices, step.results, strict=True):
        args.append(BufferArg(matrix.buffer, matrix.dtype, matrix.offset))
        args += [SizeArg(s) for s in (matrix.stride[0], *matrix.shape)]
        args.append(BufferArg(result.buffer, torch.int32, written=True))
    return args


# ---- Scan, then patch


def mark_lost(name: str, tiles: Size) -> LaunchSpec:
    """In place of a product that cannot run: has the patch compute all tiles."""
    declared = call(f"{name}_mark", ["uint8_t* __restrict__ lost", "int64_t tiles"], " {")
    source = [
        f'#include "{HEADER}"',
        '#include "launch.cuh"',
        "",
        f'extern "C" __global__ void __launch_bounds__({_THREADS})',
        *declared,
        "    " + WAIT,
        f"    const int64_t tile = int64_t(blockIdx.x) * {_THREADS} + threadIdx.x;",
        "    if (tile < tiles) reinterpret_cast<uint64_t*>(lost)[tile] = 1;",
        "}",
        "",
    ]
    args = (lost_arg(True), SizeArg(tiles))
    grid = (blocks(tiles, _THREADS), 1, 1)
    return _launch(f"{name}_mark", "\n".join(source), grid, args)


def _launch(name: str, source: str, grid: tuple[Size, Size, Size], args: tuple[Arg, ...]) -> LaunchSpec:
    return LaunchSpec(name, source, grid, (_THREADS, 1, 1), args, early=True)


def lost_flags(tiles: Size) -> Buffer:
    """Whether a warp of the product lost bits, for every tile."""
    return Buffer(LOST, (tiles * _WARPS,), (1,), torch.uint8, torch.device("meta"))


def lost_arg(written: bool) -> BufferArg:
    return BufferArg(LOST, torch.uint8, written=written)


def patch_guard(
    a: SplitOperand, b: SplitOperand, patch: tuple[int, int], tile: tuple[int, int], least_k: int, chip: Chip
) -> Guard:
    """Has blocks of `GemmSimt` compute the tiles alone in which a row or a column is what the halves cannot hold.

    patch, tile: rows and columns of the patch's tiles and of the product's. least_k: where K is smaller, all tiles.
    """
    constants = ", ".join(str(n) for n in (*patch, "Gemm::kThreads", *tile))
    always = [] if isinstance(a.matrix.shape[1], int) else [f"K < {least_k}"]
    members = [a.device(), b.device(), "lost", "M", "N", *always]
    setup = call(f"const fusewright::SplitPatch<{constants}> patch", members, ";")
    setup[0], setup[-1] = setup[0].replace("patch(", "patch{"), setup[-1].replace(");", "};")
    return Guard(
        name="patch",
        header=HEADER,
        parameters=(a.parameter(), b.parameter(), ("const uint8_t* __restrict__ lost", lost_arg(False))),
        # Tiles of a column are a row apart: by an odd number of blocks they go to many.
        blocks=2 * chip.multiprocessors - 1,
        before=(
            *setup,
            "if (!patch.anywhere()) return;",
            "for (int tile = blockIdx.x; tile < patch.tiles(); tile += gridDim.x) {",
            "    if (!__syncthreads_or(patch.sees(tile))) continue;",
            "    const int m = patch.m(tile), n = patch.n(tile);",
        ),
    )
