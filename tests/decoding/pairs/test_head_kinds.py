"""Heads of FSPAD and of Chimera: logits of a chain written out, exact output whatever they guess, their files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoding import DSBDDecoder, ModelPair, UserError, beam_sample
from decoding.engine.feature_head import DraftHead
from decoding.engine.runner import runner_of
from decoding.engine.sampled_head import SampledHead
from decoding.engine.trigram_head import TrigramHead
from decoding.forest.head_scorer import HeadScorer
from decoding.forest.node_scorer import ScorerOptions
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from decoding.pairs.drafts.chimera import ChimeraDraft
from decoding.pairs.drafts.fspad import FspadDraft
from decoding.pairs.drafts.head import HeadDraft, load_own, save_own
from decoding.results import Recorder
from tests.decoding import stubs
from tests.decoding.engine.test_graphs import Static
from tests.decoding.pairs.test_eagle3 import (
    KNOWN,
    PROMPTS,
    chain,
    check_sampled,
    check_searched,
    normed,
    row_of,
    states_of,
    target_of,
    turned,
)
from tests.decoding.stubs import in_16_bits, seeded

settings = partial(stubs.settings, verification="shared_noise")
KINDS: dict[str, tuple[type[DraftHead], type[HeadDraft]]] = {
    "fspad": (SampledHead, FspadDraft),
    "chimera": (TrigramHead, ChimeraDraft),
}


def head_of(kind: str, target: Any, seed: int = 0) -> Any:
    """A head of random weights, those of its norms too."""
    head = KINDS[kind][0].for_target(target, len(KNOWN))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random) * 0.3 + (weight.ndim == 1))
    head.t2d.zero_()
    head.use_tokens(torch.tensor(KNOWN))
    return head.eval()


def pair_of(kind: str, seed: int = 0) -> ModelPair:
    target = target_of()
    return ModelPair(target, KINDS[kind][1](head_of(kind, target, seed)))


# ---------------------------------------------------------------------------------------- reference


def mixed(head: Any, states: list[Tensor], positions: list[int]) -> Tensor:
    """What the last of some states mixes of all, [H]."""
    w, dim, groups = head.midlayer.self_attn, head.midlayer.self_attn.head_dim, head.groups
    read = [normed(x, head.midlayer.input_layernorm.weight) for x in states]
    keys = [turned((w.k_proj.weight @ x).view(-1, dim), p) for x, p in zip(read, positions, strict=True)]
    values = [(w.v_proj.weight @ x).view(-1, dim) for x in read]
    query, found = turned((w.q_proj.weight @ read[-1]).view(-1, dim), positions[-1]), []
    for number in range(len(query)):
        at = number // groups
        scores = torch.stack([query[number] @ key[at] / math.sqrt(dim) for key in keys]).softmax(0)
        found.append(sum((s * v[at] for s, v in zip(scores, values, strict=True)), torch.zeros(dim)))
    return w.o_proj.weight @ torch.cat(found)


def gated(mlp: Any, gate: Tensor, states: Tensor) -> Tensor:
    return mlp.down_proj.weight @ (F.silu(mlp.gate_proj.weight @ gate) * (mlp.up_proj.weight @ states))


def fspad(head: Any, states: list[Tensor | None], tokens: list[int]) -> Tensor:
    """Logits after the last token of a chain, [Vd], token by token; `states` as for `reference` of EAGLE-3."""
    read: list[Tensor] = []
    handed = torch.zeros(0)
    for place, token in enumerate(tokens[1:]):
        given = states[place]
        feature, embedded = handed if given is None else given[0], head.embedding[token]
        both = head.sampler.fc.weight @ torch.cat([embedded, feature])
        read.append(both + gated(head.sampler.mlp, embedded, normed(both, head.sampler.norm.weight)))
        out = read[-1] + mixed(head, read, list(range(place + 1)))
        y = normed(out, head.midlayer.post_attention_layernorm.weight)
        told, handed = (torch.cat([out, out]) + gated(head.midlayer.mlp, y, y)).chunk(2)
    return head.lm_head.weight @ told


def chimera(head: Any, states: list[Tensor | None], tokens: list[int]) -> Tensor:
    """The same; its own states are encodings, and the last token's is one whatever is known of it."""
    read = []
    for place in range(len(tokens)):
        given = states[place] if place < len(tokens) - 1 else None
        if given is None:
            three = torch.cat([head.embedding[tokens[max(place + i, 0)]] for i in (-2, -1, 0)])
            three = three + F.silu(head.trigram.block.linear.weight @ three)
            read.append(head.trigram.fc.weight @ three)
        else:
            read.append(given[0])
    out = read[-1] + mixed(head, read, list(range(len(tokens))))
    y = normed(out, head.midlayer.post_attention_layernorm.weight)
    out = out + gated(head.midlayer.mlp, y, y)
    return head.lm_head.weight @ (out + F.silu(head.residual.linear.weight @ out))


REFERENCES = {"fspad": fspad, "chimera": chimera}


def scorers(target: Any, draft: HeadDraft, **changes: Any) -> tuple[ForestScorer, HeadScorer]:
    options = ScorerOptions(rows=1, longest_prompt=8, spare_slots=16, engine="eager", **changes)
    first = ForestScorer(target, **vars(options), layers=draft.target_layers)
    scorer: Any = draft.scorer(first, options)
    return first, scorer


@pytest.mark.parametrize("rounded", [lambda model: model, in_16_bits], ids=["", "of 16 bits"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [[5, 3, 8, 1], [6, 2], [9]], ids=len)
@torch.inference_mode()
def test_a_chain_is_scored_as_written_out(kind: str, prompt: list[int], rounded: Callable[[Any], Any]) -> None:
    """By the target's states as far as it has been, by its own from there, and anew once it has come."""
    target, tokens, count = rounded(target_of()), [4, 9, 2, 7], len(prompt)
    head, reference = rounded(head_of(kind, target)), REFERENCES[kind]
    theirs, ours = scorers(target, KINDS[kind][1](head))
    forest = TokenForest()
    theirs.open(0, prompt, forest)
    ours.open(0, prompt, forest)
    whole = [*prompt, *tokens]
    states: list[Tensor | None] = list(states_of(target, whole, head.shape.layers))

    def check(node: int, known: list[Tensor | None], length: int) -> None:
        expected = reference(head, known, whole[:length]).log_softmax(0)
        torch.testing.assert_close(row_of(ours, node), expected, rtol=1e-4, atol=1e-4)

    if count > 1 or kind == "chimera":  # a prompt of one token stands before no state
        check(0, states, count)
    if count == 1 and kind == "fspad":
        return
    nodes = chain(forest, tokens)
    known = [*states[:count], None, None, None, None]
    for number, node in enumerate(nodes, 1):
        ours.score({0: [node]})
        check(node, known, count + number)
    guessed = row_of(ours, nodes[-1])
    theirs.score({0: nodes[:3]})
    whole[-1], states[-1] = 0, None
    last = forest.child(nodes[2], 0)
    ours.score({0: [last]})  # whatever the target has scored is read anew
    check(last, states, count + 4)
    assert (guessed - row_of(ours, last)).abs().max() > 1e-3


@torch.inference_mode()
def test_a_prompt_that_begins_alike_is_read_once() -> None:
    """The last token of the first prompt has an encoding in its slot, and is not taken over."""
    target = target_of()
    draft = ChimeraDraft(head_of("chimera", target))
    options = ScorerOptions(rows=2, longest_prompt=8, spare_slots=16, engine="eager")
    theirs = ForestScorer(target, **vars(options), layers=draft.target_layers)
    ours: Any = draft.scorer(theirs, options)
    for row, (prompt, shared) in enumerate([([5, 3, 8], None), ([5, 3, 8, 1], (0, 3))]):
        forest = TokenForest()
        theirs.open(row, prompt, forest, shared)
        ours.open(row, prompt, forest, shared)
    states: list[Tensor | None] = list(states_of(target, [5, 3, 8, 1], draft.target_layers))
    expected = chimera(draft.head, states, [5, 3, 8, 1]).log_softmax(0)
    torch.testing.assert_close(ours.log_probs(1, [0])[0][KNOWN], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_in_16_bits_a_head_says_nearly_the_same(kind: str) -> None:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        target = target_of().to(dtype)
        theirs, ours = scorers(target, KINDS[kind][1](head_of(kind, target).to(dtype)))
        forest = TokenForest()
        theirs.open(0, [5, 3, 8, 1], forest)
        ours.open(0, [5, 3, 8, 1], forest)
        nodes = chain(forest, [4, 9, 2])
        ours.score({0: nodes[-1:]})
        rows.append(torch.stack([row_of(ours, node).exp() for node in (0, *nodes)]))
    assert (rows[0] - rows[1]).abs().max() < 0.05  # 8 bits of a mantissa, through a few sums of some dozen numbers


# -------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"top_k": 6}, {"temperature": 0.6, "eos_token_id": 3}, {"oversample": 2}])
@pytest.mark.parametrize("width", [1, 4])
def test_sampled_tokens_are_the_targets_whatever_the_head_guesses(
    kind: str, changes: dict[str, Any], width: int
) -> None:
    check_sampled(pair_of(kind), width, changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 3])
def test_searched_tokens_are_the_targets(kind: str, width: int) -> None:
    check_searched(pair_of(kind), width)


@pytest.mark.parametrize("kind", KINDS)
def test_with_ngrams_beside_it_and_a_controllers_states_the_tokens_are_the_targets(kind: str, tmp_path: Path) -> None:
    target = target_of()
    save_own(head_of(kind, target), tmp_path, torch.float32)
    pair, config = ModelPair(target, f"ngram+{kind}:{tmp_path}"), settings(3, 6, 3, 12, top_k=6)
    recorder = Recorder()
    recorder.needs_hidden = True
    drafted = DSBDDecoder(pair, config).generate(PROMPTS, seeded(), batch_size=2, recorder=[recorder] * len(PROMPTS))
    alone = beam_sample(target, PROMPTS, config, generator=seeded())
    assert [r.sequences for r in drafted] == [r.sequences for r in alone]


@pytest.mark.parametrize("kind", KINDS)
def test_static_shapes_give_the_same_guesses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, config = pair_of(kind), settings(3, 6, 3, 12)
    expected = DSBDDecoder(pair, config).generate(PROMPTS, seeded(), batch_size=2)
    draft: Any = pair.drafter
    runner = runner_of(draft.head, pair.engine)
    runner._spare.clear()
    still = Static(runner.prompts)
    monkeypatch.setattr(runner, "forward", still)
    found = DSBDDecoder(pair, config).generate(PROMPTS, seeded(), batch_size=2)
    assert [r.sequences for r in found] == [r.sequences for r in expected]
    assert [r.stats.target_calls for r in found] == [r.stats.target_calls for r in expected]
    assert still.fillers > 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_tokens_of_the_target_alone(kind: str) -> None:
    """Under CUDA graphs; float32, where no two keys of these seeds are close."""
    target = target_of().cuda()
    pair = ModelPair(target, KINDS[kind][1](head_of(kind, target).cuda()))
    config = settings(4, 8, 3, 12)
    drafted = DSBDDecoder(pair, config).generate(PROMPTS, seeded(), batch_size=4)
    alone = beam_sample(target, PROMPTS, config, generator=seeded())
    assert [r.sequences for r in drafted] == [r.sequences for r in alone]
    assert sum(r.stats.draft_calls for r in drafted) > 4


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_uses_a_head(kind: str, tmp_path: Path) -> None:
    target = target_of()
    head = head_of(kind, target)
    save_own(head, tmp_path, torch.float32)
    pair = ModelPair(target, f"{kind}:{tmp_path}")
    found: Any = pair.drafter
    assert pair.draft_name == f"{kind}:{tmp_path}" and found.head.shape == head.shape
    for name, value in head.state_dict().items():
        assert torch.equal(found.head.state_dict()[name], value), name
    assert pair.fingerprint == ModelPair(target, KINDS[kind][1](head)).fingerprint
    assert pair.fingerprint != pair_of(kind, seed=1).fingerprint
    assert "embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")


def change(folder: Path, fields: dict[str, Any], without: str | None = None) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**told, **fields}.items() if v is not None}))
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if name != without}, folder / "model.safetensors")


ERRORS: dict[str, dict[str, Any]] = {
    "'TrigramHead'.*where SampledHead must be": {"fields": {"architectures": ["TrigramHead"]}},
    "22 tokens": {"fields": {"vocab_size": 22}},
    "no layers": {"fields": {"layers": None}},
    "states of 99": {"fields": {"target_hidden_size": 99}},
    r"no weight sampler\.fc": {"fields": {}, "without": "sampler.fc.weight"},
    "reads layer 9": {"fields": {"layers": [9]}},
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_does_not_fit_is_told_in_a_sentence(message: str, tmp_path: Path) -> None:
    target = target_of()
    save_own(head_of("fspad", target), tmp_path, torch.float32)
    change(tmp_path, **ERRORS[message])
    with pytest.raises(UserError, match=message):
        ModelPair(target, f"fspad:{tmp_path}")


def test_a_head_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_own(TrigramHead, "Chimera", tmp_path / "nowhere", target_of())
    with pytest.raises(UserError, match=r"give a model, or .*chimera:<directory>"):
        ModelPair(target_of(), "chimera:")
