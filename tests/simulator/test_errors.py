"""A planted bug for everything that the simulator catches, each reported at its block, thread and line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from fusewright.simulator import errors
from fusewright.simulator.simulate import SimulatedKernel, Simulator
from kernels import launch, line_of


@dataclass(frozen=True)
class Bug:
    """body: of a kernel with parameters `const float* in, float* out, int64_t n`, 64 of each, launched as 64 threads.
    The line marked BUG is the one to name. thread: the x of the thread to name. says: words of the message.
    """

    error: type[errors.SimulationError]
    body: str
    thread: int
    says: tuple[str, ...] = ()
    shared_bytes: int = 0


BUGS: Mapping[str, Bug] = {
    "deadlock": Bug(
        errors.Deadlock,
        """fusewright::named_barrier_sync(threadIdx.x < 32 ? 1 : 2, 64);""",
        0,
        ("barrier 1", "barrier 2", "32 of 64 threads", "31 more"),
    ),
    "spinning": Bug(
        errors.Deadlock,
        """int* flag = reinterpret_cast<int*>(out);
           while (threadIdx.x == 3 && atomicAdd(flag, 0) == 0) {  // BUG
           }""",
        3,
        ("waits in a loop for memory to change, at byte 0 of `out` (spinning.cu:4)",),
    ),
    "spinning_on_shared_memory": Bug(
        errors.Deadlock,
        """__shared__ volatile int flag;
           if (threadIdx.x == 0) flag = 0;
           __syncthreads();
           if (threadIdx.x == 3)
               while (flag == 0) {  // BUG
               }
           __syncthreads();
           out[threadIdx.x] = flag;""",
        3,
        (
            "in a loop for memory to change, at byte 0 of shared `flag`",
            "thread (0, 0, 0) waits at barrier 0",
            "62 more",
        ),
    ),
    "spinning_on_global_memory": Bug(
        errors.Deadlock,
        """volatile float* flag = out;
           while (flag[n - 1] == 0 && flag[0] == 0) {  // BUG
           }""",
        0,
        ("of `out`",),
    ),
    "spinning_by_votes": Bug(
        errors.Deadlock,
        """volatile float* flag = out;
           while (__any_sync(~0u, flag[0] == 0)) {  // BUG
           }""",
        0,
        ("at byte 0 of `out`", "63 more"),
    ),
    "local_array": Bug(
        errors.OutOfBounds,
        """float local[4];
           for (int i = 0; i < n / 8; ++i) local[i] = in[i];
           out[threadIdx.x] = local[n % 3] + local[n % 4];
           }  // BUG
           namespace {""",
        0,
        ("outside a local array",),
    ),
    "local_array_far_out": Bug(
        errors.OutOfBounds,
        """float local[4];
           for (int i = 0; i < n * n; ++i) local[i] = in[i % 64];  // BUG
           out[threadIdx.x] = local[n % 3] + local[n % 4];""",
        0,
        ("outside a local array",),
    ),
    "large_frame": Bug(
        errors.StackOverflow,
        """volatile float local[100000];
           for (int i = 0; i < n; ++i) local[i] = in[i];
           out[threadIdx.x] = local[n];""",
        0,
        ("192 KiB",),
    ),
    "recursion": Bug(
        errors.StackOverflow,
        """struct Endless {
               __attribute__((noinline)) static float run(const float* in, int64_t n) {
                   return n < 0 ? 0 : run(in, n + 1) + in[n % 64];  // BUG
               }
           };
           out[threadIdx.x] = Endless::run(in, n);""",
        0,
    ),
    "null_function": Bug(
        errors.UndefinedOperation,
        """float (*volatile function)(float) = nullptr;
           out[threadIdx.x] = function(in[threadIdx.x]);  // BUG""",
        0,
        ("null pointer",),
    ),
    "null": Bug(
        errors.OutOfBounds,
        """const float* nowhere = nullptr;
           out[threadIdx.x] = nowhere[0];  // BUG""",
        0,
        ("none of the launch's buffers",),
    ),
    "division_by_zero": Bug(
        errors.UndefinedOperation,
        """out[threadIdx.x] = n / (int64_t(threadIdx.x) - 40);  // BUG""",
        40,
        ("divides an integer by zero",),
    ),
    "trap_instruction": Bug(
        errors.UndefinedOperation,
        """if (threadIdx.x == 7) __builtin_trap();  // BUG""",
        7,
    ),
    "divergence": Bug(
        errors.BarrierDivergence,
        """if (threadIdx.x % 2)
               __syncthreads();  // BUG
           else
               __syncthreads();""",
        1,
        ("thread (0, 0, 0) waits at barrier 0",),
    ),
    "early_exit": Bug(
        errors.BarrierDivergence,
        """if (threadIdx.x == 5) return;
           __syncthreads();""",
        5,
        ("has left the kernel",),
    ),
    "collective_after_barrier": Bug(
        errors.BarrierDivergence,
        """if (threadIdx.x < 16) __syncthreads();
           out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);  // BUG""",
        16,
        ("waits at barrier 0",),
    ),
    "wrong_mask": Bug(
        errors.BarrierDivergence,
        """__syncwarp(0xffff);  // BUG""",
        16,
        ("leaves itself out",),
    ),
    "different_counts": Bug(
        errors.BarrierDivergence,
        """fusewright::named_barrier_sync(1, threadIdx.x < 32 ? 64 : 32);  // BUG""",
        32,
        ("expects 32 threads",),
    ),
    "global_read": Bug(
        errors.OutOfBounds,
        """out[threadIdx.x] = in[threadIdx.x + 1];  // BUG""",
        63,
        ("reads 4 bytes at byte 256 of `in`, which has 256 bytes",),
    ),
    "global_write": Bug(
        errors.OutOfBounds,
        """out[int64_t(threadIdx.x) - 1] = 1;  // BUG""",
        0,
        ("writes 4 bytes at byte -4 of `out`",),
    ),
    "wild_pointer": Bug(
        errors.OutOfBounds,
        """out[threadIdx.x] = *reinterpret_cast<const float*>(n * 4096);  // BUG""",
        0,
        ("none of the launch's buffers",),
    ),
    "static_shared": Bug(
        errors.OutOfBounds,
        """__shared__ float tile[64];
           __shared__ float other[64];
           other[threadIdx.x] = 0;
           tile[threadIdx.x + n - 63] = 0;  // BUG
           out[threadIdx.x] = other[threadIdx.x] + tile[threadIdx.x + 1];""",
        63,
        ("byte 256 of shared `tile`, which has 256 bytes",),
    ),
    "dynamic_shared": Bug(
        errors.OutOfBounds,
        """extern __shared__ float dynamic[];
           dynamic[threadIdx.x] = 0;  // BUG
           out[threadIdx.x] = dynamic[threadIdx.x];""",
        60,
        ("byte 240 of shared `dynamic shared memory`, which has 240 bytes",),
        240,
    ),
    "misaligned_global": Bug(
        errors.Misaligned,
        """const float4 v = *reinterpret_cast<const float4*>(in + threadIdx.x % 8);  // BUG
           out[threadIdx.x] = v.x + v.w;""",
        1,
        ("'const struct float4'", "no multiple of 16"),
    ),
    "misaligned_shared": Bug(
        errors.Misaligned,
        """__shared__ __align__(16) float tile[66];
           *reinterpret_cast<float2*>(&tile[threadIdx.x]) = float2{1, 2};  // BUG
           out[threadIdx.x] = tile[threadIdx.x];""",
        1,
        ("'struct float2'", "no multiple of 8"),
    ),
    "uninitialised": Bug(
        errors.UninitialisedRead,
        """__shared__ float tile[64];
           if (threadIdx.x < 63) tile[threadIdx.x] = 1;
           __syncthreads();
           out[threadIdx.x] = tile[63 - threadIdx.x];  // BUG""",
        0,
        ("byte 252 of shared `tile`",),
    ),
    "half_initialised": Bug(
        errors.UninitialisedRead,
        """__shared__ __align__(4) __half tile[2];
           if (threadIdx.x == 0) tile[0] = __float2half(1);
           __syncthreads();
           out[threadIdx.x] = __uint_as_float(*reinterpret_cast<unsigned*>(tile));  // BUG""",
        0,
        ("byte 2 of shared `tile`",),
    ),
    "read_after_write_race": Bug(
        errors.SharedMemoryRace,
        """__shared__ float tile[64];
           tile[threadIdx.x] = in[threadIdx.x];
           out[threadIdx.x] = tile[threadIdx.x & ~1u];  // BUG""",
        1,
        ("reads byte 0 of shared `tile`", "thread (0, 0, 0) wrote", "no barrier"),
    ),
    "write_after_read_race": Bug(
        errors.SharedMemoryRace,
        """__shared__ float tile[64];
           tile[threadIdx.x] = in[threadIdx.x];
           __syncthreads();
           const float all = tile[0] + tile[1];
           tile[63 - threadIdx.x] = all;  // BUG
           __syncthreads();
           out[threadIdx.x] = tile[0];""",
        62,
        ("writes byte 4 of shared `tile`", "thread (0, 0, 0) read"),
    ),
    "write_after_many_reads_race": Bug(
        errors.SharedMemoryRace,
        """__shared__ float tile[64];
           tile[threadIdx.x] = in[threadIdx.x];
           __syncthreads();
           out[threadIdx.x] = tile[0];
           if (threadIdx.x >= 32) fusewright::named_barrier_arrive(1, 64);
           if (threadIdx.x < 32) fusewright::named_barrier_sync(1, 64);
           if (threadIdx.x == 0) tile[0] = 1;
           if (threadIdx.x == 40) tile[0] = 2;  // BUG""",
        40,
        ("thread (0, 0, 0) ",),
    ),
    "write_write_race": Bug(
        errors.SharedMemoryRace,
        """__shared__ float tile[32];
           tile[threadIdx.x % 32] = 1;  // BUG
           __syncthreads();
           out[threadIdx.x] = tile[threadIdx.x % 32];""",
        32,
        ("thread (0, 0, 0) wrote",),
    ),
    "byte_race": Bug(
        errors.SharedMemoryRace,
        """__shared__ uint8_t tile[64];
           tile[threadIdx.x] = 1;
           if (threadIdx.x == 33) tile[34] = 2;
           __syncthreads();
           out[threadIdx.x] = tile[threadIdx.x];""",
        34,
        ("byte 34 of shared `tile`", "thread (33, 0, 0) wrote"),
    ),
    "shuffles_order_nothing": Bug(
        errors.SharedMemoryRace,
        """__shared__ float tile[64];
           tile[threadIdx.x] = in[threadIdx.x];
           const float other = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
           out[threadIdx.x] = tile[threadIdx.x ^ 1] + other;  // BUG""",
        0,
        ("thread (1, 0, 0) wrote",),
    ),
    "narrow_barrier": Bug(
        errors.SharedMemoryRace,
        """__shared__ float tile[64];
           tile[threadIdx.x] = in[threadIdx.x];
           fusewright::named_barrier_sync(1 + threadIdx.x / 32, 32);
           out[threadIdx.x] = tile[threadIdx.x ^ 32];  // BUG""",
        0,
        ("thread (32, 0, 0) wrote",),
    ),
    "atomic_and_plain_race": Bug(
        errors.SharedMemoryRace,
        """__shared__ int sum;
           if (threadIdx.x == 0) sum = 0;
           __syncthreads();
           atomicAdd(&sum, 1);  // BUG
           if (threadIdx.x == 9) out[0] = sum;""",
        10,
        ("thread (9, 0, 0) read",),
    ),
    "copy_without_wait": Bug(
        errors.CopyInFlight,
        """__shared__ __align__(16) float tile[64];
           fusewright::copy_async<4>(&tile[threadIdx.x], in + threadIdx.x);
           fusewright::copy_async_commit();
           __syncthreads();
           out[threadIdx.x] = tile[threadIdx.x];  // BUG""",
        0,
        ("an asynchronous copy of thread (0, 0, 0)",),
    ),
    "copy_waits_for_too_little": Bug(
        errors.CopyInFlight,
        """__shared__ __align__(16) float tile[2][64];
           for (int i = 0; i < 2; ++i) {
               fusewright::copy_async<4>(&tile[i][threadIdx.x], in + threadIdx.x);
               fusewright::copy_async_commit();
           }
           fusewright::copy_async_wait<1>();
           out[threadIdx.x] = tile[0][threadIdx.x];
           out[threadIdx.x] += tile[1][threadIdx.x];  // BUG""",
        0,
    ),
    "copy_overwritten": Bug(
        errors.CopyInFlight,
        """__shared__ __align__(16) float tile[64];
           fusewright::copy_async<4>(&tile[threadIdx.x], in + threadIdx.x);
           tile[threadIdx.x] = 0;  // BUG
           fusewright::copy_async_commit();
           fusewright::copy_async_wait<0>();
           out[threadIdx.x] = tile[threadIdx.x];""",
        0,
    ),
    "copy_seen_by_others": Bug(
        errors.SharedMemoryRace,
        """__shared__ __align__(16) float tile[64];
           fusewright::copy_async<4>(&tile[threadIdx.x], in + threadIdx.x);
           fusewright::copy_async_commit();
           fusewright::copy_async_wait<0>();
           out[threadIdx.x] = tile[threadIdx.x & ~1u];  // BUG""",
        1,
        ("thread (0, 0, 0) wrote",),
    ),
    "copy_past_the_end": Bug(
        errors.OutOfBounds,
        """__shared__ __align__(16) float tile[256];
           fusewright::copy_async<16>(&tile[threadIdx.x * 4], in + threadIdx.x * 4);  // BUG""",
        16,
        ("reads 16 bytes at byte 256 of `in`",),
    ),
    "copy_misaligned": Bug(
        errors.Misaligned,
        """__shared__ __align__(16) float tile[256];
           fusewright::copy_async<8>(&tile[threadIdx.x * 2], in + threadIdx.x / 2);  // BUG""",
        2,
    ),
    "read_only": Bug(
        errors.ReadOnlyWrite,
        """const_cast<float*>(in)[threadIdx.x] = 1;  // BUG""",
        0,
        ("only reads",),
    ),
    "absent_lane": Bug(
        errors.UndefinedOperation,
        """if (threadIdx.x % 32 < 16)
               out[threadIdx.x] = __shfl_down_sync(0xffff, in[threadIdx.x], 8);  // BUG""",
        8,
        ("takes no part",),
    ),
    "assertion": Bug(
        errors.KernelTrap,
        """assert(n == 64 && threadIdx.x < 40);  // BUG""",
        40,
        ("n == 64 && threadIdx.x < 40",),
    ),
}


def source(name: str, bug: Bug) -> str:
    return (
        f'#include "async.cuh"\nextern "C" __global__ void {name}(const float* in, float* out, int64_t n) {{\n'
        f"           {bug.body}\n}}\n"
    )


@pytest.fixture(scope="module")
def kernels() -> Mapping[str, SimulatedKernel]:
    launches = [launch(source(name, bug), 64, bug.shared_bytes) for name, bug in BUGS.items()]
    return dict(zip(BUGS, Simulator().load(launches), strict=True))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(kernels: Mapping[str, SimulatedKernel], name: str) -> None:
    bug = BUGS[name]
    # Guarded on both sides, so that an access that slips through does no harm.
    given, result = torch.rand(192)[64:128], torch.zeros(192)[64:128]
    with pytest.raises(errors.SimulationError) as caught:
        kernels[name]([given, result, 64], (1,))
    message = str(caught.value)
    assert type(caught.value) is bug.error, message
    where = caught.value.where
    assert (where.kernel, where.block) == (name, (0, 0, 0))
    assert where.thread == (bug.thread, 0, 0), message
    for words in bug.says:
        assert words in message
    if "// BUG" in bug.body:
        assert where.line == f"{name}.cu:{line_of(source(name, bug))}", message
        assert where.line in message


CORRECT: Mapping[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "exchanged": (
        """__shared__ float tile[64];
           tile[threadIdx.x] = in[threadIdx.x];
           __syncthreads();
           out[threadIdx.x] = tile[63 - threadIdx.x];""",
        lambda x: x.flip(0),
    ),
    "within_a_warp": (
        """__shared__ float tile[64];
           tile[threadIdx.x] = in[threadIdx.x];
           __syncwarp();
           out[threadIdx.x] = tile[threadIdx.x ^ 1];""",
        lambda x: x.reshape(32, 2).flip(1).reshape(64),
    ),
    "producer_and_consumer": (
        """__shared__ float tile[32];
           if (threadIdx.x < 32) {
               tile[threadIdx.x] = in[threadIdx.x];
               fusewright::named_barrier_arrive(1, 64);
           } else {
               fusewright::named_barrier_sync(1, 64);
               out[threadIdx.x] = tile[threadIdx.x - 32];
           }""",
        lambda x: torch.cat([torch.zeros(32), x[:32]]),
    ),
    "reused_after_narrow_barriers": (
        """__shared__ float tile[64];
           const int warp = threadIdx.x / 32;
           for (int i = 0; i < 4; ++i) {
               tile[threadIdx.x] = in[threadIdx.x] * i;
               fusewright::named_barrier_sync(1 + warp, 32);
               out[threadIdx.x] += tile[warp * 32];
               fusewright::named_barrier_sync(1 + warp, 32);
           }""",
        lambda x: x.reshape(2, 32)[:, :1].expand(2, 32).reshape(64) * 6,
    ),
    "copied": (
        """__shared__ __align__(16) float tile[64];
           if (threadIdx.x < 16) fusewright::copy_async<16>(&tile[threadIdx.x * 4], in + threadIdx.x * 4, 8);
           fusewright::copy_async_commit();
           fusewright::copy_async_wait<0>();
           __syncthreads();
           out[threadIdx.x] = tile[threadIdx.x];""",
        lambda x: (x.reshape(16, 4) * torch.tensor([1, 1, 0, 0])).reshape(64),
    ),
    "warps_may_leave": (
        """if (threadIdx.x >= 32) return;
           __syncthreads();
           out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 3);""",
        lambda x: torch.cat([x[torch.arange(32) ^ 3], torch.zeros(32)]),
    ),
    "neighbouring_bytes": (
        """__shared__ __half tile[64];
           tile[threadIdx.x] = __float2half(in[threadIdx.x]);
           __syncthreads();
           out[threadIdx.x] = __half2float(tile[threadIdx.x ^ 1]);""",
        lambda x: x.half().float().reshape(32, 2).flip(1).reshape(64),
    ),
    "waits_by_atomics": (
        """__shared__ int flag;
           if (threadIdx.x == 0) flag = 0;
           __syncthreads();
           if (threadIdx.x == 20) atomicExch(&flag, 7);
           while (threadIdx.x >= 32 && atomicAdd(&flag, 0) == 0) {
           }
           out[threadIdx.x] = 1;""",
        lambda x: torch.ones(64),
    ),
    "waits_in_global_memory": (
        """volatile float* flag = out + 63;
           if (threadIdx.x == 63) *flag = 1;
           while (*flag == 0) {
           }
           out[threadIdx.x] = 1;""",
        lambda x: torch.ones(64),
    ),
    "reads_much": (
        """float sum = 0;
           for (int i = 0; i < 50000; ++i) sum += in[i % 64] > 2;
           out[threadIdx.x] = sum;""",
        lambda x: torch.zeros(64),
    ),
    "atomics_do_not_race": (
        """__shared__ int sum;
           if (threadIdx.x == 0) sum = 0;
           __syncthreads();
           atomicAdd(&sum, 2);
           __syncthreads();
           out[threadIdx.x] = sum;""",
        lambda x: torch.full((64,), 128.0),
    ),
}


@pytest.fixture(scope="module")
def correct() -> Sequence[SimulatedKernel]:
    sources = [
        f'#include "async.cuh"\nextern "C" __global__ void {name}(const float* in, float* out) {{ {body} }}'
        for name, (body, _) in CORRECT.items()
    ]
    return Simulator().load([launch(text) for text in sources], schedules=4)


def test_correct_kernels_pass(correct: Sequence[SimulatedKernel]) -> None:
    """Nothing is reported for kernels that order their accesses, in any of four schedules."""
    for (name, (_, expected)), kernel in zip(CORRECT.items(), correct, strict=True):
        given, result = torch.rand(64), torch.zeros(64)
        kernel([given, result], (2,) if name == "copied" else (1,))
        torch.testing.assert_close(result, expected(given), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("index", [-1, -100, 100])
def test_an_access_beside_shared_memory_names_it(index: int) -> None:
    """Nothing of the module lies before its first variable, and buffers may be near."""
    text = f"""extern "C" __global__ void f(float* out) {{
        __shared__ float tile[64];
        tile[int(threadIdx.x) + ({index})] = 1;
        out[threadIdx.x] = tile[threadIdx.x]; }}"""
    (kernel,) = Simulator().load([launch(text, 1)])
    with pytest.raises(errors.OutOfBounds, match=f"byte {4 * index} of shared `tile`, which has 256 bytes"):
        kernel([torch.rand(64)], (1,))


def test_what_a_launch_does_not_read_ahead_waits() -> None:
    """A launch that is not early begins after the one before it, and there is nothing to wait for."""
    body = "const float value = in[threadIdx.x];\nLINE out[threadIdx.x] = value;"
    text = f'#include "launch.cuh"\nextern "C" __global__ void f(const float* in, float* out) {{\n{body}\n}}'
    right, wrong = (launch(text.replace("LINE", line)) for line in ("fusewright::launch_before_wait();", ""))
    early = [replace(s, early=True, ahead=a) for s, a in ((right, ("in",)), (wrong, ("in", "out")), (wrong, ("in",)))]
    *fine, bad = Simulator().load([wrong, *early])
    for kernel in fine:
        kernel([x := torch.rand(64), out := torch.zeros(64)], (2,))
        assert torch.equal(x, out)
    with pytest.raises(errors.MissingFence, match=r"writes `out`.*before launch_before_wait") as caught:
        bad([x, out], (2,))
    assert caught.value.where.line.endswith(".cu:4")
