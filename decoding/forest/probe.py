"""Does a model score a forest of beams as it scores one sequence? Asked once before it is decoded.

In float32 one distance tells. In 16 bits a right model differs from itself by what a broken mask
may make, so what must not change is changed instead, and the mask is judged by the answer.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from decoding.dice.sampling import nan_message
from decoding.engine.first_layers import first_layers
from decoding.engine.placement import device_of, dtype_of, packed
from decoding.engine.runner import runner_of
from decoding.errors import UserError, first_line
from decoding.forest.scorer import ForestScorer, PassFailed
from decoding.forest.tree import TokenForest

_TOLERANCE = 1e-3  # total variation in float32; sums in another order give some 1e-5
# What rounding may make, of what another parent makes. Of SmolLM2-135M on a CPU, in bfloat16 and
# float16, fused and not, right passes made 0.09 at most, and each of seven broken twins 0.38 or
# more in one of the questions.
_ROUNDING = 0.2
# Of packed weights; activations that are rounded to 8 bits, with scales of their own pass, made
# 0.32 there (torchao's dynamic int8, bitsandbytes' int8), and the twins 0.5; one of them, all new
# positions one too far, is not told apart.
_PACKED_ROUNDING = 0.4
_PROBED_WINDOW = 256  # tokens; a wider sliding window would make a long prompt of what should be quick
_SIBLINGS = 8
_ROWS = 3
_COPIED_LAYERS = 2


@torch.inference_mode()
def check_forest_pass(model: Any, role: str, engine: str = "auto") -> None:
    """Refuse a model whose forest pass differs from its sequential pass; once per model and engine.

    A fused pass that differs is replaced by the model's own, with a warning.

    Masks and positions are passed as transformers' attention models take them; a model that ignores
    either (some with learned relative positions) would be decoded wrongly without a word.

    Raises:
        UserError: the two passes differ, or the model cannot run a forest pass at all.
    """
    runner = runner_of(model, engine)
    if runner.checked:
        return
    _check_attention(model, role, runner.prompts.name)
    fault = _fault(model, role, engine)
    if fault and runner.prompts.name == "fused":
        runner.unfuse(model)
        _check_attention(model, role, runner.prompts.name)
        fused_fault, fault = fault, _fault(model, role, engine)
        if not fault:
            warnings.warn(
                f"The fused pass of the {role} model ({_kind(model)}) differs from the model's own ({fused_fault}), "
                "which is used instead: slower, but right.",
                stacklevel=2,
            )
    if fault:
        raise _refusal(model, role, fault)
    runner.checked = True


def _kind(model: Any) -> str:
    return str(getattr(model.config, "model_type", type(model).__name__))


def _attention(model: Any) -> str | None:
    return getattr(model.config.get_text_config(), "_attn_implementation", None)


def _check_attention(model: Any, role: str, forward: str) -> None:
    """Refuse by name what would end the process instead of raising an error."""
    if _attention(model) == "flex_attention" and device_of(model).type == "cpu" and forward != "fused":
        raise UserError(
            f"The {role} model ({_kind(model)}) has attn_implementation='flex_attention', which takes no mask of a "
            "forest of beams on a CPU; load it with attn_implementation='sdpa', or call "
            "model.set_attn_implementation('sdpa')."
        )


def _refusal(model: Any, role: str, fault: str) -> UserError:
    """The sentence on a model that is refused: why, and what to do."""
    attention = _attention(model)
    why = "it does not honour the mask or the positions it is given, so its beams would be wrong."
    what = (
        "Use a model of a family that docs/families.md names, such as Llama, Qwen, Mistral or GPT-NeoX."
        if attention in (None, "sdpa", "eager")
        else f"Its attn_implementation is {attention!r}; load it with 'sdpa' or 'eager'."
    )
    if any(type(module).__module__.startswith("torch.ao.nn.quantized.dynamic") for module in model.modules()):
        why = (
            "its quantize_dynamic layers scale by all tokens of a pass, so a token's scores depend on those beside it."
        )
        what = "Quantise the weights alone, as torchao does, or use the model as it was."
    return UserError(f"The {role} model ({_kind(model)}) {fault}{'' if 'cannot run' in fault else f': {why}'} {what}")


def _fault(model: Any, role: str, engine: str) -> str | None:
    """A sentence on what is wrong with a model's forest passes; None if nothing is."""
    try:
        return _exact_fault(model, role, engine) if _is_exact(model) else _coarse_fault(model, role, engine)
    except PassFailed as error:
        return _cannot_run(error.__cause__ or error)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own pass over a sequence, which may raise anything too
        return _cannot_run(error)


def _cannot_run(error: BaseException) -> str:
    return (
        "cannot run a forest pass, in which one pass scores several beams of several prompts under a 4-D attention "
        f"mask ({first_line(error).rstrip('.')})."
    )


def _is_exact(model: Any) -> bool:
    """True if a model's results hardly depend on the order of its sums."""
    exact = dtype_of(model) in (torch.float32, torch.float64) and not packed(model)
    return exact and not (device_of(model).type == "cuda" and torch.backends.cuda.matmul.allow_tf32)


def _differs(distance: float) -> str:
    return f"scores a forest of beams differently than one beam at a time (total variation {distance:.3f})"


def _exact_fault(model: Any, role: str, engine: str) -> str | None:
    case = _Case.of(model, engine)
    distance = _distances(_forest(model, engine, case), _one_by_one(model, role, case)).max().item()
    return None if distance <= _TOLERANCE else _differs(distance)


def _coarse_fault(model: Any, role: str, engine: str) -> str | None:
    """Questions, each of which some broken mask or some wrong positions answer wrongly.

    Medians over leaves, since a few may stand where a model is ill-conditioned, or where rounding
    sends a token to other experts.
    """
    case = _Case.of(model, engine)
    together, alone = _forest(model, engine, case), _one_by_one(model, role, case)
    read = {"its parent": case.with_other_parents(), "its prompt": case.with_other_prompts()}
    matters = {what: _median(alone, _one_by_one(model, role, other)) for what, other in read.items()}
    limit = max((_PACKED_ROUNDING if packed(model) else _ROUNDING) * matters["its parent"], _TOLERANCE)
    for leaf in (0, 1):
        others_changed = _forest(model, engine, case.with_one_path(leaf))
        hidden = _distances(others_changed, together)[:, leaf].median().item()
        if not hidden <= limit:
            return f"{_differs(hidden)}, as a beam changes with beams that it must not see"
    for what, other in read.items():
        seen = _median(_forest(model, engine, other), together)
        if not seen >= limit and matters[what] > 2 * limit:
            return f"{_differs(matters[what])}, as a beam does not change with {what}"
    moved = _median(_forest(model, engine, replace(case, backwards=True)), together)
    if not moved <= limit:
        return f"{_differs(moved)}, as a beam changes with its place in the cache"
    distance = _median(together, alone)
    return _fault_of_copy(model, role, engine) if distance <= limit else _differs(distance)


def _fault_of_copy(model: Any, role: str, engine: str) -> str | None:
    """A sentence on what is wrong with a float32 copy of the first layers, where sums are exact
    enough to show small errors too.
    """
    small = _float_copy(model)
    if small is None:
        return None
    if runner_of(model, engine).prompts.name != "fused":
        engine = "transformers"  # a copy would be fused again
    case = _Case.of(small, engine)
    try:
        alone = _one_by_one(small, role, case)
    except Exception:  # an attention for 16 bits only: the model itself has passed
        return None
    distance = _distances(_forest(small, engine, case), alone).max().item()
    limit = _TOLERANCE if _is_exact(small) else 10 * _TOLERANCE  # TF32; a position too far makes 0.02
    return None if distance <= limit else f"{_differs(distance)}, in float32"


def _float_copy(model: Any) -> Any | None:
    """The first layers in float32; None where they cannot be taken out or do not fit."""
    if packed(model) or hasattr(model, "_hf_hook") or model.config.get_text_config() is not model.config:
        return None  # with a picture tower a copy would be a large one
    count = model.config.num_hidden_layers
    try:
        shared = model if count <= _COPIED_LAYERS else first_layers(model, _COPIED_LAYERS)
        with torch.inference_mode(False), torch.no_grad():  # weights that are watched as those of any model
            return copy.deepcopy(shared).float()
    except (UserError, torch.OutOfMemoryError, RuntimeError, TypeError):
        return None


@dataclass(frozen=True)
class _Case:
    """Prompts of several lengths, and a forest after each: siblings, a child of the first and one
    of the last.

    Args:
        prompts: token ids by row.
        siblings, others: tokens of the siblings by row, and as many different ones.
        leaves: tokens of the two children.
        backwards: the siblings take their slots in the reverse order.
    """

    prompts: list[list[int]]
    siblings: list[list[int]]
    others: list[list[int]]
    leaves: list[int]
    other_leaves: list[int]
    backwards: bool = False

    @classmethod
    def of(cls, model: Any, engine: str) -> _Case:
        """Ids spread over the vocabulary: the lowest are control tokens, where models are
        ill-conditioned.
        """
        size = model.config.get_text_config().vocab_size
        step = next(n for n in range(max(1, round(0.618 * size)), 2 * size + 2) if math.gcd(n, size) == 1)
        window = runner_of(model, engine).window
        length = window + 2 if window is not None and window <= _PROBED_WINDOW else 4
        # Many siblings: the last one's slots lie far from its position, so that taking one for the
        # other shows.
        count = max(1, min(_SIBLINGS, size // 2))

        def ids(first: int, number: int) -> list[int]:
            return [(first + i) * step % size for i in range(first, first + number)]

        rows = range(_ROWS)
        return cls(
            prompts=[ids(31 + 7 * row, length + (0, 3, 1)[row]) for row in rows],
            siblings=[ids(11 * row, count) for row in rows],
            others=[ids(11 * row, 2 * count)[count:] for row in rows],
            leaves=ids(5, 2),
            other_leaves=ids(5, 4)[2:],
        )

    def with_other_prompts(self) -> _Case:
        """Another last token in each prompt."""
        pairs = zip(self.prompts, self.others, strict=True)
        return replace(self, prompts=[[*prompt[:-1], other[0]] for prompt, other in pairs])

    def with_other_parents(self) -> _Case:
        """Other tokens where the leaves' parents are."""
        return replace(self, siblings=self._siblings_but(range(1, len(self.siblings[0]) - 1)))

    def with_one_path(self, leaf: int) -> _Case:
        """Other tokens everywhere but in the prompts and on the path to one of the leaves."""
        leaves = [self.leaves[i] if i == leaf else self.other_leaves[i] for i in (0, 1)]
        return replace(self, siblings=self._siblings_but([leaf * (len(self.siblings[0]) - 1)]), leaves=leaves)

    def _siblings_but(self, kept: Collection[int]) -> list[list[int]]:
        return [
            [old if i in kept else new for i, (old, new) in enumerate(zip(*tokens, strict=True))]
            for tokens in zip(self.siblings, self.others, strict=True)
        ]

    def paths(self, row: int) -> list[list[int]]:
        """The tokens that end in each of the row's leaves."""
        ends = (self.siblings[row][0], self.leaves[0]), (self.siblings[row][-1], self.leaves[1])
        return [[*self.prompts[row], *end] for end in ends]


def _forest(model: Any, engine: str, case: _Case) -> Tensor:
    """Probabilities after the leaves, in passes over all rows; [R, 2, V]."""
    longest = max(map(len, case.prompts))
    scorer = ForestScorer(model, rows=_ROWS, longest_prompt=longest, spare_slots=2 * _SIBLINGS, engine=engine)
    forests = [TokenForest() for _ in case.prompts]
    turn = -1 if case.backwards else 1  # slots are taken in the order in which nodes are made
    try:
        siblings, leaves = {}, {}
        for row, forest in enumerate(forests):
            scorer.open(row, case.prompts[row], forest)
            siblings[row] = [forest.child(0, token) for token in case.siblings[row][::turn]][::turn]
        scorer.score(siblings)
        for row, forest in enumerate(forests):
            ends = [(siblings[row][0], case.leaves[0]), (siblings[row][-1], case.leaves[1])]
            leaves[row] = [forest.child(*end) for end in ends[::turn]][::turn]
        scorer.score(leaves)
        return torch.stack([scorer.log_probs(row, nodes).exp() for row, nodes in leaves.items()])
    finally:
        scorer.free()  # not kept: a pass that failed may have left anything in it


def _one_by_one(model: Any, role: str, case: _Case) -> Tensor:
    """Leaves by the model itself, a sequence a leaf, positions as it counts them; [R, 2, V]."""
    rows = []
    for row in range(_ROWS):
        paths = torch.tensor(case.paths(row)).to(device_of(model))
        logits = model(input_ids=paths, use_cache=False).logits[:, -1].float()
        if torch.isnan(logits).any():
            raise UserError(nan_message(role))
        rows.append(logits.softmax(-1))
    return torch.stack(rows)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Total variation of each leaf; [R, 2, V] twice -> [R, 2]."""
    return 0.5 * (one - other).abs().sum(-1)


def _median(one: Tensor, other: Tensor) -> float:
    return _distances(one, other).median().item()
