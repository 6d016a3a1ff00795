"""Loads cubins and launches kernels on torch's current stream, through the CUDA driver. Never waits for the device.

A launch rewrites argument slots that were laid out beforehand and makes one driver call.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import torch

from fusewright.chip import can_overlap
from fusewright.codegen.launch import Arg, BufferArg, FloatArg, LaunchSpec, TensorMapArg, map_type
from fusewright.errors import LaunchError, ToolMissing
from fusewright.runtime.nvrtc import Cubin

GRID_LIMITS = (2**31 - 1, 65_535, 65_535)  # CUDA C++ Programming Guide, "Compute Capabilities"
PORTABLE_CLUSTER = 8  # blocks

Grid = tuple[int, int, int]

_FLOATS = {torch.float32: "f", torch.float64: "d"}

# A CUtensorMap: bytes, and what its address is a multiple of.
TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = 128, 64
_MAPS = 256  # encoded maps of one argument that are kept, by pointer


class Kernel:
    """One kernel, ready to be launched on any device that its cubin fits, from any thread.

    Its code stays loaded for the life of the process: to unload it could take it from under a launch that is queued.
    """

    def __init__(self, spec: LaunchSpec, kernel: Any, arch: str) -> None:
        """Takes a spec and the `CUkernel` to launch by it. arch: what it was compiled for."""
        self.spec = spec
        self._kernel = kernel
        # A context's own function is launched without the search that the driver makes for a kernel.
        self._functions: dict[int, Any] = {}
        self._lock = threading.Lock()  # guards the slots and the configuration until the driver has read them
        layout = argument_layout(spec.args)
        self._slots = ctypes.create_string_buffer(layout.size + TENSOR_MAP_ALIGNMENT)
        self._start = -ctypes.addressof(self._slots) % TENSOR_MAP_ALIGNMENT
        self._pack = layout.pack_into
        self._pointers = _pointers(spec.args, ctypes.addressof(self._slots) + self._start)
        self._parameters = ctypes.addressof(self._pointers)
        self._config = _config(spec, overlaps=spec.early and can_overlap(arch))
        self._grid: Grid | None = None
        self._stream: int | None = None
        self._submit = _driver().cuLaunchKernelEx

    def launch(self, arguments: Sequence[int | float | bytes], grid: Grid, device_index: int) -> None:
        """Queues the kernel on torch's current stream of CUDA device `device_index`; an empty grid launches nothing.

        arguments: one for each of `spec.args`, in order: an address, a size, a float, an encoded tensor map.
        Raises LaunchError.
        """
        if 0 in grid:
            return
        function = self._functions.get(device_index)
        if function is None:
            function = self.prepare(device_index)
        stream = torch._C._cuda_getCurrentRawStream(device_index)
        with self._lock:
            try:
                self._pack(self._slots, self._start, *arguments)
            except (struct.error, OverflowError) as error:
                raise self._wrong_arguments(arguments, error) from None
            if grid is not self._grid or stream != self._stream:
                self._configure(grid, stream)
            call = (self._config, function, self._parameters, 0)
            if torch._C._cuda_getDevice() != device_index:
                with _context_of(device_index):
                    status = self._submit(*call)[0]
            else:
                status = self._submit(*call)[0]
                if status and status == _driver().CUresult.CUDA_ERROR_INVALID_CONTEXT:  # this thread is new to CUDA
                    _checked(_driver().cuCtxSetCurrent(_primary_context(device_index)), "the context cannot be set")
                    status = self._submit(*call)[0]
        if status:
            raise LaunchError(f"{self._describe(grid)} cannot be launched: {_explain(status)}")

    def prepare(self, device_index: int) -> Any:
        """Loads the code onto a device and raises its limit of shared memory there. Returns what is launched there.

        The first launch on a device does so too, but cannot while a CUDA graph is being captured. Raises LaunchError.
        """
        driver = _driver()
        attribute = driver.CUfunction_attribute
        attributes = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: self.spec.shared_bytes}
        x, y, z = self.spec.cluster
        if x * y * z > PORTABLE_CLUSTER:
            attributes[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
        what = f"{self._describe(None)} cannot run on device {device_index}"
        with _context_of(device_index):
            function = _checked(driver.cuKernelGetFunction(self._kernel), what)  # loads the code
            for name, value in attributes.items():
                _checked(driver.cuFuncSetAttribute(function, name, value), what)
        self._functions[device_index] = function
        return function

    def _configure(self, grid: Grid, stream: int) -> None:
        if not all(0 < blocks <= limit for blocks, limit in zip(grid, GRID_LIMITS, strict=True)):
            raise LaunchError(f"{self._describe(grid)} exceeds the largest grid, {GRID_LIMITS}")
        config = self._config
        config.hStream = self._stream = stream
        config.gridDimX, config.gridDimY, config.gridDimZ = self._grid = grid

    def _wrong_arguments(self, arguments: Sequence[int | float | bytes], error: Exception) -> LaunchError:
        expected = len(self.spec.args)
        return LaunchError(f"{self._describe(None)} takes {expected} arguments, not {tuple(arguments)}: {error}")

    def _describe(self, grid: Grid | None) -> str:
        where = f"grid {grid}, " if grid else ""
        cluster = f", cluster {self.spec.cluster}" if self.spec.cluster != (1, 1, 1) else ""
        shared = f"{self.spec.shared_bytes} bytes of dynamic shared memory"
        return f"kernel {self.spec.kernel} ({where}block {self.spec.block}{cluster}, {shared})"


def load(cubin: Cubin, spec: LaunchSpec) -> Kernel:
    """Returns the kernel that `spec` names in `cubin`. Raises LaunchError; ToolMissing without an NVIDIA driver."""
    driver = _driver()
    what = f"kernel {spec.kernel}, compiled for {cubin.arch}, cannot be loaded"
    library = _checked(driver.cuLibraryLoadData(cubin.code, [], [], 0, [], [], 0), what)
    return Kernel(spec, _checked(driver.cuLibraryGetKernel(library, spec.kernel.encode()), what), cubin.arch)


def argument_layout(args: Sequence[Arg]) -> struct.Struct:
    """Returns the packing of a kernel's arguments, each aligned as in C. Raises LaunchError for a dtype without one."""
    layout = "@"
    for arg in args:
        if isinstance(arg, TensorMapArg):  # more than `struct` aligns to by itself
            layout += f"{-struct.calcsize(layout) % TENSOR_MAP_ALIGNMENT}x"
        layout += _format(arg)
    return struct.Struct(layout)


def _format(arg: Arg) -> str:
    if isinstance(arg, BufferArg):
        return "P"
    if isinstance(arg, TensorMapArg):
        return f"{TENSOR_MAP_BYTES}s"
    if not isinstance(arg, FloatArg):
        return "q"
    if arg.dtype not in _FLOATS:
        raise LaunchError(f"a kernel takes a number as float32 or float64, not as {arg.dtype}")
    return _FLOATS[arg.dtype]


def tensor_map_encoder(arg: TensorMapArg) -> Callable[[int], bytes]:
    """Returns what encodes the map of `arg`, whose sizes are numbers, for an address; maps are kept, for it is slow.

    The returned function raises LaunchError where the driver refuses the map.
    """
    driver = _driver()
    interleave, l2 = driver.CUtensorMapInterleave, driver.CUtensorMapL2promotion
    swizzle = f"CU_TENSOR_MAP_SWIZZLE_{f'{arg.swizzle}B' if arg.swizzle else 'NONE'}"
    layout = (
        [driver.cuuint64_t(int(n)) for n in arg.dims],
        [driver.cuuint64_t(int(s) * arg.dtype.itemsize) for s in arg.strides],
        [driver.cuuint32_t(n) for n in arg.box],
        [driver.cuuint32_t(1) for _ in arg.box],
        interleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, swizzle),
        l2.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    element = getattr(driver.CUtensorMapDataType, map_type(arg))
    what = f"a tensor map of {arg.buffer}, {arg.dims} with strides {arg.strides}, cannot be had"

    @lru_cache(maxsize=_MAPS)
    def encode(address: int) -> bytes:
        encoded = _checked(driver.cuTensorMapEncodeTiled(element, len(arg.dims), address, *layout), what)
        return ctypes.string_at(int(encoded.getPtr()), TENSOR_MAP_BYTES)

    return encode


def _pointers(args: Sequence[Arg], base: int) -> ctypes.Array[ctypes.c_void_p]:
    """Returns the array of pointers to the arguments in the slots at address `base` that the driver wants."""
    ends = [argument_layout(args[: i + 1]).size for i in range(len(args))]
    sizes = [struct.calcsize(_format(arg)) for arg in args]
    starts = [base + end - size for end, size in zip(ends, sizes, strict=True)]
    return (ctypes.c_void_p * max(len(args), 1))(*starts)


def _config(spec: LaunchSpec, *, overlaps: bool) -> Any:
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.blockDimX, config.blockDimY, config.blockDimZ = spec.block
    config.sharedMemBytes = spec.shared_bytes
    attributes = []
    if spec.cluster != (1, 1, 1):
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = spec.cluster
        attributes.append(cluster)
    if overlaps:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        attributes.append(early)
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
    except (ImportError, RuntimeError) as error:
        raise ToolMissing(f"kernels cannot run here, for there is no NVIDIA driver: {error}") from error
    if status:
        raise ToolMissing(f"kernels cannot run here, for CUDA does not start: {status.name}")
    return driver


@cache
def version() -> int:
    """The newest CUDA that the driver knows, such as 13000. Raises ToolMissing, LaunchError."""
    return int(_checked(_driver().cuDriverGetVersion(), "the driver does not tell its version"))


@cache
def _primary_context(device_index: int) -> Any:
    """The context of a device that torch and the CUDA runtime use."""
    what = f"the context of device {device_index} cannot be had"
    return _checked(_driver().cuDevicePrimaryCtxRetain(_checked(_driver().cuDeviceGet(device_index), what)), what)


@contextmanager
def _context_of(device_index: int) -> Iterator[None]:
    _checked(_driver().cuCtxPushCurrent(_primary_context(device_index)), f"device {device_index} cannot be used")
    try:
        yield
    finally:
        _driver().cuCtxPopCurrent()


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """Returns the value of a driver call. Raises LaunchError, which says `what` and why."""
    status, *values = result
    if status:
        raise LaunchError(f"{what}: {_explain(status)}")
    return values[0] if values else None


def _explain(status: Any) -> str:
    text = _driver().cuGetErrorString(status)[1]
    hint = ""
    if status.name in ("CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_MISALIGNED_ADDRESS"):
        hint = "; a kernel that ran before failed, and this call is the first to be told"
    return f"{status.name} ({text.decode() if text else 'no description'}){hint}"
