"""ModelPair: what loads, what is refused and in which words, what describes a pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError, beam_sample
from decoding.engine.placement import device_of, dtype_of, packed
from decoding.engine.runner import runner_of
from decoding.pairs import architecture, loading
from decoding.pairs.architecture import check_architecture, context_of, limit_of
from decoding.pairs.pair import end_tokens
from tests.decoding.stubs import random_pair, small_llama

LOCAL = Path(__file__).parents[3] / "conf" / "pair" / "local.yaml"


def llama(vocabulary: int = 8, hidden: int = 16, seed: int = 0) -> LlamaForCausalLM:
    shape = dict(hidden_size=hidden, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
    return small_llama(vocabulary, 1, seed, max_position_embeddings=64, initializer_range=0.02, **shape)


def tokenizer(words: str = "abcdefgh") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, words[0])))


def save(model: torch.nn.Module, words: str | None, directory: Path) -> str:
    model.save_pretrained(directory)  # type: ignore[operator]
    if words is not None:
        tokenizer(words).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories as save_pretrained writes them."""
    root = tmp_path_factory.mktemp("models")
    mamba = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    return {
        "target": save(llama(seed=1), "abcdefgh", root / "target"),
        "draft": save(llama(hidden=8, seed=2), "abcdefgh", root / "draft"),
        "wide": save(llama(vocabulary=9), "abcdefgh", root / "wide"),
        "foreign": save(llama(), "abcxyfgh", root / "foreign"),
        "turned": save(llama(), "habcdefg", root / "turned"),
        "fewer": save(llama(vocabulary=6), "hgfed", root / "fewer"),
        "mute": save(llama(), None, root / "mute"),
        "mamba": save(mamba, "abcdefgh", root / "mamba"),
        "t5": save(t5, "abcdefgh", root / "t5"),
        "missing": str(root / "missing"),
    }


def load(saved: dict[str, str], target: str = "target", draft: str = "draft", **options: Any) -> ModelPair:
    return ModelPair.load(saved[target], saved.get(draft, draft), **{"device": "cpu", "dtype": "float32", **options})


def test_a_saved_pair_loads_and_decodes(saved: dict[str, str]) -> None:
    pair = load(saved)
    assert pair.name == "target"
    assert pair.tokenizer is not None
    assert pair.vocab_size == 8
    assert pair.context == 64
    assert str(pair.device) == "cpu"
    (result,) = DSBDDecoder(pair, DecodingConfig(max_new_tokens=5)).generate([[1, 2]], torch.Generator().manual_seed(0))
    assert len(result.sequences[0]) == 5
    assert load(saved, dtype="bfloat16", name="mine").describe()["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"draft": "foreign"}, r"2 of the draft's 8 tokens are not among the target's 8, such as 'x' \(3\), 'y' \(4\)"),
        ({"draft": "layers:1"}, r"'layers:1', but the target \(llama\) has 1 layers; it has none to leave out"),
        ({"draft": "layers"}, "draft is 'layers'; give a model, or layers:N"),
        ({"draft": "ngram:0"}, "draft is 'ngram:0'; give a model, or layers:N"),
        ({"draft": "layer:2"}, "'layer:2'; give a directory written by save_pretrained, a hub id, or layers:N"),
        ({"target": "missing"}, "The target model '.*missing' could not be loaded"),
        ({"draft": "missing"}, "The draft model '.*missing' could not be loaded"),
        ({"draft": "mamba"}, r"The draft model \(mamba\) keeps a recurrent state"),
        ({"target": "t5"}, r"The target model \(t5\) is an encoder-decoder"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "device is 'gpu'; give cpu, cuda, or one of several GPUs"),
        ({"device": "cuda:99"}, "device is 'cuda:99' but this machine has"),
    ],
    ids=str,
)
def test_what_cannot_be_a_pair_is_refused(saved: dict[str, str], options: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        load(saved, **options)
    assert "\n" not in str(refusal.value)


def test_a_truncated_checkpoint_is_refused(saved: dict[str, str], tmp_path: Path) -> None:
    directory = save(llama(), "abcdefgh", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match=r"The draft model .* could not be loaded"):
        ModelPair.load(saved["target"], directory, device="cpu", dtype="float32")


def test_a_model_without_a_tokenizer_is_refused(saved: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"The draft model .* could not be loaded"):
        load(saved, draft="mute")


def test_models_in_hand_are_checked_too() -> None:
    with pytest.raises(UserError, match="encoder-decoder"):
        ModelPair(T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1)), llama())
    assert ModelPair(llama(), None).vocab_size == 8


@pytest.mark.parametrize("config", [MambaConfig(), RecurrentGemmaConfig()], ids=lambda config: config.model_type)
def test_recurrent_configs_are_refused(config: Any) -> None:
    with pytest.raises(UserError, match="recurrent state"):
        check_architecture(config, "draft")


def test_a_model_that_ignores_masks_is_refused() -> None:
    """A forest pass must equal a sequential pass; one that lets beams see each other does not."""

    class Unmasked(LlamaForCausalLM):
        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            if attention_mask is not None:
                attention_mask = torch.zeros_like(attention_mask)
            return super().forward(*args, attention_mask=attention_mask, **kwargs)

    torch.manual_seed(0)
    config = llama().config
    config.initializer_range = 0.5
    pair = ModelPair(Unmasked(config), llama())
    with pytest.raises(UserError, match=r"target model .* scores a forest of beams differently"):
        DSBDDecoder(pair, DecodingConfig(max_new_tokens=3)).generate([[1, 2]])


@pytest.mark.parametrize("role", ["target", "draft"])
def test_nan_weights_name_their_model(role: str) -> None:
    pair = ModelPair(llama(seed=1), llama(seed=2))
    with torch.no_grad():
        getattr(pair, role).lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match=f"The {role} model returned NaN"):
        DSBDDecoder(pair, DecodingConfig(max_new_tokens=3)).generate([[1, 2]])


def test_the_target_alone_is_checked_too() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match="The target model returned NaN"):
        beam_sample(model, [[1, 2]], DecodingConfig(max_new_tokens=3))


def test_describe_is_json_and_tells_pairs_apart() -> None:
    first, again = (ModelPair(llama(seed=1), llama(seed=2)) for _ in range(2))
    other = ModelPair(llama(seed=1), llama(seed=3))
    about = json.loads(json.dumps(first.describe()))
    assert about == again.describe()
    assert about["fingerprint"] != other.describe()["fingerprint"]
    assert about["vocab_size"] == 8
    assert about["models"]["target"]["parameters"] == sum(p.numel() for p in first.target.parameters())
    assert set(ModelPair(llama(), None).describe()["models"]) == {"target"}


@pytest.mark.parametrize("name", ["q_proj", "down_proj", "post_attention_layernorm"])
def test_a_fingerprint_sees_every_weight(name: str) -> None:
    """As a merged adapter changes them: a little, in one kind of weight of one layer."""
    base, tuned = llama(seed=1), llama(seed=1)
    weight = next(w for key, w in tuned.named_parameters() if name in key)
    with torch.no_grad():
        weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert ModelPair(base, None).fingerprint != ModelPair(tuned, None).fingerprint
    assert ModelPair(llama(seed=1), None).fingerprint == ModelPair(base, None).fingerprint


def test_ends_that_no_model_can_reach_end_nothing() -> None:
    pair = ModelPair(llama(), None)  # ids 0 to 7
    for given, ends in (([3, 8, 99], {3}), (7, {7}), ([-1], set()), ([2, -1], {2}), (8, set()), (-5, set())):
        assert end_tokens(pair, DecodingConfig(eos_token_id=given)) == ends  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"eos_token_id is \[True\]"):
        DecodingConfig(eos_token_id=[True])


def test_models_are_put_into_evaluation_mode() -> None:
    target = llama().train()
    ModelPair(target, llama())
    assert not target.training


@pytest.mark.parametrize(
    ("given", "own", "expected"),
    [(None, 3, {3}), (None, [1, 2], {1, 2}), (None, None, set()), (-1, 3, set()), (4, 3, {4}), ([4, 5], 3, {4, 5})],
)
def test_end_tokens(given: Any, own: Any, expected: set[int]) -> None:
    pair = random_pair(6)
    pair.target.config.eos_token_id = own
    assert end_tokens(pair, DecodingConfig(eos_token_id=given)) == expected


@pytest.mark.parametrize("draft", [3, {}, ModelPair], ids=str)
def test_what_is_no_draft_is_refused(draft: Any) -> None:
    with pytest.raises(
        UserError, match=r"draft is .*; give a causal language model of transformers, loaded, or layers:N"
    ):
        ModelPair(small_llama(), draft)


def test_a_path_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(UserError, match="'/nowhere/large' could not be loaded: there is no such directory"):
        ModelPair.load("/nowhere/large", "/nowhere/small", device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_a_name_or_torchs_own(saved: dict[str, str], dtype: Any) -> None:
    pair = load(saved, dtype=dtype, device=torch.device("cpu"))
    assert {weight.dtype for model in pair.models.values() for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_draft_may_have_a_dtype_of_its_own(saved: dict[str, str], top_k: int | None) -> None:
    """Tokens are the target's alone, whatever the draft is in."""
    pair = load(saved, draft_dtype=torch.bfloat16)
    dtypes = {role: {weight.dtype for weight in model.parameters()} for role, model in pair.models.items()}
    assert dtypes == {"target": {torch.float32}, "draft": {torch.bfloat16}}
    about = pair.describe()
    assert (about["dtype"], about["draft_dtype"]) == ("float32", "bfloat16")
    assert "draft_dtype" not in load(saved).describe()
    settings = {"target_width": 2, "draft_width": 3, "draft_depth": 2, "max_new_tokens": 8, "min_width": 2}
    config = DecodingConfig(verification="shared_noise", top_k=top_k, **settings)
    found, alone = (
        DSBDDecoder(each, config).generate([[1, 2], [3]], torch.Generator().manual_seed(0))
        for each in (pair, ModelPair(pair.target, None))
    )
    assert [result.sequences for result in found] == [result.sequences for result in alone]
    with pytest.raises(UserError, match="draft_dtype is 'int8'; choose one of auto, float32"):
        load(saved, draft_dtype="int8")


def test_the_default_device_and_dtype_are_those_of_the_command_line(saved: dict[str, str]) -> None:
    """Of pair=local: a CPU, which every machine has."""
    config = OmegaConf.load(LOCAL)
    pair = ModelPair.load(saved["target"], "ngram")
    assert (str(pair.device), pair.describe()["dtype"]) == (config.device, config.dtype)


def test_a_torch_dtype_that_no_pair_has_is_refused(saved: dict[str, str]) -> None:
    with pytest.raises(UserError, match="dtype is 'int8'; choose one of auto, float32"):
        load(saved, dtype=torch.int8)


def test_a_model_that_refuses_to_move_loads_where_it_is(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As some quantised models do; to another device it is refused in a sentence that says what helps."""

    def stays(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("`.to` is not supported")

    monkeypatch.setattr(PreTrainedModel, "to", stays)
    assert str(load(saved).device) == "cpu"
    with pytest.raises(UserError, match=r"cannot be moved to meta: `\.to` is not supported Say where"):
        load(saved, device="meta")


def test_an_option_of_the_callers_goes_before_ours(saved: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"target model .* could not be loaded: .*pytorch_model\.bin"):
        load(saved, use_safetensors=False)  # there are only safetensors: transformers says so


def test_an_adapter_without_its_model_is_named(saved: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an adapter without its model; merge it"):
        ModelPair.load(str(tmp_path), "ngram")


@pytest.mark.parametrize("name", ["model.Q4_1.gguf", "model.GGUF"])
def test_a_gguf_file_is_loaded_from_its_folder(tmp_path: Path, name: str) -> None:
    class Loader:
        @staticmethod
        def from_pretrained(source: str, **options: Any) -> Any:
            return source, options

    source = str(tmp_path / name)
    with pytest.raises(UserError, match="could not be loaded: there is no such file"):
        loading._from_hub(Loader, source, "target")
    Path(source).touch()
    assert loading._from_hub(Loader, source, "target", dtype="auto") == (
        str(tmp_path),
        {"gguf_file": name, "dtype": "auto"},
    )
    on_the_hub = f"owner/repository/{name}"
    assert loading._from_hub(Loader, on_the_hub, "target") == ("owner/repository", {"gguf_file": name})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 1e4}
FACTORS = {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("rope", "positions", "made_for", "limit"),
    [
        (None, 64, 64, None),
        (YARN, 32, 128, None),
        (YARN, 128, 128, None),
        (LLAMA3, 128, 128, None),
        (LINEAR, 32, 128, None),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 64, 64, 64),
        ({**LONG, **FACTORS}, 128, 32, 32),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_contexts_count_scaled_positions(rope: Any, positions: int, made_for: int, limit: int | None) -> None:
    model = small_llama(8, 1, max_position_embeddings=positions, **({"rope_parameters": rope} if rope else {}))
    assert (context_of(model), limit_of(model)) == (made_for, limit)


def test_a_table_of_positions_is_a_limit() -> None:
    for kind, changes in ((GPT2Config, {"n_positions": 40}), (OPTConfig, {"max_position_embeddings": 40})):
        model = type("Model", (), {"config": kind(**changes)})
        assert context_of(model) == limit_of(model) == 40
    assert limit_of(type("Model", (), {"config": BloomConfig()})) is None  # ALiBi


def test_rotary_positions_of_two_kinds_of_layers_have_no_end_either() -> None:
    model = type("Model", (), {"config": Gemma3TextConfig(max_position_embeddings=64)})
    assert (context_of(model), limit_of(model)) == (64, None)


class Packed(torch.Tensor):
    """Multiplies, but cannot be cut or joined, as packed int8 is."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.cat, torch.Tensor.unflatten, torch.Tensor.view, torch.Tensor.diagonal):
            raise NotImplementedError(function.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
        keeps = function in (torch.Tensor.detach, torch.Tensor.requires_grad_)
        return out.as_subclass(cls if keeps else torch.Tensor) if isinstance(out, torch.Tensor) else out


@pytest.mark.parametrize("where", ["q_proj", "o_proj"])
@pytest.mark.parametrize("role", ["target", "draft"])
def test_packed_weights_run_by_the_models_own_forward(where: str, role: str) -> None:
    pair = ModelPair(small_llama(24), small_llama(24, 1))
    config = DecodingConfig(mode="beam_search", target_width=3, max_new_tokens=8, eos_token_id=-1)
    expected = DSBDDecoder(pair, config).generate([[1, 2]])[0].sequences
    before = pair.fingerprint
    linear = pair.models[role].model.layers[0].self_attn.get_submodule(where)
    linear.weight = torch.nn.Parameter(linear.weight.data.as_subclass(Packed), requires_grad=False)
    assert DSBDDecoder(pair, config).generate([[1, 2]])[0].sequences == expected
    assert runner_of(pair.models[role], "auto").prompts.name == "transformers"
    assert ModelPair(pair.target, pair.draft).fingerprint == before


def test_a_packed_weight_is_hashed_by_its_parts() -> None:
    whole = torch.arange(6.0)
    halves = {"left": whole[:2], "right": whole[2:], "__tensor_flatten__": lambda self: (["left", "right"], None)}
    assert [part.tolist() for part in architecture._parts(type("Weight", (), halves)())] == [[0, 1], [2, 3, 4, 5]]


def test_a_model_takes_its_inputs_where_it_is_told_to() -> None:
    """The weights of a dispatched model may wait elsewhere, and those of a quantised one be integers."""
    model = small_llama(8, 1)
    assert (device_of(model), dtype_of(model)) == (torch.device("cpu"), torch.float32)
    model.register_parameter("first", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    model._parameters = {"first": model._parameters["first"], **model._parameters}
    assert (dtype_of(model), packed(model)) == (torch.float32, True)
    model._hf_hook = type("Hook", (), {"execution_device": 1})
    assert device_of(model) == torch.device("cuda", 1)
