"""What is remembered of a decoding, for controllers to learn from."""

from decoding.traces.recorder import TraceRecorder as TraceRecorder
from decoding.traces.store import load_traces as load_traces
