"""docs/json.md is the schema: every key that a command writes stands there with its type, and no other."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusewright import cli
from fusewright.cli.output import SCHEMA, Output
from fusewright.runtime.cache import Cache, fingerprint
from fusewright.tools.bench import Accuracy, Bench, Mode, Timed
from fusewright.tools.first_call import FirstCall
from fusewright.tools.verify import SPECS
from model_files import MODELS, model

DOCUMENT = Path(__file__).parents[1] / "docs" / "json.md"
TYPES: dict[str, type | tuple[type, ...]] = {
    "text": str, "integer": int, "number": (int, float), "true or false": bool, "object": dict, "null": type(None),
}  # fmt: skip

Schema = dict[str, list[str]]  # key → the types that its value may have


def documented() -> dict[str, Schema]:
    """By command."""
    found: dict[str, Schema] = {}
    for section in DOCUMENT.read_text().split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", body, re.MULTILINE)
        assert len(rows) == len(dict(rows)), f"a key stands twice under {title}"
        found[title] = {key: kinds.strip().replace("true or false", "bool").split(" or ") for key, kinds in rows}
    common = found.pop("Every command")
    explain, verify = found["explain"], found["verify"]
    explain |= {f"training[].{k}": v for k, v in explain.items() if k not in ("model", "inputs", "arch", "training[]")}
    found["optimize"] |= explain | {f"check.{k}": v for k, v in verify.items()}
    row = {k.removeprefix("regions[]."): v for k, v in explain.items() if k.startswith("regions[].")}
    found["report"] |= {f"graphs[].regions[].row.{k}": v for k, v in row.items()}
    return {command: common | schema for command, schema in found.items()}


SCHEMAS = documented()


def leaves(value: Any, schema: Schema, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no container, by its key as the document writes it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            key = f"{path}.{name}" if path else name
            free = f"{path}.*"
            dynamic = key not in schema and any(k == free or k.startswith((f"{free}.", f"{free}[")) for k in schema)
            yield from leaves(inner, schema, free if dynamic else key)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, schema, f"{path}[]")
    else:
        yield path, value


def fits(value: Any, kinds: list[str]) -> bool:
    if isinstance(value, bool):
        return "bool" in kinds
    return any(isinstance(value, TYPES[kind]) for kind in kinds if kind != "bool")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By command, what it writes in different cases."""
    folder = tmp_path_factory.mktemp("json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return dict(_commands(folder, patch))


def _commands(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any]]]:
    def run(*arguments: str, code: int = 0) -> Any:
        patch.setattr(sys, "argv", ["fusewright", *arguments, "--json", "out.json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code
        return json.loads((folder / "out.json").read_text())

    Path("model.py").write_text(MODELS["one in a list"])
    for name in ("relu", "tanh"):
        text = model(f"    def forward(self, x):\n        return x.{name}()\n")
        Path(f"{name}.py").write_text(text if name == "relu" else text.replace("class Model", "class ModelNew"))
    body = """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 16)

    def forward(self, x):
        y = torch.relu(self.gemm(x))
        return torch.sort(y)[0] * y.sum(0)
"""
    Path("sort.py").write_text(model(body))
    yield "explain", [run("explain", "model.py"), run("explain", "sort.py")]
    optimized = [run("optimize", "model.py"), run("optimize", "model.py", "--no-verify")]
    yield "optimize", optimized
    yield "verify", [run("verify", "relu.py", "tanh.py", code=1), run("verify", "model.py", "model_new.py")]
    yield "report", [run("report", "model.py")]
    yield "doctor", [run("doctor")]
    patch.setenv("FUSEWRIGHT_CACHE_DIR", str(folder / "cache"))
    Cache("cubin").fetch(fingerprint(a=1), lambda: {"a": b""})
    yield "cache info", [run("cache", "info")]
    made = json.dumps({"choice": "fused_mm float32 nn 8x8x8: library", "device": "A GPU"}).encode()
    Cache("tuning").fetch(fingerprint(a=2), lambda: {"choice.json": made})
    yield "cache tuned", [run("cache", "tuned")]
    yield "cache clear", [run("cache", "clear", "--yes")]
    Output("bench", Path("out.json")).result(_bench())
    yield "bench", [json.loads(Path("out.json").read_text())]


def _bench() -> Bench:
    environment = dict.fromkeys(("when", "device", "capability", "driver", "torch", "python"), "text")
    more = {
        "cuda": None,
        "cpus": 2,
        "sources": "0f",
        "versions": {"triton": None, "torch": "2"},
        "card": {"power.draw": "1 W"},
    }
    timings = {"eager": Timed(1.0, 0.9, 1.1, 50, 0.1), "new file.py": Timed(failed="no")}
    mode = Mode(0.1, 100, 100, 10, timings, "eager", None)
    accuracy = {"new file.py": Accuracy(float("inf"), ["wrong"])}
    firsts = {"eager": FirstCall(2.0, 1.0), "new file.py": FirstCall(failed="no")}
    rates = {"copy_bytes_per_s": 1e12, "fp16_flop_per_s": 1e15}
    modes = {"forward": mode, "both": mode}
    return Bench(
        "a.py", "new file.py", "", "", False, False, {**environment, **more}, rates, modes, accuracy, firsts, ["x"]
    )


@pytest.mark.parametrize("command", SCHEMAS)
def test_schema(command: str, written: dict[str, list[Any]]) -> None:
    schema, seen = SCHEMAS[command], set()
    for sample in written[command]:
        assert (sample["schema"], sample["command"]) == (SCHEMA, command)
        for key, value in leaves(sample, schema):
            assert key in schema, f"{key} is not documented for {command}"
            assert fits(value, schema[key]), f"{key} of {command} is {value!r}, which is not {schema[key]}"
            seen.add(key)
    own = {k for k in schema if command == "explain" or k not in SCHEMAS["explain"]}
    own = {k for k in own if not k.startswith(("check.", "training[].")) and schema[k] != ["object"]}
    missing = {k for k in own - seen if not any(s.startswith(f"{k}.") for s in seen)}
    if torch.cuda.is_available():
        missing = {k for k in missing if not k.startswith(("sizes", "plan", "kernels"))}
    assert not missing, f"documented for {command}, and never written"


def test_the_names_of_checks_are_documented(written: dict[str, list[Any]]) -> None:
    (listed,) = re.findall(r"^The names of checks, in their order: ([^.]*)\.", DOCUMENT.read_text(), re.MULTILINE)
    names = re.findall("`([^`]+)`", listed)
    specs = [spec.name for spec in SPECS]
    assert [name for name in names if name in specs] == specs
    found = [check["name"] for check in written["verify"][0]["checks"]]
    assert [name for name in names if name in found] == found and set(names) == {*found, *specs}


def test_all_commands_are_documented() -> None:
    named = {c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    groups = {f"{g.name} {c.name}" for g in cli.app.registered_groups for c in g.typer_instance.registered_commands}
    assert {*named, *groups} == set(SCHEMAS)


def test_numbers_that_are_not_finite_are_null(written: dict[str, list[Any]]) -> None:
    assert written["bench"][0]["accuracy"]["new file.py"]["ratio"] is None
