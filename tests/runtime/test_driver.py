"""The launch path: against a stand-in for the driver's calls where there is no GPU, and on the GPU itself."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fusewright.chip import arch_of
from fusewright.codegen.launch import BufferArg, FloatArg, LaunchSpec, SizeArg, TensorMapArg
from fusewright.errors import LaunchError, ToolMissing
from fusewright.runtime import driver
from fusewright.runtime.driver import Kernel, argument_layout, load
from fusewright.runtime.nvrtc import Cubin, cached_cubin

F32, F64 = torch.float32, torch.float64

# y = x * factor + offset; arguments of every kind, ordered so that padding is needed before and after a float
SOURCE = """
extern "C" __global__ void axpb(const float* x, float factor, double offset, float* y, long long n) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
        y[i] = x[i] * factor + (float)offset;
}
// Copies through dynamic shared memory, one element in `step`, so that all of it must be there.
extern "C" __global__ void through_shared(const float* x, float* y, long long n, long long step) {
    extern __shared__ float buffer[];
    for (long long i = threadIdx.x; i < n; i += blockDim.x) buffer[i * step] = x[i];
    __syncthreads();
    for (long long i = threadIdx.x; i < n; i += blockDim.x) y[i] = buffer[i * step];
}
extern "C" __global__ void spin(float* y, long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
    *y = 1;
}
extern "C" __global__ void nothing() {}
"""

CLUSTER = """
extern "C" __global__ void cluster_rank(float* y) {
    unsigned rank, size;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    if (threadIdx.x == 0) y[blockIdx.x] = rank + 100.f * size;
}
"""

AXPB = LaunchSpec(
    kernel="axpb",
    source=SOURCE,
    grid=(4, 1, 1),
    block=(128, 1, 1),
    args=(BufferArg("x", F32), FloatArg(0.0), FloatArg(0.0, F64), BufferArg("y", F32, written=True), SizeArg(0)),
)
GRID = (4, 1, 1)


def test_arguments_are_laid_out_as_in_c() -> None:
    class InC(ctypes.Structure):
        _fields_ = (
            ("x", ctypes.c_void_p),
            ("factor", ctypes.c_float),
            ("offset", ctypes.c_double),
            ("y", ctypes.c_void_p),
            ("n", ctypes.c_int64),
        )

    layout = argument_layout(AXPB.args)
    assert layout.size == ctypes.sizeof(InC)
    in_c = InC.from_buffer_copy(layout.pack(2**48, 0.5, 1 / 3, 2**63, -(2**40)))
    assert (in_c.x, in_c.factor, in_c.offset, in_c.y, in_c.n) == (2**48, 0.5, 1 / 3, 2**63, -(2**40))


def test_a_tensor_map_lies_at_a_multiple_of_64_bytes() -> None:
    x = TensorMapArg("x", torch.float16, (64, 64, 1), (64, 4096), (64, 64, 1))
    layout = argument_layout([SizeArg(0), x, x, SizeArg(0)])
    packed = layout.pack(1, b"a" * 128, b"b" * 128, 2)
    assert (packed[64:192], packed[192:320], packed[320:]) == (b"a" * 128, b"b" * 128, (2).to_bytes(8, "little"))


def test_float_of_another_dtype() -> None:
    with pytest.raises(LaunchError, match=r"not as torch\.float16"):
        argument_layout([FloatArg(1.0, torch.float16)])


class Recorder:
    """Stands in for the calls of the driver, and reads what a launch passes to it as the driver would."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.launches: list[dict[str, Any]] = []
        self.attributes: dict[tuple[str, int], int] = {}
        self.contexts: list[int] = []  # pushed contexts
        self.current = 1  # the thread's context; device d has context d + 1
        self.status = 0
        self.delay = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return 0, device + 1

    def cuCtxPushCurrent(self, context: int) -> tuple[int]:
        self.contexts.append(self.current)
        self.current = context
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, int]:
        popped, self.current = self.current, self.contexts.pop()
        return 0, popped

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.current = context
        return (0,)

    def cuKernelGetFunction(self, kernel: Any) -> tuple[int, int]:
        return 0, kernel + self.current  # every context has its own

    def cuFuncSetAttribute(self, function: int, attribute: Any, value: int) -> tuple[int]:
        self.attributes[attribute.name, function - 78] = value
        return (0,)

    def cuGetErrorString(self, status: Any) -> tuple[int, bytes]:
        return 0, b"a reason"

    def cuLaunchKernelEx(self, config: Any, function: Any, parameters: int, extra: int) -> tuple[Any]:
        results = self.real.CUresult
        if self.current == 0:
            return (results.CUDA_ERROR_INVALID_CONTEXT,)
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        time.sleep(self.delay)
        types = (ctypes.c_void_p, ctypes.c_float, ctypes.c_double, ctypes.c_void_p, ctypes.c_int64)
        values = tuple(t.from_address(pointers[i] or 0).value for i, t in enumerate(types))
        self.launches.append(
            {
                "arguments": values,
                "grid": (config.gridDimX, config.gridDimY, config.gridDimZ),
                "block": (config.blockDimX, config.blockDimY, config.blockDimZ),
                "shared": config.sharedMemBytes,
                "stream": int(config.hStream),
                "attributes": [attribute(a) for a in config.attrs],
                "context": self.current,
                "function": int(function),
            }
        )
        return (results(self.status),)


def attribute(a: Any) -> tuple[str, Any]:
    name, dim = a.id.name.removeprefix("CU_LAUNCH_ATTRIBUTE_"), a.value.clusterDim
    return name, (dim.x, dim.y, dim.z) if "CLUSTER" in name else a.value.programmaticStreamSerializationAllowed


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    from cuda.bindings import driver as real

    recorder = Recorder(real)
    driver._primary_context.cache_clear()
    monkeypatch.setattr(driver, "_driver", lambda: recorder)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 1000 + device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    yield recorder
    driver._primary_context.cache_clear()


def kernel_of(spec: LaunchSpec, arch: str = "sm_90a") -> Kernel:
    return Kernel(spec, 77, arch)


def test_launch_passes_everything(recorder: Recorder) -> None:
    kernel = kernel_of(replace(AXPB, block=(32, 2, 3), shared_bytes=1024))
    kernel.launch((16, 0.5, 1 / 3, 32, 7), (5, 6, 7), 0)
    kernel.launch((48, 0.25, 2.0, 64, -1), (8, 6, 7), 0)
    first, second = recorder.launches
    assert first == {
        "arguments": (16, 0.5, 1 / 3, 32, 7),
        "grid": (5, 6, 7),
        "block": (32, 2, 3),
        "shared": 1024,
        "stream": 1000,
        "attributes": [],
        "context": 1,
        "function": 78,
    }
    assert second == first | {"arguments": (48, 0.25, 2.0, 64, -1), "grid": (8, 6, 7)}


def test_cluster_and_large_shared_memory(recorder: Recorder) -> None:
    kernel = kernel_of(replace(AXPB, cluster=(4, 4, 1), shared_bytes=200_000))
    kernel.launch((0, 0.0, 0.0, 0, 0), GRID, 0)
    kernel.launch((0, 0.0, 0.0, 0, 0), GRID, 0)
    assert [launch["attributes"] for launch in recorder.launches] == [[("CLUSTER_DIMENSION", (4, 4, 1))]] * 2
    assert recorder.attributes == {
        ("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", 0): 200_000,
        ("CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED", 0): 1,
    }


@pytest.mark.parametrize(("arch", "overlaps"), [("sm_89", False), ("sm_90a", True), ("sm_100a", True)])
def test_an_early_launch_overlaps_where_the_chip_can(recorder: Recorder, arch: str, overlaps: bool) -> None:
    kernel_of(replace(AXPB, early=True), arch).launch((0, 0.0, 0.0, 0, 0), GRID, 0)
    (launch,) = recorder.launches
    assert launch["attributes"] == [("PROGRAMMATIC_STREAM_SERIALIZATION", 1)] * overlaps


def test_every_device_is_prepared_and_used_in_its_context(recorder: Recorder) -> None:
    kernel = kernel_of(replace(AXPB, shared_bytes=100_000))
    for device in (0, 1, 0, 1):
        kernel.launch((0, 0.0, 0.0, 0, 0), GRID, device)
    assert [(launch["stream"], launch["context"], launch["function"]) for launch in recorder.launches] == [
        (1000, 1, 78),
        (1001, 2, 79),
    ] * 2
    assert {device for _, device in recorder.attributes} == {0, 1}
    assert recorder.contexts == []
    assert recorder.current == 1


def test_thread_without_a_context(recorder: Recorder) -> None:
    recorder.current = 0
    kernel_of(AXPB).launch((0, 0.0, 0.0, 0, 0), GRID, 0)
    assert recorder.launches[0]["context"] == recorder.current == 1


@pytest.mark.parametrize("grid", [(0, 1, 1), (3, 0, 1), (3, 1, 0)])
def test_empty_grid_launches_nothing(recorder: Recorder, grid: tuple[int, int, int]) -> None:
    kernel_of(AXPB).launch((0, 0.0, 0.0, 0, 0), grid, 0)
    assert recorder.launches == []


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65_536, 1), (1, 1, 65_536), (-1, 1, 1)])
def test_grid_beyond_the_limits(recorder: Recorder, grid: tuple[int, int, int]) -> None:
    kernel = kernel_of(AXPB)
    for _ in range(2):
        with pytest.raises(LaunchError, match=r"kernel axpb \(grid .*exceeds the largest grid"):
            kernel.launch((0, 0.0, 0.0, 0, 0), grid, 0)
    kernel.launch((0, 0.0, 0.0, 0, 0), (2**31 - 1, 65_535, 65_535), 0)
    assert [launch["grid"] for launch in recorder.launches] == [(2**31 - 1, 65_535, 65_535)]


@pytest.mark.parametrize(
    "arguments", [(1, 2.0, 3.0, 4), (1, 2.0, 3.0, 4, 5, 6), (1, 2.0, 3.0, 4, 0.5), (2**64, 2, 3, 4, 5)]
)
def test_arguments_that_do_not_fit(recorder: Recorder, arguments: tuple[float, ...]) -> None:
    with pytest.raises(LaunchError, match=r"kernel axpb .* takes 5 arguments, not"):
        kernel_of(AXPB).launch(arguments, GRID, 0)
    assert recorder.launches == []


def test_error_of_the_driver(recorder: Recorder) -> None:
    recorder.status = 701
    with pytest.raises(LaunchError) as caught:
        kernel_of(replace(AXPB, shared_bytes=8)).launch((0, 0.0, 0.0, 0, 0), GRID, 0)
    assert str(caught.value) == (
        "kernel axpb (grid (4, 1, 1), block (128, 1, 1), 8 bytes of dynamic shared memory) cannot be launched: "
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (a reason)"
    )
    recorder.status = 700
    with pytest.raises(LaunchError, match="a kernel that ran before failed"):
        kernel_of(AXPB).launch((0, 0.0, 0.0, 0, 0), GRID, 0)


def test_threads_do_not_mix_their_arguments(recorder: Recorder) -> None:
    """The driver is slow and lets other threads run while it has yet to read the arguments."""
    recorder.delay = 0.001
    kernel = kernel_of(AXPB)

    def use(worker: int) -> None:
        for i in range(20):
            kernel.launch((worker, float(worker), float(i), worker, worker), (worker + 1, 1, 1), 0)

    threads = [threading.Thread(target=use, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.launches) == 80
    for launch in recorder.launches:
        x, factor, _, y, n = launch["arguments"]
        assert (x or 0) == factor == (y or 0) == n == launch["grid"][0] - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver() -> None:
    with pytest.raises(ToolMissing, match=r"no NVIDIA driver|CUDA does not start"):
        load(Cubin(b"", "sm_90a", "", {}), AXPB)


# On the GPU


@pytest.fixture(scope="module")
def cubin() -> Cubin:
    return cached_cubin(SOURCE, arch_of(torch.cuda.get_device_capability()))


@pytest.fixture
def axpb(cubin: Cubin) -> Kernel:
    return load(cubin, AXPB)


def launch_axpb(kernel: Kernel, x: torch.Tensor, y: torch.Tensor, factor: float, offset: float) -> None:
    kernel.launch((x.data_ptr(), factor, offset, y.data_ptr(), x.numel()), GRID, x.device.index)


@pytest.mark.gpu
def test_computes(axpb: Kernel) -> None:
    x = torch.randn(100_001, device="cuda")
    for factor, offset in ((2.0, 0.5), (-0.25, 3.0)):
        y = torch.full_like(x, float("nan"))
        launch_axpb(axpb, x, y, factor, offset)
        assert torch.equal(y, x * factor + offset)


@pytest.mark.gpu
def test_large_shared_memory(cubin: Cubin) -> None:
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    args = (BufferArg("x", F32), BufferArg("y", F32, written=True), SizeArg(0), SizeArg(0))
    spec = replace(AXPB, kernel="through_shared", args=args, shared_bytes=limit)
    x = torch.randn(1000, device="cuda")
    y = torch.empty_like(x)
    step = limit // 4 // 1000
    load(cubin, spec).launch((x.data_ptr(), y.data_ptr(), 1000, step), (1, 1, 1), 0)
    assert torch.equal(x, y)
    with pytest.raises(LaunchError, match=r"kernel through_shared .*CUDA_ERROR_INVALID_VALUE"):
        load(cubin, replace(spec, shared_bytes=limit + 1024)).launch((0, 0, 0, 0), (1, 1, 1), 0)


@pytest.mark.gpu
def test_cluster() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    cubin = cached_cubin(CLUSTER, arch_of(torch.cuda.get_device_capability()))
    for size in (2, 8, 16):
        y = torch.empty(32, device="cuda")
        spec = replace(AXPB, kernel="cluster_rank", args=(BufferArg("y", F32, written=True),), cluster=(size, 1, 1))
        load(cubin, spec).launch((y.data_ptr(),), (32, 1, 1), 0)
        assert y.tolist() == [i % size + 100 * size for i in range(32)]


@pytest.mark.gpu
def test_kernel_without_arguments(cubin: Cubin) -> None:
    load(cubin, replace(AXPB, kernel="nothing", args=())).launch((), (3, 2, 1), 0)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_queues_on_the_current_stream_without_waiting(axpb: Kernel, cubin: Cubin) -> None:
    """Behind a kernel that spins for about 0.2 s, a launch returns at once, and only its own stream waits."""
    spin = load(cubin, replace(AXPB, kernel="spin", args=(BufferArg("y", F32, written=True), SizeArg(0))))
    x, y, flag = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda"), torch.zeros(1, device="cuda")
    launch_axpb(axpb, x, y, 0.0, 0.0)
    spin.launch((flag.data_ptr(), 0), (1, 1, 1), 0)
    torch.cuda.synchronize()
    slow, quick = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(slow):
        start = time.perf_counter()
        spin.launch((flag.data_ptr(), 400_000_000), (1, 1, 1), 0)
        launch_axpb(axpb, x, y, 3.0, 0.0)
        elapsed = time.perf_counter() - start
    assert elapsed < 0.05
    assert not slow.query()
    with torch.cuda.stream(quick):
        launch_axpb(axpb, x, torch.empty_like(x), 3.0, 0.0)
    quick.synchronize()
    assert not slow.query()
    slow.synchronize()
    assert torch.equal(y, 3 * x)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph(axpb: Kernel) -> None:
    x, y = torch.randn(1000, device="cuda"), torch.zeros(1000, device="cuda")
    axpb.prepare(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_axpb(axpb, x, y, 2.0, 1.0)
    assert torch.equal(y, torch.zeros_like(y))
    graph.replay()
    assert torch.equal(y, 2 * x + 1)


@pytest.mark.gpu
def test_threads_that_have_not_used_cuda(axpb: Kernel) -> None:
    x = torch.randn(1000, device="cuda")
    results = [torch.zeros_like(x) for _ in range(8)]
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def use(i: int) -> None:
        try:
            for _ in range(200):
                launch_axpb(axpb, x, results[i], float(i), 0.0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert errors == []
    for i, result in enumerate(results):
        assert torch.equal(result, i * x)


@pytest.mark.gpu
def test_backward_thread(axpb: Kernel) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            result = torch.empty_like(gradient)
            launch_axpb(axpb, gradient.contiguous(), result, 2.0, 0.0)
            return result

    x = torch.randn(1000, device="cuda", requires_grad=True)
    Double.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))  # type: ignore[arg-type]


@pytest.mark.gpu
def test_two_devices(axpb: Kernel) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for device in (1, 0, 1):
        x = torch.randn(1000, device=f"cuda:{device}")
        y = torch.zeros_like(x)
        launch_axpb(axpb, x, y, 2.0, 0.0)  # torch's current device stays 0
        assert torch.equal(y, 2 * x)
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_errors_of_the_driver(cubin: Cubin, axpb: Kernel) -> None:
    with pytest.raises(LaunchError, match=r"kernel missing, compiled for .*CUDA_ERROR_NOT_FOUND"):
        load(cubin, replace(AXPB, kernel="missing"))
    other = "sm_80" if cubin.arch != "sm_80" else "sm_90a"
    with pytest.raises(LaunchError, match=r"kernel axpb.*CUDA_ERROR_NO_BINARY_FOR_GPU"):
        load(cached_cubin(SOURCE, other), AXPB).prepare(0)
    with pytest.raises(LaunchError, match=r"block \(2048, 1, 1\).*CUDA_ERROR_INVALID_VALUE"):
        load(cubin, replace(AXPB, block=(2048, 1, 1))).launch((0, 0.0, 0.0, 0, 0), GRID, 0)
    with pytest.raises(LaunchError, match="device 99"):
        axpb.launch((0, 0.0, 0.0, 0, 0), GRID, 99)
    x = torch.ones(10, device="cuda")
    launch_axpb(axpb, x, x, 2.0, 0.0)  # none of that has harmed the context
    assert torch.equal(x, torch.full_like(x, 2.0))


@pytest.mark.gpu
def test_a_launch_takes_six_microseconds_at_most(axpb: Kernel) -> None:
    """This thread's own time, not what other processes take from it, at its best over more than a second: what shares
    a core with it seldom does all the while. Each batch is few enough for the queue of the device."""
    x = torch.zeros(1, device="cuda")
    arguments = (x.data_ptr(), 1.0, 0.0, x.data_ptr(), 1)
    batches = []
    for _ in range(60):
        torch.cuda.synchronize()
        time.sleep(0.02)
        start = time.thread_time_ns()
        for _ in range(100):
            axpb.launch(arguments, GRID, 0)
        batches.append((time.thread_time_ns() - start) / 100 / 1e3)
    print(f"{min(batches):.2f} µs a launch")
    assert min(batches) <= 6, sorted(batches)
