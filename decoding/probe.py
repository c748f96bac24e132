"""Does a model score a forest of beams as it scores one sequence? Asked once before it is decoded."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from decoding.errors import UserError
from decoding.forest import TokenForest
from decoding.runner import runner_of
from decoding.sampling import nan_message
from decoding.scorer import ForestScorer

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # total variation; sums in another order give some 1e-5
_COARSE = 0.05  # of 16-bit weights


@torch.inference_mode()
def check_forest_pass(model: Any, role: str, engine: str = "auto") -> None:
    """Refuse a model whose forest pass differs from its sequential pass; once per model and engine.

    A fused pass that differs is replaced by the model's own, with a warning.

    Masks and positions are passed as transformers' attention models take them; a model that ignores either
    (some with ALiBi or learned relative positions) would be decoded wrongly without a word.

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
            "Use a model with rotary or learned positions, such as Llama, Qwen, Mistral or GPT-NeoX."
        )
    runner.checked = True


def _distance(model: Any, role: str, engine: str) -> float:
    """Largest total variation between a forest's rows and those of one sequence at a time through the model itself."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = [token % vocabulary for token in (3, 1, 4, 1)]
    forest = TokenForest()
    scorer = ForestScorer(model, rows=1, longest_prompt=len(prompt), spare_slots=8, engine=engine)
    first, second = forest.child(0, 5 % vocabulary), forest.child(0, 2 % vocabulary)
    last = [forest.child(first, 6 % vocabulary), forest.child(second, 5 % vocabulary)]
    try:
        scorer.open(0, prompt, forest)
        scorer.score({0: [first, second]})
        scorer.score({0: last})
        together = scorer.log_probs(0, last).exp()  # [2, V]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"The {role} model ({kind}) cannot run a forest pass, in which one pass scores several beams under a 4-D "
            f"attention mask: {reason[0]}"
        ) from error
    finally:
        scorer.close()
    distance = 0.0
    for row, leaf in enumerate(last):
        path = torch.tensor([prompt + forest.path(leaf)]).to(scorer.device)
        positions = torch.arange(path.shape[1], device=scorer.device)[None]
        logits = model(input_ids=path, position_ids=positions, use_cache=False).logits[0, -1].float()
        if torch.isnan(logits).any():
            raise UserError(nan_message(role))
        distance = max(distance, 0.5 * (together[row] - logits.softmax(-1)).abs().sum().item())
    return distance
