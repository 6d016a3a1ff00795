"""Judges one set of results against eager's, by their errors against a float64 oracle.

Every error is taken per element against what the oracle gives, and the candidate's is divided by eager's. The gate
is LIMIT on that ratio, with two allowances, so that two equally good orders of summation do not fail by luck:

- eager's figure counts as at least FLOORS in ulps of the output's dtype (a result that is rounded correctly by chance
  is no yardstick);
- the limit is widened by five standard deviations of the ratio of two independent samples of that size: for millions
  of elements by nothing in the bulk and by half in the maximum, for a scalar loss by much.

An answer that is wrong by half its own size does not pass by its ratio to a bad eager's; an all-zero one is such.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Named = Mapping[str, "Tensor | None"]

LIMIT = 1.25
# Ulps of float32. A 16-bit result is summed in float32 and rounded once, so that luck moves it by less than an ulp of
# its own; in float64 the oracle is no better than eager, and the difference is that of two orders of summation.
FLOORS = {"frobenius": 1.0, "median": 1.0, "p90": 1.0, "p99.9": 2.0, "maximum": 4.0, "bias": 0.5}
NARROW_FLOOR, FLOAT64_FLOOR = 0.25, 64.0
FLOAT32_DRIFT = 5e-7  # the signed bias that a float32 sum may have
# Where a mask may flip because its input is within rounding of zero, single elements (and the rows that they feed)
# are a matter of luck: there only the bulk of the elements is compared.
EVERY_ELEMENT = ("frobenius", "median", "p99.9", "maximum", "bias")
BULK = ("median", "p90")
GRADIENT = "gradient of "  # leads a gradient's name
SAMPLE = 1 << 22  # elements that order statistics are taken of
DISTINCT = 1 << 13  # elements that are looked at for copies of each other
NOISE = 10.0  # eager's error over the oracle's size from which on eager is noise
SMALL_SAMPLE = 16  # elements: with fewer, the floor grows


def tolerance_of(dtype: torch.dtype) -> float:
    """The field's atol = rtol: 1e-4 for float32 and float64, 1e-2 for narrower types."""
    return 1e-4 if dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128) else 1e-2


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit (a NaN equals itself, −0 is not +0), whatever the strides."""
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    if a.numel() == 0:
        return True
    bits = (t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*bits)


def same_results(one: Any, other: Any) -> bool:
    """Whether two models returned the same: in structure, and bit for bit."""
    leaves, structure = pytree.tree_flatten(one)
    others, another = pytree.tree_flatten(other)
    return structure == another and all(
        isinstance(b, Tensor) and same_bits(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


def classes(t: Tensor) -> Tensor:
    """0 for a finite element, 1 for +Inf, 2 for −Inf, 3 for NaN."""
    return t.isposinf().to(torch.int8) + 2 * t.isneginf().to(torch.int8) + 3 * t.isnan().to(torch.int8)


def _first(where: Tensor) -> list[int]:
    return [int(i) for i in where.nonzero()[0].tolist()]


def luck(metric: str, count: int) -> float:
    """How far the ratio of two equally good results may stray from 1: five standard deviations.

    A metric that the largest k of n samples decide, of errors with an exponential tail, has the relative deviation
    1 / (√k · ln(n / k)) (H. A. David, *Order Statistics*, section 10.2); the ratio of two has √2 times that. (Rounding
    errors of sums have heavier tails than a normal distribution, since elements differ in size.)
    """
    deciding = max(1.0, count * {"maximum": 0.0, "p99.9": 1e-3, "p90": 0.1, "median": 0.5}.get(metric, 1.0))
    return 5 * math.sqrt(2 / deciding) / max(1.0, math.log(max(count, 1) / deciding))


@dataclass(frozen=True)
class Errors:
    """The errors of one tensor, each relative; `floor` is what eager's figure counts as at least."""

    figures: dict[str, float]
    floor: dict[str, float]
    count: int


def measure(actual: Tensor, oracle: Tensor, dtype: torch.dtype) -> Errors:
    """Errors of `actual` against `oracle`: both float64, one-dimensional and finite. `dtype` is the result's own.

    frobenius: |err|₂ / |oracle|₂. maximum, p99.9, p90: of |err| / (|oracle| + rms(oracle)). median: of
    |err| / |oracle|. bias: |mean(err · sign(oracle))| / mean |oracle|.
    """
    info, count = torch.finfo(dtype), _independent(oracle)
    quantum = info.smallest_normal * info.eps  # the spacing of denormals
    size = oracle.abs()
    rms = float(size.square().mean().sqrt()) or info.smallest_normal
    error = actual - oracle
    relative = _sample(error.abs() / (size + rms))
    nonzero = _sample(size) > 0
    own = (_sample(error).abs() / _sample(size))[nonzero]
    rms_error = float(error.square().mean().sqrt())
    mean = float(size.mean()) or info.smallest_normal
    figures = {
        "frobenius": rms_error / rms,
        "median": float(own.median()) if own.numel() else 0.0,
        "p90": _quantile(relative, 0.9),
        "p99.9": _quantile(relative, 0.999),
        "maximum": float((error.abs() / (size + rms)).max()),
        "bias": abs(float((error * oracle.sign()).mean())) / mean,
    }
    scale = {torch.float64: FLOAT64_FLOOR, torch.float32: 1.0}.get(dtype, NARROW_FLOOR)
    ulp = info.eps * scale + quantum / rms
    few = 1 + SMALL_SAMPLE / count  # of very few elements, eager's may all be right by chance
    floor = {metric: ulps * ulp * few for metric, ulps in FLOORS.items()}
    drift = FLOAT32_DRIFT if dtype != torch.float64 else ulp
    floor["bias"] = max(floor["bias"], drift, 4 * rms_error / math.sqrt(count) / mean)
    return Errors(figures, floor, count)


def _sample(t: Tensor, size: int = SAMPLE) -> Tensor:
    """About `size` elements, an odd number apart so that they come from all columns."""
    return t[:: (t.numel() // size) | 1]


def _independent(t: Tensor) -> int:
    """How many elements of `t` say something new: of a broadcast row, or of zeros, one does."""
    sample = _sample(t, DISTINCT)
    distinct = int(torch.unique(sample).numel())
    return distinct if distinct < len(sample) / 2 else t.numel()


def _quantile(t: Tensor, q: float) -> float:
    return float(t.kthvalue(max(1, math.ceil(q * t.numel()))).values)


@dataclass(frozen=True)
class Verdict:
    """problems: what is wrong, in words; empty if nothing is. figures: the worst ratio to eager by metric."""

    problems: tuple[str, ...]
    figures: dict[str, float]


@dataclass
class Judge:
    """Collects runs of candidate, eager and oracle, and judges each named tensor over all of them.

    gradient_metrics: EVERY_ELEMENT only where no mask can flip (see `variations.on_grid`).
    usual: by tensor, eager's errors on the file's own inputs, which count as the least that its errors are.
    """

    gradient_metrics: tuple[str, ...] = BULK
    usual: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    _problems: list[str] = field(default_factory=list)
    _runs: dict[str, list[tuple[Errors, Errors]]] = field(default_factory=lambda: defaultdict(list))
    _flips: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, candidate: Named, eager: Named, oracle: Named, case: str = "") -> None:
        """One run. `oracle` may lack a name: then that tensor is held to eager's at the field's tolerance.

        `case` leads every message about this run, and runs of the same case are judged together.
        """
        lead = f"{case}: " if case else ""
        if missing := [name for name in eager if name not in candidate]:
            self._problems.append(f"{lead}lacks {', '.join(missing)}")
        for name, expected in eager.items():
            if name in candidate:
                self._add(lead + name, candidate[name], expected, oracle.get(name))

    def fail(self, problem: str) -> None:
        """Records a problem that the caller found."""
        self._problems.append(problem)

    def verdict(self) -> Verdict:
        problems, worst = list(self._problems), dict[str, float]()
        for name, runs in self._runs.items():
            for metric in self.gradient_metrics if GRADIENT in name else EVERY_ELEMENT:
                ratio, limit = _ratio(metric, runs, self._usual(name, metric))
                worst[metric] = max(worst.get(metric, 0.0), ratio)
                if not ratio <= limit:
                    problems.append(f"{name}: {metric} error is {ratio:.3g}× eager's (at most {limit:.3g}×)")
        for name, counts in self._flips.items():
            ours, theirs = (sum(column) for column in zip(*counts, strict=True))
            if ours > LIMIT * theirs + 3 * math.sqrt(theirs):
                problems.append(f"{name}: {ours} elements are not the oracle's (eager: {theirs})")
        return Verdict(tuple(dict.fromkeys(problems)), worst)

    def eager_errors(self) -> dict[str, dict[str, float]]:
        """By tensor, eager's figures in the last run: what `usual` takes."""
        return {name: runs[-1][1].figures for name, runs in self._runs.items()}

    def _usual(self, name: str, metric: str) -> float:
        return next((figures[metric] for known, figures in self.usual.items() if name.endswith(known)), 0.0)

    def _add(self, name: str, candidate: Tensor | None, eager: Tensor | None, oracle: Tensor | None) -> None:
        if candidate is None or eager is None:
            if candidate is not eager:
                self.fail(f"{name} is {'None' if candidate is None else 'a tensor'}, unlike in eager")
            return
        if problem := _kind_differs(candidate, eager):
            self.fail(f"{name}: {problem}")
        elif eager.numel() == 0:
            return
        elif eager.is_complex():
            as_real = None if oracle is None else torch.view_as_real(oracle.resolve_conj())
            ours, theirs = (torch.view_as_real(t.resolve_conj()) for t in (candidate, eager))
            self._add(name, ours, theirs, as_real)
        elif eager.is_floating_point():
            self._add_floating(name, candidate.detach(), eager.detach(), oracle)
        else:
            truth = eager if oracle is None or oracle.shape != eager.shape else oracle
            self._flips[name].append((int((candidate != truth).sum()), int((eager != truth).sum())))

    def _add_floating(self, name: str, candidate: Tensor, eager: Tensor, oracle: Tensor | None) -> None:
        dtype = eager.dtype
        truth = eager.double() if oracle is None or oracle.shape != eager.shape else oracle.detach().double()
        ours, theirs, right = (classes(t) for t in (candidate, eager, truth.to(dtype)))
        if bool((wrong := (ours != theirs) & (ours != right)).any()):
            where = _first(wrong)
            pair = f"{candidate[tuple(where)].item()} where eager gives {eager[tuple(where)].item()}"
            self.fail(f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ in class, first {where}: {pair}")
        both = (ours == 0) & (right == 0)
        if bool((rescued := both & (theirs != 0)).any()):  # eager overflowed on the way, the candidate did not
            tolerance = tolerance_of(dtype)
            if not torch.allclose(candidate[rescued].double(), truth[rescued], tolerance, tolerance):
                self.fail(f"{name}: wrong where eager overflows")
        if not bool((settled := both & (theirs == 0)).any()):
            return
        got, yardstick, exact = (t.double()[settled] for t in (candidate, eager, truth))
        ours_errors = measure(got, exact, dtype)
        if oracle is None:
            eager_errors = Errors(dict.fromkeys(FLOORS, tolerance_of(dtype)), ours_errors.floor, ours_errors.count)
        else:
            eager_errors = measure(yardstick, exact, dtype)
        self._runs[name].append((ours_errors, eager_errors))
        self._refuse_absurdity(name, ours_errors, eager_errors, measure(got, yardstick, dtype))

    def _refuse_absurdity(self, name: str, ours: Errors, eagers: Errors, unlike: Errors) -> None:
        """Where eager itself is far off (randomness, underflow), its ratio would let anything pass.

        Where eager is nothing but noise, many times the oracle (the gradient of a bias before a normalisation, which
        is zero), there is no right answer to be near to, and the ratio decides alone.
        """
        off, noise = ours.figures["frobenius"], eagers.figures["frobenius"]
        floor = ours.floor["frobenius"] * FLOORS["maximum"]
        if noise < NOISE and off > max(0.5, floor) and unlike.figures["frobenius"] > max(0.05, floor):
            self.fail(f"{name}: off by {off:.2g} of its own size")


def _ratio(metric: str, runs: Iterable[tuple[Errors, Errors]], usual: float) -> tuple[float, float]:
    """The candidate's mean error over eager's, its usual error or the floor, whichever is most; and the limit."""
    runs = list(runs)
    ours = sum(mine.figures[metric] for mine, _ in runs)
    theirs = sum(max(his.figures[metric], mine.floor[metric], usual) for mine, his in runs)
    return ours / theirs, LIMIT * (1 + luck(metric, sum(mine.count for mine, _ in runs)))


def _kind_differs(candidate: Tensor, eager: Tensor) -> str:
    if candidate.dtype != eager.dtype:
        return f"dtype {candidate.dtype} where eager gives {eager.dtype}"
    if candidate.shape != eager.shape:
        return f"shape {tuple(candidate.shape)} where eager gives {tuple(eager.shape)}"
    if candidate.device != eager.device:
        return f"device {candidate.device} where eager gives {eager.device}"
    return ""


def misses(candidate: Tensor, eager: Tensor, oracle: Tensor | None) -> int:
    """How many elements miss the field's allclose(candidate, eager) while eager is nearer the oracle than they are.

    An element that is nearer the oracle than eager's is no miss: two results that are each within the tolerance of
    the truth may be further than that from each other.
    """
    tolerance = tolerance_of(eager.dtype)
    far = ~torch.isclose(candidate, eager, rtol=tolerance, atol=tolerance, equal_nan=True)
    if oracle is not None and oracle.shape == eager.shape and bool(far.any()):
        candidate, eager, oracle = map(_subtractable, (candidate, eager, oracle))
        far &= ~((candidate - oracle).abs() <= (eager - oracle).abs())
    return int(far.sum())


def _subtractable(values: Tensor) -> Tensor:
    """Booleans have no differences, and those of bytes wrap around."""
    return values if values.is_floating_point() or values.is_complex() else values.double()
