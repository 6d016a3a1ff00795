"""What `freeze` adds to a written file: fp16 halves of float32 parameters, kept from one call to the next.

Calls leave out the split of the parameters. In float32 the products are those of inference, so results are the same
bits. Where TF32 is allowed inference may round a parameter in registers; products from halves take the place of these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from torch import nn

from fusewright.capture.model import CapturedModel
from fusewright.chip import Chip
from fusewright.fusion.plan import Encode, Encoded, FusionPlan, Region, Step, View
from fusewright.ir.size import evaluate_typical
from fusewright.kernels.choose import candidates
from fusewright.kernels.split_f16 import encode_program
from fusewright.tools.host import result_type, tensor_inputs
from fusewright.tools.model_source import ModelSource
from fusewright.tools.planned import Planned

# What the class gets. A model that has one of these already keeps its own, and gets none.
_NAMES, _OVERRIDDEN = ("freeze", "thaw", "_halves"), ("_apply", "_load_from_state_dict")


def graphs(
    inference: Planned, captured: CapturedModel, model: nn.Module, source: ModelSource, chip: Chip
) -> tuple[Planned, ...]:
    """Two more graphs, where calls split parameters: `split`, which returns their halves, and `frozen`, inference that
    takes those after its other arguments."""
    if any(hasattr(model, n) for n in _NAMES) or any(n in vars(type(model)) for n in _OVERRIDDEN):
        return ()
    parameters = {
        name
        for name, expression in zip(inference.plan.inputs, captured.arguments, strict=True)
        if isinstance(name, str) and re.split(r"\W", expression or "")[0] == source.arguments[0]
    }
    whole = _by_planes(inference, parameters, chip)
    kept: list[Encode] = []
    steps: list[Step] = []
    programs = dict(whole.programs)
    for step in whole.plan.steps:
        if not isinstance(step, Encode):
            steps.append(step)
            continue
        left = []
        for matrix, result in zip(step.matrices, step.results, strict=True):
            if matrix.buffer in parameters:
                kept.append(replace(step, name=f"{step.name}_{result.buffer}", matrices=(matrix,), results=(result,)))
            else:
                left.append((matrix, result))
        if left:
            matrices, results = zip(*left, strict=True)
            rest = replace(step, matrices=matrices, results=results)
            steps.append(rest)
            programs[step.name] = encode_program(rest, chip)
    if not kept:
        return ()
    split = _split(kept, whole, chip)
    halves = [name for step in kept for name in step.writes()]
    taking = replace(whole.plan, inputs=(*whole.plan.inputs, *halves), steps=tuple(steps))
    return split, replace(whole, name="frozen", plan=taking, programs=programs)


def _split(kept: Sequence[Encode], whole: Planned, chip: Chip) -> Planned:
    buffers = [whole.plan.buffers[name] for step in kept for name in step.writes()]
    plan = replace(
        whole.plan,
        inputs=tuple(dict.fromkeys(name for step in kept for name in step.reads())),
        outputs=tuple(View(b.name, b.shape, b.stride) for b in buffers),
        steps=tuple(kept),
        refusals=(),
    )
    return replace(whole, name="split", plan=plan, programs={s.name: encode_program(s, chip) for s in kept})


def _by_planes(inference: Planned, parameters: Set[str], chip: Chip) -> Planned:
    """Inference with planes of the parameters that its products round in registers: where nothing has to be split in
    each call, products from planes are faster."""
    plan = inference.plan
    pairs = [pair for e in plan.encodes for pair in zip(e.matrices, e.results, strict=True)]
    without = {result.buffer for matrix, result in pairs if matrix.buffer in parameters and not result.halves.planes}
    if not without:
        return inference
    planes = max(result.halves.planes for _, result in pairs)
    products = [r.gemm.encoded for r in plan.regions if r.gemm and r.gemm.encoded]
    across = {e.buffer for a, b in products for e, left in ((a, True), (b, False)) if e.transposed == left}

    def filled(encoded: Encoded) -> Encoded:
        if encoded.buffer not in without:
            return encoded
        halves = replace(encoded.halves, planes=planes, by_line=encoded.buffer not in across)
        return replace(encoded, halves=halves)

    def step(old: Step) -> Step:
        if isinstance(old, Encode):
            return replace(old, results=tuple(map(filled, old.results)))
        if not isinstance(old, Region) or old.gemm is None or old.gemm.encoded is None:
            return old
        a, b = old.gemm.encoded
        return replace(old, gemm=replace(old.gemm, encoded=(filled(a), filled(b))))

    words = {r.buffer: filled(r).halves.words for _, r in pairs if r.buffer in without}
    buffers = {name: replace(b, shape=(words[name],)) if name in words else b for name, b in plan.buffers.items()}
    changed = replace(plan, buffers=buffers, steps=tuple(map(step, plan.steps)))
    found = candidates(changed, chip, library=False, tensor_maps=True)
    programs = {
        name: program if program.region in changed.steps else found[name][0]
        for name, program in inference.programs.items()
    }
    return replace(inference, plan=changed, programs=programs)


def kept(added: Sequence[Planned]) -> int:
    """Bytes that `freeze` keeps."""
    split = added[0].plan
    return int(sum(evaluate_typical(split.buffers[o.buffer].bytes) for o in split.outputs if isinstance(o, View)))


def autograd(plan: FusionPlan) -> str:
    """The C++ that refuses gradients, then runs `frozen`. plan: its own."""
    inputs = tensor_inputs(plan)
    return (
        (Path(__file__).parent / "emitted_frozen.hpp")
        .read_text()
        .format(
            type=result_type(sum(isinstance(o, View) for o in plan.outputs), False),
            parameters=", ".join(f"const at::Tensor& {b.name}" for b in inputs),
            names=", ".join(b.name for b in inputs),
            any_grad=" || ".join(f"{b.name}.requires_grad()" for b in inputs if b.dtype.is_floating_point),
        )
    )


def methods(
    inference: Planned, added: Sequence[Planned], captured: CapturedModel, space: str, source: ModelSource
) -> str:
    """The text of the methods, which follows `forward`; empty where nothing is kept."""
    if not added:
        return ""
    split = added[0].plan
    names = [b.name for b in tensor_inputs(added[1].plan)]
    expressions = dict(zip(names, (e for e in captured.arguments if e is not None), strict=False))
    this = source.arguments[0]
    call = f"torch.ops.{space}.split({', '.join(expressions[b.name] for b in tensor_inputs(split))})"
    same = all(added[1].programs[region.name] is inference.programs[region.name] for region in inference.plan.regions)
    text = _METHODS.format(
        this=this,
        call=call if len(split.outputs) > 1 else f"({call},)",
        results="stay the same, bit for bit" if same else "keep TF32's precision",
    )
    unit = source.indent.removeprefix(source.outer)

    def indented(line: str) -> str:
        depth = (len(line) - len(line.lstrip(" "))) // 4
        return f"{source.outer}{unit * depth}{line.lstrip(' ')}" if line else ""

    return "\n" + "".join(f"{indented(line)}\n" for line in text.strip("\n").split("\n"))


_METHODS = '''
# Between `freeze` and `thaw`: the fp16 halves of float32 parameters.
_halves = ()

def freeze({this}):
    """For inference: splits the parameters into fp16 halves now, and no more in each call. Returns the model.

    Prints the memory that the halves take. Results {results}. Until `thaw`, a call cannot have
    gradients, and the parameters must not change. Moving the model, or loading a state dict into it, thaws it.
    """
    with torch.no_grad():
        {this}._halves = {call}
    torch.cuda.synchronize({this}._halves[0].device)  # whichever stream reads them
    size = sum(halves.numel() * halves.element_size() for halves in {this}._halves)
    print(f"freeze: keeps {{size:,}} bytes on the GPU, beside the parameters")
    return {this}

def thaw({this}):
    """Forgets what `freeze` keeps: the parameters may change, and calls have gradients. Returns the model."""
    {this}._halves = ()
    return {this}

def _apply({this}, *args, **kwargs):
    {this}.thaw()  # the parameters are about to be replaced
    return super()._apply(*args, **kwargs)

def _load_from_state_dict({this}, *args, **kwargs):
    {this}.thaw()
    return super()._load_from_state_dict(*args, **kwargs)
'''
