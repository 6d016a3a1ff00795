"""Two files' arguments: what each defines for itself is the same, what a seed decides is compared, code is not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusewright.capture.model_file import load
from fusewright.tools.arguments import difference, leaves
from fusewright.tools.verify import Subject, verify
from model_files import model

OWN = """
import random
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from enum import Enum

import numpy as np


@dataclass
class Config:
    width: int = 20
    inner: object = None


@dataclass
class Slots:
    __slots__ = ("width",)
    width: int


class Kind(Enum):
    RELU = 1
    TANH = 2


class Odd:
    def __eq__(self, other):
        raise SystemExit("compared")


class OddTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *_, **__):
        raise SystemExit("compared")


Pair = namedtuple("Pair", "a b")
nan = float("nan")
loop = [1]
loop.append(loop)


def relu(x):
    return x


def tanh(x):
    return x


"""
BODY = "    class Config:\n        pass\n\n    def forward(self, x):\n        return x + 1\n"


def told(folder: Path, first: str, second: str) -> str | None:
    """The difference between what two files give."""

    def arguments(name: str, values: str) -> Any:
        path = folder / name
        path.write_text(model(BODY, before=OWN).replace("return []", f"return [{values}]").replace("Model", name))
        return load(path, name=name).get_init_inputs

    wanted, given = arguments("Model", first), arguments("ModelNew", second)
    return difference(leaves(given()), leaves(wanted()), leaves(wanted()))


@pytest.mark.parametrize(
    "values",
    ["Config(8, Kind.TANH)", "Slots(8)", "Kind.RELU", "relu", "lambda x: x", "Odd, Odd()", "Pair(1, nan)", "loop",
     "np.array([20, 16]), np.float32(nan), np.array([Odd(), Config()])",
     "torch.tensor([1.0, nan])", "Model.Config, Model.Config()",
     "OrderedDict(a=relu)", "{Kind.RELU: 1, 'a': 2}", "torch.rand(2).as_subclass(OddTensor)",
     "torch.eye(2).to_sparse()", "random.random(), np.random.rand(2), [0] * random.randint(1, 99)", "{1, 2}",
     "torch.float16, torch.device('cpu')"],
)  # fmt: skip
def test_the_same(tmp_path: Path, values: str) -> None:
    assert told(tmp_path, values, values) is None


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("Config(8)", "Config(9)", "[0].width is 9 where the reference's is 8"),
        ("Config(8, Config(1))", "Config(8, Config(2))", "[0].inner.width is 2 where the reference's is 1"),
        ("Config()", "Kind.RELU", "[0] is Kind.RELU where the reference's is a Config"),
        ("Kind.RELU", "Kind.TANH", "[0] is Kind.TANH where the reference's is Kind.RELU"),
        ("relu", "tanh", "[0] is tanh where the reference's is relu"),
        ("np.array([20, 16])", "np.array([20, 17])", "[0] has other values"),
        ("np.zeros(2)", "np.zeros(3)", "[0] is array float64 [3] where the reference's is array float64 [2]"),
        ("np.zeros(2)", "torch.zeros(2).double()", "[0] is float64 [2] where the reference's is array float64 [2]"),
        ("nan, 3", "nan, 4", "[1] is 4 where the reference's is 3"),
        ("torch.tensor([nan, 3])", "torch.tensor([nan, 4])", "[0] has other values"),
        ("random.random(), 3", "random.random(), 4", "[1] is 4 where the reference's is 3"),
        ("1, 2", "1,", " is a list of 1 where the reference's is a list of 2"),
        ("1,", "1, 2", " is a list of 2 where the reference's is a list of 1"),
        ("{'a': 1}", "{'b': 1}", "[0] is a dict of ['b'] where the reference's is a dict of ['a']"),
        ("torch.float16", "torch.float32", "[0] is torch.float32 where the reference's is torch.float16"),
        ("{'a': 1, 'b': 2}", "{'b': 3, 'a': 1}", "[0]['b'] is 3 where the reference's is 2"),
    ],
)
def test_another(tmp_path: Path, first: str, second: str, says: str) -> None:
    assert (told(tmp_path, first, second) or "").startswith(says)


def test_a_candidate_with_a_configuration_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusewright.tools.verify.SPECS", ())
    body = "    def __init__(self, c):\n        super().__init__()\n\n    def forward(self, x):\n        return x + 1\n"
    path = tmp_path / "model.py"
    path.write_text(model(body, before=OWN).replace("return []", "return [Config(np.array([20, 16]), Kind.RELU)]"))
    first, second = (Subject.of_file(name, lambda: load(path)) for name in ("model.py", "again.py"))
    report = verify(first, second)
    assert report.passed and "arguments" in {check.name for check in report.checks}
