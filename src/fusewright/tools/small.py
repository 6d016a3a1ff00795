"""A model file at sizes that a CPU can run: large constants made small, or only the batch."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fusewright.capture import model_file
from fusewright.capture.model_file import Instance, ModelFile
from fusewright.errors import EagerFailure, FusewrightError
from fusewright.tools.comparison import same_results

LARGE = 256
# Larger than one tile of a kernel and no multiple of it, so that full and ragged tiles are both there.
_RAGGED = (200, 136, 168, 232, 104)
_BATCH = 37
# Elements of all parameters that are still quick to multiply on a CPU, in the simulator and in torch.
SIMULATED, CHECKED = 1 << 18, 1 << 28
_QUICK = 2e10  # FLOP of products that a CPU computes in about a second


@dataclass(frozen=True)
class Small:
    """A model and inputs. sizes: how they differ from the file's, for a person to read."""

    model: nn.Module
    inputs: list[Any]
    sizes: str

    def repeats(self) -> bool:
        """Whether the model gives the same twice, and draws no random numbers."""
        with torch.no_grad():
            return same_results(self.model(*self.inputs), self.model(*self.inputs))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def small(file: ModelFile, settings: Mapping[str, object], dtype: torch.dtype | None) -> Small:
    """The file's model with its large integer constants replaced, or with a small batch where that does not run."""
    for replaced in _replacements(file):
        try:
            other = model_file.load(file.path, {**settings, **replaced})
            instance = other.instantiate(dtype=dtype, device="cpu")
            other.run(instance)
        except FusewrightError:
            continue
        if (grown := _grown(other, instance)) is not None:
            return grown
        sizes = ", ".join(f"{name} = {value}" for name, value in replaced.items()) or "the file's own sizes"
        return Small(instance.model, instance.inputs, sizes)
    instance = file.instantiate(dtype=dtype, device="cpu")
    if (grown := _grown(file, instance)) is not None:
        return grown
    tensors = [t for t in pytree.tree_leaves(instance.inputs) if isinstance(t, torch.Tensor) and t.dim()]
    batch = tensors[0].shape[0] if tensors else 0

    def cut(value: Any) -> Any:
        whole = not isinstance(value, torch.Tensor) or not value.dim() or value.shape[0] != batch
        return value if whole else value[:_BATCH].clone()

    return Small(instance.model, pytree.tree_map(cut, instance.inputs), f"batch {min(batch, _BATCH)}")


def _grown(file: ModelFile, instance: Instance) -> Small | None:
    """With rows, where the file's batch is empty and the model takes another: of no rows nothing can be said."""

    def grown(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[0]:
            return value
        rows = value.new_zeros((_BATCH, *value.shape[1:]))
        return rows.normal_() if value.is_floating_point() else rows

    inputs = pytree.tree_map(grown, instance.inputs)
    if all(a is b for a, b in zip(pytree.tree_leaves(inputs), pytree.tree_leaves(instance.inputs), strict=True)):
        return None
    try:
        file.run(Instance(instance.model, inputs))
    except FusewrightError:
        return None
    return Small(instance.model, inputs, f"batch {_BATCH}, where the file's own is empty")


def run_eagerly(file: ModelFile, settings: Mapping[str, object], dtype: torch.dtype | None) -> Any:
    """Returns what the model returns in eager mode. Raises EagerFailure if it fails.

    Without a GPU a model that takes long is run at small sizes; at its own if it fails there, for it may be right here.
    """
    bounded = _Bounded(math.inf if torch.cuda.is_available() else _QUICK)
    try:
        with bounded:
            returned = file.run(file.instantiate(dtype=dtype), dtype)
    except EagerFailure:
        if bounded.left >= 0:
            raise
    if bounded.left >= 0:
        return returned
    try:
        reduced = small(file, settings, dtype)
        return file.run(Instance(reduced.model, reduced.inputs), dtype)
    except FusewrightError:
        return file.run(file.instantiate(dtype=dtype), dtype)


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops what runs in it where its products come to more than `left` FLOP, which is then below 0."""

    def __init__(self, left: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = left

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in flop_registry:
            self.left -= _flop(func, args, kwargs)
            if self.left < 0:
                raise RuntimeError("this takes long")
        return func(*args, **kwargs)


def _flop(operator: Any, args: Any, kwargs: Any) -> float:
    try:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        return float(flop_registry[operator.overloadpacket](*args, **kwargs, out_val=operator(*args, **kwargs)))
    except Exception:  # the operator itself says what is wrong
        return 0.0


def _replacements(file: ModelFile) -> Iterator[dict[str, int]]:
    """Smaller values for the large constants; constants that are equal stay equal."""
    large = {}
    for name, nodes in model_file.constants(file.tree).items():
        value = ast.literal_eval(nodes[-1])
        if type(value) is int and value >= LARGE:
            large[name] = value
    if not large:
        return
    distinct = sorted(set(large.values()), reverse=True)
    ragged = dict(zip(distinct, _RAGGED, strict=False))
    if len(ragged) == len(distinct):
        yield {name: ragged[value] for name, value in large.items()}
    yield dict.fromkeys(large, LARGE)
