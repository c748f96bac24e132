"""EAGLE-3 heads: both file formats, logits as the paper has them, exact output whatever they guess."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError, beam_sample
from decoding.engine.feature_head import FeatureHead, HeadShape, default_layers
from decoding.engine.runner import runner_of
from decoding.forest.head_scorer import HeadScorer
from decoding.forest.node_scorer import ScorerOptions
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from decoding.pairs.drafts.eagle3 import Eagle3Draft, load_head, save_head
from tests.decoding import stubs
from tests.decoding.engine.test_graphs import Static
from tests.decoding.engine.test_vocabulary import tokenizer
from tests.decoding.stubs import in_16_bits, seeded, small_llama

VOCABULARY, KNOWN = 23, [0, 2, 3, 7, 11, 12, 19, 20]
PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 6], [9], [1, 2, 3, 0]]
settings = partial(stubs.settings, verification="shared_noise")
VARIANTS: dict[str, dict[str, bool]] = {
    "as published": {},
    "norm before the residual": {"norm_before_residual": True},
    "norms of each state": {"fc_norm": True},
    "one norm of all states": {"norm_before_fc": True},
    "normed output": {"norm_output": True},
    "queries and keys normed": {"qk_norm": True},
    "own embedding": {"own_embedding": True},
}


def target_of(seed: int = 0) -> Any:
    return small_llama(VOCABULARY, layers=4, seed=seed)


def head_of(target: Any, seed: int = 0, **changes: bool) -> FeatureHead:
    """A head of random weights, those of its norms too."""
    text = target.config
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=text.hidden_size,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
    )
    shape = replace(HeadShape(len(KNOWN), text.hidden_size, (1, 2, 4)), **changes)
    lent = None if shape.own_embedding else target.get_input_embeddings().weight.detach()
    head = FeatureHead(config, shape, lent)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random) * (0.4 if weight.ndim > 1 else 0.2))
            if weight.ndim == 1:
                weight.add_(1)
    head.t2d.zero_()
    head.use_tokens(torch.tensor(KNOWN))
    return head


def pair_of(seed: int = 0, **changes: bool) -> ModelPair:
    target = target_of()
    return ModelPair(target, Eagle3Draft(head_of(target, seed, **changes)))


# ---------------------------------------------------------------------------------------- reference


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-5).sqrt() * weight


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary positions of one token's heads, [heads, D], written out."""
    half = x.shape[-1] // 2
    angles = position / 10000.0 ** (torch.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def reference(head: FeatureHead, states: list[Tensor | None], tokens: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits after the last token of a chain, [Vd], and features, token by token as the paper has it.

    Args:
        states: [K, H] of the target at each token, None where it has not been; one less than there are tokens
            is read, and the first token is not.
    """
    w, shape = head.state_dict(), head.shape
    keys: list[Tensor] = []
    values: list[Tensor] = []
    features: list[Tensor] = []
    for place, token in enumerate(tokens[1:]):
        given = states[place]
        if given is None:
            feature = features[-1]
        else:
            if shape.fc_norm:
                given = torch.stack([normed(given[i], w[f"fc_norm.{i}.weight"]) for i in range(len(given))])
            flat = given.flatten()
            feature = w["fc.weight"] @ (normed(flat, w["input_norm.weight"]) if shape.norm_before_fc else flat)
        m = {name.removeprefix("midlayer."): value for name, value in w.items()}
        hidden = normed(feature, m["hidden_norm.weight"])
        x = torch.cat([normed(head.embedding[token], m["input_layernorm.weight"]), hidden])
        q, k, v = ((m[f"self_attn.{name}_proj.weight"] @ x).view(-1, 8) for name in "qkv")
        if shape.qk_norm:
            q = torch.stack([normed(row, m["self_attn.q_norm.weight"]) for row in q])
            k = torch.stack([normed(row, m["self_attn.k_norm.weight"]) for row in k])
        keys.append(turned(k, place))
        values.append(v)
        query, mixed = turned(q, place), []
        for number in range(4):
            scores = torch.stack([query[number] @ key[number // 2] / math.sqrt(8) for key in keys]).softmax(0)
            mixed.append(sum((s * v[number // 2] for s, v in zip(scores, values, strict=True)), torch.zeros(8)))
        out = (hidden if shape.norm_before_residual else feature) + m["self_attn.o_proj.weight"] @ torch.cat(mixed)
        y = normed(out, m["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(m["mlp.gate_proj.weight"] @ y) * (m["mlp.up_proj.weight"] @ y)
        out = out + m["mlp.down_proj.weight"] @ gate
        read = normed(out, w["norm.weight"])
        features.append(read if shape.norm_output else out)
    return w["lm_head.weight"] @ read, features


def states_of(target: Any, tokens: list[int], layers: tuple[int, ...]) -> list[Tensor]:
    with torch.inference_mode():
        hidden = target(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return list(torch.stack([hidden[layer][0] for layer in layers], 1))


def scorers(target: Any, head: FeatureHead, **changes: Any) -> tuple[ForestScorer, HeadScorer]:
    options = ScorerOptions(rows=1, longest_prompt=8, spare_slots=16, engine="eager", **changes)
    first = ForestScorer(target, **vars(options), layers=head.shape.layers)
    return first, HeadScorer(head, first, options)


def chain(forest: TokenForest, tokens: list[int]) -> list[int]:
    nodes, parent = [], 0
    for token in tokens:
        parent = forest.child(parent, token)
        nodes.append(parent)
    return nodes


def row_of(scorer: HeadScorer, node: int) -> Tensor:
    return scorer.log_probs(0, [node])[0][KNOWN]


@pytest.mark.parametrize("rounded", [lambda model: model, in_16_bits], ids=["", "of 16 bits"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_a_chain_is_scored_as_the_paper_has_it(variant: str, rounded: Callable[[Any], Any]) -> None:
    """By the target's states as far as it has been, by own features from there, and anew once it has come."""
    target = rounded(target_of())
    head = rounded(head_of(target, **VARIANTS[variant]).eval())
    prompt, tokens = [5, 3, 8, 1], [4, 9, 2, 7]
    theirs, ours = scorers(target, head)
    forest = TokenForest()
    theirs.open(0, prompt, forest)
    ours.open(0, prompt, forest)
    whole = [*prompt, *tokens]
    states: list[Tensor | None] = list(states_of(target, whole, head.shape.layers))
    expected, _ = reference(head, states, prompt)
    torch.testing.assert_close(row_of(ours, 0), expected.log_softmax(0), rtol=1e-4, atol=1e-4)
    nodes = chain(forest, tokens)
    known = [*states[:4], None, None, None, None]
    for length, node in enumerate(nodes, 5):
        ours.score({0: [node]})
        expected, _ = reference(head, known, whole[:length])
        torch.testing.assert_close(row_of(ours, node), expected.log_softmax(0), rtol=1e-4, atol=1e-4)
    guessed = row_of(ours, nodes[-1])
    theirs.score({0: nodes[:3]})
    last = forest.child(nodes[2], 0)
    ours.score({0: [last]})  # whatever the target has scored is read anew
    expected, _ = reference(head, [*states[:7], None], [*whole[:7], 0])
    torch.testing.assert_close(row_of(ours, last), expected.log_softmax(0), rtol=1e-4, atol=1e-4)
    expected, _ = reference(head, [*states[:6], None], whole[:7])
    assert (guessed - row_of(ours, nodes[2])).abs().max() > 1e-3, "own features differ from the target's"


@torch.inference_mode()
def test_in_16_bits_a_head_says_nearly_the_same() -> None:
    """The products run in another layout there, where the processor has them."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        target = target_of().to(dtype)
        theirs, ours = scorers(target, head_of(target).eval().to(dtype))
        forest = TokenForest()
        theirs.open(0, [5, 3, 8, 1], forest)
        ours.open(0, [5, 3, 8, 1], forest)
        nodes = chain(forest, [4, 9, 2])
        ours.score({0: nodes[-1:]})
        rows.append(torch.stack([row_of(ours, node).exp() for node in (0, *nodes)]))
    assert (rows[0] - rows[1]).abs().max() < 0.05  # 8 bits of a mantissa, through a few sums of some dozen numbers


@torch.inference_mode()
def test_only_the_known_tokens_are_proposed_by_the_targets_ids() -> None:
    target = target_of()
    theirs, ours = scorers(target, head_of(target).eval(), top=4)
    forest = TokenForest()
    theirs.open(0, [1, 2, 3], forest)
    ours.open(0, [1, 2, 3], forest)
    values, tokens = ours.tops(0, [0])
    assert set(tokens[0].tolist()) <= set(KNOWN)
    assert (values[0][:-1] >= values[0][1:]).all()


# -------------------------------------------------------------------------------------------- exact


def check_sampled(pair: ModelPair, width: int, changes: dict[str, Any]) -> None:
    """Alone and in batches, what is drafted with gives what the target alone does."""
    if "oversample" in changes:
        changes = {**changes, "warp": "beam"}
    config = settings(width, 2 * width, 3, 12, **changes)
    for batch in (1, 4):
        drafted = DSBDDecoder(pair, config).generate(PROMPTS, seeded(), batch_size=batch)
        alone = beam_sample(pair.target, PROMPTS, config, generator=seeded())
        assert [r.sequences for r in drafted] == [r.sequences for r in alone]
    assert sum(r.stats.draft_calls for r in drafted) > 4


def check_searched(pair: ModelPair, width: int) -> None:
    """As `check_sampled`, without noise."""
    config = DecodingConfig(mode="beam_search", target_width=width, draft_width=6, draft_depth=3, max_new_tokens=12)
    drafted = DSBDDecoder(pair, config).generate(PROMPTS)
    alone = DSBDDecoder(ModelPair(pair.target, None), config).generate(PROMPTS)
    assert [r.sequences for r in drafted] == [r.sequences for r in alone]


@pytest.mark.parametrize("variant", ["as published", "norm before the residual"])
@pytest.mark.parametrize("changes", [{}, {"top_k": 6}, {"temperature": 0.6, "eos_token_id": 3}, {"oversample": 2}])
@pytest.mark.parametrize("width", [1, 4])
def test_sampled_tokens_are_the_targets_whatever_the_head_guesses(
    variant: str, changes: dict[str, Any], width: int
) -> None:
    check_sampled(pair_of(**VARIANTS[variant]), width, changes)


@pytest.mark.parametrize("width", [1, 3])
def test_searched_tokens_are_the_targets(width: int) -> None:
    check_searched(pair_of(), width)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("batch", [1, 4])
def test_a_gpu_gives_the_tokens_of_the_target_alone(variant: str, batch: int) -> None:
    """Sampled and searched, under CUDA graphs; float32, where no two keys of these seeds are close."""
    target = target_of().cuda()
    pair = ModelPair(target, Eagle3Draft(head_of(target, **VARIANTS[variant]).cuda()))
    config = settings(4, 8, 3, 12)
    drafted = DSBDDecoder(pair, config).generate(PROMPTS, seeded(), batch_size=batch)
    alone = beam_sample(target, PROMPTS, config, generator=seeded())
    assert [r.sequences for r in drafted] == [r.sequences for r in alone]
    assert sum(r.stats.draft_calls for r in drafted) > 4
    search = DecodingConfig(mode="beam_search", target_width=3, draft_width=6, draft_depth=3, max_new_tokens=12)
    found, plain = (DSBDDecoder(p, search).generate(PROMPTS) for p in (pair, ModelPair(target, None)))
    assert [r.sequences for r in found] == [r.sequences for r in plain]


def test_static_shapes_and_processors_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, config = pair_of(), settings(3, 6, 3, 12)
    expected = DSBDDecoder(pair, config).generate(PROMPTS, seeded(), batch_size=2)
    runner = runner_of(pair.drafter.head, pair.engine)
    runner._spare.clear()
    still = Static(runner.prompts)
    monkeypatch.setattr(runner, "forward", still)
    found = DSBDDecoder(pair, config).generate(PROMPTS, seeded(), batch_size=2)
    assert [r.sequences for r in found] == [r.sequences for r in expected]
    assert [r.stats.target_calls for r in found] == [r.stats.target_calls for r in expected], "the same guesses"
    assert still.fillers > 0


# ------------------------------------------------------------------------------------------ formats


def speculators_format(head: FeatureHead, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The same head as the package speculators writes it."""
    save_head(head, folder, dtype)
    fields = json.loads((folder / "config.json").read_text())
    nested = {
        name: fields[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps")
    }
    nested |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "num_hidden_layers": 1}
    nested |= {"model_type": "llama", "attention_bias": False, "hidden_act": "silu"}
    flags = {name: fields[name] for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")}
    told = {"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"], **flags}
    told |= {"transformer_layer_config": nested, "draft_vocab_size": len(KNOWN)}
    told |= {"eagle_aux_hidden_state_layer_ids": list(head.shape.layers), "target_hidden_size": None}
    (folder / "config.json").write_text(json.dumps(told))
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("midlayer.", "layers.0."): value for name, value in weights.items()}
    weights["verifier_norm.weight"] = torch.ones(head.config.hidden_size)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("write", [save_head, speculators_format], ids=["original", "speculators"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_formats_are_read_back(variant: str, write: Any, tmp_path: Path) -> None:
    target = target_of()
    head = head_of(target, **VARIANTS[variant])
    write(head, tmp_path, torch.float32)
    found = load_head(tmp_path, target)
    assert found.shape == head.shape
    assert {n: v.tolist() for n, v in found.state_dict().items()} == {
        n: v.tolist() for n, v in head.state_dict().items()
    }
    assert found.token_ids.tolist() == KNOWN
    assert torch.equal(found.embedding, head.embedding)


def test_one_line_uses_a_head(tmp_path: Path) -> None:
    """In Python and on the command line: the draft's text, and a name that can be a folder's."""
    target = target_of()
    target.save_pretrained(tmp_path / "target")
    save_head(head_of(target), tmp_path / "head", torch.float32)
    pair = ModelPair(target, f"eagle3:{tmp_path / 'head'}")
    assert pair.draft_name == f"eagle3:{tmp_path / 'head'}"
    assert pair.describe()["head"]["draft_vocab_size"] == len(KNOWN)
    assert pair.with_draft(pair.draft_name).fingerprint == pair.fingerprint
    assert ModelPair(target, Eagle3Draft(head_of(target, seed=1))).fingerprint != pair.fingerprint


SPECULATORS: dict[str, dict[str, Any]] = {  # settings of the package's own config; its layers are Llama's or Qwen 3's
    "as it is": {},
    "norm before the residual": {"norm_before_residual": True},
    "norms of each state": {"fc_norm": True},
    "one norm of all states": {"norm_before_fc": True},
    "normed output": {"norm_output": True},
    "Qwen 3": {"family": Qwen3Config},
    "all tokens, no maps": {"draft_vocab_size": VOCABULARY},
}


def written_by_speculators(folder: Path, target: Any, family: Any = LlamaConfig, **changes: Any) -> Any:
    """A model of the package speculators, random weights, and what its `save_pretrained` writes beside its target."""
    pytest.importorskip("speculators", reason="pip install 'dsbd[speculators]'")
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    target.save_pretrained(folder / "target")
    tokenizer("abcdefghijklmnopqrstuvw").save_pretrained(folder / "target")
    block = {"vocab_size": VOCABULARY, "hidden_size": target.config.hidden_size, "intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    layer = family(**block, **heads, num_hidden_layers=1, rms_norm_eps=1e-5)
    layer._attn_implementation = "eager"
    verifier = VerifierConfig(name_or_path=str(folder / "target"), architectures=["LlamaForCausalLM"])
    proposals: Any = [GreedyTokenProposalConfig(speculative_tokens=3)]
    told = SpeculatorsConfig(
        algorithm="eagle3", proposal_methods=proposals, default_proposal_method="greedy", verifier=verifier
    )
    fields = {"draft_vocab_size": len(KNOWN), "eagle_aux_hidden_state_layer_ids": [1, 2, 4], **changes}
    model = Eagle3DraftModel(Eagle3SpeculatorConfig(transformer_layer_config=layer, speculators_config=told, **fields))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random) * 0.3 + (weight.ndim == 1))
        model.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
    known = torch.tensor(KNOWN)
    model.load_vocab_mappings(torch.arange(VOCABULARY).unsqueeze(1).eq(known).any(1), known - torch.arange(len(known)))
    model.save_pretrained(folder / "head")
    return model.eval()


@pytest.mark.parametrize("settings", SPECULATORS)
@torch.inference_mode()
def test_a_checkpoint_of_speculators_is_used_by_one_line_and_says_what_speculators_computes(
    settings: str, tmp_path: Path
) -> None:
    """The package writes it; after every token, by the target's states and then by three features of its own."""
    model = written_by_speculators(tmp_path, target_of(), **SPECULATORS[settings])
    pair = ModelPair.load(str(tmp_path / "target"), f"eagle3:{tmp_path / 'head'}")
    draft: Any = pair.drafter
    known = KNOWN if model.use_draft_vocab else list(range(VOCABULARY))
    assert draft.head.token_ids.tolist() == known

    prompt, tokens = [5, 3, 8, 1], [4, 9, 2]
    whole = [*prompt, *tokens]
    given = torch.stack(states_of(pair.target, whole, (1, 2, 4))[:-1]).flatten(1)[None]
    steps: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: steps.append(output[0].log_softmax(-1)))
    model(given, torch.tensor([whole[1:]]), torch.zeros(1, len(whole) - 1, dtype=torch.long), ttt_steps=4)

    theirs, ours = scorers(pair.target, draft.head)
    forest = TokenForest()
    theirs.open(0, prompt, forest)
    ours.open(0, prompt, forest)
    place = len(prompt) - 2  # of the pair (last token of the prompt, states of the one before it)
    nodes = [0, *chain(forest, tokens)]
    ours.score({0: nodes[1:2]})  # its parent has the target's states
    for step in (2, 3):
        ours.score({0: nodes[step : step + 1]})
    drafted = [(0, place), (0, place + 1), (1, place + 1), (2, place + 1)]  # which step says what follows a node, where
    for node, (step, at) in zip(nodes, drafted, strict=True):
        found = ours.log_probs(0, [node])[0][known]
        torch.testing.assert_close(found, steps[step][at], rtol=1e-4, atol=1e-4)
    theirs.score({0: nodes[:-1]})
    last = forest.child(nodes[-1], 0)
    ours.score({0: [last]})  # and anew, by the target's states alone
    for number, node in enumerate(nodes[1:-1], 1):
        found = ours.log_probs(0, [node])[0][known]
        torch.testing.assert_close(found, steps[0][place + number], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_speculators_leaves_the_tokens_the_targets(tmp_path: Path) -> None:
    written_by_speculators(tmp_path, target_of())
    pair = ModelPair.load(str(tmp_path / "target"), f"eagle3:{tmp_path / 'head'}")
    config = settings(3, 6, 3, 12)
    drafted = DSBDDecoder(pair, config).generate(PROMPTS, seeded())
    alone = beam_sample(pair.target, PROMPTS, config, generator=seeded())
    assert [r.sequences for r in drafted] == [r.sequences for r in alone]
    assert sum(r.stats.draft_calls for r in drafted) > 4


# ------------------------------------------------------------------------------------------- errors


def broken(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    change(weights, fields)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))


ERRORS = {
    "no EAGLE-3 head": lambda w, c: w.pop("fc.weight"),
    "23 tokens|22": lambda w, c: c.update(vocab_size=22),
    "reads layers": lambda w, c: c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[1, 2, 9]),
    "d2t does not name": lambda w, c: w.update(d2t=w["d2t"] + 40),
    "has no weight midlayer": lambda w, c: w.pop("midlayer.mlp.up_proj.weight"),
    "which nothing reads": lambda w, c: w.update(more=torch.ones(1)),
    "states of 99": lambda w, c: c.update(target_hidden_size=99),
    "kind 'mtp'": lambda w, c: c.update(speculators_model_type="mtp"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_does_not_fit_is_told_in_a_sentence(message: str, tmp_path: Path) -> None:
    target = target_of()
    save_head(head_of(target), tmp_path, torch.float32)
    broken(tmp_path, ERRORS[message])
    with pytest.raises(UserError, match=message):
        load_head(tmp_path, target)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    target = target_of()
    save_head(head_of(target), tmp_path, torch.float32)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle can run code"):
        load_head(tmp_path, target)
    with pytest.raises(UserError, match="no such directory"):
        load_head(tmp_path / "nowhere", target)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_head(tmp_path, target)


def test_layers_are_eagles_own_choice() -> None:
    assert default_layers(32) == (2, 16, 29)
    assert default_layers(30) == (2, 15, 27)
    assert default_layers(4) == (1, 2, 4)
