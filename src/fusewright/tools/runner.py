"""One way to run a model, with inputs and gradients of its own: what `bench` times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusewright.tools.comparison import GRADIENT
from fusewright.tools.timing import Candidate, separate
from fusewright.tools.trial import inner, named_tensors
from fusewright.tools.variations import Inputs, copies_of, map_floating

MODES = ("forward", "backward", "both")


@dataclass
class Runner:
    """A model to run in three modes.

    inputs: copied. compiled: arguments of torch.compile; None calls the model itself. gradients: of the results that
    require one, in order; what backward starts from. replays: whether calls replay CUDA graphs.
    """

    model: nn.Module
    inputs: Inputs
    compiled: Mapping[str, Any] | None = None
    replays: bool = False
    gradients: Sequence[Tensor] = ()
    call: Callable[..., Any] = field(init=False)
    outputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = map_floating(copies_of(self.inputs), lambda t: t.requires_grad_())
        self.call = self.model
        if self.compiled is not None:
            self.model = separate(self.model)
            self.call = torch.compile(self.model, **self.compiled)

    @property
    def leaves(self) -> list[Tensor]:
        """Inputs, parameters and buffers."""
        given = [x for x in pytree.tree_leaves(self.inputs) if isinstance(x, Tensor)]
        return [*given, *self.model.parameters(), *self.model.buffers()]

    def reset(self) -> None:
        """Between runs: no gradient, no graph."""
        self.outputs = []
        for tensor in self.leaves:
            tensor.grad = None
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def forward(self) -> Any:
        """The usual forward of inference."""
        with torch.no_grad():
            return self.call(*self.inputs)

    def half(self) -> None:
        """Training's forward."""
        result = self.call(*self.inputs)
        found = [result] if isinstance(result, Tensor) else pytree.tree_leaves(result)
        self.outputs = [t for t in found if isinstance(t, Tensor) and t.requires_grad]

    def backward(self) -> None:
        """The backward of `half`."""
        torch.autograd.backward(self.outputs, self.gradients)

    def both(self) -> None:
        self.half()
        self.backward()

    def _prepared(self) -> None:
        self.reset()
        self.half()

    def candidate(self, mode: str) -> Candidate:
        """What is timed in a mode, and what runs before it."""
        if mode == "backward":
            return Candidate(self.backward, self._prepared)
        return Candidate(self.forward if mode == "forward" else self.both, self.reset)

    def draw_gradients(self) -> bool:
        """Draws random output gradients. Returns whether there is anything to go backward from."""
        self._prepared()
        generator = torch.Generator(self.outputs[0].device if self.outputs else "cpu").manual_seed(1)
        self.gradients = [
            torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float32).to(t.dtype)
            for t in self.outputs
        ]
        self.reset()
        return bool(self.gradients)

    def results(self) -> dict[str, Tensor | None]:
        """Copies of the outputs of inference and, where there is a backward, of every gradient, by name."""
        self.reset()
        found = {name: None if t is None else t.detach().clone() for name, t in named_tensors(self.forward()).items()}
        if self.gradients:
            self.reset()
            self.both()
            given = [x for x in pytree.tree_leaves(self.inputs) if isinstance(x, Tensor)]
            named = {**{f"input {i}": x for i, x in enumerate(given)}, **dict(inner(self.model).named_parameters())}
            found |= {GRADIENT + n: x.grad.clone() for n, x in named.items() if x.grad is not None}
        self.reset()
        return found
