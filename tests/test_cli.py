"""The command line: exit codes, one message for every bad input, nothing left behind, JSON, and quiet in a pipe."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from typer.models import OptionInfo

from fusewright import __version__, cli
from fusewright.cli.output import Output
from fusewright.runtime.cache import Cache, fingerprint, stored
from fusewright.tools import bench, doctor
from fusewright.tools import explain as explanation
from fusewright.tuned import parse
from model_files import MODELS, model


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the entry point in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["fusewright", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


GOOD = MODELS["one in a list"]
LINEAR = """
    def __init__(self, inner=20):
        super().__init__()
        self.gemm = nn.Linear(inner, 16)

    def forward(self, x):
        return torch.relu(self.gemm(x))
"""


def forward(*lines: str) -> str:
    return model("    def forward(self, x):\n" + "".join(f"        {line}\n" for line in lines))


# name → the file, more arguments, and what the message has to say
BAD: dict[str, tuple[str, list[str], list[str]]] = {
    "not python": ("class Model(:\n", [], ["model.py:1", "not Python"]),
    "not text": ("\udcff", [], ["not UTF-8"]),
    "no Model": (GOOD.replace("class Model", "class Net"), [], ["class Model", "defines Net"]),
    "no get_inputs": (GOOD.replace("def get_inputs", "def other"), [], ["get_inputs()", "define it"]),
    "no get_init_inputs": (GOOD.replace("def get_init_inputs", "def other"), [], ["get_init_inputs()", "define it"]),
    "raises on import": ("1 / 0\n", [], ["model.py:1", "ZeroDivisionError"]),
    "imports what is missing": ("import no_such_package\n", [], ["imports what is not installed", "no_such_package"]),
    "too many arguments": (model(LINEAR).replace("return []", "return [20, 3]"), [], ["constructor", "2 values"]),
    "constructor raises": (model(LINEAR).replace("return []", "return ['a']"), [], ["constructor", "TypeError"]),
    "not tensors": (model(LINEAR, inputs="'text'"), [], ["get_inputs()[0]", "must be a tensor"]),
    "no list": (model(LINEAR).replace("return []", "return 3"), [], ["get_init_inputs", "list"]),
    "mixed devices": (
        model(LINEAR, inputs="torch.rand(2, 20, device='meta')"),
        [],
        ["get_inputs", "meta", "fill them"],
    ),
    "wrong inner dimension": (model(LINEAR, inputs="torch.rand(24, 21)"), [], ["eager", "24x21 and 20x16"]),
    "fails in eager": (forward("raise ValueError('of its own')"), [], ["eager", "ValueError: of its own"]),
    "another dtype than the parameters": (
        model(LINEAR, inputs="torch.rand(24, 20).double()"),
        [],
        ["model.py:12", "fails in eager", "dtype"],
    ),
    "index out of range": (
        model(LINEAR.replace("Linear(", "Embedding("), inputs="torch.full((24,), 20)"),
        [],
        ["model.py:12", "fails in eager", "index out of range"],
    ),
    "unsupported dtype": (model(LINEAR), ["--dtype", "int4"], ["int4", "float16, bfloat16"]),
    "complex": (forward("return x * 1j"), [], ["complex64", "float32"]),
    "unknown arch": (GOOD, ["--arch", "sm_1"], ["sm_1", "choose one of sm_80"]),
    "unknown setting": (GOOD, ["--set", "batch=3"], ["batch", "no constant"]),
    "no setting": (GOOD, ["--set", "batch"], ["NAME=VALUE"]),
    "out of no folder": (GOOD, ["-o", "missing/out.py"], ["missing", "create it"]),
    "out is a folder": (GOOD, ["-o", "."], ["folder", "-o"]),
    "out is a dash": (GOOD, ["-o", "-"], ["standard output", "-o"]),
    "out is the input": (GOOD, ["-o", "./model.py"], ["input itself", "-o"]),
    "another mode": (
        forward("return torch.relu(x) if self.training else x * 2"),
        [],
        ["model.py", "training mode", "in process"],
    ),
    "more results in another mode": (
        forward("y = torch.relu(x)", "return (y, y * 2) if self.training else (y,)"),
        [],
        ["training mode"],
    ),
    "dropout of its own": (
        model(
            """
    def __init__(self):
        super().__init__()
        self.drop = Drop(0.5)

    def forward(self, x):
        return self.drop(x * 2)
""",
            before="class Drop(nn.Dropout):\n    pass\n\n\n",
        ),
        ["--allow-library"],
        ["training mode"],
    ),
    "random in training": (
        model("""
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x * 2)
"""),
        ["--allow-library"],
        ["training mode", ".eval()"],
    ),
    "returns a number": (forward("return float(x.sum())"), [], ["type float", "return tensors"]),
    "a tensor on the way": (
        forward("return x * torch.tensor([2.0, 3.0]).sum()"),
        [],
        ["forward makes a tensor", "buffer"],
    ),
    "parameters without values": (model(LINEAR.replace("16)", '16, device="meta")')), [], ["on meta", "fill them"]),
    "graph break": (forward("torch._dynamo.graph_break()", "return x"), [], ["not one graph"]),
    "depends on data": (forward("return x * 2 if x.sum() > 0 else x / 3"), [], ["not one graph"]),
    "changes its input": (
        model(LINEAR.replace("return", "x.add_(1)\n        return")),
        [],
        ["model.py:11: the model changes one of its inputs or buffers; return the new value instead\n"],
    ),
    "returns its input": (forward("return x"), [], ["model.py:7", "returns one of its inputs"]),
    "returns a text": (forward("return 'text'"), [], ["model.py:7", "returns is a value of type str", "tensors"]),
    "returns nothing": (forward("x * 2"), [], ["model.py:7", "type NoneType", "tensors"]),
    "returns a number too": (forward("return x * 2, [3]"), [], ["model.py:7", "at [1][0]", "type int", "tensors"]),
    "right, but not in that dtype": (
        forward("return x @ torch.ones(20, 3)"),
        ["--dtype", "bfloat16"],
        ["model.py:8: the model, cast to bfloat16, fails in eager mode: RuntimeError: "],
    ),
    "no kernel": (forward("return torch.sort(x)[0]"), [], ["no kernel for", "sort", "--allow-library"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, run: Run, tmp_path: Path) -> None:
    text, arguments, says = BAD[name]
    (tmp_path / "model.py").write_bytes(text.encode(errors="surrogateescape"))
    done = run("optimize", "model.py", *arguments)
    assert done.code == 2, done.err
    assert done.err.startswith("error: ") and "Traceback" not in done.err and "error:" not in done.err[7:]
    for words in says:
        assert words in done.err
    assert "wrote" not in done.out
    assert [p.name for p in tmp_path.iterdir()] == ["model.py"]
    assert (tmp_path / "model.py").read_bytes() == text.encode(errors="surrogateescape")


def test_no_such_file(run: Run) -> None:
    for command in (["optimize"], ["explain"], ["verify", "other.py"]):
        done = run(*command, "missing.py")
        assert done.code == 2 and "no such file" in done.err
    for command in ("optimize", "report"):
        done = run(command, ".")
        assert done.code == 2 and "this is a folder; name the .py file in it" in done.err


def test_a_place_that_cannot_be_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found before the work."""
    (tmp_path / "model.py").write_text(GOOD)
    (tmp_path / "model_new.py").touch()
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    done = run("optimize", "model.py")
    assert done.code == 2 and "permission denied" in done.err and "-o" in done.err
    if Path("/proc").exists():  # where even root may write nothing, and os.access says yes
        done = run("optimize", "model.py", "-o", "/proc/model_new.py")
        assert done.code == 2 and "/proc/model_new.py cannot be written" in done.err and done.out == ""


def test_usage(run: Run) -> None:
    assert run("--version") == Done(0, f"fusewright {__version__}\n", "")
    assert run("optimize").code == 2
    assert run("optimize", "--no-such-option").code == 2
    for command in ("optimize", "explain", "verify"):
        shown = run(command, "--help")
        assert shown.code == 0 and "--dtype" in shown.out


COMMANDS = ("optimize", "explain", "report", "verify", "bench", "doctor", "cache info", "cache tuned", "cache clear")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Run, command: str) -> None:
    shown = run(*command.split(), "--help").out
    assert "Examples:" in shown
    for words in ("[default:", "<int", "<list"):  # what a default is stands in the text, and types have names
        assert words not in shown


# ---- what went wrong in fusewright itself


def test_internal_errors_are_one_message(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(GOOD)

    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(explanation, "explain", broken)
    done = run("explain", "model.py")
    assert done.code == 1 and "Traceback" not in done.err
    assert done.err.startswith("internal error: KeyError: 'lost'") and "FUSEWRIGHT_TRACEBACK=1" in done.err
    monkeypatch.setenv("FUSEWRIGHT_TRACEBACK", "1")
    with pytest.raises(KeyError, match="lost"):
        run("explain", "model.py")


# ---- explain


def test_explain_json(run: Run, tmp_path: Path) -> None:
    """At the top level inference; what the file prints is not mixed in."""
    (tmp_path / "model.py").write_text("print('printed by the file')\n" + MODELS["two linears"])
    done = run("explain", "model.py", "--json", "-")
    assert done.code == 0 and "printed by the file" in done.err
    found = json.loads(done.out)
    for graph in (found, *found["training"]):
        counts = [graph[k] for k in ("launches_before", "launches_after", "bytes_before", "bytes_after")]
        assert all(type(c) is int and c > 0 for c in counts)
        assert graph["fallbacks"] == [] and isinstance(graph["refusals"], list)
        assert sum(r["launches"] for r in graph["regions"]) == graph["launches_after"]
    assert [r["operators"] for r in found["regions"]] == [["addmm", "gelu"], ["mm", "add"]]
    assert all(r["kernel"].startswith("fused_") for r in found["regions"])
    assert found["launches_before"] == 4 and found["launches_after"] == 2
    assert found["bytes_after"] < found["bytes_before"]
    assert [g["graph"] for g in found["training"]] == ["forward", "backward"]


def test_explain_names_what_runs_as_aten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(forward("return torch.sort(torch.relu(x))[0]"))
    done = run("explain", "model.py", "--json", "found.json")
    assert done.code == 0 and done.err == "" and "sort runs as ATen" in done.out
    found = json.loads((tmp_path / "found.json").read_text())
    (fallback,) = found["fallbacks"]
    assert fallback["operator"] == "sort" and fallback["reason"]


def test_explain_at_other_sizes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("rows = 24\n" + model(LINEAR, inputs="torch.rand(rows, 20)"))
    first, second = (run("explain", "model.py", "--json", "-", "--set", f"rows={n}") for n in (24, 240))
    assert json.loads(first.out)["inputs"] == "float32 [24, 20]"
    assert json.loads(second.out)["bytes_after"] > json.loads(first.out)["bytes_after"]


def test_quiet_in_a_pipe(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    done = run("explain", "model.py")
    assert done.code == 0 and done.err == "" and "\x1b" not in done.out and "loading" not in done.out


def test_an_empty_batch(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(model(LINEAR, inputs="torch.rand(0, 20)"))
    done = run("explain", "model.py", "--json", "-")
    assert done.code == 0 and json.loads(done.out)["launches_after"] == 1
    assert run("optimize", "model.py", "--no-verify").code == 0
    assert (tmp_path / "model_new.py").exists()


# ---- verify


def test_verify_tells_a_wrong_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    wrong = GOOD.replace("class Model", "class ModelNew").replace("torch.relu(", "torch.sigmoid(")
    (tmp_path / "wrong.py").write_text(wrong)
    done = run("verify", "model.py", "wrong.py", "--json", "-")
    assert done.code == 1 and done.err.rstrip().endswith("wrong.py is not as correct as model.py")
    assert json.loads(done.out)["passed"] is False


def test_verify_wants_a_candidate(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the reference once more; with get_inputs and get_init_inputs as they are, --set and all."""
    monkeypatch.setattr("fusewright.tools.verify.SPECS", ())
    reference = "rows = 24\n" + GOOD.replace("torch.rand(24,", "torch.rand(rows,")
    (tmp_path / "model.py").write_text(reference)
    done = run("verify", "model.py", "model.py")
    assert done.code == 2 and "no class ModelNew (the file defines Model)" in done.err
    candidate = reference.replace("class Model", "class ModelNew")
    (tmp_path / "new.py").write_text(candidate)
    assert run("verify", "model.py", "new.py", "--set", "rows=3").code == 0
    (tmp_path / "new.py").write_text(candidate.replace("rows = 24", "rows = 8"))
    done = run("verify", "model.py", "new.py", "--json", "-")
    (missed,) = [c for c in json.loads(done.out)["checks"] if not c["passed"]]
    assert done.code == 1 and missed["name"] == "arguments"
    assert missed["detail"] == "get_inputs()[0] is float32 [8, 20] where the reference's is float32 [24, 20]"


def test_verify_knows_only_its_own_files_without_a_gpu(run: Run, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("runs the file where there is a GPU")
    (tmp_path / "model.py").write_text(GOOD)
    assert run("optimize", "model.py", "--no-verify").code == 0
    text = (tmp_path / "model_new.py").read_text()
    (tmp_path / "model_new.py").write_text(text.replace("nn.Linear(20, 16)", "nn.Linear(20, 16, bias=True)"))
    done = run("verify", "model.py", "model_new.py")
    assert done.code == 2 and "is not what this version writes" in done.err


# ---- help, completion, and what starts fast


def commands() -> list[list[str]]:
    groups = [[g.name, c.name] for g in cli.app.registered_groups for c in g.typer_instance.registered_commands]
    return [[c.callback.__name__] for c in cli.app.registered_commands if c.callback] + groups


def test_options_are_named_in_lower_case() -> None:
    """typer 0.27 names an option that has no name of its own after its metavar."""
    callbacks = [c.callback for c in cli.app.registered_commands]
    callbacks += [c.callback for g in cli.app.registered_groups for c in g.typer_instance.registered_commands]
    for callback in filter(None, callbacks):
        for name, hint in get_type_hints(callback, include_extras=True).items():
            for option in getattr(hint, "__metadata__", ()):
                if isinstance(option, OptionInfo) and option.metavar:
                    names = (option.default, *option.param_decls)  # typer takes the first name for a default
                    assert any(str(n).startswith("--") for n in names), f"{callback.__name__}: {name}"


def test_help_that_a_newcomer_can_work_from(run: Run) -> None:
    """The way in names every step; each command has examples that call it, with options that it has."""
    way_in = run().out or run("--help").out
    for words in ("doctor", "explain model.py", "optimize model.py", "bench model.py", "--install-completion"):
        assert words in way_in
    for command in commands():
        shown = " ".join(run(*command, "--help").out.split())
        assert "--json" in shown, command
        assert "<bool>" not in shown.replace("--help <bool>", ""), command  # which is typer's own
        examples = shown.partition("Examples: ")[2]
        if command != ["cache", "info"]:
            assert f"fusewright {' '.join(command)}" in examples, command
        for option in re.findall(r"(?<=\s)--?[a-z][\w-]*", examples):
            assert option in shown.partition("Examples: ")[0], f"{option} of an example of {command}"


COMPLETED = {
    "fusewright ver": ["verify"],
    "fusewright cache ": ["info", "tuned", "clear"],
    "fusewright optimize --arch sm_9": ["sm_90a"],
    "fusewright optimize --dtype b": ["bfloat16"],
    "fusewright bench --mode back": ["backward"],
    "fusewright bench --cuda": ["--cuda-graphs"],
}


@pytest.mark.parametrize("line", COMPLETED)
def test_completion(line: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bash asks for it."""
    monkeypatch.setenv("_FUSEWRIGHT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    assert run().out.split() == COMPLETED[line]


def test_completion_scripts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("_FUSEWRIGHT_COMPLETE", f"source_{shell}")
        assert "_FUSEWRIGHT_COMPLETE" in run().out


def test_it_starts_without_torch() -> None:
    """Completion and help answer at once; torch takes seconds."""
    code = "import sys, fusewright.cli; sys.exit('torch' in sys.modules or 'sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_full_disk_behind_standard_output(tmp_path: Path) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full")
    environment = {**os.environ, "FUSEWRIGHT_CACHE_DIR": str(tmp_path)}
    code = "from fusewright.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "cache", "info"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    assert done.returncode == 2 and "No space left" in done.stderr and "internal" not in done.stderr


def test_closed_streams(tmp_path: Path) -> None:
    """As a service has them: text goes nowhere, and nobody can be asked."""
    environment = {**os.environ, "FUSEWRIGHT_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "from fusewright.cli import main; main()", "cache"]
    for arguments, closed, code in (
        (["info", "--json", "out.json"], "<&- >&- 2>&-", 0),
        (["info", "--json", "out.json"], ">&-", 0),
        (["clear"], "<&-", 2),
    ):
        line = ["sh", "-c", f'"$@" {closed}', "sh", *command, *arguments]
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == code and "internal" not in done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["entries"] == 0 and "--yes" in done.stderr


# ---- JSON


def test_json_goes_nowhere_bad(run: Run, tmp_path: Path) -> None:
    """It is refused before the work, and never written over the model."""
    (tmp_path / "model.py").write_text(GOOD)
    for path, says in (("model.py", "the input itself"), ("missing/out.json", "create it"), (".", "folder")):
        done = run("explain", "model.py", "--json", path)
        assert done.code == 2 and says in done.err
    done = run("optimize", "model.py", "-o", "out.py", "--json", "./out.py")
    assert done.code == 2 and "--json" in done.err
    (tmp_path / "bench.json").write_text("{}")
    done = run("report", "model.py", "--measured", "bench.json", "--json", "bench.json")
    assert done.code == 2 and "the input itself" in done.err and (tmp_path / "bench.json").read_text() == "{}"
    (tmp_path / "bench.json").unlink()
    assert (tmp_path / "model.py").read_text() == GOOD and [p.name for p in tmp_path.iterdir()] == ["model.py"]


def test_json_of_optimize_stands_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    done = run("optimize", "model.py", "--no-verify", "--json", "-")
    found = json.loads(done.out)
    assert done.code == 0 and "wrote model_new.py" in done.err
    assert found["out"] == "model_new.py" and (tmp_path / "model_new.py").exists() and found["check"] is None
    assert [k["graph"] for k in found["kernels"]][:2] == ["inference", "forward"]
    assert all(k["registers"] > 0 and k["spill_bytes"] == 0 for k in found["kernels"])


def test_what_a_child_process_prints_is_not_in_the_json(capfd: pytest.CaptureFixture[str]) -> None:
    """As nvcc does, for a candidate that builds with `verbose=True`."""
    output = Output("explain", Path("-"))
    with output.kept():
        subprocess.run(["echo", "from a child"])
    output.result({})
    shown = capfd.readouterr()
    assert shown.err == "from a child\n" and json.loads(shown.out)["command"] == "explain"


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def shown() -> str:
        with Output("explain").loading():
            pass
        return capsys.readouterr().out

    assert shown() == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert "loading torch" in shown()


# ---- bench, doctor, cache


def test_bench_without_a_gpu(run: Run, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (tmp_path / "model.py").write_text(GOOD)
    done = run("bench", "model.py", "--json", "out.json", "--plot", "out.png")
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: bench measures on an NVIDIA GPU") and "fusewright doctor" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["model.py"]


def test_bench_reports(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the options to the request, and from what was measured to the text, the JSON and the picture."""
    pytest.importorskip("matplotlib")
    requests: list[bench.Request] = []
    rates = {"copy_bytes_per_s": 1e12, "fp16_flop_per_s": 1e15}
    mode = bench.Mode(0.1, 100, 100, 10, {"eager": bench.Timed(1.0, 0.9, 1.1, 50, 0.1)}, "eager", None)

    def measure(request: bench.Request, console: object) -> bench.Bench:
        requests.append(request)
        print("printed by the file")
        modes = {"forward": mode}
        return bench.Bench("m", "new.py", "", "", True, False, {"device": "A GPU"}, rates, modes, {}, {}, [])

    monkeypatch.setattr(bench, "require_gpu", lambda: None)
    monkeypatch.setattr(bench, "bench", measure)
    options = "--dtype bfloat16 --set rows=3 --allow-tf32 --mode both --quick --trials 60 --first-call --plot out.svg"
    done = run("bench", "model.py", "new.py", *options.split(), "--json", "-")
    assert done.code == 0 and "A GPU" in done.err and "printed by the file" in done.err
    assert json.loads(done.out)["modes"]["forward"]["timings"]["eager"]["ms"] == 1.0
    assert (tmp_path / "out.svg").exists()
    wanted = (Path("model.py"), Path("new.py"), torch.bfloat16, {"rows": 3}, True, ("both",), True, 60, True, False)
    assert requests == [bench.Request(*wanted)]
    assert run("bench", "model.py", "--trials", "10").code == 2
    assert run("bench", "model.py", "--plot", "out.doc").code == 2 and len(requests) == 1


def test_doctor_exits_by_what_it_finds(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = doctor.Finding("NVRTC", "broken", "all", "gone", "pip install it")
    for ok in (True, False):
        monkeypatch.setattr(doctor, "diagnose", lambda arch, console, ok=ok: doctor.Diagnosis(ok, arch, [finding]))
        done = run("doctor", "--arch", "sm_80", "--json", "-")
        assert done.code == (0 if ok else 1) and json.loads(done.out)["findings"][0]["fix"] == "pip install it"
        assert json.loads(done.out)["arch"] == "sm_80"
    assert run("doctor", "--arch", "sm_1").code == 2


def test_what_was_tuned_is_listed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    assert "nothing was tuned yet" in run("cache", "tuned").out
    lines = ["fused_mm bfloat16 nt 8x8x8: library", "fused_mm bfloat16 nt 16x8x8: gemm_sm90 128x256x64"]
    for line in lines:
        made = json.dumps({"winner": 0, "choice": line, "device": "A GPU"}).encode()
        Cache("tuning").fetch(fingerprint(line=line), lambda made=made: {"choice.json": made})
    Cache("tuning").fetch(fingerprint(line="older"), lambda: {"choice.json": b'{"winner": 0}'})
    done = run("cache", "tuned", "--json", "out.json")
    assert done.out.split("\n") == ["# A GPU", *sorted(lines), ""] and len(parse(done.out)) == 2
    assert json.loads(Path("out.json").read_text())["devices"] == [{"device": "A GPU", "choices": sorted(lines)}]


def test_a_cache_whose_name_is_markup(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("a[/c]", "a[red]c"):
        monkeypatch.setenv("FUSEWRIGHT_CACHE_DIR", name)
        done = run("cache", "info")
        assert done.code == 0 and done.out.startswith(name)


def test_no_home_for_the_cache(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWRIGHT_CACHE_DIR", "~nobody-of-this-name/cache")
    done = run("cache", "info")
    assert done.code == 2 and "no such home folder" in done.err and "FUSEWRIGHT_CACHE_DIR" in done.err


def test_cache(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    for kind in ("cubin", "tuning"):
        Cache(kind).fetch(fingerprint(kind=kind), lambda: {"a": b"12"})
    assert "cubin" in run("cache", "info").out
    refused = run("cache", "clear")  # nobody can be asked
    assert refused.code == 2 and "--yes" in refused.err and "2 entries" in refused.err
    unknown = run("cache", "clear", "--kind", "cubins", "--yes")
    assert unknown.code == 2 and "its kinds are: cubin, simulator, tuning" in unknown.err
    assert run("cache", "clear", "--kind", "simulator", "--yes").code == 0  # nothing is there
    assert "removed 1 entry" in run("cache", "clear", "--kind", "cubin", "--yes").out
    assert [(k.kind, k.entries) for k in stored()] == [("cubin", 0), ("tuning", 1)]
    for answer, code, left in (("n", 2, 1), ("y", 0, 0)):
        terminal = io.StringIO(f"{answer}\n")
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", terminal)
        assert run("cache", "clear").code == code
        assert sum(k.entries for k in stored()) == left
