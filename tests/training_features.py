"""What surrounds a model in training, checked on any device: each check compares a compiled model with eager."""

from __future__ import annotations

import copy
import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INPUTS, HIDDEN, OUTPUTS, BATCH = 9, 10, 7, 5
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class Block(nn.Module):
    """checkpointed: backward computes the first layer's activations again."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return self.down(checkpoint(self.hidden, x, use_reentrant=False))  # type: ignore[no-any-return]
        return self.down(self.hidden(x))  # type: ignore[no-any-return]

    def hidden(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.up(x)) * 2


@dataclass(frozen=True)
class Features:
    device: str
    options: dict[str, Any] = field(default_factory=dict)

    def compiled(self, model: Any) -> Any:
        return torch.compile(model, backend="fusewright", options=self.options)

    def block(self, **settings: Any) -> Block:
        torch.manual_seed(0)
        return Block(**settings).to(self.device)

    def batch(self, seed: int = 1) -> Tensor:
        return torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def autocast(self, dtype: torch.dtype) -> None:
        def step(call: Any, model: nn.Module) -> list[Tensor]:
            model.zero_grad()
            with torch.autocast(torch.device(self.device).type, dtype):
                y = call(self.batch())
            assert y.dtype == dtype
            y.float().square().sum().backward()
            return [y.detach(), *_gradients(model)]

        model = self.block()
        found, expected = step(self.compiled(model), model), step(model, model)
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        for a, e in zip(found, expected, strict=True):
            scale = float(e.abs().max())
            torch.testing.assert_close(a, e, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)

    def without_gradients(self) -> None:
        model = self.block()
        call, x = self.compiled(model), self.batch()
        with torch.no_grad():
            y = call(x)
            assert not y.requires_grad
        with torch.inference_mode():
            z = call(x)
            assert z.is_inference()
        expected = model(x)
        _close([y, z.clone()], [expected.detach()] * 2)
        trained = call(x)
        assert trained.requires_grad
        trained.sum().backward()
        assert all(g.abs().sum() > 0 for g in _gradients(model))

    def scaler(self) -> None:
        """Scaled gradients of float16; an overflow leaves the weights alone and halves the scale."""
        states = []
        for compiled in (True, False):
            model = self.block()
            call = self.compiled(model) if compiled else model
            optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler(torch.device(self.device).type, init_scale=1024.0)
            for seed in (1, 2, 3):
                before = copy.deepcopy(model.state_dict())
                optimiser.zero_grad()
                with torch.autocast(torch.device(self.device).type, torch.float16):
                    loss = call(self.batch(seed)).float().square().mean()
                scaler.scale(loss * (torch.inf if seed == 2 else 1)).backward()
                scaler.step(optimiser)
                scaler.update()
                unchanged = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
                assert unchanged == (seed == 2)
            assert scaler.get_scale() == 512.0
            states.append(list(model.state_dict().values()))
        _close(*states, tolerance=TOLERANCE[torch.float16])

    def checkpointing(self) -> None:
        """Within the compiled model, and around it."""
        plain, inside = self.block(), self.block(checkpointed=True)
        calls: list[tuple[nn.Module, Callable[..., Tensor]]] = [(inside, self.compiled(inside))]
        around = self.block()
        whole = self.compiled(around)
        calls.append((around, lambda x: checkpoint(whole, x, use_reentrant=False)))  # type: ignore[return-value]
        expected = _step(plain, plain, self.batch())
        for model, call in calls:
            _close(_step(call, model, self.batch()), expected)

    def accumulation(self) -> None:
        model, other = self.block(), self.block()
        call = self.compiled(model)
        for seed in (1, 2, 3):
            (call(self.batch(seed)).square().sum() / 3).backward()
            (other(self.batch(seed)).square().sum() / 3).backward()
        _close(_gradients(model), _gradients(other))

    def state(self) -> None:
        """Weights go out of a compiled model and into another, through a file."""
        model = self.block()
        call = self.compiled(model)
        call(self.batch()).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        file = io.BytesIO()
        torch.save(call.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        fresh = self.compiled(Block().to(self.device))
        before = fresh(self.batch())
        fresh.load_state_dict(state)
        assert not torch.equal(before, fresh(self.batch()))
        _close([fresh(self.batch()).detach()], [model(self.batch()).detach()])
        plain = Block().to(self.device)
        plain.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in state.items()})
        _close([plain(self.batch()).detach()], [model(self.batch()).detach()])

    def deep_copy(self) -> None:
        """A copy of a compiled model is compiled, and has weights of its own."""
        call = self.compiled(self.block())
        before = call(self.batch()).detach()
        copied = copy.deepcopy(call)
        with torch.no_grad():
            for p in copied.parameters():
                p.mul_(-2)
        _close([call(self.batch()).detach()], [before])
        found = _step(copied, copied, self.batch())
        plain = self.block()
        with torch.no_grad():
            for p in plain.parameters():
                p.mul_(-2)
        _close(found, _step(plain, plain, self.batch()))

    def exported(self) -> None:
        model = self.block()
        program = torch.export.export(model, (self.batch(),))
        module = program.module()
        call = self.compiled(module)
        _close(_step(call, module, self.batch()), _step(model, model, self.batch()))

    def threads(self, count: int = 2, times: int = 5) -> None:
        """Threads call a model that all share and one each of their own, all for the first time at once."""
        shared_model = self.block()
        shared = self.compiled(shared_model)
        models = [self.block() for _ in range(count)]
        expected = [self.block()(self.batch(i)).detach() for i in range(count)]
        start, problems = threading.Barrier(count), list[BaseException]()

        def work(i: int) -> None:
            try:
                own = self.compiled(models[i])
                start.wait()
                for _ in range(times):
                    with torch.no_grad():
                        found = [_when_nobody_traces(call, self.batch(i)) for call in (own, shared)]
                    _close(found, [expected[i]] * 2)
                    _when_nobody_traces(lambda x: _step(own, models[i], x), self.batch(i))
            except BaseException as error:
                problems.append(error)
                start.abort()

        workers = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if problems:
            raise problems[0]
        for i, model in enumerate(models):
            plain = self.block()
            _close(_gradients(model), _step(plain, plain, self.batch(i))[1:])


def _when_nobody_traces(call: Any, x: Tensor) -> Any:
    """While one thread traces, torch refuses compiled models in all of them, whatever their backend."""
    end = time.monotonic() + 60
    while True:
        try:
            return call(x)
        except RuntimeError as error:
            if "FX to symbolically trace" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)


def _step(call: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of all parameters."""
    model.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), *_gradients(model)]


def _gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return found  # type: ignore[return-value]


def _close(found: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE[torch.float32]) -> None:
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
