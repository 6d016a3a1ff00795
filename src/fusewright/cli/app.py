"""The commands by name, their examples, and the entry point."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fusewright import __version__
from fusewright.cli import machine, models
from fusewright.cli.options import flag
from fusewright.errors import FusewrightError


def _lines(*lines: str) -> str:
    """An epilog: typer joins lines, and keeps paragraphs apart."""
    return "\n\n".join(lines)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog=_lines(
        "A way in:",
        "fusewright doctor — what this machine can do, and what mends what it cannot",
        "fusewright explain model.py — what would be fused, and what not and why",
        "fusewright optimize model.py — writes model_new.py, checked",
        "fusewright bench model.py — on a GPU: how fast, beside torch.compile",
        "fusewright COMMAND --help has examples of each. Tab completion: fusewright --install-completion",
    ),
)
cache = typer.Typer(no_args_is_help=True, help="What fusewright keeps on disk: compiled kernels and tuning results.")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, flag("--version", help="Print the version and stop.")] = False) -> None:
    """Turns a PyTorch model into fused CUDA kernels that its owner can read, check and keep."""
    if version:
        typer.echo(f"fusewright {__version__}")
        raise typer.Exit


app.command(
    epilog=_lines(
        "Examples:",
        "fusewright optimize model.py — writes model_new.py beside it",
        "fusewright optimize model.py -o fast.py --arch sm_80 --dtype bfloat16",
        "fusewright optimize model.py --set batch_size=64 --allow-library",
    )
)(models.optimize)
app.command(
    epilog=_lines(
        "Examples:",
        "fusewright explain model.py",
        "fusewright explain model.py --arch sm_80 --json - | jq .launches_after",
    )
)(models.explain)
app.command(
    epilog=_lines(
        "Examples:",
        "fusewright report model.py -o report.html",
        "fusewright report model.py --measured bench.json --measured verify.json",
    )
)(models.report)
app.command(
    epilog=_lines(
        "Examples:",
        "fusewright verify model.py model_new.py",
        "fusewright verify model.py by_hand.py --dtype bfloat16 --json report.json",
    )
)(models.verify)
app.command(
    epilog=_lines(
        "Examples:",
        "fusewright bench model.py --quick",
        "fusewright bench model.py model_new.py --dtype bfloat16 --json bench.json --plot roofline.png",
        "fusewright bench model.py --mode forward --set batch_size=16 --cuda-graphs --first-call",
    )
)(models.bench)
app.command(
    epilog=_lines(
        "Examples:",
        "fusewright doctor",
        "fusewright doctor --arch sm_80 --json -",
    )
)(machine.doctor)
cache.command(
    "info",
    epilog=_lines(
        "The folder is ~/.cache/fusewright, or what FUSEWRIGHT_CACHE_DIR names.",
        "Examples:",
        "fusewright cache info",
        "fusewright cache info --json - | jq .bytes",
    ),
)(machine.cache_info)
cache.command(
    "tuned",
    epilog=_lines(
        "Examples:",
        "fusewright cache tuned",
        "then, in Python: fusewright.compile(model, tuned='fused_mm bfloat16 nt 64x64x64: gemm_sm90 128x128x64')",
    ),
)(machine.cache_tuned)
cache.command(
    "clear",
    epilog=_lines("Examples:", "fusewright cache clear", "fusewright cache clear --kind tuning --yes"),
)(machine.cache_clear)
app.add_typer(cache, name="cache")


def main() -> None:
    """The entry point: errors become one message on standard error and an exit code, never a traceback."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows a question mark
    try:
        app()
    except FusewrightError as error:
        _fail(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            sys.stdout = io.StringIO()  # what is left of the text cannot be written at the end either
            _fail(f"error: not all could be written ({error.strerror}); make room, or write to another place", 2)
        if os.environ.get("FUSEWRIGHT_TRACEBACK") == "1":
            raise
        what = f"{type(error).__name__}: {error}".strip()
        _fail(f"internal error: {what}\nPlease report it, with what FUSEWRIGHT_TRACEBACK=1 shows.", 1)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)
    sys.exit(code)
