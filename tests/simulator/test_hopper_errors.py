"""A planted bug for everything that the simulator catches in the use of Hopper's asynchronous instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch

from fusewright.codegen.launch import BufferArg, LaunchSpec, TensorMapArg
from fusewright.simulator import errors
from fusewright.simulator.simulate import SimulatedKernel, Simulator
from kernels import line_of

# What bugs are planted into: 128 threads that load a box of 128 rows of 128 bytes and multiply it by itself.
START = """#include "sm90.cuh"
using namespace fusewright;
extern "C" __global__ void __launch_bounds__(128, 1) NAME(const __grid_constant__ TensorMap map, float* out) {
    extern __shared__ __align__(16) unsigned char dynamic[];
    unsigned char* shared = dynamic + (-shared_address(dynamic) & 1023);
    __shared__ uint64_t barrier;
    const int thread = threadIdx.x;
    float sums[64];
    (void)sums;
"""
INIT = "if (thread == 0) { mbarrier_init(&barrier, 1); mbarrier_fence_init(); }\n__syncthreads();\n"
LOAD = (
    "if (thread == 0) { mbarrier_arrive_expect_tx(&barrier, 16384); tensor_load(shared, &map, &barrier, 0, 0, 0); }\n"
)
WAIT = "mbarrier_wait(&barrier, 0);\n"
DESCRIPTOR = "const uint64_t x = matrix_descriptor(shared, 8192), y = matrix_descriptor(shared, 0);\n"
PRODUCT = "wgmma<__half, Major::K, Major::K>(sums, x, y, false);\n"
WROTE = "for (int i = thread; i < 4096; i += 128) reinterpret_cast<float*>(shared)[i] = 0;\n"
READY = INIT + LOAD + WAIT + DESCRIPTOR


@dataclass(frozen=True)
class Bug:
    """body: the kernel's. The line marked BUG is the one to name, if there is one. thread: the x of the thread to name.
    says: words of the message. cluster: blocks.
    """

    error: type[errors.SimulationError]
    body: str
    thread: int
    says: tuple[str, ...] = ()
    cluster: int = 1


BUGS: Mapping[str, Bug] = {
    # ---- Proxies ----------------------------------------------------------------------------------------------------
    "written_then_multiplied": Bug(
        errors.MissingFence,
        WROTE + "__syncthreads();\n" + DESCRIPTOR + "wgmma_fence();\n" + PRODUCT.replace("\n", "  // BUG\n"),
        31,
        ("no fence.proxy.async", "wrote at written_then_multiplied.cu:"),
    ),
    "written_then_stored": Bug(
        errors.MissingFence,
        WROTE + "__syncthreads();\nif (thread == 0) tensor_store(&map, shared, 0, 0, 0);  // BUG\n",
        0,
        ("no fence.proxy.async",),
    ),
    "written_then_loaded": Bug(
        errors.MissingFence,
        INIT + WROTE + "__syncthreads();\n" + LOAD.replace("\n", "  // BUG\n"),
        0,
        ("overwritten",),
    ),
    "fence_before_the_write": Bug(
        errors.MissingFence,
        "fence_proxy_async();\n"
        + WROTE
        + "__syncthreads();\nif (thread == 0) tensor_store(&map, shared, 0, 0, 0);  // BUG\n",
        0,
    ),
    "unpublished_barrier": Bug(
        errors.MissingFence,
        INIT.replace("mbarrier_fence_init();", "") + LOAD.replace("\n", "  // BUG\n"),
        0,
        ("fence.mbarrier_init",),
    ),
    "registers_without_a_fence": Bug(
        errors.MissingFence,
        READY + "for (int i = 0; i < 64; ++i) sums[i] = 1;\n" + PRODUCT.replace("\n", "  // BUG\n"),
        0,
        ("wgmma.fence",),
    ),
    "registers_written_after_the_fence": Bug(
        errors.MissingFence,
        READY
        + "wgmma_fence();\n"
        + PRODUCT
        + "wgmma_commit();\nwgmma_wait<0>();\nout[thread] = sums[5];\n"
        + PRODUCT.replace("\n", "  // BUG\n"),
        0,
        ("wgmma.fence",),
    ),
    # ---- What is still in use ---------------------------------------------------------------------------------------
    "load_not_waited_for": Bug(
        errors.CopyInFlight,
        INIT + LOAD + "__syncthreads();\nout[thread] = shared[thread];  // BUG\n",
        0,
        ("a bulk copy counted at the mbarrier at byte 0 of shared `barrier`",),
    ),
    "product_of_a_load_not_waited_for": Bug(
        errors.CopyInFlight,
        INIT + LOAD + "__syncthreads();\n" + DESCRIPTOR + "wgmma_fence();\n" + PRODUCT.replace("\n", "  // BUG\n"),
        31,
    ),
    "operand_overwritten": Bug(
        errors.OperandInFlight,
        READY + "wgmma_fence();\n" + PRODUCT + "wgmma_commit();\n"
        "if (thread == 64) reinterpret_cast<float*>(shared)[7] = 0;  // BUG\n",
        64,
        ("may still be reading",),
    ),
    "operand_loaded_again": Bug(
        errors.OperandInFlight,
        READY + "wgmma_fence();\n" + PRODUCT + "wgmma_commit();\n__syncthreads();\n" + LOAD.replace("\n", "  // BUG\n"),
        0,
    ),
    "operand_of_another_warp": Bug(
        errors.SharedMemoryRace,
        READY + "wgmma_fence();\n" + PRODUCT + "wgmma_commit();\nwgmma_wait<0>();\n"
        "if (thread == 127) reinterpret_cast<float*>(shared)[7] = 0;  // BUG\n",
        127,
        ("an asynchronous operation of warp 0 read at",),
    ),
    "sums_not_waited_for": Bug(
        errors.OperandInFlight,
        READY + "wgmma_fence();\n" + PRODUCT + "wgmma_commit();\nwgmma_wait<1>();\nout[thread] = sums[3];  // BUG\n",
        0,
        ("reads registers", "writing"),
    ),
    "product_not_committed": Bug(
        errors.OperandInFlight,
        READY + "wgmma_fence();\n" + PRODUCT + "wgmma_wait<0>();\nout[thread] = sums[3];  // BUG\n",
        0,
    ),
    "factors_overwritten": Bug(
        errors.OperandInFlight,
        READY + "uint32_t a[4] = {1, 2, 3, 4};\nwgmma_fence();\nwgmma_registers<Major::K>(sums, a, y, false);\n"
        "wgmma_commit();\na[thread % 4] = 0;  // BUG\nwgmma_wait<0>();\nout[a[1]] = sums[0];\n",
        0,
        ("writes registers", "reading"),
    ),
    "stored_bytes_overwritten": Bug(
        errors.OperandInFlight,
        WROTE
        + "fence_proxy_async();\n__syncthreads();\n"
        + "if (thread == 0) { tensor_store(&map, shared, 0, 0, 0); tensor_store_commit(); }\n__syncthreads();\n"
        + "if (thread == 9) shared[0] = 1;  // BUG\n",
        9,
    ),
    "store_not_waited_for": Bug(
        errors.OperandInFlight,
        WROTE
        + "fence_proxy_async();\n__syncthreads();\n"
        + "if (thread == 0) { tensor_store(&map, shared, 0, 0, 0); tensor_store_commit(); }  // BUG\n",
        127,
        ("leaves the kernel",),
    ),
    "left_while_loading": Bug(
        errors.CopyInFlight, INIT + LOAD.replace("\n", "  // BUG\n"), 127, ("leaves the kernel",)
    ),
    # ---- Phases -----------------------------------------------------------------------------------------------------
    "phase_that_never_comes": Bug(
        errors.Deadlock,
        INIT + LOAD + WAIT + "mbarrier_wait(&barrier, 1);\n",
        0,
        ("parity 1 of the mbarrier at byte 0 of shared `barrier`", "in phase 1 with 0 of 1 arrivals", "127 more"),
    ),
    "bytes_that_never_come": Bug(
        errors.Deadlock,
        INIT + LOAD.replace("16384", "16392") + WAIT,
        0,
        ("1 of 1 arrivals and 8 bytes still to come",),
    ),
    "more_bytes_than_expected": Bug(
        errors.PhaseOverrun,
        INIT + LOAD.replace("16384", "16000").replace("\n", "  // BUG\n") + WAIT,
        0,
        ("384 bytes more",),
    ),
    "more_bytes_than_it_counts": Bug(
        errors.PhaseOverrun,
        INIT + "if (thread == 0) mbarrier_arrive_expect_tx(&barrier, 1 << 20);  // BUG\n",
        0,
        ("1048575",),
    ),
    "too_many_arrivals": Bug(
        errors.PhaseOverrun,
        INIT + LOAD + "if (thread == 40) mbarrier_arrive(&barrier);  // BUG\n",
        40,
        ("all 1 arrivals",),
    ),
    "not_initialised": Bug(errors.UndefinedOperation, "mbarrier_arrive(&barrier);  // BUG\n", 0, ("none has been",)),
    "initialised_twice": Bug(
        errors.UndefinedOperation, INIT + "if (thread == 3) mbarrier_init(&barrier, 1);  // BUG\n", 3, ("one already",)
    ),
    "barrier_overwritten": Bug(
        errors.UndefinedOperation, INIT + "if (thread == 3) barrier = 0;  // BUG\n", 3, ("where an mbarrier lies",)
    ),
    "used_before_it_is_known": Bug(
        errors.SharedMemoryRace,
        INIT.replace("__syncthreads();", "") + "if (thread == 32) mbarrier_arrive(&barrier);  // BUG\n",
        32,
        ("initialised at",),
    ),
    "parity": Bug(
        errors.UndefinedOperation,
        INIT + "out[thread] = mbarrier_try_wait(&barrier, 2);  // BUG\n",
        0,
        ("neither 0 nor 1",),
    ),
    # ---- Descriptors and boxes --------------------------------------------------------------------------------------
    "descriptor_misaligned": Bug(
        errors.Misaligned,
        READY + "wgmma_fence();\nwgmma<__half, Major::K, Major::K>(sums, x + 8, y, false);  // BUG\n",
        31,
        ("multiples of 1024",),
    ),
    "descriptor_out_of_range": Bug(
        errors.OutOfBounds,
        READY + "wgmma_fence();\nwgmma<__half, Major::K, Major::K>(sums, x + 4096, y, false);  // BUG\n",
        31,
        ("dynamic shared memory",),
    ),
    "descriptor_of_nothing": Bug(
        errors.UninitialisedRead,
        READY + "wgmma_fence();\nwgmma<__half, Major::K, Major::K>(sums, x, y + 1024, false);  // BUG\n",
        31,
    ),
    "copy_misaligned": Bug(
        errors.Misaligned,
        INIT + LOAD.replace("(shared,", "(shared + 64,").replace("\n", "  // BUG\n"),
        0,
        ("no multiple of 128",),
    ),
    "copy_out_of_range": Bug(
        errors.OutOfBounds,
        INIT + LOAD.replace("(shared,", "(shared + 57344,").replace("\n", "  // BUG\n"),
        0,
        ("dynamic shared memory",),
    ),
    "box_misaligned": Bug(
        errors.Misaligned, INIT + LOAD.replace("0, 0, 0)", "3, 0, 0)").replace("\n", "  // BUG\n"), 0, ("6 bytes",)
    ),
    "box_beyond_the_tensor": Bug(
        errors.OutOfBounds, INIT + LOAD.replace("0, 0, 0)", "0, 64, 0)").replace("\n", "  // BUG\n"), 0, ("of `x`",)
    ),
    "store_before_the_tensor": Bug(
        errors.UndefinedOperation,
        WROTE + "fence_proxy_async();\n__syncthreads();\n"
        "if (thread == 0) tensor_store(&map, shared, 0, -1, 0);  // BUG\n",
        0,
        ("before the tensor, at -1 of dimension 1",),
    ),
    "no_map": Bug(
        errors.UndefinedOperation,
        "__shared__ TensorMap other;\n" + INIT + LOAD.replace("&map", "&other").replace("\n", "  // BUG\n"),
        0,
        ("no tensor map",),
    ),
    # ---- Warps and blocks together ----------------------------------------------------------------------------------
    "half_a_warpgroup": Bug(
        errors.BarrierDivergence,
        READY + "if (thread < 64) { wgmma_fence();  // BUG\n }",
        63,
        ("has not executed wgmma.fence",),
    ),
    "warps_disagree": Bug(
        errors.BarrierDivergence,
        READY + "wgmma_fence();\nwgmma<__half, Major::K, Major::K>(sums, x, y + thread / 64 * 2, false);  // BUG\n",
        95,
        ("other operands",),
    ),
    "part_of_a_warp": Bug(
        errors.BarrierDivergence, "if (thread == 5) return;\nwgmma_fence();  // BUG\n", 6, ("some lanes have left",)
    ),
    "registers_that_nobody_gives": Bug(
        errors.Deadlock, "registers_acquire<240>();\n", 0, ("waits for 240 registers a thread",)
    ),
    "registers_without_bounds": Bug(
        errors.UndefinedOperation, "registers_release<40>();  // BUG\n", 0, ("without __launch_bounds__",)
    ),
    "registers_grow_by_release": Bug(
        errors.UndefinedOperation, "registers_release<256>();  // BUG\n", 31, ("to 256 registers, but has 248",)
    ),
    "arrival_at_a_block_that_left": Bug(
        errors.UndefinedOperation,
        "if (thread == 0) { mbarrier_init(&barrier, 1); mbarrier_fence_init(); }\ncluster_sync();\n"
        "if (cluster_rank() == 1 && thread == 0) mbarrier_arrive_remote(&barrier, 0);  // BUG\n",
        127,
        ("nothing says that it has",),
        2,
    ),
    "no_such_block": Bug(
        errors.UndefinedOperation,
        INIT + "if (thread == 0) mbarrier_arrive_remote(&barrier, 2);  // BUG\n",
        0,
        ("which has 2",),
        2,
    ),
    "cluster_barrier": Bug(
        errors.Deadlock,
        INIT + "if (cluster_rank() == 0) cluster_sync();\nelse mbarrier_wait(&barrier, 0);\n",
        0,
        ("block (0, 0, 0): thread (0, 0, 0) waits at the cluster's barrier", "128 of 256 threads"),
        2,
    ),
}


def planted(name: str, bug: Bug) -> LaunchSpec:
    tensor_map = TensorMapArg("x", torch.float16, (64, 192, 1), (64, 192 * 64), (64, 128, 1), written=True)
    args = (tensor_map, BufferArg("out", torch.float32, written=True))
    source = START.replace("NAME", name) + bug.body + "}\n"
    bounds = {"registers_that_nobody_gives": "(128, 4)", "registers_without_bounds": "(128)"}
    source = source.replace("(128, 1)", bounds.get(name, "(128, 1)"))
    return LaunchSpec(name, source, (1, 1, 1), (128, 1, 1), args, 64 * 1024, (bug.cluster, 1, 1))


@pytest.fixture(scope="module")
def kernels() -> Mapping[str, SimulatedKernel]:
    return dict(zip(BUGS, Simulator().load([planted(*item) for item in BUGS.items()]), strict=True))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(kernels: Mapping[str, SimulatedKernel], name: str) -> None:
    bug, kernel = BUGS[name], kernels[name]
    x, out = torch.rand(128, 64).half(), torch.zeros(128)
    with pytest.raises(bug.error) as caught:
        kernel([x, out], (bug.cluster, 1, 1))
    where = caught.value.where
    assert type(caught.value) is bug.error
    assert where.thread == (bug.thread, 0, 0)
    for words in bug.says:
        assert words in str(caught.value)
    if "// BUG" in bug.body:
        assert where.line == f"{name}.cu:{line_of(kernel.launch.source)}"


CORRECT = {
    "loaded_and_multiplied": READY
    + "wgmma_fence();\n"
    + PRODUCT
    + "wgmma_commit();\nwgmma_wait<0>();\nout[thread] = sums[0];",
    # A fence by one thread that knows of the writes through a barrier.
    "fenced_by_the_reader": WROTE
    + "__syncthreads();\nif (thread == 0) { fence_proxy_async(); tensor_store(&map, shared, 0, 0, 0);\n"
    + "tensor_store_commit(); tensor_store_wait_read<0>(); }",
    # Arrivals order what lies before them, for those who wait: no barrier of the block.
    "ordered_by_an_mbarrier": """__shared__ float value;
        if (thread == 0) { mbarrier_init(&barrier, 32); }
        __syncthreads();
        if (thread == 40) value = 3;
        if (thread / 32 == 1) { __syncwarp(); mbarrier_arrive(&barrier); }
        mbarrier_wait(&barrier, 0);
        out[thread] = value;""",
    # A wait that may give up: thread 0 arrives only once it has been told "not yet".
    "asked_in_vain": """if (thread == 0) { mbarrier_init(&barrier, 1); mbarrier_fence_init(); }
        __syncthreads();
        bool done = mbarrier_try_wait(&barrier, 0);
        if (thread == 0 && !done) mbarrier_arrive(&barrier);
        while (!mbarrier_test_wait(&barrier, 0)) {}""",
}  # fmt: skip


def test_correct_kernels_pass() -> None:
    """Nothing is reported for kernels that wait and fence, in any of four schedules."""
    launches: Sequence[LaunchSpec] = [
        planted(name, Bug(errors.SimulationError, body, 0)) for name, body in CORRECT.items()
    ]
    for launch, kernel in zip(launches, Simulator().load(launches, schedules=4), strict=True):
        x, out = torch.rand(128, 64).half(), torch.zeros(128)
        expected = {"loaded_and_multiplied": None, "ordered_by_an_mbarrier": 3.0}.get(launch.kernel, 0.0)
        kernel([x, out], (1, 1, 1))
        assert expected is None or (out == expected).all(), launch.kernel
