"""A draft without a model: what followed the last few tokens where they came before, in the prompt
or the beam itself.

Prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding), as a
distribution: drafts are drawn from it and verified as any others, so the output stays exact. It
pays where the text repeats its context: code, summaries, answers that quote.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding.dice.sampling import FloatArray, IntArray
from decoding.forest.node_scorer import NodeScorer, Process, ScorerOptions
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from decoding.pairs.architecture import vocab_size_of
from decoding.pairs.drafts.base import Draft, NamedKind, whole_number

MAX_NGRAM = 3
BACKOFF = 0.3  # weight of matches of n - 1 tokens over those of n
_LOOKUP_TOKENS = 10  # that transformers' prompt lookup drafts at a time, as its documentation does

Gram = tuple[int, ...]


@dataclass(frozen=True)
class NgramDraft(Draft):
    """Tokens drafted by looking up what followed a suffix before.

    Args:
        max_ngram: tokens of the longest suffix that is looked up.
    """

    max_ngram: int = MAX_NGRAM

    @property
    def name(self) -> str:
        """The draft as users write it: `ngram:3`."""
        return f"ngram:{self.max_ngram}"

    def fingerprint(self) -> bytes:
        """Bytes of the name, which says all."""
        return self.name.encode()

    def scorer(self, target: ForestScorer, options: ScorerOptions) -> NodeScorer:
        """Lookups on the host; of the target only its vocabulary and its device are read."""
        return NgramScorer(
            self,
            options.rows,
            vocab_size_of(target.model),
            temperature=options.temperature,
            top=options.top,
            device=target.device,
            process=options.process,
        )

    def assistance(self) -> dict[str, Any]:
        """Arguments of transformers' own prompt lookup, with suffixes as long."""
        return {"prompt_lookup_num_tokens": _LOOKUP_TOKENS, "max_matching_ngram_size": self.max_ngram}


def _from_text(number: str | None, target: Any) -> NgramDraft | None:
    """The draft that `ngram` or `ngram:N` names, with N at least 1."""
    if number is None:
        return NgramDraft()
    found = whole_number(number)
    return NgramDraft(found) if found else None


KIND = NamedKind("ngram", "ngram or ngram:N (no draft model; suffixes of up to N tokens)", _from_text)


class NgramIndex:
    """The tokens that followed each n-gram in one prompt and in the paths of its forest.

    The prompt's n-grams are counted once; those that end inside the forest are kept by node,
    because a beam may only look at its own path. A node is added, found and removed in a few
    dictionary operations for each n.
    """

    def __init__(self, prompt: Sequence[int], forest: TokenForest, max_ngram: int) -> None:
        self._forest, self._max = forest, max_ngram
        self._counts: dict[Gram, dict[int, int]] = {}  # n-gram -> token that followed in the prompt -> times
        tokens = tuple(prompt)
        for at in range(1, len(tokens)):
            for n in range(1, min(max_ngram, at) + 1):
                followers = self._counts.setdefault(tokens[at - n : at], {})
                followers[tokens[at]] = followers.get(tokens[at], 0) + 1
        self._nodes: dict[Gram, dict[int, None]] = {}  # n-gram -> nodes that followed, in order
        # Of each node: the last tokens up to it, and the nodes of its path by depth.
        self._tails: dict[int, Gram] = {0: tokens[-max_ngram:]}
        self._paths: dict[int, tuple[int, ...]] = {0: (0,)}

    def add(self, node: int) -> None:
        """Take in a node, and its ancestors where they are new."""
        new = []
        while node not in self._tails:
            new.append(node)
            node = self._forest.parents[node]
        for fresh in reversed(new):
            parent = self._forest.parents[fresh]
            tail = self._tails[parent]
            for n in range(1, len(tail) + 1):
                self._nodes.setdefault(tail[-n:], {})[fresh] = None
            self._tails[fresh] = (*tail, self._forest.tokens[fresh])[-self._max :]
            self._paths[fresh] = (*self._paths[parent], fresh)

    def remove(self, node: int) -> None:
        """Forget a node that died."""
        if self._tails.pop(node, None) is None:
            return
        tail = self._tails_of_parent(node)
        for n in range(1, len(tail) + 1):
            followers = self._nodes[tail[-n:]]
            del followers[node]
            if not followers:
                del self._nodes[tail[-n:]]
        del self._paths[node]

    def _tails_of_parent(self, node: int) -> Gram:
        return self._tails[self._forest.parents[node]]  # children die before parents

    def followers(self, node: int, n: int) -> dict[int, int]:
        """Times that each token followed the last `n` tokens before, in the prompt and on the path
        to a known node.
        """
        tail = self._tails[node]
        if len(tail) < n:
            return {}
        gram = tail[-n:]
        counts = self._counts.get(gram, {})
        later = self._nodes.get(gram)
        if later:
            path, depths, tokens = self._paths[node], self._forest.depths, self._forest.tokens
            counts = dict(counts)
            for other in later:
                depth = depths[other]
                if depth < len(path) and path[depth] == other:
                    counts[tokens[other]] = counts.get(tokens[other], 0) + 1
        return counts

    def longest(self, node: int) -> int:
        """Tokens of the longest suffix of the path to a known node that came before; 0 for none."""
        return next((n for n in range(self._max, 0, -1) if self.followers(node, n)), 0)

    def distribution(self, node: int) -> dict[int, float]:
        """Share of each token after a known node, in all one; empty where no suffix came before.

        Q(v) = Σ_n w_n · (share of v after the last n tokens), w_n falling by `BACKOFF` from the
        longest match down.
        """
        shares: dict[int, float] = {}
        weight = 1.0
        for n in range(self._max, 0, -1):
            counts = self.followers(node, n)
            if counts:
                each = weight / sum(counts.values())
                for token, count in counts.items():
                    shares[token] = shares.get(token, 0.0) + each * count
                weight *= BACKOFF
        total = sum(shares.values())
        return {token: share / total for token, share in shares.items()}


class _Prompt:
    """The prompt in a row."""

    def __init__(self, index: NgramIndex) -> None:
        self.index = index
        self.scored: dict[int, tuple[list[float], list[int]]] = {}  # log-probabilities, best first, and their tokens
        self.calls = 0


class NgramScorer:
    """Nodes in, log-probabilities out, as `ForestScorer` for a model; a `NodeScorer`.

    Args:
        draft: the settings.
        rows: prompts at a time.
        vocabulary: V of the target.
        temperature: sharpens or flattens as it does the target: Q^(1 / temperature), normalised.
        top: at most so many likeliest tokens per node are given, on the host; None: rows of V on
            `device`.
        device: of `log_probs`.
        process: as for ForestScorer; what it forbids is not proposed.
    """

    def __init__(
        self,
        draft: NgramDraft,
        rows: int,
        vocabulary: int,
        temperature: float = 1.0,
        top: int | None = None,
        device: torch.device | None = None,
        process: Process | None = None,
    ) -> None:
        self.draft, self.vocabulary, self.temperature, self.top = draft, vocabulary, temperature, top
        self.device, self._process = device or torch.device("cpu"), process
        self.model_seconds = 0.0
        self._prompts: list[_Prompt | None] = [None] * rows

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """Index a prompt; node 0 of `forest` is its last token. Nothing is shared between rows."""
        held = self._prompts[row] = _Prompt(NgramIndex(prompt, forest, self.draft.max_ngram))
        held.scored[0] = self._look_up(row, held.index, 0)

    def close_row(self, row: int) -> None:
        """The prompt in a row is done."""
        self._prompts[row] = None

    def close(self) -> None:
        """Give nothing back: nothing is borrowed."""

    def free(self) -> None:
        """Keep nothing: there is nothing to free."""

    def score(self, wanted: Mapping[int, Sequence[int]]) -> int:
        """Look up all nodes of `wanted` (row -> nodes) that were not; returns how many these are."""
        began, count = time.perf_counter(), 0
        for row, nodes in wanted.items():
            held = self._held(row)
            fresh = [node for node in dict.fromkeys(nodes) if node not in held.scored]
            for node in fresh:
                held.index.add(node)
                held.scored[node] = self._look_up(row, held.index, node)
            held.calls += bool(fresh)
            count += len(fresh)
        self.model_seconds += time.perf_counter() - began
        return count

    def _look_up(self, row: int, index: NgramIndex, node: int) -> tuple[list[float], list[int]]:
        logs = {token: math.log(share) / self.temperature for token, share in index.distribution(node).items()}
        if logs and self._process is not None:
            table = torch.full((1, self.vocabulary), -torch.inf, device=self.device)
            table[0, list(logs)] = torch.tensor(list(logs.values()), device=self.device)
            processed = self._process(row, [node], table)[0].tolist()
            logs = {token: log for token, log in enumerate(processed) if -math.inf < log < math.inf}
        ranked = sorted(logs.items(), key=lambda item: -item[1])[: self.top]
        return [log for _, log in ranked], [token for token, _ in ranked]

    def proposes(self, row: int, nodes: Sequence[int]) -> bool:
        """True if any of some scored nodes has a next token to propose."""
        return any(self._held(row).scored[node][0] for node in nodes)

    def tops(self, row: int, nodes: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """Log-probabilities of the likeliest next tokens, best first, and the tokens; [N, K] each.

        K is what the longest of these rows needs; -inf fills the others.
        """
        found = [self._held(row).scored[node] for node in nodes]
        width = max(1, *(len(logs) for logs, _ in found))
        values, tokens = np.full((len(nodes), width), -np.inf), np.zeros((len(nodes), width), dtype=np.int64)
        for i, (logs, ids) in enumerate(found):
            values[i, : len(logs)], tokens[i, : len(logs)] = _normalised(logs), ids
        return values, tokens

    def log_probs(self, row: int, nodes: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token at scored nodes, [N, V] float32; -inf for tokens that
        never followed.
        """
        found = [self._held(row).scored[node] for node in nodes]
        index = [i * self.vocabulary + token for i, (_, ids) in enumerate(found) for token in ids]
        values = [value for logs, _ in found for value in _normalised(logs)]
        table = torch.full((len(nodes), self.vocabulary), -torch.inf, device=self.device)
        table.view(-1)[torch.tensor(index, dtype=torch.int64).to(self.device)] = torch.tensor(values).to(self.device)
        return table

    def longest(self, row: int, node: int) -> int:
        """Tokens of the longest suffix that a scored node's proposals come from; 0 where it has
        none.
        """
        held = self._held(row)
        return held.index.longest(node) if held.scored[node][0] else 0

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor | None:
        """None, for there is no model that could have hidden states."""
        return None

    def forget(self, row: int, dead: Sequence[int], live: Sequence[int]) -> None:
        """Nodes died; keep what was looked up at `live` beams only."""
        held = self._held(row)
        for node in dead:
            held.index.remove(node)
        held.scored = {node: held.scored[node] for node in live if node in held.scored}

    def calls(self, row: int) -> int:
        """Times that nodes of the row's prompt were looked up."""
        return self._held(row).calls

    def _held(self, row: int) -> _Prompt:
        held = self._prompts[row]
        assert held is not None, "the row was opened"
        return held


def _normalised(logs: list[float]) -> list[float]:
    """Logarithms of shares that add up to one."""
    if not logs:
        return []
    best = max(logs)
    total = best + math.log(sum(math.exp(value - best) for value in logs))
    return [value - total for value in logs]
