"""Halves of frozen parameters, kept from one call to the next: only where the user says `freeze`.

What is kept belongs to a parameter's memory, whichever graph reads it, and is forgotten with that memory. Nothing tells
whether its contents have changed: version counters do not move under fused optimisers or writes to `.data`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

# (address, what was made of it) → (the storage that it lies in, what was made)
_KEPT: dict[Hashable, tuple[StorageWeakRef, torch.Tensor]] = {}
_LOCK = threading.Lock()
# What CUDA graphs of the user's own read: it stays where it is, also after a thaw, for as long as the parameter lives.
_CAPTURED: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}
_RECORDING = threading.local()  # .holds: what the graph reads that this thread records for us
_thaws = 0


def kept(source: torch.Tensor, layout: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` made of `source` the first time. layout: what was made, and of which elements from the first on."""
    key = (source.device, source.data_ptr(), layout)
    found = _KEPT.get(key)
    capturing = _capturing(source)
    if found is not None and not _gone(found[0]):
        if capturing:
            _hold(*found)
        return found[1]
    made = make()
    if capturing:
        return made  # made by the graph, at every replay
    if source.is_cuda:
        torch.cuda.current_stream(source.device).synchronize()  # other streams will read it
    with _LOCK:
        _forget_the_gone(_KEPT)
        _forget_the_gone(_CAPTURED)
        _KEPT[key] = StorageWeakRef(source.untyped_storage()), made  # type: ignore[no-untyped-call]
    return made


@contextmanager
def held() -> Iterator[list[torch.Tensor]]:
    """While this thread records a CUDA graph: gives what the graph reads, for whoever keeps the graph to keep too."""
    _RECORDING.holds = []
    try:
        yield _RECORDING.holds
    finally:
        _RECORDING.holds = None


def _hold(storage: StorageWeakRef, made: torch.Tensor) -> None:
    holds = getattr(_RECORDING, "holds", None)
    if holds is not None:
        holds.append(made)
    else:
        with _LOCK:
            _CAPTURED[id(made)] = storage, made


def _forget_the_gone(entries: dict[Any, tuple[StorageWeakRef, torch.Tensor]]) -> None:
    for old in [key for key, (storage, _) in entries.items() if _gone(storage)]:
        del entries[old]


def _capturing(source: torch.Tensor) -> bool:
    return source.is_cuda and torch.cuda.is_current_stream_capturing()


def _gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


def thaws() -> int:
    """How often everything was forgotten: what was recorded before reads what is stale."""
    return _thaws


def thaw() -> int:
    """Forgets the halves of all frozen parameters, so that the next call makes them anew. Returns their bytes."""
    global _thaws
    with _LOCK:
        _thaws += 1
        freed = sum(made.nbytes for _, made in _KEPT.values())
        _KEPT.clear()
    return freed
