"""What happens on a bad day, with real processes and real signals: crowds, kills, full disks, Ctrl-C, odd names."""

from __future__ import annotations

import ast
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fusewright
from fusewright import cli
from fusewright.errors import OutputNotWritable
from fusewright.runtime import autotune, nvrtc
from fusewright.runtime.cache import Cache, fingerprint
from fusewright.tools.files import write
from model_files import model

FORK = multiprocessing.get_context("fork")
SOURCES = Path(fusewright.__file__).parent
MODEL = model("    def forward(self, x):\n        return torch.relu(x) * 2\n")  # little to compile and to simulate


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# ---- the cache

PROCESSES, KEYS = 64, 8

USER = f"""
import os, sys, time
from fusewright.runtime.cache import Cache, fingerprint

assert "torch" not in sys.modules, "the cache alone needs no torch"
folder = sys.argv[1]
open(os.path.join(folder, "ready", str(os.getpid())), "w").close()
while not os.path.exists(os.path.join(folder, "go")):
    time.sleep(0.01)

def contents(i):
    return {{"kernel.cubin": bytes([i]) * 100_000, "compile.log": b"log %d" % i}}

def build(i):
    with open(os.path.join(folder, "builds"), "a") as log:
        log.write(f"{{i}}\\n")
    return contents(i)

for i in range({KEYS}):
    assert Cache("cubin").fetch(fingerprint(number=i), lambda: build(i)).files == contents(i)
"""


def test_64_processes_share_a_cache(tmp_path: Path) -> None:
    """Each entry is built once, and everybody gets it whole."""
    (tmp_path / "ready").mkdir()
    environment = {**os.environ, "FUSEWRIGHT_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", USER, str(tmp_path)]
    users = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    wait_for(lambda: len(os.listdir(tmp_path / "ready")) == PROCESSES or any(u.poll() for u in users))
    (tmp_path / "go").touch()
    complaints = [user.communicate(timeout=120)[1] for user in users]
    assert complaints == [""] * PROCESSES and [user.returncode for user in users] == [0] * PROCESSES
    builds = Counter((tmp_path / "builds").read_text().split())
    assert builds == {str(i): 1 for i in range(KEYS)}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """kill -9 while entries are written: what is there is whole, what is not is built again, and no lock is left."""
    keys = [fingerprint(number=i) for i in range(300)]

    def contents(key: str) -> dict[str, bytes]:
        return {f"file {i}": key.encode() * 2000 for i in range(4)}

    def writer(seed: int) -> None:
        for key in random.Random(seed).sample(keys, len(keys)):
            Cache("cubin", tmp_path).fetch(key, lambda key=key: contents(key))  # type: ignore[misc]

    kills = random.Random(0)
    for generation in range(3):
        processes = [FORK.Process(target=writer, args=(10 * generation + i,)) for i in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            time.sleep(kills.uniform(0.005, 0.05))
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        for process in processes:
            process.join(30)
        assert -signal.SIGKILL in [p.exitcode for p in processes]
    left = list((tmp_path / "cubin").glob("*.partial"))
    found = [Cache("cubin", tmp_path).fetch(key, lambda key=key: contents(key)) for key in keys]  # type: ignore[misc]
    assert all(entry.files == contents(key) and entry.folder for key, entry in zip(keys, found, strict=True))
    assert not any(path.exists() for path in left)


@contextmanager
def small_disk(folder: Path, size: str = "64k") -> Iterator[None]:
    """A file system of its own that is soon full."""
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    """The cache goes without, and an output file is refused; nothing half-written is left."""
    with small_disk(disk := tmp_path / "disk"):
        write(disk / "out.py", "before")
        cache = Cache("cubin", disk / "cache")
        files = {"a": b"1" * 40_000, "b": b"2" * 40_000}
        with pytest.warns(RuntimeWarning, match="No space left"):
            entry = cache.fetch(fingerprint(a=1), lambda: files)
        assert entry.files == files and entry.folder is None
        with pytest.raises(OutputNotWritable, match=r"out\.py cannot be written \(No space left on device\)"):
            write(disk / "out.py", "x" * 100_000)
        assert (disk / "out.py").read_text() == "before"
        assert sorted(p.name for p in disk.rglob("*") if p.suffix != ".lock") == ["cache", "cubin", "out.py"]


def test_a_write_that_fails_in_its_middle(tmp_path: Path) -> None:
    """The same with a limit on the size of files, which every machine has."""
    write(tmp_path / "out.py", "before")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(OutputNotWritable, match="File too large"):
            write(tmp_path / "out.py", "x" * 100_000)

    process = FORK.Process(target=limited)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.py"] and (tmp_path / "out.py").read_text() == "before"


# ---- what a cached result depends on


def test_another_machine_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cubins depend on the chip and the compiler; what was tuned on the GPU, the driver and torch as well."""
    assert nvrtc._key("source", "sm_80") != nvrtc._key("source", "sm_90a")
    before = nvrtc._key("source", "sm_80")
    monkeypatch.setattr(nvrtc, "_toolkit", lambda: "another compiler")
    assert nvrtc._key("source", "sm_80") != before

    region = SimpleNamespace(rows=(64,), columns=32, gemm=None)
    monkeypatch.setattr(autotune, "Region", SimpleNamespace)
    program: Any = SimpleNamespace(family="a", launches=(), region=region)
    tuned = autotune.Tuned(SimpleNamespace(device="cuda:0"), {})  # type: ignore[arg-type]
    monkeypatch.setattr(autotune.driver, "version", lambda: 13000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    keys = [tuned._key([program], {})]
    assert tuned._key([program], {}) == keys[0]
    changes: list[tuple[object, str, object]] = [
        (autotune.driver, "version", lambda: 13010),
        (torch.cuda, "get_device_name", lambda _: "NVIDIA H100"),
        (torch, "__version__", "2.12.0"),
        (autotune, "tf32_allowed", lambda: True),
    ]
    for owner, name, value in changes:
        monkeypatch.setattr(owner, name, value)
        keys.append(tuned._key([program], {}))
    assert len(set(keys)) == len(keys)


# ---- names


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fusewright", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Spaces, other alphabets, markup, quotes: in the model's name, in the written file's, and in the folder's."""
    folder = tmp_path / "папка [bold] с моделью"
    folder.mkdir()
    monkeypatch.chdir(folder)
    name, new = "模型 v1 [red]'\"(копия).py", "новая модель.py"
    Path(name).write_text(MODEL)
    assert run(monkeypatch, "explain", name, "--json", "объяснение.json") == 0
    assert run(monkeypatch, "optimize", name, "-o", new) == 0
    assert run(monkeypatch, "verify", name, new) == 0
    shown = capsys.readouterr()
    assert f"wrote {new}" in shown.out and name in shown.out and shown.err == ""
    assert sorted(p.name for p in folder.iterdir()) == sorted([name, new, "объяснение.json"])
    assert name in Path(new).read_text(encoding="utf-8")


def test_a_terminal_without_the_letters(tmp_path: Path) -> None:
    """A character that standard output cannot encode is replaced, and nothing breaks."""
    environment = {**os.environ, "FUSEWRIGHT_CACHE_DIR": str(tmp_path / "кэш"), "PYTHONIOENCODING": "ascii"}
    code = "from fusewright.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "cache", "info"], env=environment, capture_output=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == b"" and b"???" in done.stdout


# ---- Ctrl-C

INTERRUPTED = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from fusewright import cli
from fusewright.capture import model_file
from fusewright.runtime import nvrtc
from fusewright.runtime.cache import Cache
from fusewright.tools import optimize, plan_check

def pause(owner, name, seconds):
    original = getattr(owner, name)
    def wrapped(*arguments, **options):
        setattr(owner, name, original)
        print(f"@at {name}", flush=True)
        time.sleep(seconds)
        return original(*arguments, **options)
    setattr(owner, name, wrapped)

def attempt(*options):
    sys.argv = ["fusewright", "optimize", "model.py", "--arch", "sm_80", *options]
    try:
        cli.main()
    except SystemExit as stop:
        print("@exit", stop.code, *sorted(p.name for p in Path(".").iterdir()), flush=True)
    # What still compiles ends, and the next attempt has a cache of its own: it is interrupted in what it does itself.
    nvrtc._COMPILERS.shutdown()
    nvrtc._COMPILERS = ThreadPoolExecutor(2)
    os.environ["FUSEWRIGHT_CACHE_DIR"] += "+"

pause(optimize, "load_and_capture", 30)
attempt()
pause(nvrtc, "_compile", 0.3)  # in a thread, which Python lets end
attempt()
pause(Cache, "_store", 0.3)
attempt()
pause(plan_check, "check", 30)
attempt()
pause(Path, "replace", 30)
attempt("--no-verify")
attempt("--no-verify")
"""


def test_interrupted_at_any_moment(tmp_path: Path) -> None:
    """SIGINT while the model is traced, compiled, stored, checked and written: exit code 130, and nothing is left."""
    (tmp_path / "model.py").write_text(MODEL)
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        env={**os.environ, "FUSEWRIGHT_CACHE_DIR": str(tmp_path.parent / "cache of the interrupted")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    moments, exits = [], []
    assert child.stdout
    for line in child.stdout:
        if line.startswith("@at"):
            moments.append(line.split()[1])
            time.sleep(0.05)
            child.send_signal(signal.SIGINT)
        elif line.startswith("@exit"):
            exits.append(line.split()[1:])
        assert "Traceback" not in line
    assert child.wait(60) == 0
    assert moments == ["load_and_capture", "_compile", "_store", "check", "replace"]
    assert exits[:-1] == [["130", "model.py"]] * len(moments)
    assert exits[-1] == ["0", "model.py", "model_new.py"]
    assert not list(tmp_path.parent.glob("cache of the interrupted*/**/*.partial"))


# ---- trust


def test_a_model_file_runs_alone(tmp_path: Path) -> None:
    """The command runs the file that is named: nothing beside it is imported, and nothing is left beside it."""
    script = shutil.which("fusewright", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if script is None:
        pytest.skip("the command is not installed")
    (tmp_path / "model.py").write_text(MODEL)
    trap = f"open({str(tmp_path / 'sprung')!r}, 'a').write(__name__)\n"
    for name in (
        "torch",
        "typing",
        "sitecustomize",
        "usercustomize",
        "conftest",
        "helper",
        "setup",
        "__init__",
        "rich",
    ):
        (tmp_path / f"{name}.py").write_text(trap)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = subprocess.run([script, "explain", "model.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# Running a model file is what `model_file` is for; `size` converts numbers; `doctor` imports by names of its own.
ALLOWED = {
    ("capture/model_file.py", "exec"),
    ("capture/model_file.py", "compile"),
    ("ir/size.py", "sympify"),
    ("tools/doctor.py", "import_module"),
}
CALLS = {"eval", "exec", "compile", "__import__", "import_module", "run_path", "run_module", "system", "popen",
         "sympify", "parse_expr", "lambdify"}  # fmt: skip
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "code", "codeop"}
HARMLESS_OWNERS = {"re", "torch", "compiler", "optimizer", "fusewright", "doors"}  # re.compile, torch.compile


def test_no_pickle_and_no_eval_of_text() -> None:
    found = set()
    for path in sorted(SOURCES.rglob("*.py")):
        where = path.relative_to(SOURCES).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            found |= {(where, name) for name in suspicious(node)}
    assert found == ALLOWED


def suspicious(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom):
        yield from [node.module] if (node.module or "").split(".")[0] in MODULES else []
    elif isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name) and function.id in CALLS:
            yield function.id
        elif isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if function.attr in CALLS and owner not in HARMLESS_OWNERS:
                yield function.attr
            if (owner, function.attr) == ("torch", "load"):
                yield "torch.load"
        if any(k.arg == "shell" for k in node.keywords):
            yield "shell"
