"""What the simulator finds wrong with a kernel or a launch: one class per kind of bug."""

from __future__ import annotations

from dataclasses import dataclass

from fusewright.errors import FusewrightError, ToolMissing


class CompilerMissing(ToolMissing):
    """No C++ compiler on this machine, and the simulator compiles kernels for the CPU."""


class SimulatorCompileError(FusewrightError):
    """The host compiler refused a kernel."""

    exit_code = 1


@dataclass(frozen=True)
class Where:
    """Where a kernel went wrong. line: "file:line" of the kernel's source, "" if unknown.

    What is wrong with a launch as a whole is at its first block and thread, and has no line.
    """

    kernel: str
    block: tuple[int, int, int] = (0, 0, 0)
    thread: tuple[int, int, int] = (0, 0, 0)
    line: str = ""


class SimulationError(FusewrightError):
    """Base of the bugs that a simulated kernel shows. `where` says in which kernel, block, thread and source line."""

    exit_code = 1

    def __init__(self, message: str, where: Where) -> None:
        super().__init__(message)
        self.where = where


class LaunchLimit(SimulationError):
    """The launch asks for more than the chip has, or its arguments do not fit: nothing has run."""


class Deadlock(SimulationError):
    """Threads wait for what can never come; the message says who waits on what."""


class BarrierDivergence(SimulationError):
    """Threads that must come to a barrier or warp collective together come to different ones."""


class OutOfBounds(SimulationError):
    """An access outside the launch's buffers, or outside the block's shared memory."""


class Misaligned(SimulationError):
    """An access at an address that is no multiple of its size."""


class UninitialisedRead(SimulationError):
    """A read of shared memory that no thread of the block has written."""


class SharedMemoryRace(SimulationError):
    """Two threads touch the same bytes of shared memory, one of them writes, and no barrier orders the two."""


class CopyInFlight(SimulationError):
    """An access to shared memory that an asynchronous copy, not waited for, may still be writing."""


class OperandInFlight(SimulationError):
    """A write to what a product or bulk store, not waited for, may still read, or any access to what it may write."""


class MissingFence(SimulationError):
    """No fence between what a thread did and what the asynchronous proxy, or a product, does in the same place."""


class PhaseOverrun(SimulationError):
    """More arrivals or bytes at an mbarrier than its phase expects, or than it can count."""


class StackOverflow(SimulationError):
    """A thread needs more local memory than it can have: recursion without end, or arrays as large."""


class ReadOnlyWrite(SimulationError):
    """A store through a pointer that the launch declares as only read."""


class UndefinedOperation(SimulationError):
    """Something that CUDA leaves undefined, such as shuffling from a lane that takes no part."""


class KernelTrap(SimulationError):
    """The kernel itself stopped: a failed assertion, or __trap()."""


class OrderDependentResult(SimulationError):
    """Two orders of the same threads and blocks give different results."""
