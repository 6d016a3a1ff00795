"""The simulator's runtime library, compiled once for each machine, and its C interface (runtime/launch.hpp)."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path

from fusewright.runtime.cache import Cache, Entry, fingerprint
from fusewright.simulator import errors
from fusewright.simulator.toolchain import INCLUDE, RUNTIME, Toolchain

CACHE_KIND = "simulator"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-pthread")

INTERRUPTED = -1
# What a failure's `kind` means otherwise: the order of Failure::Kind in runtime/block.hpp, from 1.
ERRORS: tuple[type[errors.SimulationError], ...] = (
    errors.Deadlock,
    errors.BarrierDivergence,
    errors.OutOfBounds,
    errors.Misaligned,
    errors.UninitialisedRead,
    errors.SharedMemoryRace,
    errors.CopyInFlight,
    errors.ReadOnlyWrite,
    errors.UndefinedOperation,
    errors.KernelTrap,
    errors.OperandInFlight,
    errors.MissingFence,
    errors.PhaseOverrun,
    errors.StackOverflow,
)


class Range(ctypes.Structure):
    """Memory that the kernel may touch."""

    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("writable", ctypes.c_uint64),
        ("early", ctypes.c_uint64),  # before the launch before has ended
    )


class Variable(ctypes.Structure):
    """A variable in shared memory."""

    _fields_ = (("offset", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("name", ctypes.c_char_p))


class Launch(ctypes.Structure):
    """One launch."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("anchor", ctypes.c_void_p),
        ("anchor_offset", ctypes.c_uint64),
        ("ranges", ctypes.POINTER(Range)),
        ("range_count", ctypes.c_uint64),
        ("variables", ctypes.POINTER(Variable)),
        ("variable_count", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("registers", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("workers", ctypes.c_uint32),
    )


class Failure(ctypes.Structure):
    """What went wrong in a launch."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("pc", ctypes.c_uint64),
        ("message", ctypes.c_char * 4096),
    )


def build(toolchain: Toolchain) -> Entry:
    """Returns the cache entry that holds the runtime library, `runtime_name(entry)`, compiling it if need be."""
    files = {path.name: path.read_bytes() for path in [*sorted(RUNTIME.iterdir()), INCLUDE / "api.hpp"]}
    key = fingerprint(kind="simulator runtime", files=files, toolchain=toolchain, flags=FLAGS)
    return Cache(CACHE_KIND).fetch(key, lambda: {_name(key): _compile(toolchain, _name(key))})


def runtime_name(entry: Entry) -> str:
    """Returns the file name of the library, which is its soname too: modules find the loaded one by it."""
    return _name(entry.key)


def _name(key: str) -> str:
    return f"libfusewright_simulator_{key[:16]}.so"


def _compile(toolchain: Toolchain, name: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="fusewright-") as temporary:
        folder = Path(temporary)
        # As one unit: most of the time goes into the standard library's headers.
        unit = "".join(f'#include "{source}"\n' for source in sorted(RUNTIME.glob("*.cpp")))
        (folder / "runtime.cpp").write_text(unit)
        toolchain.run([*FLAGS, "-shared", f"-Wl,-soname,{name}", "runtime.cpp", "-o", name], folder)
        return (folder / name).read_bytes()


@functools.cache
def load(path: str) -> ctypes.CDLL:
    """Loads the runtime library. Modules that are loaded later find it by its name."""
    library = ctypes.CDLL(path)
    library.fusewright_simulator_launch.argtypes = [ctypes.POINTER(Launch), ctypes.POINTER(Failure)]
    library.fusewright_simulator_launch.restype = ctypes.c_int
    return library
