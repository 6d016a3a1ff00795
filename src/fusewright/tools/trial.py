"""Runs candidate, eager reference and float64 oracle side by side on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fusewright.capture.without_gpu import without_gpu
from fusewright.errors import raised
from fusewright.tools.comparison import GRADIENT, Judge, Named, same_bits
from fusewright.tools.variations import Inputs, copies_of, map_floating

NARROW = (torch.float32, torch.float16, torch.bfloat16)
SEED = 42  # what the field's judge seeds every constructor with


class Refused(Exception):
    """Eager itself raises on this input, so that there is nothing to compare with."""


class CandidateError(Exception):
    """The candidate raised where eager does not."""


def inner(module: nn.Module) -> nn.Module:
    """The module that holds the parameters: what `torch.compile` wraps, or the module itself."""
    wrapped = getattr(module, "_orig_mod", module)
    return wrapped if isinstance(wrapped, nn.Module) else module


class _InDouble(TorchFunctionMode):
    """Runs a model in float64 although it names narrower types itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args, kwargs = pytree.tree_map(self._widen, (args, kwargs or {}))
        return func(*args, **kwargs)

    @staticmethod
    def _widen(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.double() if x.dtype in NARROW else x
        return torch.float64 if isinstance(x, torch.dtype) and x in NARROW else x


@contextmanager
def in_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with without_gpu(), _InDouble():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Gives the module's buffers their values back, so that no run depends on the one before."""
    before = {name: b.detach().clone() for name, b in inner(module).named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, b in inner(module).named_buffers():
                if name in before and b.shape == before[name].shape:
                    b.copy_(before[name])


def poison_cache(device: torch.device) -> None:
    """Fills every free block of torch's CUDA cache with NaN (all bits set), so that no old result lies there."""
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device).cuda_stream
    free = [
        block["size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if (segment["device"], segment["stream"]) == (torch.cuda.current_device(), stream)
        if tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
    blocks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sorted(free, reverse=True)]
    for block in blocks:
        block.fill_(255)
    torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Backward:
    """How a run goes backward.

    kind: the output gradients' layout, one of "contiguous", "transposed", "expanded" (stride 0, as `sum()` gives)
    or "special" (with NaN and ±Inf). inputs, parameters: whose gradients are asked for. prefill: whether `.grad`
    already holds something. retain: backward twice through one graph.
    """

    kind: str = "contiguous"
    inputs: bool = True
    parameters: bool = True
    prefill: bool = False
    retain: bool = False


@dataclass
class Trial:
    """The three modules, on one device and with one state, and the way to run them.

    draw(seed): the file's own inputs, on the device and in the dtype. oracle is None where the reference cannot run
    in float64. training: the mode that the checks use. backward: how they go backward; None if eager cannot.
    skipped: what eager refused or torch lacks, in words.
    """

    reference: nn.Module
    candidate: nn.Module
    oracle: nn.Module | None
    draw: Callable[[int], Inputs]
    device: torch.device
    training: bool = True
    backward: Backward | None = field(default_factory=Backward)
    skipped: list[str] = field(default_factory=list)
    _dtypes: dict[int, torch.dtype] = field(default_factory=dict)

    def surroundings(self, module: nn.Module) -> AbstractContextManager[None]:
        """What a module's code runs in: float64 for the oracle; for eager, the CPU where there is no GPU."""
        if module is self.candidate:
            return nullcontext()
        return in_double() if module is self.oracle else without_gpu()

    def error(self, module: nn.Module, message: str) -> Exception:
        return CandidateError(message) if module is self.candidate else Refused(message)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def forward(self, module: nn.Module, inputs: Inputs, seed: int = SEED) -> Any:
        """What the module returns. Raises CandidateError or Refused with the module's own error text."""
        if module is self.candidate:
            poison_cache(self.device)
        torch.manual_seed(seed)
        try:
            with self.surroundings(module):
                result = module(*inputs)
            self.synchronize()
            return result
        except BaseException as error:
            raise self.error(module, raised(error)) from error

    def synchronize(self) -> None:
        """Waits for the whole device, so that work on any stream is finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run(self, module: nn.Module, inputs: Inputs, backward: Backward | None = None, seed: int = SEED) -> Named:
        """Outputs, and with `backward` the gradients, by name. `inputs` are copied first, strides kept."""
        inner(module).train(self.training)
        inputs = copies_of(inputs)
        found: Named
        with keeping_buffers(module):
            if backward is None:
                with torch.no_grad():
                    found = named_tensors(self.forward(module, inputs, seed))
            else:
                found = self._run_backward(module, inputs, backward, seed)
            changed = {f"buffer {n}": b.detach().clone() for n, b in inner(module).named_buffers()}
        return {**found, **changed}

    def _run_backward(self, module: nn.Module, inputs: Inputs, backward: Backward, seed: int) -> Named:
        if backward.inputs:
            inputs = map_floating(inputs, lambda x: x.requires_grad_())
        leaves = self.leaves(module, inputs)
        asked = {n: p.requires_grad for n, p in inner(module).named_parameters()}
        for n, p in inner(module).named_parameters():
            p.requires_grad_(backward.parameters and asked[n])
        for i, leaf in enumerate(leaves.values()):
            leaf.grad = self._noise(module, leaf, 1000 + i) if backward.prefill and leaf.requires_grad else None
        try:
            result = named_tensors(self.forward(module, inputs, seed))
            self._go_backward(module, result, backward)
            found = {n: None if t is None else t.detach().clone() for n, t in result.items()}
            grads = {GRADIENT + n: t.grad for n, t in leaves.items()}
            return {**found, **grads}
        finally:
            for n, p in inner(module).named_parameters():
                p.requires_grad_(asked[n])
                p.grad = None

    def leaves(self, module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """Every input tensor and parameter, by name."""
        leaves = {f"input{path}": x for path, x in _with_paths(inputs) if isinstance(x, Tensor)}
        return {**leaves, **dict(inner(module).named_parameters())}

    def _go_backward(self, module: nn.Module, result: Named, backward: Backward) -> None:
        outputs = [t for t in result.values() if t is not None and t.requires_grad]
        if not outputs:
            raise self.error(module, "no output requires a gradient")
        gradients = self.output_gradients(module, outputs, backward.kind)
        try:
            with self.surroundings(module):
                for last in [False, True] if backward.retain else [True]:
                    torch.autograd.backward(outputs, gradients, retain_graph=not last)
            self.synchronize()
        except BaseException as error:
            raise self.error(module, f"in backward: {raised(error)}") from error

    def output_gradients(self, module: nn.Module, outputs: list[Tensor], kind: str) -> list[Tensor]:
        """The same random numbers for all three modules: those that eager's dtype can hold."""
        gradients = []
        for i, t in enumerate(outputs):
            noise = self._noise(module, t, i)
            if kind == "transposed" and t.dim() >= 2:
                noise = noise.mT.contiguous().mT
            elif kind == "expanded":
                noise = noise.reshape(-1)[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() else noise
            elif kind == "special" and t.numel():
                flat = noise.view(-1)
                # an infinite gradient of a scalar loss has no meaning that implementations agree on
                values = (math.nan, math.inf, -math.inf) if flat.numel() > 4 else (math.nan,)
                for j, value in enumerate(values):
                    flat[(j + 1) * flat.numel() // 5] = value
            gradients.append(noise)
        return gradients

    def _noise(self, module: nn.Module, like: Tensor, seed: int) -> Tensor:
        if module is self.reference:
            self._dtypes[seed] = like.dtype
        wide = torch.complex64 if like.is_complex() else torch.float32
        noise = torch.randn(like.shape, generator=self.generator(seed), device=self.device, dtype=wide)
        return noise.to(self._dtypes.get(seed, like.dtype)).to(like.dtype)

    @property
    def modules(self) -> tuple[nn.Module, nn.Module]:
        return inner(self.reference), inner(self.candidate)

    def state(self) -> dict[str, Tensor]:
        """A copy of the reference's parameters and buffers."""
        return {n: t.detach().clone() for n, t in inner(self.reference).state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Writes `state` into reference and candidate."""
        for module in self.modules:
            module.load_state_dict(state)

    def repeatable(self, backward: Backward | None = None, reseed: bool = True) -> bool:
        """Whether eager gives the same bits twice (with another random seed, if `reseed`)."""
        inputs = self.draw(SEED)
        first = self.run(self.reference, inputs, backward, SEED)
        second = self.run(self.reference, inputs, backward, SEED + reseed)
        pairs = zip(first.values(), second.values(), strict=True)
        return all(a is None or (b is not None and same_bits(a, b)) for a, b in pairs)

    def oracle_run(self, inputs: Inputs, backward: Backward | None = None, seed: int = SEED) -> Named:
        """The same in float64, with the reference's present state; empty where that is impossible."""
        if self.oracle is None:
            return {}
        self.oracle.load_state_dict(inner(self.reference).state_dict())
        try:
            return self.run(self.oracle, map_floating(inputs, Tensor.double), backward, seed)
        except Refused:
            return {}

    def judge(
        self,
        judge: Judge,
        inputs: Inputs,
        backward: Backward | None = None,
        case: str = "",
        seed: int = SEED,
        candidate_first: bool = False,
    ) -> None:
        """Runs all three and hands the results to `judge`. Raises Refused if eager does, before the candidate runs."""
        if candidate_first:
            found, eager = self._candidate_first(inputs, backward, seed)
        else:
            eager = self.run(self.reference, inputs, backward, seed)
            found = self.run(self.candidate, inputs, backward, seed)
        judge.add(found, eager, self.oracle_run(inputs, backward, seed), case)

    def attempt(self, judge: Judge, inputs: Inputs, backward: Backward | None = None, case: str = "") -> bool:
        """`judge`, where a candidate that raises is a problem and an eager that does is noted; False for that."""
        try:
            self.judge(judge, inputs, backward, case)
        except CandidateError as error:
            judge.fail(f"{case}: {error}" if case else str(error))
        except Refused as error:
            self.skipped.append(f"{case}: eager raises {first_line(error)}")
            return False
        return True

    def _candidate_first(self, inputs: Inputs, backward: Backward | None, seed: int) -> tuple[Named, Named]:
        failure: CandidateError | None = None
        found: Named = {}
        try:
            found = self.run(self.candidate, inputs, backward, seed)
        except CandidateError as error:
            failure = error
        eager = self.run(self.reference, inputs, backward, seed)
        if failure is not None:
            raise failure
        return found, eager


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _with_paths(tree: Any) -> list[tuple[str, Any]]:
    return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def named_tensors(result: Any) -> dict[str, Tensor | None]:
    """The tensors of a returned tree by their place in it: "output", or "output[0]['key']"."""
    return {f"output{path}": x for path, x in _with_paths(result) if isinstance(x, Tensor)}
