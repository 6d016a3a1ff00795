"""One class per failure. Each says what was wrong with the user's input and what to do about it.

Every class derives from `FusewrightError`; the command line prints `str(error)` and exits with `error.exit_code`.
"""

from __future__ import annotations


def raised(error: BaseException) -> str:
    """What a user's code raised, in words. Any exception is a failure of that code, exit() in there too; but Ctrl-C
    and the end of a generator, which are not, are raised again."""
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        raise error
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of the error's own __str__
        return type(error).__name__


class FusewrightError(Exception):
    """Base of every error that fusewright raises on purpose."""

    exit_code = 2


class ModelFileError(FusewrightError):
    """The model file cannot be used: not Python, a name is missing, or it raises."""


class EagerFailure(FusewrightError):
    """What is to be compiled already fails in eager mode; its own error is shown."""


class MixedDevices(FusewrightError):
    """The model's tensors live on more than one device."""


class UnexpectedTensor(FusewrightError):
    """A compiled graph got a tensor of another kind, dtype, shape or device than it was compiled for."""


class OverwrittenInBackward(FusewrightError):
    """A backward of the model's own overwrites a tensor, such as a buffer of statistics."""


class FrozenGradients(FusewrightError):
    """Gradients are asked for of a model whose parameters were declared frozen."""


class UnsupportedDtype(FusewrightError):
    """A tensor has a dtype that no kernel family handles."""


class UnknownArch(FusewrightError):
    """`arch` names no chip that fusewright knows."""


class UnknownSetting(FusewrightError):
    """An option or setting name is not one of fusewright's."""


class InvalidSetting(FusewrightError):
    """A setting has a value of another type, or excludes another setting that is given."""


class CannotFuse(FusewrightError):
    """An epilogue holds an operator that does not fit into its product's kernel, or the product has none."""


class CannotReplay(FusewrightError):
    """CUDA graphs were asked for, and an operator does what a graph cannot hold, such as waiting for the device."""


class OutputNotWritable(FusewrightError):
    """The output file cannot be written, or is the input file."""


class CompileError(FusewrightError):
    """The CUDA compiler refused a generated kernel, or warned about lost performance. A bug in fusewright."""

    exit_code = 1


class ToolMissing(FusewrightError):
    """A compiler, package or device that the request needs is not on this machine."""


class WrongResult(FusewrightError):
    """A kernel or plan computed something else than the model."""

    exit_code = 1


class LaunchError(FusewrightError):
    """The driver refused to load or launch a kernel."""

    exit_code = 1


class CannotCapture(FusewrightError):
    """The model is not one graph of tensor operators, so no file can be written for it."""


class NoKernel(FusewrightError):
    """An operator has no kernel, and the library was not allowed."""


class BadMeasurement(FusewrightError):
    """A file of measurements is not what `bench --json` or `verify --json` writes."""


class NotConfirmed(FusewrightError):
    """What cannot be undone was confirmed neither with an option nor by who was asked."""
