"""Door 1: `torch.compile(model, backend="fusewright")`, through Dynamo and AOTAutograd."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._decomp import get_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import default_partition

from fusewright import compiler
from fusewright.capture.arguments import bringing
from fusewright.capture.direct import Direct
from fusewright.capture.fx import RESULTS, from_fx
from fusewright.capture.joint import partition_joint
from fusewright.capture.metadata import reads_numbers
from fusewright.chip import DEFAULT_ARCH, chip_for
from fusewright.errors import CannotReplay, FrozenGradients, MixedDevices
from fusewright.fusion.plan import FusionPlan
from fusewright.ir.size import evaluate_typical
from fusewright.kernels.choose import capabilities
from fusewright.passes.format import Capabilities
from fusewright.runtime.autotune import executable_of
from fusewright.runtime.graphs import Replayed
from fusewright.runtime.target import BACKGROUND, GpuTarget, SimulatorTarget, Target, load_toolkit
from fusewright.settings import Settings, tf32_allowed

log = logging.getLogger("fusewright")

# `torch.compile` imports this module, and Dynamo then takes a second before the first kernel is asked for. Only where
# CUDA is in use already: whoever compiles for a CPU needs none of it.
if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
    BACKGROUND.submit(load_toolkit)

_announced: set[str] = set()

_FROZEN = (
    "freeze keeps what is made of the parameters from one call to the next, so the call cannot have gradients: "
    "call the model under torch.no_grad(), or compile it without freeze to train it"
)

_READS = "a graph computes with a number or a size that a tensor's values give, as .item() and nonzero() do, {}"


def fusewright(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    check: Callable[[FusionPlan, bool], None] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """The Dynamo backend. options: the fields of `Settings`. check: sees each plan, and whether it is a backward's.

    CPU tensors go to Inductor unless `simulate` is set. Raises UnknownSetting, InvalidSetting, UnknownArch,
    MixedDevices, and FrozenGradients where `freeze` is set and gradients are asked for.
    """
    settings = Settings.of(options)
    devices = {t.device for t in _tensors(module, example_inputs) if t.dim() or t.device.type != "cpu"}
    if len(devices) > 1:
        raise MixedDevices(
            f"the model's tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device"
        )
    device = devices.pop() if devices else torch.device("cpu")
    if device.type == "cpu" and not settings.simulate:
        # Of the three doors torch.compile alone takes settings as `options`.
        asked = "simulate=True, of torch.compile options={'simulate': True},"
        _announce(f"CPU tensors: compiled by Inductor ({asked} runs fusewright's kernels)")
        inductor = torch._dynamo.lookup_backend("inductor")
        return cast("Callable[..., Any]", inductor(module, list(example_inputs)))
    return _Compilation.of(settings, device, check).compiled(module, example_inputs)


@dataclass(frozen=True)
class _Compilation:
    """What AOTAutograd calls back for the graphs that it makes of one of Dynamo's: one to split, two or one to compile.

    library: cuBLAS competes. products: what float32 products gain from halves on the target.
    """

    settings: Settings
    device: torch.device
    target: Target
    library: bool
    products: Capabilities | None
    check: Callable[[FusionPlan, bool], None] | None
    direct: Direct

    @classmethod
    def of(
        cls, settings: Settings, device: torch.device, check: Callable[[FusionPlan, bool], None] | None
    ) -> _Compilation:
        target = target_for(device, settings)
        target.prepare()
        library = settings.library and not settings.simulate
        products = capabilities(target.chip, library=library, tensor_maps=target.tensor_maps, tf32=tf32_allowed())
        return cls(settings, device, target, library, products, check, Direct())

    def compiled(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiling = aot_autograd(
            fw_compiler=self.compile,
            bw_compiler=self.compile,
            inference_compiler=self.compile,
            partition_fn=self.split,
            decompositions=decompositions(),
        )
        # A backward's kernels compile beside those of its forward; in the simulator too many are never run.
        with functorch_config.patch(force_non_lazy_backward_lowering=not self.settings.simulate):
            wrapped: Callable[..., Any] = compiling(module, example_inputs)
        return self.direct.around(wrapped, module, example_inputs)

    def split(self, joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        """A joint graph into forward and backward."""
        if self.settings.freeze:
            raise FrozenGradients(_FROZEN)
        if reads_numbers(joint):
            return default_partition(joint, inputs, **options)
        return partition_joint(joint, inputs, capabilities=self.products, **options)

    def compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A graph of inference, of forward or of backward."""
        if reads_numbers(graph):
            return self._as_it_is(graph)
        backward, cuda_graphs = is_backward(graph), self.settings.cuda_graphs
        # What a joint graph's products read was decided before it was split.
        chosen = None if RESULTS in graph.meta or backward else self.products
        kept = stationary(graph) if self.settings.freeze else ()
        built = compiler.build(
            from_fx(graph),
            self.target,
            self.device,
            library=self.library,
            capabilities=chosen,
            kept=kept,
            tuned=self.settings.tuned or "",
        )
        plan, results = executable_of(built).plan, graph.meta.get(RESULTS)
        _tell_kept(plan)
        if self.check is not None:
            self.check(plan, backward)
        replayed = Replayed.of(built, stationary(graph), results, kept) if cuda_graphs else built
        donate_nothing()
        run = bringing(replayed, graph, self.device, backward=backward)
        if backward:
            self.direct.add_backward(run, graph)
        else:
            self.direct.add_forward(run, results)
        boxed: Callable[..., Any] = make_boxed_func(run)
        return boxed

    def _as_it_is(self, graph: fx.GraphModule) -> Callable[..., Any]:
        """By ATen's operators."""
        if self.settings.cuda_graphs:
            raise CannotReplay(_READS.format("which a CUDA graph cannot hold: take that out, or leave cuda_graphs off"))
        _announce(_READS.format("so it runs as ATen's operators"))
        donate_nothing()
        return cast("Callable[..., Any]", make_boxed_func(graph.forward))


def target_for(device: torch.device, settings: Settings) -> Target:
    if settings.simulate:
        return SimulatorTarget(chip_for(settings.arch or DEFAULT_ARCH), settings.schedules)
    return GpuTarget.of(device)


def is_backward(graph: fx.GraphModule) -> bool:
    return any("tangents" in p.name for p in graph.graph.find_nodes(op="placeholder"))


def donate_nothing() -> None:
    """Tells AOTAutograd, which is compiling a forward, that its backward overwrites nothing: it may run twice."""
    context = torch._guards.TracingContext.try_get()
    if context and context.fw_metadata:
        context.fw_metadata.bw_donated_idxs = []


def stationary(graph: fx.GraphModule) -> list[int]:
    """The arguments that lie still: parameters and buffers, and in a backward what forward saved."""
    if is_backward(graph):
        names = [p.name for p in graph.graph.find_nodes(op="placeholder")]
        return [i for i, name in enumerate(names) if "tangents" not in name]
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context else None
    return list(metadata.static_input_indices or ()) if metadata else []


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operators that torch takes apart before we see them, because the table has rows for their parts only."""
    aten = torch.ops.aten
    return get_decompositions(
        [
            aten.log_sigmoid_forward,
            aten.log_sigmoid_backward,
            aten.mse_loss,
            aten.mse_loss_backward,
            aten.smooth_l1_loss,
            aten.huber_loss,
            aten.huber_loss_backward,
            aten.glu,
            aten.glu_backward,
            aten._prelu_kernel_backward,
            aten.rrelu_with_noise,
            aten.soft_margin_loss,
            aten.soft_margin_loss_backward,
            aten.binary_cross_entropy,
            aten.binary_cross_entropy_backward,
            aten.binary_cross_entropy_with_logits,
            aten.mvlgamma,
            aten.addmv,
            aten.dot,
        ]
    )


def _tensors(module: fx.GraphModule, example_inputs: Sequence[Any]) -> list[torch.Tensor]:
    values = [*example_inputs, *module.parameters(), *module.buffers()]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _tell_kept(plan: FusionPlan) -> None:
    kept = [r.halves for e in plan.encodes if e.kept for r in e.results]
    if kept:
        size = sum(int(evaluate_typical(h.words)) * 4 for h in kept)
        log.warning("freeze: keeps %d bytes on the device, for %d parameters, beside the parameters", size, len(kept))


def _announce(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        log.warning(message)
