"""Is a candidate as correct as the model that it replaces? Eager is the yardstick, float64 the oracle.

`verify` checks everything of *correct* that the machine allows: errors as ratios to eager's, values, layouts and
batch sizes that the file's own inputs never take, gradients, changes of parameters, and side effects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusewright.capture.model_file import ModelFile
from fusewright.errors import EagerFailure, FusewrightError, raised
from fusewright.tools import checks, training_checks
from fusewright.tools.arguments import Leaves, difference, leaves
from fusewright.tools.comparison import EVERY_ELEMENT, Judge, same_bits
from fusewright.tools.flags import torch_flags
from fusewright.tools.trial import SEED, Backward, CandidateError, Refused, Trial, first_line, inner
from fusewright.tools.units import times
from fusewright.tools.variations import Inputs, copies_of, map_floating

Progress = Callable[[str, int, int], None]  # the check that starts, its number from 0, how many there are
SHOWN = 3  # problems that a check's detail spells out


@dataclass(frozen=True)
class Subject:
    """One side of a comparison.

    build: a new module, its parameters drawn from torch's default random generator. inputs, initial: the model file's
    get_inputs and get_init_inputs; both sides have to give the same, and the reference's inputs are used.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Sequence[Any]]
    initial: Callable[[], Sequence[Any]] = list

    @classmethod
    def of_file(cls, name: str, load: Callable[[], ModelFile]) -> Subject:
        """A model file, loaded when it is first needed: flags that it switches when it is imported are seen."""
        file = cache(load)
        return cls(name, lambda: file().build(), lambda: file().inputs(), lambda: file().get_init_inputs())


@dataclass(frozen=True)
class Check:
    """One check's outcome. figures: the worst ratio to eager's error by metric, over all tensors of the check."""

    name: str
    passed: bool
    detail: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """All checks of one verification. not_checked: what this machine or the reference does not allow, and why.

    mode: training or evaluation, in which all checks but that of the other mode ran; empty where none of them did.
    """

    reference: str
    candidate: str
    device: str
    dtype: str
    checks: tuple[Check, ...]
    not_checked: tuple[str, ...] = ()
    mode: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True)
class _Spec:
    name: str
    function: Callable[[Trial, Judge], None]
    gradients: bool = False  # whether it needs a model that can go backward
    exact: bool = False  # whether no mask can flip, so that every element of a gradient counts


SPECS = (
    _Spec("error against float64", checks.accuracy),
    _Spec("allclose to eager", checks.allclose),
    _Spec("layout and aliases", checks.layout),
    _Spec("values", checks.values),
    _Spec("NaN and Inf", checks.non_finite),
    _Spec("views", checks.views),
    _Spec("batch sizes", checks.shapes),
    _Spec("other mode", checks.modes),
    _Spec("side effects", checks.side_effects),
    _Spec("uninitialised memory", checks.uninitialised),
    _Spec("the same result twice", checks.repeated),
    _Spec("streams", checks.streams),
    _Spec("gradients", training_checks.gradients, gradients=True),
    _Spec("exact gradients", training_checks.exact_gradients, gradients=True, exact=True),
    _Spec("accumulation", training_checks.accumulation, gradients=True),
    _Spec("changed parameters", training_checks.updates),
    _Spec("double backward", training_checks.double_backward, gradients=True),
)


def verify(
    reference: Subject,
    candidate: Subject,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Report:
    """Checks `candidate` against `reference` on `device`.

    dtype: what floating parameters and inputs are cast to; None leaves them. A candidate that raises fails that
    check. Raises EagerFailure if the reference itself does not run.
    """
    device = torch.device(device)
    flags = torch_flags()
    draw = _drawer(reference, device, dtype)
    original = _eager_build(reference, device, dtype)
    report = Report(reference.name, candidate.name, _device_name(device), str(dtype or "the file's own"), ())
    total = len(SPECS) + 2  # initialisation, which includes arguments, and torch's flags
    notify = progress or (lambda name, done, total: None)
    notify("initialisation", 0, total)
    built, initialisation = _initialisation(reference, candidate)
    if built is None:
        return replace(report, checks=(initialisation,))
    trial = Trial(original, _placed(built, device, dtype), _oracle(reference, device), draw, device)
    found = [initialisation]
    with _many_recompilations():
        _prepare(trial)
        report = replace(report, mode="training" if trial.training else "evaluation")
        found.append(_same_arguments(reference, candidate))
        for number, spec in enumerate(SPECS, 1):
            notify(spec.name, number, total)
            if spec.gradients and trial.backward is None:
                trial.skipped.append(f"{spec.name}: eager gives no gradients")
            elif (check := _perform(spec, trial)) is not None:
                found.append(check)
    notify("torch's flags", total - 1, total)
    found.append(_flags_check(flags))
    skipped = (*trial.skipped, "compute-sanitizer: run it on the program itself")
    return replace(report, checks=tuple(found), not_checked=tuple(dict.fromkeys(skipped)))


def _perform(spec: _Spec, trial: Trial) -> Check | None:
    """The check's outcome; None if eager allows none of it."""
    judge = Judge(EVERY_ELEMENT) if spec.exact else Judge()
    before = len(trial.skipped)
    try:
        spec.function(trial, judge)
    except Refused as error:
        trial.skipped.append(f"{spec.name}: {first_line(error)}")
        return None
    except CandidateError as error:
        judge.fail(str(error))
    except BaseException as error:  # the candidate's own code runs in here
        judge.fail(raised(error))
    trial.skipped[before:] = [f"{spec.name}: {reason}" for reason in trial.skipped[before:]]
    verdict = judge.verdict()
    if not verdict.problems and not verdict.figures and len(trial.skipped) > before:
        return None
    return Check(spec.name, not verdict.problems, _detail(verdict.problems, verdict.figures), verdict.figures)


def _detail(problems: Sequence[str], figures: Mapping[str, float]) -> str:
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        return "; ".join([*problems[:SHOWN], *more])
    if not figures:
        return ""
    metric = max(figures, key=lambda name: figures[name])
    return f"worst {times(figures[metric])} eager's error ({metric})"


@contextmanager
def _eager(what: str) -> Iterator[None]:
    """Runs the reference's code: what it raises is no fault of the candidate."""
    try:
        yield
    except FusewrightError:
        raise
    except BaseException as error:
        raise EagerFailure(f"{what} {raised(error)}") from error


def _drawer(subject: Subject, device: torch.device, dtype: torch.dtype | None) -> Callable[[int], Inputs]:
    @lru_cache(maxsize=8)
    def draw(seed: int) -> Inputs:
        torch.manual_seed(seed)
        with _eager(f"get_inputs of {subject.name} raises"):
            inputs = list(subject.inputs())
        inputs = pytree.tree_map(lambda x: x.detach().to(device) if isinstance(x, Tensor) else x, inputs)
        return inputs if dtype is None else map_floating(inputs, lambda t: t.to(dtype))

    return lambda seed: copies_of(draw(seed))


def _seeded(subject: Subject, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return subject.build()


def _placed(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    return module.to(device) if dtype is None else module.to(device, dtype)


def _eager_build(subject: Subject, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    with _eager(f"{subject.name} cannot be built:"):
        return _placed(_seeded(subject, SEED), device, dtype)


def _oracle(subject: Subject, device: torch.device) -> nn.Module | None:
    try:
        return _seeded(subject, SEED).to(device).double()
    except BaseException as error:
        raised(error)
        return None


def _initialisation(reference: Subject, candidate: Subject) -> tuple[nn.Module | None, Check]:
    """The candidate's module (None if it cannot take the reference's parameters), and whether it starts the same."""
    problems, module = [], None
    try:
        for seed in (SEED + 1, SEED):
            expected = inner(_seeded(reference, seed)).state_dict()
            module = _seeded(candidate, seed)
            found = inner(module).state_dict()
            if list(found) != list(expected):
                problems.append(f"state_dict has {list(found)} where the reference has {list(expected)}")
            different = [n for n in expected if n in found and not same_bits(found[n].cpu(), expected[n].cpu())]
            if different:
                problems.append(f"{', '.join(different)}: other values from the same seed")
        inner(module).load_state_dict(expected)  # type: ignore[arg-type]
    except BaseException as error:
        problems.append(raised(error))
        module = None
    detail = _detail(list(dict.fromkeys(problems)), {}) or "the same parameters, bit for bit"
    return module, Check("initialisation", not problems, detail, {})


def _same_arguments(reference: Subject, candidate: Subject) -> Check:
    """Whether both files give the same arguments, to the constructor and to forward, from the same seed."""
    problems = []
    pairs = {
        "get_init_inputs": (reference.initial, candidate.initial),
        "get_inputs": (reference.inputs, candidate.inputs),
    }
    for function, (wanted, given) in pairs.items():
        with _eager(f"{function} of {reference.name} raises"):
            expected, again = _arguments(wanted), _arguments(wanted)
        try:
            found = _arguments(given)
        except BaseException as error:
            problems.append(f"{function}: {raised(error)}")
            continue
        if what := difference(found, expected, again):
            problems.append(f"{function}(){what}")
    return Check("arguments", not problems, _detail(problems, {}) or "the same as the reference's", {})


def _arguments(function: Callable[[], Sequence[Any]]) -> Leaves:
    torch.manual_seed(SEED)
    return leaves(function())


def _prepare(trial: Trial) -> None:
    """Finds out what the reference can do. Raises EagerFailure if it cannot run at all."""
    inputs = trial.draw(SEED)
    try:
        trial.run(trial.reference, inputs)
        trial.training = trial.repeatable()
    except Refused as error:
        raise EagerFailure(f"the model fails in eager: {error}") from error
    try:
        trial.run(trial.reference, inputs, Backward(prefill=True))
    except Refused as error:
        trial.backward = None
        trial.skipped.append(f"backward: {first_line(error)}")
    if trial.oracle is None or not trial.oracle_run(inputs):
        trial.oracle = None
        trial.skipped.append("float64 oracle: the reference cannot run in float64; eager's result serves instead")


def _flags_check(before: Mapping[str, str]) -> Check:
    after = torch_flags()
    problems = [f"{n} is switched from {before[n]} to {after[n]}" for n in before if after[n] != before[n]]
    return Check("torch's flags", not problems, _detail(problems, {}) or "as they were", {})


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextmanager
def _many_recompilations() -> Iterator[None]:
    """Lets Dynamo recompile for every case: at its usual limit it would silently run the model in eager."""
    import torch._dynamo.config as config

    limits = {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16, "fail_on_recompile_limit_hit": True}
    with config.patch(limits):
        yield


def render(report: Report) -> Group:
    """The report for a terminal: one row per check, then long details, such as a compiler's log, and what could not be
    checked."""
    mode = f", in {report.mode} mode" if report.mode else ""
    title = f"{report.candidate} against {report.reference} on {report.device}, dtype {report.dtype}{mode}"
    table = Table(title=Text(title))
    table.add_column("check")
    table.add_column("")
    table.add_column("error / eager's", justify="right")
    table.add_column("detail", overflow="fold")
    below = []
    for check in report.checks:
        mark = Text("ok", "green") if check.passed else Text("FAILED", "bold red")
        worst = max(check.figures.values(), default=None)
        long = "\n" in check.detail
        if long:
            below.append(Text(f"{check.name}: {check.detail}"))
        detail = "see below" if long else check.detail
        table.add_row(check.name, mark, "" if worst is None else times(worst), Text(detail))
    skipped = [Text(f"not checked: {reason}", "dim") for reason in report.not_checked]
    verdict = Text("correct", "bold green") if report.passed else Text("WRONG", "bold red")
    return Group(table, *below, *skipped, verdict)
