"""A small classifier trained with and without fusewright: the same loss curve? Writes results/training.json.

    python benchmarks/training.py [--quick] [--seconds 90]

An MLP learns the labels that a random network gives to normal inputs, in float32 and bfloat16, by SGD and fused AdamW.
Eager trains several times on the same batches: each time but the first, their rows come in another order, so that sums
round differently, and every initial weight is moved by one ulp up, down or not at all, as one rounding might. How far
these curves drift apart is the spread. Ours passes if its distance to the nearest of eager's runs is no larger than the
largest distance between two of those. The distance of two curves: the largest difference of their means over windows of
25 steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import measure
from common import Budget, attempt

INPUTS, HIDDEN, CLASSES = 256, 1024, 16
BATCH, SAMPLES, STEPS = 512, 1 << 15, 300
WINDOW = 25
EAGER_RUNS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "fused AdamW": partial(torch.optim.AdamW, lr=5e-4, fused=True),
}


class Classifier(nn.Module):
    """Three Linears with GELU and LeakyReLU between them."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.leaky_relu(self.second(F.gelu(self.first(x))), 0.1))


@dataclass(frozen=True)
class Data:
    x: Tensor
    labels: Tensor

    @classmethod
    def of_teacher(cls, samples: int, inputs: int, classes: int, device: str) -> Data:
        generator = torch.Generator().manual_seed(7)
        x, *weights = (
            torch.randn(shape, generator=generator) for shape in ((samples, inputs), (inputs, 64), (64, classes))
        )
        labels = (torch.tanh(x @ weights[0] / math.sqrt(inputs)) @ weights[1]).argmax(1)
        return cls(x.to(device), labels.to(device))

    def batches(self, batch: int, steps: int, order: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches for every `order`, with their rows in an order of its own; 0 leaves them."""
        draw, shuffle = torch.Generator().manual_seed(11), torch.Generator().manual_seed(order)
        for _ in range(steps):
            rows = torch.randint(len(self.x), (batch,), generator=draw)
            rows = rows[torch.randperm(batch, generator=shuffle)] if order else rows
            rows = rows.to(self.x.device)
            yield self.x[rows], self.labels[rows]


def nudge(model: nn.Module, order: int) -> None:
    """Moves every weight by one ulp up, down or not at all; 0 moves none."""
    generator = torch.Generator().manual_seed(order)
    with torch.no_grad():
        for weight in model.parameters() if order else ():
            way = torch.randint(-1, 2, weight.shape, generator=generator).to(weight.device)
            towards = torch.where(way == 0, weight, way * torch.full_like(weight, math.inf)).to(weight.dtype)
            weight.copy_(torch.nextafter(weight, towards))


def train(
    model: nn.Module,
    call: Callable[[Tensor], Tensor],
    optimiser: Callable[..., torch.optim.Optimizer],
    batches: Iterator[tuple[Tensor, Tensor]],
) -> list[float]:
    """Trains `model`, which `call` runs; the loss of every step."""
    update, losses = optimiser(model.parameters()), []
    dtype = next(model.parameters()).dtype
    for x, labels in batches:
        update.zero_grad()
        loss = F.cross_entropy(call(x.to(dtype)).float(), labels)
        loss.backward()
        update.step()
        losses.append(loss.detach())
    return [float(f"{loss:.6g}") for loss in torch.stack(losses).tolist()]


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    windows = range(0, len(a), WINDOW)
    means = [[statistics.fmean(curve[w : w + WINDOW]) for w in windows] for curve in (a, b)]
    return max(abs(x - y) for x, y in zip(*means, strict=True))


def verdict(ours: Sequence[float], eager: Sequence[Sequence[float]]) -> dict[str, Any]:
    """passed: ours lies within the spread of eager's runs, and training works."""
    spread = max(distance(a, b) for a, b in combinations(eager, 2))
    nearest = min(distance(ours, e) for e in eager)
    learns = statistics.fmean(ours[-WINDOW:]) < 0.7 * ours[0]
    return {"distance": nearest, "spread": spread, "passed": bool(nearest <= spread and learns), "last_loss": ours[-1]}


def one(dtype: torch.dtype, optimiser: Callable[..., torch.optim.Optimizer], data: Data, steps: int) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(3)
    device = data.x.device
    initial = Classifier(data.x.shape[1], HIDDEN, CLASSES).to(device, dtype)

    def run(order: int, compiled: bool) -> list[float]:
        model = measure.separate(copy.deepcopy(initial))
        nudge(model, order)
        call = torch.compile(model, backend="fusewright") if compiled else model
        return train(model, call, optimiser, data.batches(BATCH, steps, order))

    eager, ours = [run(order, False) for order in range(EAGER_RUNS)], run(0, True)
    return {"eager": eager, "fusewright": ours, **verdict(ours, eager)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the steps")
    parser.add_argument("--seconds", type=float, default=90.0)
    options = parser.parse_args()
    budget, steps = Budget(options.seconds), STEPS // 3 if options.quick else STEPS
    data = Data.of_teacher(SAMPLES, INPUTS, CLASSES, "cuda")
    report: dict[str, Any] = {"environment": measure.environment(), "steps": steps, "batch": BATCH, "runs": {}}
    report |= {"layers": [INPUTS, HIDDEN, HIDDEN, CLASSES], "window": WINDOW, "eager_runs": EAGER_RUNS}
    for name, dtype in DTYPES.items():
        for kind, optimiser in OPTIMISERS.items():
            if budget.spent:
                print(f"time is up: {name}, {kind} is left out", flush=True)
                continue
            found = attempt(partial(one, dtype, optimiser, data, steps))
            report["runs"][f"{name}, {kind}"] = found
            measure.write("training", report)
            print(name, kind, {k: v for k, v in found.items() if k not in ("eager", "fusewright")}, flush=True)
    return 0 if all(r.get("passed") for r in report["runs"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
