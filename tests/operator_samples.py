"""Samples of torch's own operator database, and the gate that compiled results of them pass.

A result is held to float64 eager, and to eager in the sample's own dtype: the largest and the mean error, in units in
the last place, are at most LIMIT times eager's, or within FLOOR; NaN and ±Inf are where eager or float64 has them.
Where float64 eager itself is inaccurate, an exact formula stands for it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any
from unittest import TestCase

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fusewright.capture.backend import fusewright

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.bool)

# Not element by element, complex, random, or no operator of a model.
LEFT_OUT = frozenset(
    {
        *("complex", "polar", "imag", "conj", "cdouble", "cfloat", "chalf", "nn.functional.silu.complex"),
        *("nn.functional.rrelu", "jiterator_unary", "jiterator_binary", "jiterator_binary_return_by_ref"),
    }
)
# Elementwise, although the database has them as operators of any kind.
MORE = frozenset(
    {
        *("addcmul", "addcdiv", "clamp", "lerp", "logaddexp2", "masked_fill", "where", "clone", "to", "isclose"),
        *(
            f"nn.functional.{name}"
            for name in (
                *("gelu", "glu", "hardswish", "leaky_relu", "mse_loss", "huber_loss", "smooth_l1_loss"),
                *("binary_cross_entropy", "binary_cross_entropy_with_logits", "soft_margin_loss"),
            )
        ),
    }
)
# Rounded correctly, or not at all: the same bits as eager.
EXACT = frozenset(
    {
        *("abs", "neg", "positive", "sign", "sgn", "add", "sub", "rsub", "mul", "div.no_rounding_mode", "true_divide"),
        *("maximum", "minimum", "fmax", "fmin", "max.binary", "min.binary", "clamp", "clamp_min", "clamp_max"),
        *("floor", "ceil", "trunc", "round", "frac", "square", "reciprocal", "sqrt", "copysign", "fmod", "nextafter"),
        *("nan_to_num", "heaviside", "where", "masked_fill", "clone", "to", "nn.functional.relu", "conj_physical"),
        *("nn.functional.hardtanh", "nn.functional.relu6", "nn.functional.threshold", "nn.functional.hardshrink"),
        *("__radd__", "__rmul__", "__rsub__", "isclose"),
        *("float", "double", "half", "bfloat16", "int", "long", "short", "byte", "char", "bool"),
    }
)
# Of 0 and −0 either may be the larger: ATen's own kernels differ.
TIES = frozenset(
    {
        *("maximum", "minimum", "fmax", "fmin", "max.binary", "min.binary", "clamp", "clamp_min", "clamp_max"),
        *("nn.functional.relu", "nn.functional.relu6", "nn.functional.hardtanh", "nn.functional.threshold"),
    }
)
# Sums whose terms may cancel: an error is that of the terms, as it is for every gradient.
CANCELLING = frozenset({"addcmul", "addcdiv", "lerp", "nn.functional.gelu", "logaddexp", "logaddexp2"})

# What ATen computes, as docs/operators.md says; and parts of a sample that are not element by element.
ATEN = frozenset(
    name
    for name in (
        *("frexp", "igamma", "igammac", "special.airy_ai", "special.spherical_bessel_j0"),
        *(f"special.modified_bessel_i{n}" for n in (0, 1)),
        *(f"special.bessel_{kind}" for kind in ("j0", "j1", "y0", "y1")),
        *(f"special.{s}modified_bessel_k{n}" for s in ("", "scaled_") for n in (0, 1)),
    )
)
# torch takes it apart before any compiler sees it, into a formula whose gradient at NaN is 0.
OTHER_GRADIENT_AT_NAN = frozenset({"nn.functional.softshrink"})
NOT_POINTWISE = frozenset({"arange", "cat", "sum"})

LIMIT = 1.25
# Units in the last place. In float64 eager is its own oracle, but for EXACT_FORMULAS.
FLOOR = {torch.float64: 4096.0, torch.float32: 2.0, torch.bfloat16: 1.0, torch.float16: 1.0}
# Eager results with larger errors than this, in float64, are float32's: no measure.
NO_MEASURE = 2.0**20

SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.0, 1e-5, 1e30, 19.0, -104.0]


class _LogNdtr(torch.autograd.Function):
    """In ATen's gradient, exp(-x²/2 - log_ndtr x), terms cancel: at x = -104 an ulp of one is 4096 of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.special.log_ndtr(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * math.sqrt(2 / math.pi) / torch.special.erfcx(-x * math.sqrt(0.5))


# Where ATen's float64 kernels are inaccurate. Those of the hard functions on CUDA multiply by 1/6 rounded to float32.
EXACT_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "nn.functional.hardsigmoid": lambda x: torch.where(x <= -3, 0.0, torch.where(x < 3, (x + 3) / 6, x * 0 + 1)),
    "nn.functional.hardswish": lambda x: torch.where(x <= -3, x * 0, torch.where(x < 3, x * (x + 3) / 6, x)),
    "special.log_ndtr": _LogNdtr.apply,
}


@cache
def database() -> dict[str, Any]:
    """The elementwise operators by name. The database's own tests need expecttest; it needs no more than the name."""
    if "expecttest" not in sys.modules:
        sys.modules["expecttest"] = ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = TestCase  # type: ignore[attr-defined]
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import BinaryUfuncInfo, UnaryUfuncInfo

    named = {(f"{o.name}.{o.variant_test_name}" if o.variant_test_name else o.name): o for o in op_db}
    return {
        name: op
        for name, op in named.items()
        if name not in LEFT_OUT and (isinstance(op, (UnaryUfuncInfo, BinaryUfuncInfo)) or op.name in MORE)
    }


@dataclass(frozen=True)
class Call:
    """One sample: `function` of its tensors. The structure holds whatever else the sample has."""

    name: str
    function: Callable[..., Any]
    leaves: Sequence[Any]
    structure: Any
    dtype: torch.dtype
    special: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        result = self.function(*args, **kwargs)
        return [r for r in pytree.tree_leaves(result) if isinstance(r, Tensor)]

    def traced(self) -> list[Tensor]:
        """The results as fake tensors, which tell compilers the strides; some of ATen's kernels give others."""
        mode = FakeTensorMode()
        fake = self.with_tensors(mode.from_tensor)
        with mode:
            return fake(fake.tensors)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Call:
        return replace(self, leaves=[change(x) if isinstance(x, Tensor) else x for x in self.leaves])


def calls(name: str, device: str, dtypes: Sequence[torch.dtype], limit: int) -> list[Call]:
    """Of each dtype that the operator takes, at most `limit` samples from all over, a strided and a special one."""
    op = database()[name]
    kind = torch.device(device).type
    found = []
    for dtype in dtypes:
        if dtype not in op.supported_dtypes(kind):
            continue
        differentiable = dtype.is_floating_point and dtype in op.supported_backward_dtypes(kind)
        torch.manual_seed(0)
        samples = op.sample_inputs(device, dtype, requires_grad=differentiable)
        every = [_call(op, name, s, dtype) for s in samples if isinstance(s.input, Tensor)]
        several = every[len(every) // (2 * limit) :: max(1, len(every) // limit)][:limit]
        if several:
            several.append(several[-1].with_tensors(_strided))
        if dtype.is_floating_point and takes_special(name) and (extreme := _extreme(several)) is not None:
            several.append(extreme)
        found += [c for c in several if _works(c)]
    return found


def takes_special(name: str) -> bool:
    """Not polynomials: as a degree, infinity has ATen take 2^63 steps, and of NaN it returns what memory held.

    Nor mvlgamma, which is undefined for operands of (p - 1) / 2 and less.
    """
    return "polynomial" not in name and "mvlgamma" not in name


def _call(op: Any, name: str, sample: Any, dtype: torch.dtype) -> Call:
    leaves, structure = pytree.tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
    return Call(name, op.get_op(), leaves, structure, dtype)


def _strided(t: Tensor) -> Tensor:
    """The same values: the dimensions in the opposite order in memory, and every other element of a longer row."""
    if t.dim() == 0:
        return t.detach().clone().requires_grad_(t.requires_grad)
    reversed_dims = tuple(reversed(range(t.dim())))
    wide = t.detach().permute(reversed_dims).contiguous().repeat_interleave(2, dim=-1)
    return wide[..., ::2].permute(reversed_dims).requires_grad_(t.requires_grad)


def _extreme(several: Sequence[Call]) -> Call | None:
    """A call whose floating-point operands meet in every pair of special values."""
    for call in several:
        floats = [t for t in call.tensors if t.dtype == call.dtype]
        if len(floats) != len(call.tensors) or not 1 <= len(floats) <= 2 or any(t.numel() == 0 for t in floats):
            continue
        shapes = [(-1, 1), (1, -1)] if len(floats) == 2 else [(2, -1)]
        values = torch.tensor(SPECIAL, dtype=torch.float64).to(floats[0].device, call.dtype)
        operands = [
            values.reshape(s).clone().requires_grad_(t.requires_grad) for s, t in zip(shapes, floats, strict=True)
        ]
        return replace(call.with_tensors(_given(operands)), special=True)
    return None


def _given(tensors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    rest = iter(tensors)
    return lambda _: next(rest)


def _works(call: Call) -> bool:
    """Integers that an operator takes on a GPU alone, such as the divisor 0, have no defined result."""
    try:
        if not call.dtype.is_floating_point:
            call([t.cpu() for t in call.tensors])
        return all(not r.is_complex() for r in call(call.tensors))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
        return False


def together(several: Sequence[Call]) -> Callable[..., list[Tensor]]:
    """One function of all the tensors of several calls, in order, that returns all results."""
    counts = [len(c.tensors) for c in several]

    def run(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        return [r for c, n in zip(several, counts, strict=True) for r in c(list(itertools.islice(rest, n)))]

    return run


def compiled(several: Sequence[Call], **options: Any) -> Callable[..., Any]:
    """`together` by fusewright's backend. Traced by AOTAutograd alone: Dynamo takes longer than the rest."""
    tensors = [t for c in several for t in c.tensors]
    module = make_fx(together(several))(*(t.detach() for t in tensors))
    return fusewright(module, tensors, options=options)


def vectors(names: Sequence[str], dtype: torch.dtype, length: int, together_at_most: int) -> list[Call]:
    """One call of each operator whose operands are vectors: special values, then a sample's.

    Vectors of one length are computed by one kernel; each `together_at_most` operators have a length of their own,
    since a compiler's time grows faster than a kernel. What is not element by element is left out.
    """
    found: list[Call] = []
    for name in names:
        count = length + len(found) // together_at_most
        for call in calls(name, "cpu", [dtype], 3):
            if not call.special and call.tensors and all(t.numel() for t in call.tensors):
                shifts = itertools.count(0, 3) if takes_special(name) else itertools.repeat(None)
                vector = call.with_tensors(lambda t, n=count, s=shifts: _vector(t, n, next(s)))
                if _works(vector) and all(r.shape == (count,) for r in vector(vector.tensors)):
                    found.append(vector)
                    break
    return found


def _vector(t: Tensor, length: int, shift: int | None) -> Tensor:
    """shift: by how much the special values are rotated; None for none of them."""
    values = t.detach().flatten()
    sample = values.repeat(length // values.numel() + 1)[:length].clone()
    if t.is_floating_point() and shift is not None:
        special = torch.tensor(SPECIAL, dtype=torch.float64).roll(shift).to(t.dtype)
        sample[: len(SPECIAL)] = special
    return sample.requires_grad_(t.requires_grad)


@dataclass(frozen=True)
class Results:
    """What the calls return, and the gradients of a fixed weighting of it: of each result, of each leaf. sizes: for
    gradients that are sums, how large those would be but for cancellation, which leaves any size by luck."""

    values: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    sizes: Sequence[Tensor | None] = ()


def evaluate(run: Callable[..., Sequence[Tensor]], several: Sequence[Call]) -> Results:
    tensors = [t for c in several for t in c.tensors]
    values = run(*tensors)
    leaves, roots = ([t for t in group if t.requires_grad] for group in (tensors, values))
    gradients = torch.autograd.grad(roots, leaves, [_weights(v) for v in roots], allow_unused=True) if roots else ()
    return Results([v.detach() for v in values], gradients)


def _weights(value: Tensor) -> Tensor:
    """Numbers that every dtype has."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(value.shape, generator=generator).to(torch.bfloat16)
    return weights.to(value.device, value.dtype)


def oracle(several: Sequence[Call]) -> Results:
    """Eager's results where every floating-point operand is float64, and integers too whose result is not."""
    wide = []
    for sample in several:
        call = replace(sample, function=EXACT_FORMULAS.get(sample.name, sample.function))
        promotes = not call.dtype.is_floating_point and all(r.is_floating_point() for r in call(call.tensors))
        wide.append(call.with_tensors(_double if promotes else _double_float))
    exact = evaluate(together(wide), wide)
    return replace(exact, sizes=[size for call in wide for size in _sizes(call)])


def _sizes(call: Call) -> list[Tensor | None]:
    """For each leaf that was broadcast, the root of the sum of the squares of what its gradient is a sum of."""
    shape = (result := call(call.tensors)[0]).shape
    leaves = [t for t in call.tensors if t.requires_grad]
    spread = call.with_tensors(lambda t: _spread(t, shape))
    try:
        same = torch.equal(spread(spread.tensors)[0].nan_to_num(), result.nan_to_num())
    except RuntimeError:
        same = False
    if not same:  # the operator does not broadcast it as arithmetic does
        return [None] * len(leaves)
    terms = evaluate(together([spread]), [spread]).gradients
    return [
        None if g is None or g.shape == leaf.shape else g.square().sum_to_size(leaf.shape).sqrt()
        for g, leaf in zip(terms, leaves, strict=True)
    ]


def _spread(t: Tensor, shape: torch.Size) -> Tensor:
    if not t.requires_grad or not t.numel() or t.dim() > len(shape):
        return t
    if any(n not in (1, m) for n, m in zip(reversed(t.shape), reversed(shape), strict=False)):
        return t
    return t.detach().expand(shape).clone().requires_grad_()


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def _double_float(t: Tensor) -> Tensor:
    return _double(t) if t.is_floating_point() else t


def problems(several: Sequence[Call], found: Results, eager: Results, exact: Results) -> list[str]:
    """What is wrong with the results of a compilation of `several`, in words."""
    gate = _Gate()
    owners = [(c, i) for c in several for i, _ in enumerate(c(c.tensors))]
    for (call, i), ours, theirs, right in zip(owners, found.values, eager.values, exact.values, strict=True):
        gate.strides(call, i, ours, theirs)
        gate.value(call, ours, theirs, right)
    graded = [(c, t) for c in several for t in c.tensors if t.requires_grad]
    if eager.gradients:
        columns = zip(graded, found.gradients, eager.gradients, exact.gradients, exact.sizes, strict=True)
        for (call, leaf), ours, theirs, right, size in columns:
            gate.gradient(call, leaf, ours, theirs, right, size)
    return gate.verdict()


@dataclass
class _Gate:
    complaints: list[str] = field(default_factory=list)
    errors: dict[tuple[str, torch.dtype], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def strides(self, call: Call, index: int, ours: Tensor, theirs: Tensor) -> None:
        if ours.numel() == 0 or ours.stride() == theirs.stride():
            return
        traced = call.traced()[index].stride()
        if ours.stride() != traced:
            title = f"{call.name} {call.dtype}"
            self.complaints.append(f"{title}: strides {ours.stride()} where eager gives {theirs.stride()} or {traced}")

    def value(self, call: Call, ours: Tensor, theirs: Tensor, right: Tensor) -> None:
        title = f"{call.name} {call.dtype}"
        if call.name in EXACT or not theirs.is_floating_point():
            # Not all of eager's square roots on the CPU are rounded correctly; float64's, rounded, are.
            equal = [_same(ours, t.to(ours.dtype), signed_zero=call.name not in TIES) for t in (theirs, right)]
            if ours.dtype != theirs.dtype or ours.shape != theirs.shape or not bool((equal[0] | equal[1]).all()):
                self.complaints.append(f"{title}: {_first(ours, theirs)}, to the bit")
            return
        self.accuracy(title, ours, theirs, right, _typical(right) if call.name in CANCELLING else right.new_zeros(()))

    def gradient(
        self,
        call: Call,
        leaf: Tensor,
        ours: Tensor | None,
        theirs: Tensor | None,
        right: Tensor | None,
        size: Tensor | None,
    ) -> None:
        title = f"gradient of {call.name} {call.dtype}"
        if ours is None or theirs is None or right is None:
            if ours is not theirs:
                self.complaints.append(f"{title}: {ours} where eager gives {theirs}")
            return
        least = _typical(right) if size is None else torch.maximum(size.nan_to_num(), _typical(right))
        # On the CPU, eager's gradient at NaN depends on where in its vector an element is.
        if leaf.device.type == "cpu" or call.name in OTHER_GRADIENT_AT_NAN:
            known = ~leaf.detach().isnan()
            ours, theirs, right, least = (t[known] for t in (ours, theirs, right, least.expand_as(right)))
        self.accuracy(title, ours, theirs, right, least)

    def accuracy(self, title: str, ours: Tensor, theirs: Tensor, right: Tensor, least: Tensor) -> None:
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            self.complaints.append(f"{title}: {ours.dtype} {ours.shape} where eager has {theirs.dtype} {theirs.shape}")
            return
        classes = [_classes(t) for t in (ours, theirs, right.to(ours.dtype))]
        wrong = (classes[0] != classes[1]) & (classes[0] != classes[2])
        if bool(wrong.any()):
            self.complaints.append(f"{title}: {_first(ours[wrong], theirs[wrong])}")
        finite = (classes[0] == 0) & (classes[2] == 0)
        both = finite & (classes[1] == 0)
        least = least.expand_as(right)
        pair = (_ulps(ours[finite], right[finite], least[finite]), _ulps(theirs[both], right[both], least[both]))
        self.errors.setdefault((title, ours.dtype), []).append(pair)

    def verdict(self) -> list[str]:
        """Over all samples of an operator and dtype together."""
        for (title, dtype), pairs in self.errors.items():
            ours, theirs = (torch.cat([p[i] for p in pairs]) for i in range(2))
            for metric, worst in (("largest", _largest), ("mean", _mean)):
                mine, measure = worst(ours), worst(theirs)
                limit = FLOOR[dtype] + (LIMIT * measure if dtype != torch.float64 or measure < NO_MEASURE else 0.0)
                if not mine <= limit:
                    self.complaints.append(f"{title}: {metric} error {mine:.4g} ulp, at most {limit:.4g}")
        return list(dict.fromkeys(self.complaints))


def _typical(t: Tensor) -> Tensor:
    size = t.abs()[t.isfinite()]
    return size.median() if size.numel() else t.new_zeros(())


def _largest(errors: Tensor) -> float:
    return float(errors.max()) if errors.numel() else 0.0


def _mean(errors: Tensor) -> float:
    return float(errors.mean()) if errors.numel() else 0.0


def _classes(t: Tensor) -> Tensor:
    """0 for a finite element, 1 for +Inf, 2 for −Inf, 3 for NaN."""
    return t.isposinf().to(torch.int8) + 2 * t.isneginf().to(torch.int8) + 3 * t.isnan().to(torch.int8)


def _ulps(found: Tensor, right: Tensor, least: Tensor) -> Tensor:
    """Errors in units in the last place of the right value, or of `least` where that is larger."""
    info = torch.finfo(found.dtype)
    exponent = torch.frexp(torch.maximum(right.abs(), least.to(right)))[1].double()
    unit = (torch.exp2(exponent - 1) * info.eps).clamp(min=info.smallest_normal * info.eps)
    return (found.double() - right).abs() / unit


def _same(a: Tensor, b: Tensor, signed_zero: bool) -> Tensor:
    """Where bits are the same; any NaN is as good as another. signed_zero: −0 is not 0."""
    equal = a == b
    if a.is_floating_point() and signed_zero:
        equal &= a.signbit() == b.signbit()
    return equal | (a != a) & (b != b)


def _first(ours: Tensor, theirs: Tensor) -> str:
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return f"{ours.dtype} {tuple(ours.shape)} where eager gives {theirs.dtype} {tuple(theirs.shape)}"
    same = _same(ours, theirs, signed_zero=True)
    at = tuple((~same).nonzero()[0].tolist())
    return f"{ours[at].item()} where eager gives {theirs[at].item()} in {int((~same).sum())} of {same.numel()} elements"
