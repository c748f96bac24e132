"""CUDA graphs: a pass of each shape is captured once and replayed, so that the host launches one
thing a pass.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch

from decoding.engine.forward import Forward, PassInputs, PassOutput

GRAPH_LIMIT = 64  # shapes captured; beyond, passes run eagerly: shapes that never repeat would fill the memory


class GraphedForward:
    """Captures another forward, lazily, a graph for each (buffer, rows, queries, slots).

    Args:
        forward: what a graph runs; passes of more than `GRAPH_LIMIT` shapes, and of models that
            cannot be captured, go to it as they are.

    Attributes:
        captures, replays, eager: passes of each kind, for the bench: many captures mean shapes that
            do not repeat.
    """

    ragged, static = False, True

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._graphs: dict[tuple[Any, ...], _Captured] = {}
        self._pool: Any = None
        self._works = True
        self.name = f"{forward.name}+graphs"
        self.captures = self.replays = self.eager = 0

    def new_store(self, rows: int, capacity: int) -> Any:
        """A new, empty KV buffer."""
        return self._forward.new_store(rows, capacity)

    def __call__(self, inputs: PassInputs, store: Any) -> PassOutput:
        """Run one pass of the captured forward; the tensors are overwritten by the next pass of the
        same shape.
        """
        slides = inputs.window_mask is not None
        shape = (inputs.rows, inputs.tokens.shape[0], inputs.read)
        key = (id(store), store.capacity, *shape, inputs.hidden, inputs.layers, slides)
        graph = self._graphs.get(key)
        if graph is None and self._works and len(self._graphs) < GRAPH_LIMIT:
            graph = self._capture(key, inputs, store)
        if graph is None:
            self.eager += 1
            return self._forward(inputs, store)
        self.replays += 1
        return graph(inputs)

    def _capture(self, key: tuple[Any, ...], inputs: PassInputs, store: Any) -> _Captured | None:
        try:
            if not self._graphs:  # torch refuses a pool again once all of its graphs are gone
                self._pool = torch.cuda.graph_pool_handle()
            graph = _Captured(self._forward, inputs, store, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that waits for the device, or allocates on the host
            self._works = False
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            warnings.warn(f"A pass cannot be captured as a CUDA graph ({reason}); it runs eagerly.", stacklevel=2)
            return None
        self.captures += 1
        self._graphs[key] = graph
        weakref.finalize(store, self._graphs.pop, key, None)  # a graph holds addresses of its buffer
        return graph


class _Captured:
    """One graph with the tensors that it reads and writes."""

    def __init__(self, forward: Forward, inputs: PassInputs, store: Any, pool: Any) -> None:
        read = {name: getattr(inputs, name).clone() for name in _read_by(inputs)}
        self._inputs = PassInputs(**read, first_row=inputs.first_row, hidden=inputs.hidden, layers=inputs.layers)
        device = inputs.tokens.device
        current, side = torch.cuda.current_stream(device), _side_stream(device)
        # This block gives the device and the stream back after a capture that failed, too; torch's
        # own does not.
        with torch.cuda.device(device), torch.cuda.stream(side):
            side.wait_stream(current)
            forward(self._inputs, store)  # libraries set themselves up in the first pass, which cannot be captured
            _check_that_nothing_waits(forward, self._inputs, store)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._outputs = forward(self._inputs, store)
        current.wait_stream(side)

    def __call__(self, inputs: PassInputs) -> PassOutput:
        for name in _read_by(inputs):
            getattr(self._inputs, name).copy_(getattr(inputs, name))
        self._graph.replay()
        return self._outputs


def _read_by(inputs: PassInputs) -> list[str]:
    """Names of the tensors that a captured pass reads; some only where a model slides or has ALiBi."""
    names = ("tokens", "positions", "slots", "mask", "window_mask", "key_positions", "features")
    return [name for name in names if getattr(inputs, name) is not None]


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """The stream of all warm-ups and captures on a device.

    One for both, so that cuBLAS has its workspace before a capture and puts none into a pool of
    graphs, which could then never be freed; and one for all, since it keeps a workspace for every
    stream.
    """
    return torch.cuda.Stream(device)


def _check_that_nothing_waits(forward: Forward, inputs: PassInputs, store: Any) -> None:
    """A pass; RuntimeError where the host waits for the device.

    Found in a capture, that would leave torch's allocator and its generators on the GPU in
    disorder.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype, once
        torch.cuda.set_sync_debug_mode("error")
    try:
        forward(inputs, store)
    finally:
        torch.cuda.set_sync_debug_mode(before)
