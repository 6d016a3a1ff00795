"""The least that a model must do, whoever computes it: bytes that must move, and operations of its products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fusewright.chip import Chip

# They read rows, not the whole table.
_GATHERS = {"embedding", "index", "index_select", "gather", "take"}


@dataclass(frozen=True)
class Work:
    """What a run must do at least.

    bytes: every input, parameter and result once; of a backward, what its products read, the results' gradients and
    the gradients that it leaves. flop: of the products, by their operands' dtype. elements: of all other results,
    one operation each; these set no floor.
    """

    bytes: int
    flop: Mapping[torch.dtype, int]
    elements: int

    @property
    def operations(self) -> int:
        return sum(self.flop.values()) + self.elements

    def __add__(self, other: Work) -> Work:
        dtypes = {*self.flop, *other.flop}
        flop = {d: self.flop.get(d, 0) + other.flop.get(d, 0) for d in dtypes}
        return Work(self.bytes + other.bytes, flop, self.elements + other.elements)


@dataclass(eq=False)
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches eager operators. read, multiplied: bytes by the address of the storage that operators, and products
    alone, read."""

    read: dict[int, int] = field(default_factory=dict)
    multiplied: dict[int, int] = field(default_factory=dict)
    flop: dict[torch.dtype, int] = field(default_factory=lambda: defaultdict(int))
    elements: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands, results = _tensors((args, kwargs)), _tensors(result)
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return result  # a view
        if func._schema.name.split("::")[1] not in _GATHERS:
            _note(self.read, operands)
        count = flop_registry.get(func._overloadpacket)
        if count is not None and operands:
            self.flop[operands[-1].dtype] += int(count(*args, **kwargs, out_val=result))
            _note(self.multiplied, operands)
        else:
            self.elements += sum(t.numel() for t in results)
        return result


def forward_work(run: Callable[[], Any], leaves: Iterable[Tensor]) -> Work:
    """run: a forward in eager. leaves: inputs, parameters and buffers."""
    leaves = _distinct(leaves)
    with Recorder() as seen:
        result = run()
    own = {_address(t) for t in leaves}
    written = [t for t in _distinct(_tensors(result)) if _address(t) not in own]
    return Work(_bytes(leaves, seen.read) + _total(written), dict(seen.flop), seen.elements)


def backward_work(run: Callable[[], Any], leaves: Iterable[Tensor], gradients: Sequence[Tensor]) -> Work:
    """run: a backward in eager. gradients: of the results. It must leave the leaves' gradients in `.grad`."""
    leaves = _distinct(leaves)
    with Recorder() as seen:
        run()
    left = [t.grad for t in leaves if t.grad is not None]
    return Work(_bytes(leaves, seen.multiplied) + _total([*gradients, *left]), dict(seen.flop), seen.elements)


def floor_seconds(work: Work, chip: Chip | None, rates: Mapping[str, float], tf32: bool) -> float:
    """Seconds that no version can beat at the measured rates.

    By the fastest known ways, a float32 product counts as three of fp16, and one at TF32's precision, whose mantissa is
    fp16's, as one; one of float64 as the chip's datasheet has it (nothing where the chip is not known).
    """
    double = chip.fp16 / chip.fp64 if chip else 0.0
    passes = {torch.float32: 1.0 if tf32 else 3.0, torch.float64: double}
    products = sum(count * passes.get(dtype, 1.0) for dtype, count in work.flop.items())
    return max(work.bytes / rates["copy_bytes_per_s"], products / rates["fp16_flop_per_s"])


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({_address(t): t for t in tensors if t.numel()}.values())


def _total(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _note(seen: dict[int, int], operands: Iterable[Tensor]) -> None:
    for t in operands:
        if t.numel():
            seen[_address(t)] = max(seen.get(_address(t), 0), _total([t]))


def _bytes(leaves: Iterable[Tensor], seen: Mapping[int, int]) -> int:
    """Of each leaf, what was read of it: an expanded view reads no more than there is, a slice less."""
    return sum(min(_total([t]), seen.get(_address(t), 0)) for t in leaves)
