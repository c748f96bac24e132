"""Measuring methods side by side: which rows, interleaved timing on the same prompts and seeds, scoring by the target.

Used by evaluate.py. Nothing is averaged here: a `Measurement` is one prompt decoded by one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from decoding.baselines import Generate, Method, now
from decoding.config import DecodingConfig
from decoding.decoder import OutOfDeviceMemory
from decoding.energy import EnergyMeter
from decoding.errors import UserError
from decoding.pair import ModelPair
from decoding.results import DecodeStats
from decoding.tasks.base import Prompt, Task, stable_hash

OUT_OF_MEMORY = (
    "The device ran out of memory: lower batch_size, target_width, draft_width, max_new_tokens or the length of the "
    "prompts."
)
REFERENCE_METHODS = ("hf_beam_sample", "beam_sample")  # a row's speed-up is over these at its own target width
GRID_AXES = {
    "widths": "target_width",
    "draft_widths": "draft_width",
    "depths": "draft_depth",
    "asked_widths": "asked_width",
    "final_widths": "final_width",
    "surpluses": "surplus",
    "thresholds": "threshold",
    "shares": "share",
    "gaps": "gap",
    "scales": "scale",
    "stop_entropies": "stop_entropy",
    "width_values": "width_value",
}
WIDTH_AXES = ("target_width", "draft_width", "draft_depth")
_IDLE = ("draft_width", "surplus", "stop_entropy")  # axes of layers that are drafted
_SYMBOLS = {
    "draft_width": "w",
    "draft_depth": "γ",
    "threshold": "threshold",
    "share": "share",
    "gap": "gap",
    "scale": "scale",
    "stop_entropy": "stop",
    "final_width": "last",
    "surplus": "surplus",
    "width_value": "value",
}


@dataclass(frozen=True)
class Row:
    """A method with settings: one row of the results."""

    method: str
    settings: Mapping[str, Any]
    config: DecodingConfig  # as the method runs it

    @property
    def name(self) -> str:
        """Method and settings in a line, such as `fixed M=2/4 w=6 γ=3` (M of at most 4)."""
        asked, widest = self.settings.get("asked_width"), self.config.target_width
        words = [self.method, f"M={widest}" if asked in (None, widest) else f"M={asked}/{widest}"]
        return " ".join(words + [f"{_SYMBOLS[k]}={v}" for k, v in self.settings.items() if k in _SYMBOLS])


@dataclass
class Measurement:
    """One prompt decoded by one row."""

    prompt_id: str
    wall_seconds: float
    joules: float | None
    stats: DecodeStats
    tokens: list[int]  # best hypothesis
    finished: bool
    log_prob: float = 0.0  # of `tokens` under the target at temperature 1, summed
    metrics: dict[str, float] = field(default_factory=dict)
    text: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as in results.json."""
        return vars(self) | {"stats": self.stats.to_dict()}


def make_rows(
    names: Sequence[str],
    methods: Mapping[str, Method],
    config: DecodingConfig,
    grid: Mapping[str, Any],
    references: Sequence[str] = REFERENCE_METHODS,
) -> list[Row]:
    """Methods times the settings that they take, and the reference rows at every target width among them.

    Args:
        names: of `methods`; the rows' order.
        config: what no axis sets.
        grid: values of each axis (GRID_AXES); one that is absent or empty keeps the config's value. Methods that choose
            M themselves take no `widths`: they have the config's target_width, or the widest of `widths` if that is
            more.
        references: methods of the reference rows.

    Raises:
        UserError: unknown name, or settings that cannot be.
    """
    for what, given in (("policies", names), ("references", references)):
        for name in given:
            if name not in methods:
                raise UserError(f"{what} holds {name!r}; choose among {', '.join(methods)}.")
    unknown = set(grid) - set(GRID_AXES)
    if unknown:
        raise UserError(f"grid holds {', '.join(sorted(unknown))}; its axes are {', '.join(GRID_AXES)}.")
    for name, values in grid.items():
        if values is not None and not isinstance(values, list | tuple):
            raise UserError(f"grid.{name} is {values!r}; give a list, such as [{values}].")
    axes = {GRID_AXES[name]: list(values) for name, values in grid.items() if values}
    if config.exact and "surplus" in axes:
        raise UserError("grid.surpluses is given with exact=true, which keeps no surplus; leave one of them out.")
    widest = {axis: max(axes[axis]) for axis in ("draft_width", "draft_depth") if axis in axes}
    config = config.with_changes(**widest, target_width=max([config.target_width, *axes.get("target_width", [])]))
    rows = [row for name in dict.fromkeys(names) for row in _rows_of(name, methods[name], config, axes)]
    widths = sorted({row.config.target_width for row in rows})
    for name in references:
        at = {row.config.target_width for row in rows if row.method == name}
        missing = [width for width in widths if width not in at]
        rows = [r for w in missing for r in _rows_of(name, methods[name], config, {"target_width": [w]})] + rows
    return rows


def _rows_of(name: str, method: Method, config: DecodingConfig, axes: Mapping[str, Sequence[Any]]) -> list[Row]:
    """A method's rows, without the combinations that cannot be, or that are another row over again."""
    own = [axis for axis in method.axes if axis in axes]
    rows, seen, refused = [], set(), {}
    for values in itertools.product(*(axes[axis] for axis in own)):
        settings = {axis: value for axis, value in zip(own, values, strict=True) if value is not None}
        width = {**settings, **method.fixed}.get("target_width", config.target_width)
        if settings.get("draft_width", width) < width:
            refused["draft_width"] = "draft_widths has none that the target width allows: a layer could never pass"
        elif settings.get("asked_width", 1) > width:
            refused["asked_width"] = "asked_widths asks for more than the target width"
        elif settings.get("final_width", 1) > width:
            refused["final_width"] = "final_widths asks for more than the target width"
        else:
            idle = _IDLE if settings.get("draft_depth") == 0 else ()  # nothing is drafted: these change nothing
            told = tuple((axis, value) for axis, value in settings.items() if axis not in idle)
            if told in seen:
                continue
            seen.add(told)
            own_config = method.configure(config, settings)
            taken = {axis: getattr(own_config, axis) for axis in WIDTH_AXES if axis in method.axes}
            rows.append(Row(name, {**taken, **settings}, own_config))
    if not rows:
        raise UserError(f"The grid leaves no row for {name!r}: {'; '.join(refused.values())}. Change the grid.")
    return rows


def run_rows(
    rows: Sequence[Row],
    calls: Sequence[Generate],
    prompts: Sequence[Prompt],
    warmup: Sequence[Prompt],
    seed: int,
    device: torch.device,
    advance: Callable[[str], None] = lambda what: None,
    batch_size: int = 1,
    failed: dict[int, str] | None = None,
) -> list[list[Measurement]]:
    """Decode every prompt by every row, interleaved: machine drift hits all rows alike.

    The order of the rows rotates from prompt to prompt; a prompt's seed is the same for all rows. Warm-up prompts are
    decoded first and not reported.

    Args:
        rows, calls: each row and its method, built.
        device: of the models; on CUDA the clock waits for it, and joules are measured.
        advance: called with the row's name after each decoding.
        batch_size: prompts decoded together; a row's turn takes so many. transformers' methods take them one by one.
        failed: gets the index of a row that the device's memory did not suffice for, and a sentence; its measurements
            end there, those of the other rows go on. None: the error is raised.

    Returns:
        [rows][prompts] measurements, not yet scored. After Ctrl-C those of the first prompts, as far as all rows got.

    Raises:
        KeyboardInterrupt: before all rows have measured a prompt.
    """
    meter = EnergyMeter(device)
    measured: list[list[Measurement]] = [[] for _ in rows]
    groups = [*_groups(warmup, batch_size), *_groups(prompts, batch_size)]
    try:
        for i, group in enumerate(groups):
            for j in range(len(rows)):
                at = (i + j) % len(rows)
                if failed is None or at not in failed:
                    try:
                        taken = measure(calls[at], group, seed, device, meter)
                    except (OutOfDeviceMemory, torch.OutOfMemoryError) as error:
                        if failed is None:
                            raise
                        failed[at] = str(error) if isinstance(error, UserError) else OUT_OF_MEMORY
                        continue
                    if i >= len(groups) - -(-len(prompts) // batch_size):
                        measured[at] += taken
                for _ in group:
                    advance(rows[at].name)
    except KeyboardInterrupt:
        common = min((len(found) for at, found in enumerate(measured) if at not in (failed or {})), default=0)
        if not common:
            raise
        return [found[:common] for found in measured]
    return measured


def _groups(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    return [prompts[first : first + size] for first in range(0, len(prompts), size)]


def measure(
    generate: Generate, prompts: Sequence[Prompt], seed: int, device: torch.device, meter: EnergyMeter
) -> list[Measurement]:
    """Decode prompts together, by the clock; seconds and joules are split as the stats' seconds are."""
    streams = [prompt_stream(seed, prompt) for prompt in prompts]
    with meter:
        began = now(device)
        results = generate([prompt.tokens for prompt in prompts], streams)
        seconds = now(device) - began
    claimed = sum(result.stats.total_seconds for result in results)
    measured = []
    for prompt, result in zip(prompts, results, strict=True):
        share = result.stats.total_seconds / claimed
        joules = meter.joules * share if meter.joules is not None else None
        tokens, finished = list(result.sequences[0]), result.finished[0]
        measured.append(Measurement(prompt.id, seconds * share, joules, result.stats, tokens, finished))
    return measured


def prompt_stream(seed: int, prompt: Prompt) -> torch.Generator:
    """The random stream of a prompt, the same for all rows."""
    return torch.Generator().manual_seed(stable_hash(f"{seed} {prompt.id}") % 2**62)


def score(measurement: Measurement, prompt: Prompt, pair: ModelPair, task: Task) -> None:
    """Fill in a measurement's log-probability under the target, text and metrics."""
    measurement.log_prob = log_probability(pair.target, prompt.tokens, measurement.tokens)
    if pair.tokenizer is not None:
        text = pair.tokenizer.decode(measurement.tokens, skip_special_tokens=True)
        measurement.text = text
        measurement.metrics = task.metrics(text, prompt, measurement.finished)


@torch.inference_mode()
def log_probability(model: torch.nn.Module, prompt: list[int], continuation: list[int]) -> float:
    """log p(continuation | prompt) at temperature 1, natural logarithm, teacher forced in one pass."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *continuation]], device=device)  # [1, T]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()  # [new, V]
    picked = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])  # [new, 1]
    return float(picked.double().sum())
