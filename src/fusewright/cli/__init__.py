"""The command line. Thin: every command calls one function of `tools`, which it imports when it is called."""

from fusewright.cli.app import app, main

__all__ = ["app", "main"]
