"""ForestScorer: nodes in, log-probabilities out. The only place that calls a model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from decoding.cache import ForestCache
from decoding.errors import UserError
from decoding.forest import TokenForest
from decoding.sampling import FloatArray, log_probabilities, nan_message


class ForestScorer:
    """Runs one model over one prompt's forest; each node is scored at most once.

    Args:
        model: a transformers causal LM.
        prompt: token ids, [L].
        forest: the prompt's forest, shared with the other model's scorer.
        spare_slots: KV slots to set aside for new tokens; more are made when they run out.
        temperature: divides the logits.
        keep_hidden: also keep the last hidden state of scored nodes.
    """

    def __init__(
        self,
        model: Any,
        prompt: list[int],
        forest: TokenForest,
        spare_slots: int,
        temperature: float,
        keep_hidden: bool = False,
    ) -> None:
        self.model, self.forest, self.temperature = model, forest, temperature
        self.device = next(model.parameters()).device
        self.calls = 0
        self._prompt = prompt
        self._rows: dict[int, tuple[Tensor, int]] = {}  # node -> (log-probabilities of a pass [N, V], row)
        self._hidden: dict[int, tuple[Tensor, int]] = {}  # node -> (hidden states of a pass [N, H], row)
        self._hidden_pass: Tensor | None = None
        self._keep_hidden = keep_hidden
        self._hook: RemovableHandle | None = None
        config = model.config.get_text_config()
        dtype = next(model.parameters()).dtype
        self.cache = ForestCache(len(prompt), len(prompt) + spare_slots, config.num_hidden_layers, self.device, dtype)
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )

    def close(self) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()

    def prefill(self) -> None:
        """Score the prompt; its last token is node 0."""
        if self._keep_hidden:  # hooked here rather than above: who could not build all scorers closes none
            self._hook = self.model.get_output_embeddings().register_forward_pre_hook(self._keep)
        mask = self.cache.begin_prompt()
        positions = torch.arange(len(self._prompt), device=self.device)[None]
        self._forward(self._prompt, positions, mask, [0], **self._last_only)

    def score(self, nodes: list[int]) -> int:
        """Make sure that all `nodes` are scored, in at most one pass; unscored ancestors are scored with them.

        Returns:
            The number of nodes scored.
        """
        fresh: set[int] = set()
        for node in nodes:
            while node not in fresh and not self.cache.holds(node):
                fresh.add(node)
                node = self.forest.parents[node]
        if not fresh:
            return 0
        order = sorted(fresh)  # parents first: they are older
        mask = self.cache.begin_nodes(order, [self.forest.parents[n] for n in order])
        depths = torch.tensor([[self.forest.depths[n] for n in order]])
        positions = depths.to(self.device) + (len(self._prompt) - 1)
        self._forward([self.forest.tokens[n] for n in order], positions, mask, order)
        self.calls += 1
        return len(order)

    def _forward(self, tokens: list[int], positions: Tensor, mask: Tensor, nodes: list[int], **extra: object) -> None:
        """One pass; keeps the last len(nodes) rows."""
        logits = self.model(
            input_ids=torch.tensor([tokens]).to(self.device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **extra,
        ).logits[0, -len(nodes) :]  # [N, V]
        log_probs = log_probabilities(logits, self.temperature)
        self._rows.update((node, (log_probs, i)) for i, node in enumerate(nodes))
        if self._hidden_pass is not None:
            hidden = self._hidden_pass[0, -len(nodes) :]
            self._hidden.update((node, (hidden, i)) for i, node in enumerate(nodes))

    def log_probs(self, nodes: list[int]) -> Tensor:
        """Log-probabilities of the next token at scored `nodes`, [N, V] float32."""
        return _gather([self._rows[n] for n in nodes])

    def has_log_probs(self, node: int) -> bool:
        """Whether `log_probs` can answer for the node."""
        return node in self._rows

    def hidden(self, nodes: list[int]) -> FloatArray | None:
        """Mean of the last hidden states at those of `nodes` that have been scored, [H]; None if none was."""
        rows = [self._hidden[n] for n in nodes if n in self._hidden]
        return _gather(rows).float().mean(0).cpu().numpy() if rows else None

    def forget(self, dead: list[int], live: list[int]) -> None:
        """Free the slots of dead nodes, and all log-probabilities except at `live` beams."""
        self.cache.release(dead)
        self._rows = {n: self._rows[n] for n in live if n in self._rows}
        near = {*live, *(self.forest.parents[n] for n in live)}
        self._hidden = {n: row for n, row in self._hidden.items() if n in near}

    def _keep(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        self._hidden_pass = args[0]  # [1, N, H]


def _gather(rows: list[tuple[Tensor, int]]) -> Tensor:
    """Rows of one or several passes -> [N, width]."""
    first = rows[0][0]
    if all(source is first for source, _ in rows):
        index = [i for _, i in rows]
        if index == list(range(len(first))):
            return first
        return first[torch.tensor(index).to(first.device)]
    return torch.stack([source[i] for source, i in rows])


@torch.inference_mode()
def check_forest_pass(model: Any, role: str) -> None:
    """Refuse a model whose forest pass differs from its sequential pass.

    Masks and positions are passed as transformers' attention models take them; a model that ignores either
    (some with ALiBi or learned relative positions) would be decoded wrongly without a word.

    Raises:
        UserError: the two passes differ, or the model cannot run a forest pass at all.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = [token % vocabulary for token in (3, 1, 4, 1)]
    forest = TokenForest()
    scorer = ForestScorer(model, prompt, forest, 8, temperature=1.0)
    first, second = forest.child(0, 5 % vocabulary), forest.child(0, 2 % vocabulary)
    last = [forest.child(first, 6 % vocabulary), forest.child(second, 5 % vocabulary)]
    try:
        scorer.prefill()
        scorer.score([first, second])
        scorer.score(last)
        together = scorer.log_probs(last).exp()  # [2, V]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"The {role} model ({kind}) cannot run a forest pass, in which one pass scores several beams under a 4-D "
            f"attention mask: {reason[0]}"
        ) from error
    distance = 0.0
    for row, leaf in enumerate(last):
        path = torch.tensor([prompt + forest.path(leaf)]).to(scorer.device)
        positions = torch.arange(path.shape[1], device=scorer.device)[None]
        logits = model(input_ids=path, position_ids=positions, use_cache=False).logits[0, -1].float()
        if torch.isnan(logits).any():
            raise UserError(nan_message(role))
        distance = max(distance, 0.5 * (together[row] - logits.softmax(-1)).abs().sum().item())
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if not distance <= (1e-3 if exact else 0.05):
        raise UserError(
            f"The {role} model ({kind}) scores a forest of beams differently than one beam at a time (total variation "
            f"{distance:.3f}): it does not honour the mask or the positions it is given, so its beams would be wrong. "
            "Use a model with rotary or learned positions, such as Llama, Qwen, Mistral or GPT-NeoX."
        )
