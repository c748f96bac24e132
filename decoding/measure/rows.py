"""Rows of a comparison: a method with settings each, from a grid (evaluate.py) or one by one
(conf/bench.yaml).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decoding.config import DecodingConfig
from decoding.errors import UserError
from decoding.measure.methods import FLAGS, METHODS, PEERS, Generate, Method, find_method
from decoding.pairs.pair import ModelPair
from decoding.policies.base import DRAFT_DEPTH, DRAFT_WIDTH, TARGET_WIDTH, Knob, check_unloaded
from decoding.support.checks import whole
from decoding.support.settings import check_type

REFERENCES = ("hf_beam_sample", "beam_sample")  # a row's speed-up is over these at its own target width
_WIDTHS = (TARGET_WIDTH, DRAFT_WIDTH, DRAFT_DEPTH)


@dataclass(frozen=True)
class Row:
    """A method with settings: one row of the results.

    Args:
        method: what decodes.
        settings: that tell the row from others of its method; those of its widths are always among
            them.
        config: as the method runs it.
        batch_size: prompts decoded together; None: as many as the run says.
        draft: instead of the pair's own.
    """

    method: Method
    settings: Mapping[str, Any]
    config: DecodingConfig
    batch_size: int | None = None
    draft: str | None = None

    @property
    def alone(self) -> str:
        """The name without the batch size: rows that share it differ by nothing else."""
        asked, widest = self.settings.get("asked_width"), self.config.target_width
        symbols = {knob.name: knob.name if knob.symbol is None else knob.symbol for knob in self.method.knobs}
        words = [self.method.name, f"M={widest}" if asked in (None, widest) else f"M={asked}/{widest}"]
        for name, value in self.settings.items():
            symbol = symbols.get(name, name)
            words += [] if not symbol else [symbol] if value is True else [f"{symbol}={value}"]
        return " ".join([*words, *([f"draft={self.draft}"] if self.draft is not None else [])])

    @property
    def name(self) -> str:
        """Method and settings in a line, such as `fixed M=2/4 w=6 γ=3 exact, batch 8`
        (M of at most 4).
        """
        return self.alone + (f", batch {self.batch_size}" if (self.batch_size or 1) > 1 else "")

    def check(self) -> None:
        """Refuse, before models are loaded, widths that its policy cannot work with (UserError)."""
        if self.method.policy is not None:
            check_unloaded(self.method.policy(self.settings), self.config)

    def build(self, pair: ModelPair) -> Generate:
        """The function that decodes prompts by this row."""
        return self.method(pair, self.config, self.settings)


# -------------------------------------------------------------------------------------- from a grid


def make_rows(
    names: Sequence[str],
    config: DecodingConfig,
    grid: Mapping[str, Any],
    references: Sequence[str] = REFERENCES,
    methods: Mapping[str, Method] = METHODS,
) -> list[Row]:
    """Methods times the settings that they take, and the reference rows at every target width among
    them.

    Args:
        names: of methods, as `find_method` reads them; the rows' order.
        config: what no axis sets.
        grid: values of each axis, None for the knob's own grid; one that is absent or empty keeps
            the config's value or the policy's. Methods that choose M themselves take no `widths`:
            they have the config's target_width, or the widest of `widths` if that is more.
        references: methods of the reference rows.
        methods: that names are looked up in first.

    Raises:
        UserError: unknown name, or settings that cannot be.
    """
    chosen = [find_method(name, methods) for name in dict.fromkeys(names)]
    compared = [find_method(name, methods, "references holds") for name in references]
    axes = _read_grid(grid, axes_of([*methods.values(), *chosen, *compared]))
    if config.exact and "surpluses" in axes:
        raise UserError("grid.surpluses is given with exact=true, which keeps no surplus; leave one of them out.")
    widest = {knob.name: max(axes[knob.on_axis]) for knob in (DRAFT_WIDTH, DRAFT_DEPTH) if knob.on_axis in axes}
    config = config.with_changes(**widest, target_width=max([config.target_width, *axes.get("widths", [])]))
    rows = [row for method in chosen for row in _rows_of(method, config, axes)]
    widths = sorted({row.config.target_width for row in rows})
    for method in compared:
        at = {row.config.target_width for row in rows if row.method is method}
        missing = [width for width in widths if width not in at]
        rows = [row for width in missing for row in _rows_of(method, config, {"widths": [width]})] + rows
    return rows


def axes_of(methods: Iterable[Method]) -> dict[str, Knob]:
    """The axes that a grid may have, with a knob of each."""
    return {knob.on_axis: knob for method in methods for knob in method.knobs}


def _read_grid(grid: Mapping[str, Any], knobs: Mapping[str, Knob]) -> dict[str, list[Any]]:
    unknown = set(grid) - set(knobs)
    if unknown:
        raise UserError(f"grid holds {', '.join(sorted(unknown))}; its axes are {', '.join(knobs)}.")
    axes: dict[str, list[Any]] = {}
    for name, values in grid.items():
        values = knobs[name].grid if values is None else values
        if not isinstance(values, list | tuple):
            raise UserError(f"grid.{name} is {values!r}; give a list, such as [{values}].")
        for value in values:
            if value is not None:
                check_type(f"A value of grid.{name}", value, knobs[name].kind)
        axes |= {name: list(values)} if values else {}
    return axes


def _rows_of(method: Method, config: DecodingConfig, axes: Mapping[str, Sequence[Any]]) -> list[Row]:
    """A method's rows, without the combinations that cannot be, or that are another row over again."""
    own = [knob for knob in method.knobs if knob.on_axis in axes]
    rows, seen, refused = [], set(), {}
    for values in itertools.product(*(axes[knob.on_axis] for knob in own)):
        given = [(knob, value) for knob, value in zip(own, values, strict=True) if value is not None]
        settings = {knob.name: value for knob, value in given}
        width = {**settings, **method.fixed}.get("target_width", config.target_width)
        too_wide = [knob.on_axis for knob, value in given if knob.within_width and value > width]
        if settings.get("draft_width", width) < width:
            refused["draft_widths has none that the target width allows: a layer could never pass"] = True
        elif too_wide:
            refused[f"{too_wide[0]} asks for more than the target width"] = True
        else:
            nothing_drafted = settings.get("draft_depth") == 0
            key = tuple((knob.name, value) for knob, value in given if not (nothing_drafted and knob.of_drafts))
            if key not in seen:
                seen.add(key)
                rows.append(_row(method, method.configure(config, settings), settings))
    if not rows:
        raise UserError(f"The grid leaves no row for {method.name!r}: {'; '.join(refused)}. Change the grid.")
    return rows


def _row(method: Method, config: DecodingConfig, settings: Mapping[str, Any], **more: Any) -> Row:
    """A row whose settings have the widths that its config came to."""
    taken = {knob.name: getattr(config, knob.name) for knob in _WIDTHS if knob in method.knobs}
    return Row(method, {**taken, **settings}, config, **more)


# --------------------------------------------------------------------------------------- one by one


def read_rows(entries: Any, config: DecodingConfig) -> list[Row]:
    """Rows as conf/bench.yaml writes them.

    Raises:
        UserError: an unknown method, or a setting that it does not take.
    """
    if not entries:
        raise UserError("rows is empty; give at least one, such as rows=[{method: beam_sample, target_width: 4}].")
    rows = [_read_row(f"rows[{i}]", entry, config) for i, entry in enumerate(entries)]
    names = [row.name for row in rows]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"rows[{i}] is rows[{names.index(name)}] again ({name}); remove one.")
    return rows


def _read_row(path: str, entry: Any, config: DecodingConfig) -> Row:
    if not isinstance(entry, dict):
        raise UserError(f"{path} is {entry!r}; give a mapping, such as {{method: fixed, draft_width: 6}}.")
    method = find_method(entry.get("method"), METHODS, f"{path}.method is")
    settings = {key: value for key, value in entry.items() if key != "method"}
    _check_settings(path, method, settings)
    batch_size, draft = settings.pop("batch_size", 1), settings.pop("draft", None)
    whole(f"{path}.batch_size", batch_size, least=1)
    flags = {knob.name: settings.pop(knob.name) for knob in FLAGS if knob.name in settings}
    try:
        own_config = method.configure(config, {**flags, **settings})
    except UserError as error:
        raise UserError(f"{path} ({method.name}): {error}") from error
    return _row(method, own_config, {**settings, **flags}, batch_size=batch_size, draft=draft)


def _check_settings(path: str, method: Method, settings: Mapping[str, Any]) -> None:
    """Refuse settings that a method does not take, and values of another kind."""
    ours = method.family not in PEERS
    kinds: dict[str, type | None] = dict.fromkeys(method.arguments)  # a policy's own arguments are its to check
    kinds |= {knob.name: knob.kind for knob in (*method.knobs, *(FLAGS if ours else ()))}
    kinds |= ({"draft": str} if method.drafts else {}) | ({"batch_size": int} if method.batches else {})
    for key, value in settings.items():
        if key not in kinds and not (key == "batch_size" and value == 1):
            takes = f"it takes {', '.join(kinds)}" if kinds else "it takes none"
            one = ", and decodes one prompt at a time" if key == "batch_size" else ""
            raise UserError(f"{path}.{key} is not a setting of {method.name}; {takes}{one}.")
        if (kind := kinds.get(key)) is not None:
            check_type(f"{path}.{key}", value, kind)
