"""fusewright turns a PyTorch model into fused CUDA kernels that its owner can read, check and keep."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewright.doors import compile, linear, thaw

__version__ = "0.1.0"

__all__ = ["__version__", "compile", "linear", "thaw"]


def __getattr__(name: str) -> Any:
    """The doors, imported when they are first used: the command line starts without torch."""
    if name in ("compile", "linear", "thaw"):
        from fusewright import doors

        globals()[name] = getattr(doors, name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
