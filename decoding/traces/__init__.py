"""Traces: a record of decodings, for controllers to learn from."""

from decoding.traces.recorder import TraceRecorder as TraceRecorder
from decoding.traces.schema import Column as Column
from decoding.traces.store import load_traces as load_traces
