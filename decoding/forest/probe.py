"""Does a model score a forest of beams as it scores one sequence? Asked once before it is decoded."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from decoding.dice.sampling import nan_message
from decoding.engine.runner import runner_of
from decoding.errors import UserError
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # total variation; sums in another order give some 1e-5
_COARSE = 0.05  # of 16-bit weights
_PROBED_WINDOW = 256  # tokens; a wider sliding window would make a long prompt of what should be quick
_SIBLINGS = 8


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
    kind = getattr(model.config, "model_type", type(model).__name__)
    limit = _TOLERANCE.get(next(model.parameters()).dtype, _COARSE)
    fused = runner.prompts.name == "fused"
    try:
        distance = _distance(model, role, engine)
    except UserError:
        if not fused:
            raise
        distance = math.inf
    if fused and not distance <= limit:
        runner.unfuse(model)
        distance = _distance(model, role, engine)
        warnings.warn(
            f"The fused pass of the {role} model ({kind}) differs from the model's own, which is used instead: slower, "
            "but right.",
            stacklevel=2,
        )
    if not distance <= limit:
        raise UserError(
            f"The {role} model ({kind}) scores a forest of beams differently than one beam at a time (total variation "
            f"{distance:.3f}): it does not honour the mask or the positions it is given, so its beams would be wrong. "
            "Use a model of a family that docs/families.md names, such as Llama, Qwen, Mistral or GPT-NeoX."
        )
    runner.checked = True


def _distance(model: Any, role: str, engine: str) -> float:
    """Largest total variation between a forest's rows and those of one sequence at a time through
    the model itself.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    vocabulary = model.config.get_text_config().vocab_size
    window = runner_of(model, engine).window
    length = window + 2 if window is not None and window <= _PROBED_WINDOW else 4
    prompt = [(i * i + 3) % vocabulary for i in range(length)]
    forest = TokenForest()
    scorer = ForestScorer(model, rows=1, longest_prompt=length, spare_slots=2 * _SIBLINGS, engine=engine)
    # Many siblings: the last one's slots lie far from its position, so that taking one for the
    # other shows.
    siblings = [forest.child(0, (5 + i) % vocabulary) for i in range(_SIBLINGS)]
    last = [forest.child(siblings[0], 6 % vocabulary), forest.child(siblings[-1], 5 % vocabulary)]
    try:
        scorer.open(0, prompt, forest)
        scorer.score({0: siblings})
        scorer.score({0: last})
        together = scorer.log_probs(0, last).exp()  # [2, V]
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"The {role} model ({kind}) cannot run a forest pass, in which one pass scores several beams under a 4-D "
            f"attention mask: {reason[0]}"
        ) from error
    finally:
        scorer.free()  # not kept: a pass that failed may have left anything in it
    distance = 0.0
    for row, leaf in enumerate(last):
        path = torch.tensor([prompt + forest.path(leaf)]).to(scorer.device)
        logits = model(input_ids=path, use_cache=False).logits[0, -1].float()  # positions as the model counts them
        if torch.isnan(logits).any():
            raise UserError(nan_message(role))
        distance = max(distance, 0.5 * (together[row] - logits.softmax(-1)).abs().sum().item())
    return distance
