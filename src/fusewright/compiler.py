"""The way from a graph to an executable: every door goes through here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

import torch

from fusewright.fusion.fuse import fuse
from fusewright.fusion.plan import FusionPlan
from fusewright.ir.graph import Graph
from fusewright.kernels.choose import candidates, contenders
from fusewright.passes import pipeline
from fusewright.passes.format import Capabilities, encode_operands
from fusewright.runtime.autotune import Tuned, title
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import Target
from fusewright.tuned import parse


def plan(
    graph: Graph,
    names: Sequence[str | None] = (),
    capabilities: Capabilities | None = None,
    kept: Collection[int] = (),
) -> FusionPlan:
    """Rewrites and fuses. names: what to call the inputs' buffers.

    capabilities: products may read halves of their operands where that pays; a graph that was cut from a joint one has
    been through that stage already. kept: indices of inputs whose halves are kept from one call to the next.
    """
    graph = pipeline.run(graph)
    if capabilities is not None:
        graph = encode_operands(graph, capabilities, [graph.inputs[i] for i in kept])
    return fuse(graph, names, [graph.inputs[i] for i in kept])


def build(
    graph: Graph,
    target: Target,
    device: torch.device,
    *,
    library: bool,
    capabilities: Capabilities | None = None,
    kept: Collection[int] = (),
    tuned: str = "",
) -> Executable | Tuned:
    """Compiles a graph for `target`; see `plan`. library: measure torch's products against ours at the first call.

    tuned: choices that are made already, as `fusewright.tuned` reads them.
    """
    made = plan(graph, (), capabilities, kept)
    programs = candidates(made, target.chip, library=library, tensor_maps=target.tensor_maps)
    first = {name: found[0] for name, found in programs.items()}
    measured = programs.items() if device.type == "cuda" else ()
    contested = {name: several for name, found in measured if len(several := contenders(found)) > 1}
    choices = parse(tuned)
    named = {r.name: programs[r.name] for r in made.regions if r.name in {c.kernel for c in choices}}
    chosen = [p for found in named.values() for p in found if title(p) in {c.program for c in choices}]
    rivals = chain(chosen, *(several for name, several in contested.items() if name not in named))
    executable = Executable(made, first, target, device, rivals)
    return Tuned(executable, contested, choices, named) if contested or named else executable
