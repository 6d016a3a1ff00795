"""What is checked of a candidate's gradients, and of its results after its parameters have changed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusewright.errors import FusewrightError, raised
from fusewright.tools.comparison import GRADIENT, Judge, Named
from fusewright.tools.trial import (
    SEED,
    Backward,
    CandidateError,
    Refused,
    Trial,
    first_line,
    inner,
    keeping_buffers,
    named_tensors,
)
from fusewright.tools.variations import Inputs, copies_of, family, map_floating, on_grid

CASES = {
    "contiguous": Backward(),
    "transposed output gradient": Backward(kind="transposed"),
    "expanded output gradient": Backward(kind="expanded"),
    "inputs only": Backward(parameters=False),
    "parameters only": Backward(inputs=False),
}


def gradients(trial: Trial, judge: Judge) -> None:
    """Gradients of every input and parameter, for output gradients of every layout."""
    trial.judge(judge, trial.draw(SEED), Backward(), "own inputs")
    inputs = family(trial.draw(SEED), "normal", trial.generator(SEED))
    for case, backward in CASES.items():
        trial.attempt(judge, inputs, backward, case)


def exact_gradients(trial: Trial, judge: Judge) -> None:
    """Every single element of the gradients, on inputs and parameters whose sums are exact.

    Masks cannot differ by rounding there, and many of their inputs are exactly zero.
    """
    state = trial.state()
    try:
        g = trial.generator(SEED)
        names = {n for n, p in inner(trial.reference).named_parameters() if p.is_floating_point()}
        trial.load({n: on_grid(t, g, 1) if n in names else t for n, t in state.items()})
        trial.attempt(judge, map_floating(trial.draw(SEED), lambda t: on_grid(t, g, 2)), Backward())
    finally:
        trial.load(state)


def accumulation(trial: Trial, judge: Judge) -> None:
    """`.grad` is added to, not overwritten; `retain_graph` allows a second backward pass."""
    inputs = trial.draw(SEED)
    trial.attempt(judge, inputs, Backward(prefill=True), "into .grad")
    trial.attempt(judge, inputs, Backward(retain=True), "retain_graph")
    trial.attempt(judge, inputs, Backward(retain=True, prefill=True), "retain_graph into .grad")


def _step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[nn.Module, torch.Generator], None]:
    def step(module: nn.Module, g: torch.Generator) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimiser = make(parameters)
        for p in parameters:
            p.grad = _fresh(p, g)
        optimiser.step()
        for p in parameters:
            p.grad = None

    return step


def _fresh(p: Tensor, g: torch.Generator) -> Tensor:
    """New values of about the parameter's size."""
    size = p.detach().float().abs().mean().nan_to_num() + 1e-3
    return (torch.randn(p.shape, generator=g, device=p.device) * size).to(p.dtype)


def _in_place(module: nn.Module, g: torch.Generator) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(_fresh(p, g))


def _data_write(module: nn.Module, g: torch.Generator) -> None:
    for p in module.parameters():
        p.data.copy_(_fresh(p, g))


def _data_swap(module: nn.Module, g: torch.Generator) -> None:
    for p in module.parameters():
        p.data = _fresh(p, g)


def _replace(module: nn.Module, g: torch.Generator) -> None:
    for owner in module.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(_fresh(p, g), p.requires_grad))


def _load(module: nn.Module, g: torch.Generator) -> None:
    names = {n for n, _ in module.named_parameters(remove_duplicate=False)}
    module.load_state_dict({n: _fresh(t, g) if n in names else t for n, t in module.state_dict().items()})


UPDATES: dict[str, Callable[[nn.Module, torch.Generator], None]] = {
    "SGD": _step(lambda ps: torch.optim.SGD(ps, lr=1.0)),
    "fused SGD": _step(lambda ps: torch.optim.SGD(ps, lr=1.0, fused=True)),
    "fused Adam": _step(lambda ps: torch.optim.Adam(ps, lr=0.1, fused=True)),
    "in-place": _in_place,
    ".data write": _data_write,
    ".data swap": _data_swap,
    "new nn.Parameter": _replace,
    "load_state_dict": _load,
}


def updates(trial: Trial, judge: Judge) -> None:
    """Results after the parameters changed, by every way to change them: nothing stale is used."""
    if not any(True for _ in inner(trial.reference).parameters()):
        raise Refused("the model has no parameters")
    state = trial.state()
    inputs = trial.draw(SEED)
    try:
        for name, update in UPDATES.items():
            for backward in (trial.backward, None):  # fills whatever the candidate keeps
                trial.run(trial.candidate, inputs, backward)
            try:
                update(inner(trial.candidate), trial.generator(SEED))
            except RuntimeError as error:
                trial.skipped.append(f"{name}: torch raises {first_line(error)}")
                continue
            inner(trial.reference).load_state_dict(inner(trial.candidate).state_dict())
            trial.attempt(judge, inputs, trial.backward, f"after {name}")
            trial.attempt(judge, inputs, None, f"no_grad after {name}")
    finally:
        trial.load(state)


def double_backward(trial: Trial, judge: Judge) -> None:
    """Second derivatives are right, or a RuntimeError says that there are none."""
    inputs = family(trial.draw(SEED), "normal", trial.generator(SEED))
    eager = _second_order(trial, trial.reference, inputs)
    try:
        found = _second_order(trial, trial.candidate, inputs)
    except CandidateError as error:
        if not isinstance(error.__cause__, (RuntimeError, FusewrightError)):
            judge.fail(f"no clear error: {error}")
        return
    try:
        exact = _second_order(trial, trial.oracle, map_floating(inputs, Tensor.double)) if trial.oracle else {}
    except Refused:
        exact = {}
    judge.add(found, eager, exact, "double backward")


def _second_order(trial: Trial, module: nn.Module, inputs: Inputs) -> Named:
    inner(module).train(trial.training)
    with keeping_buffers(module):
        return _differentiate_twice(trial, module, map_floating(copies_of(inputs), lambda t: t.requires_grad_()))


def _differentiate_twice(trial: Trial, module: nn.Module, inputs: Inputs) -> Named:
    """Gradients of Σ grad² / √n + Σ output · noise: a graph that lacks the second order gives a wrong sum, no error."""
    leaves = {n: t for n, t in trial.leaves(module, inputs).items() if t.requires_grad}
    outputs = [t for t in named_tensors(trial.forward(module, inputs)).values() if t is not None and t.requires_grad]
    noise = trial.output_gradients(module, outputs, "contiguous")
    try:
        with trial.surroundings(module):
            firsts = torch.autograd.grad(outputs, list(leaves.values()), noise, create_graph=True, allow_unused=True)
            terms = [(o * n).sum() for o, n in zip(outputs, noise, strict=True)]
            terms += [g.square().sum() / max(1, g.numel()) ** 0.5 for g in firsts if g is not None]
            total = torch.stack(terms).sum()
            seconds = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        trial.synchronize()
    except BaseException as error:
        raise trial.error(module, raised(error)) from error
    return {GRADIENT + n: g for n, g in zip(leaves, seconds, strict=True)}
