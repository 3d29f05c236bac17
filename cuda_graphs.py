"""Training passes as CUDA graphs: the GPU replays recorded kernels, and does not wait for Python to
launch each of them.

Launching a layer's kernels takes the host some 3 ms per pass, far longer than a small layer's
kernels run. Shapes do not change during a run, so a pass can be recorded once (Nguyen et al.,
"Accelerating PyTorch with CUDA Graphs", 2021).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

EAGER_CALLS = 3  # before the capture: they compile, load and autotune the kernels


# Graphs are never replayed at the same time and share one memory pool: what one frees the next may
# use.
_instances: weakref.WeakSet[GraphedForward] = weakref.WeakSet()


class GraphedForward:
    """A model's `forward(**inputs) -> mapping with tensors`, replayed as CUDA graphs, with results
    equal to the bit.

    A model that trains returns a mapping with a scalar "loss". Its backward pass is a second graph;
    gradients reach the parameters through autograd as usual, so that hooks on them run. Only calls
    with gradients enabled are replayed; the others (evaluation) run eagerly. Every call of a frozen
    model is replayed. options: further inputs of every call, replayed or not.

    The first EAGER_CALLS calls run eagerly. After the capture, a call's tensors are copied to the
    graph's own; parameters that are passed as inputs are read in place; inputs that are not tensors
    must stay the same. No other graph of the process may run between the forward and the backward
    pass of a call. Raises RuntimeError if the passes cannot be recorded, and for a call whose
    result the graph would get wrong.
    """

    passes = 0  # replays of all graphs of the process: tells whether another one has run

    def __init__(self, model: nn.Module, **options):
        self.model = model
        self.forward = partial(model.forward, **options)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.enabled = True
        self.calls = 0
        self.forward_graph: torch.cuda.CUDAGraph | None = None
        _instances.add(self)

    def __call__(self, **inputs):
        wanted = torch.is_grad_enabled() or not self.parameters
        if not self.enabled or not wanted:
            return self.forward(**inputs)
        self.calls += 1
        if self.calls <= EAGER_CALLS:
            return self.forward(**inputs)
        if self.forward_graph is None:
            self._try_capture(inputs)
        self._fill(inputs)
        if not self.parameters:
            self._replay(self.forward_graph)
            return {name: value.clone() for name, value in self.outputs.items()}
        return dict(zip(self.outputs, _Replay.apply(self, *self.parameters)))

    def _try_capture(self, inputs: dict) -> None:
        try:
            self._capture(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None  # leaving the capture failed after it
            name = type(self.model).__name__
            cure = "set train.cuda_graphs=false"
            raise RuntimeError(f"{name} cannot be recorded as a CUDA graph; {cure} ({error})") from error

    def _capture(self, inputs: dict) -> None:
        self.constants = {name: value for name, value in inputs.items() if not _is_copied(value)}
        self.inputs = {name: value.clone() for name, value in inputs.items() if _is_copied(value)}
        read_in_place = [value for value in self.constants.values() if isinstance(value, torch.Tensor)]
        self.in_place = [*self.model.parameters(), *self.model.buffers(), *read_in_place]
        self.addresses = self._addresses()
        # Autograd remembers the stream on which it first met a leaf, and makes it wait for the
        # backward pass; a stream that is not recorded cannot wait for one that is. So the passes
        # are recorded with leaves of their own, in the same memory.
        self.leaves = {p: nn.Parameter(p.detach()) for p in self.parameters}
        _free_memory()
        pool = _shared_pool()
        self.forward_graph, self.outputs = _record(self._forward_pass, pool)
        if self.parameters:
            self.d_loss = torch.ones_like(self.outputs["loss"])
            self.backward_graph, self.gradients = _record(self._backward_pass, self.forward_graph.pool())
        self._pass = None  # the graphs own its activations

    def _forward_pass(self) -> dict[str, torch.Tensor]:
        with _with_leaves(self.model, self.leaves):
            self._pass = self.forward(**self.inputs, **self.constants)
        tensors = {name: value for name, value in self._pass.items() if isinstance(value, torch.Tensor)}
        return {name: value.detach() for name, value in tensors.items()}

    def _backward_pass(self) -> tuple[torch.Tensor | None, ...]:
        leaves = list(self.leaves.values())
        with _with_leaves(self.model, self.leaves):  # activation checkpointing reads them again
            return torch.autograd.grad(self._pass["loss"], leaves, self.d_loss, allow_unused=True)

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.in_place]

    def _fill(self, inputs: dict) -> None:
        """Copies a call's tensors to the graph's. Raises RuntimeError where the graph would compute
        something else than the call."""
        constants = {name: value for name, value in inputs.items() if name not in self.inputs}
        if not _same_values(constants, self.constants):
            raise RuntimeError(
                f"a CUDA graph was recorded with {_names(self.constants)}, and is called with {_names(constants)}"
            )
        for name, static in self.inputs.items():
            value = inputs.get(name)
            if not _is_copied(value) or value.shape != static.shape or value.dtype != static.dtype:
                raise RuntimeError(
                    f"a CUDA graph was recorded with {name} {_kind(static)}, and is called with {_kind(value)}"
                )
            static.copy_(value)
        if self._addresses() != self.addresses:
            raise RuntimeError("parameters or buffers of a recorded CUDA graph have moved in memory since")

    @staticmethod
    def _replay(graph: torch.cuda.CUDAGraph) -> None:
        GraphedForward.passes += 1
        graph.replay()

    def switch_off(self) -> None:
        """Drops the graphs and their memory. From here on every call runs eagerly."""
        self.enabled = False
        self.forward_graph = self.backward_graph = None
        self.inputs = self.outputs = self.gradients = None


def graphs_in_use() -> bool:
    """Whether any model of the process runs as CUDA graphs, or will after its first calls."""
    return any(graphed.enabled for graphed in _instances)


def switch_off_all() -> None:
    """Switches off the graphs of every model of the process. They share their memory, which is free
    once the last of them is dropped."""
    for graphed in _instances:
        graphed.switch_off()


class _Replay(torch.autograd.Function):
    """Outputs and gradients are copies: the next replay overwrites the graph's own."""

    @staticmethod
    def forward(ctx, graphed: GraphedForward, *parameters):
        graphed._replay(graphed.forward_graph)
        ctx.graphed = graphed
        ctx.number = GraphedForward.passes
        outputs = {name: value.clone() for name, value in graphed.outputs.items()}
        ctx.mark_non_differentiable(*(value for name, value in outputs.items() if name != "loss"))
        ctx.loss = list(outputs).index("loss")
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx, *d_outputs):
        graphed = ctx.graphed
        if ctx.number != GraphedForward.passes:
            cause = "a CUDA graph has run since this call's forward pass"
            raise RuntimeError(f"{cause}, and may have overwritten its activations")
        graphed.d_loss.copy_(d_outputs[ctx.loss])
        graphed._replay(graphed.backward_graph)
        used = [gradient for gradient in graphed.gradients if gradient is not None]
        copies = [torch.empty_like(gradient) for gradient in used]
        torch._foreach_copy_(copies, used)
        remaining = iter(copies)
        return None, *(None if gradient is None else next(remaining) for gradient in graphed.gradients)


def _free_memory() -> None:
    """Returns cached memory of the eager calls, for the graphs' own pool."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()


def _shared_pool():
    """The memory pool of the graphs that are recorded already, or None."""
    for other in _instances:
        if other.forward_graph is not None:
            return other.forward_graph.pool()
    return None


def _record(run: Callable[[], Any], pool) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The GPU's work in run() as a graph, and what run() returned, which every replay
    overwrites."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads (NCCL's watchdog, pinned memory) may call CUDA during the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return graph, result


@contextmanager
def _with_leaves(model: nn.Module, leaves: dict[nn.Parameter, nn.Parameter]):
    """Replaces the parameters that are keys of `leaves` by their values, for the context's
    duration."""
    places = []
    for module in model.modules():
        for name, p in module._parameters.items():
            if p in leaves:
                places.append((module._parameters, name, p))
    for parameters, name, p in places:
        parameters[name] = leaves[p]
    try:
        yield
    finally:
        for parameters, name, p in places:
            parameters[name] = p


def _is_copied(value) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)


def _same_values(values: dict, others: dict) -> bool:
    if values.keys() != others.keys():
        return False
    return all(_same(value, others[name]) for name, value in values.items())


def _same(value, other) -> bool:
    """Whether two inputs are the same tensor, or equal values that are no tensors."""
    if isinstance(value, torch.Tensor):
        return value is other
    return value is other or (type(value) is type(other) and value == other)


def _kind(value) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)


def _names(values: dict) -> str:
    return ", ".join(f"{name} {_kind(value)}" for name, value in values.items()) or "nothing else"
