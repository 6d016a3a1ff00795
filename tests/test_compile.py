"""`fusewright.compile`: torch.compile with our backend, with settings that are checked at once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fusewright
from fusewright.errors import InvalidSetting, UnknownArch, UnknownSetting
from fusewright.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches torch.compile."""
    seen: list[dict[str, Any]] = []
    compile = torch.compile

    def spy(model: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return compile(model, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    return seen


def test_a_module_is_compiled_and_stays_the_module() -> None:
    model = nn.Sequential(nn.Linear(9, 10), nn.ReLU())
    run = fusewright.compile(model, simulate=True, fullgraph=True)
    x = torch.randn(5, 9)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=2e-5, atol=2e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert dict(run.named_parameters())["_orig_mod.0.weight"] is model[0].weight


def test_it_decorates_with_and_without_settings() -> None:
    @fusewright.compile(simulate=True, dynamic=True)
    def double(x: Tensor) -> Tensor:
        """Twice as much."""
        return x * 2

    @fusewright.compile
    def triple(x: Tensor) -> Tensor:
        return x * 3

    assert double.__doc__ == "Twice as much."
    for n in (4, 7):
        assert torch.equal(double(torch.ones(n)), torch.full((n,), 2.0))
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(triple(torch.ones(3)), torch.full((3,), 3.0))


def test_settings_reach_the_backend_and_the_rest_torch_compile(options: list[dict[str, Any]]) -> None:
    fusewright.compile(torch.sin, library=False, cuda_graphs=True, fullgraph=True, dynamic=False)
    (seen,) = options
    assert seen["options"] == {"library": False, "cuda_graphs": True}
    assert (seen["fullgraph"], seen["dynamic"], seen["backend"]) == (True, False, "fusewright")


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"cuda_graph": True}, UnknownSetting, "did you mean 'cuda_graphs'"),
        ({"full_graph": True}, UnknownSetting, "did you mean 'fullgraph'"),
        ({"speed": 9}, UnknownSetting, "the settings are library"),
        ({"library": "no"}, InvalidSetting, "'library' takes bool, not 'no'"),
        ({"schedules": True}, InvalidSetting, "'schedules' takes int"),
        ({"simulate": True, "schedules": 0}, InvalidSetting, "'schedules' takes 1 or more, not 0"),
        ({"arch": 90}, InvalidSetting, "'arch' takes str | None"),
        ({"arch": ""}, UnknownArch, "unknown architecture ''"),
        ({"simulate": True, "cuda_graphs": True}, InvalidSetting, "needs a GPU"),
    ],
    ids=str,
)
def test_wrong_settings_fail_at_once_and_say_what_was_meant(settings: Any, error: Any, says: str) -> None:
    with pytest.raises(error) as caught:
        fusewright.compile(torch.sin, **settings)
    assert says in str(caught.value)


def test_every_setting_is_documented() -> None:
    for field in fields(Settings):
        assert f"{field.name}:" in (Settings.__doc__ or ""), field.name


def test_the_package_starts_without_torch() -> None:
    code = (
        "import sys, fusewright; assert 'torch' not in sys.modules; fusewright.compile; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="linera"):
        fusewright.linera  # noqa: B018


@pytest.mark.parametrize("model", [3, "model.py"])
def test_what_is_no_model_is_refused(model: object) -> None:
    with pytest.raises(InvalidSetting, match=r"a module or a function.*`fusewright optimize`"):
        fusewright.compile(model)  # type: ignore[arg-type]
