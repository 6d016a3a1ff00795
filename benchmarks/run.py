"""All GPU tests, then all benchmarks, in one call; a short table last. A step that fails does not stop the others.

    python benchmarks/run.py [--quick] [--minutes 8] [--only STEP ...] [--copy-to DIR]

--quick: fewer trials and no max-autotune. --copy-to: copies the results and the whole log to DIR, also if the time
runs out. Steps that can are told how many seconds they have, and end by themselves with what they measured.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LEAST_SECONDS = 30.0  # a step is not started with less
ENDING = 20.0  # of a budgeted step: to start, and to end what it has begun


@dataclass(frozen=True)
class Step:
    """seconds: the most that it may take. quick: arguments for --quick. budgeted: it takes --seconds."""

    name: str
    command: tuple[str, ...]
    seconds: float
    quick: tuple[str, ...] = ()
    budgeted: bool = False

    def arguments(self, quick: bool, limit: float) -> list[str]:
        budget = ["--seconds", f"{limit - ENDING:.0f}"] if self.budgeted else []
        return [*self.command, *(self.quick if quick else ()), *budget]


def program(name: str, seconds: float, *quick: str, budgeted: bool = False) -> Step:
    return Step(name, (sys.executable, str(HERE / f"{name}.py")), seconds, quick, budgeted)


PYTEST = ["-m", "pytest", "-m", "gpu", "-n", "8", "--tb=short", "-rfE", "--continue-on-collection-errors"]
STEPS = (
    program("parity", 60),
    Step("tests", (sys.executable, *PYTEST), 200),
    program("gemm_simt", 80, "--trials", "20"),
    program("first_call", 150, "--rounds", "1"),
    program("headline", 300, "--quick", "--trials", "30"),
    program("precision", 60),
    program("accuracy", 120, "--quick", budgeted=True),
    program("epilogues", 75, "--quick", budgeted=True),
    program("sweep", 180, "--quick", budgeted=True),
    program("zoo", 600, "--quick", budgeted=True),
    program("tower", 75, "--quick", budgeted=True),
    program("training", 90, "--quick", budgeted=True),
)


@dataclass(frozen=True)
class Outcome:
    step: str
    verdict: str
    seconds: float
    last: str


def perform(step: Step, quick: bool, seconds: float, log: Path) -> Outcome:
    """Runs one step, its output going to `log` and to the terminal's end."""
    start = time.monotonic()
    limit = min(step.seconds, seconds)
    if limit < LEAST_SECONDS:
        return Outcome(step.name, "no time left", 0.0, "")
    command = step.arguments(quick, limit)
    with log.open("a") as out, tempfile.TemporaryFile("w+") as own:
        process = subprocess.Popen(
            command,
            cwd=HERE.parent,
            stdout=own,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            verdict = "passed" if process.wait(limit) == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            verdict = f"stopped after {limit:.0f} s"
            _stop(process)
        own.seek(0)
        text = own.read()
        out.write(f"\n===== {step.name}: {' '.join(command)}: {verdict}\n{text}")
    lines = [line for line in text.splitlines() if line.strip()]
    return Outcome(step.name, verdict, time.monotonic() - start, "\n".join(lines))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and the workers that it started, which share its session. pytest reports what it knows on SIGINT."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shown(outcome: Outcome, lines: int) -> str:
    """The end of a step's output, the lines that tell most."""
    noise = re.compile(r".*pytest.benchmark|^\s*(?:warner|warnings\.warn|W\d{4}|\[W)")
    kept = [line for line in outcome.last.splitlines() if not noise.match(line)]
    return "\n".join(line[:240] for line in kept[-lines:])


def copy(log: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for path in (*RESULTS.glob("*.json"), log):
        shutil.copy2(path, to / path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], metavar="STEP")
    parser.add_argument("--tests", nargs="+", default=["tests"], metavar="PATH", help="what the step `tests` runs")
    parser.add_argument("--copy-to", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        for step in STEPS:
            if options.only and step.name not in options.only:
                continue
            if step.name == "tests":
                step = replace(step, command=(*step.command, *options.tests))
            outcomes.append(perform(step, options.quick, deadline - time.monotonic(), log))
            if options.copy_to:
                copy(log, options.copy_to)
            print(f"----- {step.name}\n{shown(outcomes[-1], 40)}", flush=True)
    print("\n" + "\n".join(f"{o.step:12} {o.verdict:24} {o.seconds:6.0f} s" for o in outcomes))
    return 0 if all(o.verdict == "passed" for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
