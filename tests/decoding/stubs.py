"""Models small enough to enumerate, and an independent implementation of beam sampling to compare with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from decoding import DecodingConfig, ModelPair
from decoding.dice.sampling import Joint, compact_joint, top_entries
from decoding.policies.base import DraftContext
from decoding.tasks.base import Prompt

MAX_POSITIONS = 16


def joint_distribution(
    log_probs: Tensor,  # [B, V] float32
    nodes: Sequence[int],
    weights: Sequence[float],
    config: DecodingConfig,
    model_name: str = "model",
) -> Joint:
    """The compact joint as the decoder makes it: the likeliest tokens to the host, then the cut."""
    count = log_probs.shape[1] if config.top_k is None else config.top_k
    return compact_joint(*top_entries(log_probs, count), nodes, weights, config, model_name)


def settings(width: int, drafts: int, depth: int, tokens: int, **changes: Any) -> DecodingConfig:
    """A config that returns all beams, never ends early and verifies by rejection, unless `changes` say otherwise."""
    fields = dict(
        target_width=width,
        draft_width=drafts,
        draft_depth=depth,
        max_new_tokens=tokens,
        num_return_sequences=width,
        eos_token_id=-1,
        verification="rejection",
    )
    return DecodingConfig(**{**fields, **changes})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TableModel(nn.Module):
    """A causal LM whose next-token logits are a table of (position, last token): [positions, V, V]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        vocabulary = table.shape[-1]
        self.table = nn.Parameter(table.clone())
        self.head = nn.Identity()
        self.config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=MAX_POSITIONS,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.config.rope_parameters = None  # its positions are a table, which ends

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> SimpleNamespace:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        return SimpleNamespace(logits=self.head(self.table[position_ids, input_ids]))  # [B, N, V]


def random_pair(vocabulary: int, seed: int = 0, closeness: float = 0.5, scale: float = 1.5) -> ModelPair:
    """A target and a draft with random tables; the draft's is the target's plus noise, 0: unrelated, 1: equal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (MAX_POSITIONS, vocabulary, vocabulary)
    target = scale * torch.randn(shape, generator=generator)
    noise = scale * torch.randn(shape, generator=generator)
    return ModelPair(TableModel(target), TableModel(closeness * target + (1 - closeness) * noise))


def small_llama(vocabulary: int = 7, layers: int = 2, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Random, grouped-query attention, sharp enough that tokens and positions matter; `changes` of its config."""
    shape = dict(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, **{**shape, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def sharp_llama(vocabulary: int = 7, seed: int = 0) -> LlamaForCausalLM:
    """As small_llama, with distributions far from flat, as a language model's are."""
    model = small_llama(vocabulary, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def llama_pair(vocabulary: int = 7, engine: str = "auto") -> ModelPair:
    """The draft is the target with noise on its weights, so that drafts are sometimes right."""
    target, draft = small_llama(vocabulary), small_llama(vocabulary)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return ModelPair(target, draft, engine=engine)


class SimpleFeatures:
    """Two numbers of a layer, and one of each candidate."""

    names = ["layer", "parents"]  # noqa: RUF012 - as the protocol has it
    candidate_names = ["q"]  # noqa: RUF012
    version = 1

    def of_layer(self, context: DraftContext) -> np.ndarray:
        return np.array([context.layer, len(context.weights)], dtype=np.float32)

    def of_candidates(self, context: DraftContext) -> np.ndarray:
        assert context.candidates is not None
        return context.candidates.probs[:, None].astype(np.float32)


class FixedTask:
    """Prompts that need no tokenizer."""

    name = "numbers"

    def prompts(self, split: str, limit: int | None, tokenizer: object) -> list[Prompt]:
        return [Prompt(f"{split}:{i}", [1 + i % 7, 2, 3], None, None) for i in range(limit or 3)]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


Path = tuple[int, ...]
Beams = frozenset[Path]


class Reference:
    """Exact beam sampling by enumeration, written from design 5.1 alone: dictionaries and loops, float64."""

    def __init__(self, model: nn.Module, prompt: list[int], config: DecodingConfig) -> None:
        self.model, self.prompt, self.config = model, prompt, config
        self._log_p: dict[Path, np.ndarray] = {}

    def log_p(self, path: Path) -> np.ndarray:
        """Temperature-scaled log-probabilities after prompt + path, [V]."""
        if path not in self._log_p:
            sequence = torch.tensor([[*self.prompt, *path]])
            with torch.inference_mode():
                everything = self.model(input_ids=sequence, position_ids=torch.arange(sequence.shape[1])[None])
            logits = everything.logits[0, -1].double() / self.config.temperature
            self._log_p[path] = logits.log_softmax(-1).numpy()
        return self._log_p[path]

    def weight(self, path: Path) -> float:
        return float(sum(self.log_p(path[:i])[token] for i, token in enumerate(path)))

    def score(self, path: Path) -> float:
        return self.weight(path) / len(path) ** self.config.length_penalty

    def joint(self, beams: Iterable[Path]) -> dict[Path, float]:
        """P over children of `beams`, cut as the config says."""
        config = self.config
        shares: dict[Path, float] = {}
        for beam in beams:
            row = {(*beam, v): float(np.exp(lp)) for v, lp in enumerate(self.log_p(beam))}
            if config.warp == "beam":
                row = _cut(row, config)
            shares |= {child: float(np.exp(self.weight(beam))) * share for child, share in row.items()}
        if config.warp == "joint":
            shares = _cut(shares, config)
        total = sum(shares.values())
        return {child: share / total for child, share in shares.items()}

    def step(self, beams: Beams, width: int) -> dict[Beams, float]:
        """Distribution of the next set of beams: `width` draws from the joint, one after the other."""
        joint = self.joint(sorted(beams))
        now: dict[Beams, float] = {frozenset(): 1.0}
        for _ in range(width if self.config.replacement else min(width, len(joint))):
            after: dict[Beams, float] = defaultdict(float)
            for drawn, chance in now.items():
                left = 1.0 if self.config.replacement else sum(p for x, p in joint.items() if x not in drawn)
                for x, p in joint.items():
                    if self.config.replacement or x not in drawn:
                        after[drawn | {x}] += chance * p / left
            now = after
        return dict(now)

    def returned(self, width_of: Callable[[Reference, Beams, int], int] | None = None) -> dict[Beams, float]:
        """Distribution of the set of returned sequences, with layers of widths `width_of(reference, beams, layer)`.

        Beams that end leave for a pool of the best target_width; decoding stops by transformers' rule.
        """
        config = self.config
        ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id or [])
        out: dict[Beams, float] = defaultdict(float)
        now: dict[tuple[Beams, Beams], float] = {(frozenset({()}), frozenset()): 1.0}
        for layer in range(1, config.max_new_tokens + 1):
            after: dict[tuple[Beams, Beams], float] = defaultdict(float)
            for (beams, pool), chance in now.items():
                width = width_of(self, beams, layer) if width_of else config.target_width
                for children, share in self.step(beams, width).items():
                    growing = frozenset(child for child in children if child[-1] not in ends)
                    ended = self._best(pool | (children - growing), config.target_width)
                    if self._stops(growing, ended, layer):
                        cut_off = growing if layer == config.max_new_tokens else frozenset()  # else the pool decided
                        out[self._best(ended | cut_off, config.num_return_sequences)] += chance * share
                    else:
                        after[growing, ended] += chance * share
            now = after
        return dict(out)

    def _best(self, paths: Beams, count: int) -> Beams:
        return frozenset(sorted(paths, key=lambda path: -self.score(path))[:count])

    def _stops(self, growing: Beams, ended: Beams, layer: int) -> bool:
        config = self.config
        if not growing or layer == config.max_new_tokens:
            return True
        if len(ended) < config.target_width:
            return False
        if config.early_stopping is True:
            return True
        longest = config.early_stopping == "never" and config.length_penalty > 0
        length = config.max_new_tokens if longest else layer
        hope = max(self.weight(path) for path in growing) / length**config.length_penalty
        return min(self.score(path) for path in ended) >= hope


def _cut(shares: dict[Path, float], config: DecodingConfig) -> dict[Path, float]:
    """Top-k, then top-p, of un-normalised shares; what stays keeps its share."""
    ranked = sorted(shares, key=lambda child: -shares[child])[: config.top_k]
    if config.top_p is not None:
        total, before, keep = sum(shares[c] for c in ranked), 0.0, []
        for child in ranked:
            if before < config.top_p * total:
                keep.append(child)
            before += shares[child]
        ranked = keep
    return {child: shares[child] for child in ranked}


def chi_square_p(counts: Mapping[Any, int], expected: dict[Any, float], least: float = 8.0) -> float:
    """p-value of observed counts under exact probabilities.

    Neighbours in sorted order (beams that begin alike) are pooled until at least `least` are expected. An outcome
    that the exact distribution excludes gives 0.
    """
    if any(outcome not in expected for outcome in counts):
        return 0.0
    total = sum(counts.values())
    bins, seen, mean = [], 0.0, 0.0
    for outcome in sorted(expected, key=lambda o: sorted(o) if isinstance(o, frozenset) else o):
        seen, mean = seen + counts.get(outcome, 0), mean + expected[outcome] * total
        if mean >= least:
            bins.append((seen, mean))
            seen, mean = 0.0, 0.0
    if mean > 0 and bins:
        bins[-1] = (bins[-1][0] + seen, bins[-1][1] + mean)
    return chi_square_tail(sum((o - e) ** 2 / e for o, e in bins), len(bins) - 1)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """P(chi-square with `freedom` degrees of freedom >= statistic); 1 where nothing is free."""
    if freedom < 1:
        return 1.0
    half = torch.tensor([freedom, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1]))


def open_scorers(run: Any) -> list[Any]:
    """The scorers of a prompt that hold slots of it: the target's, and the draft's once it has read the prompt."""
    late = run.draft
    return [run.target] if run.row in late._waiting else [run.target, late.scorer]


@torch.no_grad()
def in_16_bits(model: Any) -> Any:
    """Round a float32 model's weights as a checkpoint in bfloat16 has them; returns it."""
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    return model
