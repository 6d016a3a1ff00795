"""Whether a model computes something else in evaluation than in training: a written file has one of the two."""

from __future__ import annotations

import ast
from collections.abc import Mapping

import torch
from torch import nn

from fusewright.capture.model import undecorated
from fusewright.capture.model_file import SEED, Instance, ModelFile
from fusewright.errors import CannotCapture
from fusewright.tools.comparison import same_results
from fusewright.tools.small import small


def check_modes(file: ModelFile, model: nn.Module, settings: Mapping[str, object], dtype: torch.dtype | None) -> None:
    """Raises CannotCapture if the results of the two modes differ, at small sizes, from one seed.

    model: the file's. It is only run if it, or a module of torch's in it, asks for the mode.
    """
    if not _asks(file, model):
        return
    found = []
    for training in (True, False):
        reduced = small(file, settings, dtype)
        torch.manual_seed(SEED)
        found.append(file.run(Instance(reduced.model.train(training), reduced.inputs)))
    if not same_results(*found):
        raise CannotCapture(
            f"{file.place_of_forward()}: the model computes something else in training mode than after .eval(), and a "
            "written file has one of the two; let forward not depend on the mode, or run the model in process, where "
            'each is compiled: torch.compile(model, backend="fusewright")'
        )


def _asks(file: ModelFile, model: nn.Module) -> bool:
    if any(isinstance(node, ast.Attribute) and node.attr == "training" for node in ast.walk(file.tree)):
        return True
    # What torch wrote, which the tree does not show, a class of the file may inherit.
    codes = [getattr(undecorated(type(m).forward), "__code__", None) for m in model.modules()]
    return any(code is not None and "training" in code.co_names for code in codes)
