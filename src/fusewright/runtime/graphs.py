"""CUDA graphs: what one call launches, replayed as one.

A graph freezes addresses, so one comparison a call keeps it right: a recording is replayed only where every argument
that it reads in place lies where it lay at the capture. What follows from that:

- A graph is captured when the same addresses come a second time. The first call of each kind runs as it would without
  graphs, which also tunes and loads every kernel.
- An argument that keeps moving gets a buffer of its own, into which it is copied before each replay. Parameters, and
  what forward saved for backward, are never copied.
- Results lie in the graph's own memory. They are handed out as they lie, and nothing is replayed over memory that
  somebody still holds: the call runs without a graph then. From then on the caller's own results are copied out, so
  that holding them costs a copy and no more. What forward saved stays in place for backward's graph, so a forward
  before the last one's backward has run always goes without.
- There is one set of recordings for each set of sizes, and a bound on all of them; beyond it calls run without graphs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fusewright.errors import CannotReplay
from fusewright.fusion.plan import FusionPlan
from fusewright.runtime.autotune import Tuned, executable_of
from fusewright.runtime.executable import Executable
from fusewright.runtime.frozen import held, thaws

log = logging.getLogger("fusewright")

SIZES = 16  # sets of sizes that graphs are kept for
CAPTURES = 16  # captures for one set of sizes, before what still changes runs without graphs
_PLACES = 8  # sets of addresses that are remembered for one set of sizes
_STAYS = 2  # addresses at which an argument may be seen before it counts as moving

# One capture at a time: each begins by waiting for the device, which another's forbids, and may be on the same stream.
_CAPTURE = threading.Lock()

Run = Callable[..., list[Any]]


class Recorder(Protocol):
    """Makes graphs."""

    def stream(self) -> int:
        """The stream that work is queued on now."""

    def capturing(self) -> bool:
        """Whether the caller is capturing a graph of their own."""

    def record(self, run: Run, arguments: Sequence[Any]) -> tuple[Callable[[], None], list[Any]]:
        """Captures what `run` launches. Returns how to replay that, and the results, which each replay writes anew."""


class CudaRecorder:
    """Captures through torch, each graph with a pool of memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index = device.index or 0

    def stream(self) -> int:
        return int(torch._C._cuda_getCurrentRawStream(self.index))

    def capturing(self) -> bool:
        return bool(torch._C._cuda_isCurrentStreamCapturing())

    def record(self, run: Run, arguments: Sequence[Any]) -> tuple[Callable[[], None], list[Any]]:
        graph = torch.cuda.CUDAGraph()
        side = _side_stream(self.index, self.stream())
        # Other threads may use the device meanwhile.
        captured = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
        with torch.cuda.device(self.index), torch.inference_mode(False), torch.no_grad(), captured:
            results = run(*arguments)
        return graph.replay, results


@lru_cache(maxsize=64)
def _side_stream(device: int, stream: int) -> torch.cuda.Stream:
    """Where captures for a stream happen; the library keeps a workspace for each, which concurrent replays need."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Replayed:
    """Calls `run` as it is or by replaying a recording of it; the results are the same."""

    def __init__(
        self,
        run: Run,
        sizes: Callable[[Sequence[Any]], Hashable],
        recorder: Recorder,
        *,
        fixed: Collection[int] = (),
        results: int | None = None,
        frozen: Collection[int] = (),
        fallbacks: Sequence[str] = (),
    ) -> None:
        """sizes: what decides the shapes of a call. fixed: the arguments that are never copied. results: how many of
        the results are the caller's; those after them are for backward. frozen: the arguments of which `run` keeps
        what it made; recordings keep them alive, for at their address must be nothing else. fallbacks: what runs as
        ATen, for messages."""
        self.run = run
        self.sizes = sizes
        self.recorder = recorder
        self.fixed = frozenset(fixed)
        self.results = results
        self.frozen = frozenset(frozen)
        self.fallbacks = fallbacks
        self._kept: dict[Hashable, _Sized] = {}
        self._lock = threading.Lock()  # between the question who holds the results and the replay

    @classmethod
    def of(
        cls, executable: Executable | Tuned, fixed: Collection[int], results: int | None, frozen: Collection[int]
    ) -> Replayed:
        """Replays an executable on its GPU. Raises CannotReplay."""
        inner = executable_of(executable)
        check(inner.plan, inner.device)
        return cls(
            executable,
            lambda arguments: tuple(inner.sizes(arguments).values()),
            CudaRecorder(inner.device),
            fixed=fixed,
            results=results,
            frozen=frozen,
            fallbacks=[f.name for f in inner.plan.fallbacks],
        )

    def __call__(self, *arguments: Any) -> list[Any]:
        """Raises CannotReplay."""
        if self.recorder.capturing():
            return self.run(*arguments)
        with self._lock:
            key = self.sizes(arguments)
            sized = self._kept.get(key)
            if sized is None:
                if len(self._kept) >= SIZES:
                    _warn(f"more than {SIZES} sets of sizes; further ones run without CUDA graphs")
                    return self.run(*arguments)
                sized = self._kept[key] = _Sized(self, arguments)
            return sized(arguments)


class _Sized:
    """The recordings for one set of sizes, by stream and addresses of what they read in place; None: seen only."""

    def __init__(self, owner: Replayed, arguments: Sequence[Any]) -> None:
        self.owner = owner
        self.recordings: dict[tuple[Any, ...], _Recording | None] = {}
        self.in_place = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        self.copied: set[int] = set()
        self.seen: dict[int, set[int]] = {i: set() for i in self.in_place}
        self.copied_out: frozenset[int] = frozenset()
        self.captures = 0
        self.limit = 0 if any(isinstance(a, Tensor) and not a.numel() for a in arguments) else CAPTURES

    def __call__(self, arguments: Sequence[Any]) -> list[Any]:
        places = (self.owner.recorder.stream(), thaws(), *[arguments[i].data_ptr() for i in self.in_place])
        recording = self.recordings.get(places)
        if recording is not None:
            held = recording.held()
            if not held:
                return recording.replay(arguments)
            self.leave(held)
        elif places not in self.recordings:
            self.meet(places)
        elif self.captures < self.limit:
            return self.capture(places, arguments)
        return self.owner.run(*arguments)

    def meet(self, places: tuple[Any, ...]) -> None:
        """Notes addresses that come for the first time, and which arguments keep moving."""
        for i, place in zip(self.in_place, places[2:], strict=True):
            seen = self.seen[i]
            seen.add(place)
            if len(seen) > _STAYS and i not in self.owner.fixed:
                self.copied.add(i)
            elif len(seen) > _PLACES:
                seen.clear()
        if not self.copied.isdisjoint(self.in_place):
            self.in_place = [i for i in self.in_place if i not in self.copied]
            self.recordings.clear()
            return
        self.recordings = {
            p: r for p, r in self.recordings.items() if p[1] == places[1]
        }  # thawed ones never come again
        if len(self.recordings) >= _PLACES:
            del self.recordings[next(iter(self.recordings))]
        self.recordings[places] = None

    def leave(self, held: Sequence[set[int]]) -> None:
        """Somebody holds these results of the last replay: those that are the caller's are copied out from now on."""
        results = self.owner.results
        own = {i for i in set().union(*held) if results is None or i < results}
        if own:
            self.copied_out |= own
            self.recordings = dict.fromkeys(self.recordings)

    def capture(self, places: tuple[Any, ...], arguments: Sequence[Any]) -> list[Any]:
        """Runs the call with copied arguments in their buffers, then records that for the next one."""
        owner = self.owner
        self.captures += 1
        if self.captures == CAPTURES:
            _warn(f"{CAPTURES} CUDA graphs were captured for one set of sizes; what still changes runs without one")
        with torch.inference_mode(False):
            buffers = {i: _buffer(arguments[i]) for i in sorted(self.copied)}
        for i, buffer in buffers.items():
            _copy(buffer, arguments[i])
        static = [buffers.get(i, a) for i, a in enumerate(arguments)]
        first = owner.run(*static)
        # A result that lies in a buffer is made anew below, for a recording counts who holds its memory from the start.
        inside = {_storage(b) for b in buffers.values()}
        again = [isinstance(r, Tensor) and _storage(r) in inside for r in first]
        first = [None if a else r for r, a in zip(first, again, strict=True)]
        try:
            with held() as kept, _CAPTURE:
                graph, results = owner.recorder.record(owner.run, static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CannotReplay(_refused(owner.fallbacks, str(error))) from error
        recording = self.recordings[places] = _Recording.of(graph, buffers, static, results, self.copied_out)
        recording.frozen = [*(arguments[i] for i in owner.frozen), *kept]
        return [m if a else r for r, a, m in zip(first, again, recording.results(arguments), strict=True)]


@dataclass
class _Slot:
    """A tensor in the graph's memory that results are. copied: they are copies of it; else aliases, counted."""

    tensor: Tensor
    copied: bool
    positions: set[int]

    def copy(self) -> Tensor:
        result = _buffer(self.tensor)
        _copy(result, self.tensor)
        return result


# A result after a replay: from the slots' fresh tensors, and the arguments of the call.
Make = Callable[[Sequence[Tensor], Sequence[Any]], Any]


@dataclass
class _Recording:
    """One captured graph. buffers: what is copied in, by argument. watched: of each storage that results alias the
    address, how many tensors share it that we hold, and those results."""

    graph: Callable[[], None]
    buffers: dict[int, Tensor]
    slots: list[_Slot]
    make: list[Make]
    watched: list[tuple[int, int, set[int]]]
    frozen: Sequence[Tensor] = ()

    @classmethod
    def of(
        cls,
        graph: Callable[[], None],
        buffers: dict[int, Tensor],
        arguments: Sequence[Any],
        results: Sequence[Any],
        copied_out: Collection[int],
    ) -> _Recording:
        """arguments: those of the capture; nothing keeps hold of them but for `buffers`."""
        in_place = {_storage(a): i for i, a in enumerate(arguments) if isinstance(a, Tensor) and i not in buffers}
        slots: dict[tuple[int, bool], _Slot] = {}
        make: list[Make] = []
        for position, result in enumerate(results):
            if not isinstance(result, Tensor):
                make.append(_constant(result))
            elif _storage(result) in in_place:
                make.append(_view_of(in_place[_storage(result)], arguments, result))
            else:
                key = id(result), position in copied_out
                slot = slots.setdefault(key, _Slot(result, key[1], set()))
                slot.positions.add(position)
                make.append(_slot(list(slots).index(key)))
        aliased = [(_storage(s.tensor), s.positions) for s in slots.values() if not s.copied]
        watched = [(storage, _holders(storage), positions) for storage, positions in aliased]
        return cls(graph, buffers, list(slots.values()), make, watched)

    def held(self) -> list[set[int]]:
        """The results of the last replay that somebody still holds, by any alias."""
        return [positions for storage, own, positions in self.watched if _holders(storage) > own]

    def replay(self, arguments: Sequence[Any]) -> list[Any]:
        for i, buffer in self.buffers.items():
            _copy(buffer, arguments[i])
        self.graph()
        return self.results(arguments)

    def results(self, arguments: Sequence[Any]) -> list[Any]:
        fresh = [slot.copy() if slot.copied else slot.tensor.detach() for slot in self.slots]
        return [make(fresh, arguments) for make in self.make]


def _constant(value: Any) -> Make:
    return lambda fresh, arguments: value


def _slot(k: int) -> Make:
    return lambda fresh, arguments: fresh[k]


def _view_of(i: int, arguments: Sequence[Any], result: Tensor) -> Make:
    """An argument that is read in place, or a view of it, by what it is in the call."""
    if any(result is a for a in arguments):
        i = next(k for k, a in enumerate(arguments) if result is a)
        return lambda fresh, arguments: arguments[i]
    size, stride, dtype = result.size(), result.stride(), result.dtype
    conjugated, negated = result.is_conj(), result.is_neg()
    begin = _begin(result) - _begin(arguments[i])

    def make(fresh: Sequence[Tensor], arguments: Sequence[Any]) -> Tensor:
        place = _begin(arguments[i]) + begin
        view = _as(arguments[i], dtype).as_strided(size, stride, place // dtype.itemsize)
        view = torch._conj(view) if conjugated else view
        return torch._neg_view(view) if negated else view

    return make


def _begin(tensor: Tensor) -> int:
    """Where a tensor begins in its storage, in bytes."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of `dtype` in the same storage, for `as_strided`."""
    if tensor.is_conj():
        tensor = torch._conj(tensor)
    if tensor.is_neg():
        tensor = torch._neg_view(tensor)
    if tensor.dtype == dtype:
        return tensor
    size = tensor.untyped_storage().nbytes() // dtype.itemsize * dtype.itemsize // tensor.itemsize
    return tensor.as_strided((size,), (1,), 0).view(dtype)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


# Counts, from a constant on, the tensors that share a storage.
_holders: Callable[[int], int] = torch._C._storage_Use_Count


def _buffer(like: Tensor) -> Tensor:
    """Memory for a tensor with the same strides."""
    return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=like.device)


def _copy(to: Tensor, source: Tensor) -> None:
    """Copies between tensors of the same strides; of an expanded dimension once."""
    strides = to.stride()
    if 0 in strides:
        for dim, stride in enumerate(strides):
            if stride == 0 and to.size(dim) > 1:
                to, source = to.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    to.copy_(source)


def check(plan: FusionPlan, device: torch.device) -> None:
    """Raises CannotReplay if the plan holds an operator that is known to wait for the device or to use the CPU."""
    for fallback in plan.fallbacks:
        tags = getattr(dict(fallback.node.attributes).get("target"), "tags", ())
        read, written = ([plan.buffers[n] for n in names] for names in (fallback.reads(), fallback.writes()))
        # torch counts the true elements of a mask on the CPU.
        masked = "index" in fallback.name and any(b.dtype in (torch.bool, torch.uint8) for b in read[1:])
        if masked or torch.Tag.cudagraph_unsafe in tags or any(b.device != device for b in written):
            raise CannotReplay(_refused([fallback.name], "it computes on the CPU, or makes it wait for the GPU"))


def _refused(fallbacks: Sequence[str], reason: str) -> str:
    operators = f"ATen runs {', '.join(dict.fromkeys(fallbacks))}" if fallbacks else "no operator runs as ATen"
    return (
        f"this cannot be replayed as a CUDA graph ({operators}): {reason}. Leave cuda_graphs off, or take the operator "
        "out of what is compiled, for instance with torch._dynamo.graph_break()"
    )


@cache
def _warn(message: str) -> None:
    """Once for each message."""
    log.warning(message)
