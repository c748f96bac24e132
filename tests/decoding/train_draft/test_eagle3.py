"""Training of a head: the unrolled steps are what decoding does, a head learns, a shifted twin does not, going on."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError, beam_sample
from decoding.engine.feature_head import FeatureHead
from decoding.support.entry import CONF_DIR
from decoding.support.in_use import in_use
from decoding.train_draft import __main__ as door
from decoding.train_draft.chimera import encoded
from decoding.train_draft.eagle3 import HeadModule, unrolled
from decoding.train_draft.fit import TextData, shifted
from decoding.train_draft.states import TargetStates
from decoding.train_draft.text import Document
from tests.decoding.pairs import test_head_kinds
from tests.decoding.pairs.test_eagle3 import head_of, reference, states_of, target_of
from tests.decoding.stubs import seeded, small_llama
from tests.decoding.train_draft.test_text import WORDS, tokenizer_of


@torch.no_grad()
def test_unrolled_steps_are_those_of_decoding() -> None:
    """From every place, k drafted tokens in a row give what the paper's chain gives there, token by token."""
    target = target_of()
    head = head_of(target)
    tokens = [5, 3, 8, 1, 4, 9, 2, 7]
    states = states_of(target, tokens, head.shape.layers)
    features = head.fuse(torch.stack(states))[None]
    for step, given in enumerate(unrolled(head, torch.tensor([tokens]), features, 3)):
        for place in range(len(tokens) - step - 1):
            known: list[Tensor | None] = [*states[: place + 1], *[None] * step]
            expected, _ = reference(head, known, tokens[: place + step + 2])
            torch.testing.assert_close(head.logits(given[0, place]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unrolled_steps_of_other_kinds_are_those_of_decoding() -> None:
    """The same, of chains written out for FSPAD and Chimera."""
    target, tokens = target_of(), [5, 3, 8, 1, 4, 9, 2, 7]
    states = states_of(target, tokens, (4,))
    given = torch.stack(states)[None, :, 0]
    steps: dict[str, Any] = {"fspad": unrolled, "chimera": encoded}
    for kind, drafts in steps.items():
        head = test_head_kinds.head_of(kind, target)
        for step, found in enumerate(drafts(head, torch.tensor([tokens]), given, 3)):
            for place in range(len(tokens) - step - 1):
                known: list[Tensor | None] = [*states[: place + 1], *[None] * step]
                expected = test_head_kinds.REFERENCES[kind](head, known, tokens[: place + step + 2])
                torch.testing.assert_close(head.logits(found[0, place]), expected, rtol=1e-4, atol=1e-4)


def texts_of(target: Any, count: int = 120, length: int = 20) -> list[Document]:
    """Texts that the target writes."""
    random = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count // 40):
        tokens = torch.randint(0, target.config.vocab_size, (40, 1), generator=random)
        with torch.no_grad():
            for _ in range(length):
                chances = target(input_ids=tokens).logits[:, -1].softmax(-1)
                tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=random)], 1)
        found += [Document(row.to(torch.int32), 1) for row in tokens]
    return found


def learned(shift: int, monkeypatch: pytest.MonkeyPatch, kind: str = "eagle3") -> float:
    """Held-out acceptance at the first step after a short fit to what the target says `shift` tokens earlier."""
    torch.manual_seed(0)
    target = target_of()
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(4)
    texts = texts_of(target)
    head: Any = door.HEADS[kind].head.for_target(target, 23)
    states = TargetStates(target.requires_grad_(False), head.shape.layers, texts)
    module = door.HEADS[kind].module(head, states, steps=2, lr=5e-3)
    data = TextData(texts, 2000)
    told = HeadModule.target_chances
    monkeypatch.setattr(HeadModule, "target_chances", lambda self, seen: told(self, seen).roll(shift, 1))
    optimiser = module.configure_optimizers()
    for _ in range(60):
        for batch in data.batches(data.train, torch.Generator().manual_seed(0)):
            total = sum((e[c].mean() for e, _, c, _ in module.losses(states(batch))), torch.zeros(()))
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
    monkeypatch.setattr(module, "log", lambda *args, **options: None)
    found: dict[str, float] = {}
    monkeypatch.setattr(module, "log_dict", found.update)
    with torch.no_grad():
        for batch in data.batches(data.val, None):
            module.validation_step(torch.tensor(batch), 0)
        module.on_validation_epoch_end()
    return found["val/accepted_1"]


@pytest.mark.parametrize("kind", door.HEADS)
def test_a_head_learns_and_one_that_is_told_of_another_token_does_not(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = learned(0, monkeypatch, kind), learned(1, monkeypatch, kind)
    assert right > wrong + 0.1, (right, wrong)


def test_acceptance_of_a_head_that_says_what_the_target_says_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of()
    texts = texts_of(target, 80)
    head = FeatureHead.for_target(target, 23)
    states = TargetStates(target.requires_grad_(False), head.shape.layers, texts)
    module = HeadModule(head, states, steps=2)
    data = TextData(texts, 500)
    losses = module.losses

    def perfect(seen: Any) -> Any:
        logits = module.target_chances(seen).log()
        for entropy, _, counts, ahead in losses(seen):
            yield entropy, shifted(logits, ahead), counts, ahead

    monkeypatch.setattr(module, "losses", perfect)
    monkeypatch.setattr(module, "log", lambda *args, **options: None)
    found: dict[str, float] = {}
    monkeypatch.setattr(module, "log_dict", found.update)
    with torch.no_grad():
        for batch in data.batches(data.val, None):
            module.validation_step(torch.tensor(batch), 0)
        module.on_validation_epoch_end()
    for step in (1, 2):
        assert found[f"val/accepted_{step}"] == pytest.approx(1, abs=1e-5)
        assert found[f"val/top1_{step}"] == 1


# -------------------------------------------------------------------------------------- command line


def config(folder: Path, target: Path, *overrides: str) -> DictConfig:
    quick = ["callbacks.progress_bar=null", "logger=none", "+trainer.enable_progress_bar=false"]
    sizes = ["text.tokens=1500", "text.batch=32", "text.longest=24", "fit.batch_tokens=400", "fit.steps=2"]
    named = ["pair=local", f"pair.target={target}", f"paths.output_dir={folder}", f"text_dir={target.parent / 'text'}"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train_draft", [*named, *quick, *sizes, "head.draft_vocab_size=6", *overrides])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target") / "model"
    model = small_llama(len(WORDS), layers=3)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", door.HEADS)
def test_one_command_gives_a_draft_that_one_line_uses(
    kind: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted = door.main(config(tmp_path, target, f"kind={kind}", "trainer.max_epochs=2"))
    assert 0 < accepted <= 1
    assert f"pair.draft={kind}:{tmp_path / 'head'}" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "head" / "recipe.json").read_text())
    assert recipe["metrics"]["val/accepted"] == pytest.approx(accepted)
    assert recipe["text"]["documents"] > 50
    pair = ModelPair.load(str(target), f"{kind}:{tmp_path / 'head'}")
    settings = DecodingConfig(target_width=2, draft_width=4, draft_depth=2, max_new_tokens=10)
    drafted = DSBDDecoder(pair, settings).generate([[1, 3], [1, 4, 5]], seeded())
    alone = beam_sample(pair.target, [[1, 3], [1, 4, 5]], settings, generator=seeded())
    assert [r.sequences for r in drafted] == [r.sequences for r in alone]


def test_a_small_model_is_a_draft_too(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["kind=model", "model.hidden_size=64", "model.layers=1", "fit.lr=1e-2"]
    accepted = [
        door.main(config(tmp_path / str(epochs), target, *sizes, f"trainer.max_epochs={epochs}")) for epochs in (1, 6)
    ]
    assert accepted[1] > accepted[0] > 0, "it learns"
    assert f"pair.draft={tmp_path / '6' / 'head'}" in capsys.readouterr().out
    pair = ModelPair.load(str(target), str(tmp_path / "6" / "head"))
    settings = DecodingConfig(target_width=2, draft_width=4, draft_depth=2, max_new_tokens=10)
    drafted = DSBDDecoder(pair, settings).generate([[1, 3], [1, 4, 5]], seeded())
    alone = beam_sample(pair.target, [[1, 3], [1, 4, 5]], settings, generator=seeded())
    assert [r.sequences for r in drafted] == [r.sequences for r in alone]


@pytest.mark.parametrize("kind", door.HEADS)
def test_going_on_equals_not_having_stopped(
    kind: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [f"kind={kind}", "trainer.max_epochs=3"]
    door.main(config(tmp_path / "whole", target, *asked))
    ends, count = HeadModule.on_validation_epoch_end, []

    def once(self: HeadModule) -> None:
        ends(self)
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(HeadModule, "on_validation_epoch_end", once)
    with pytest.raises(KeyboardInterrupt):
        door.main(config(tmp_path / "part", target, *asked))
    monkeypatch.undo()
    last = tmp_path / "part" / "last.ckpt"
    assert last.is_file() and not list((tmp_path / "part" / "head").glob("*.json"))
    door.main(config(tmp_path / "again", target, *asked, f"ckpt_path={last}"))
    whole, again = (load_file(tmp_path / name / "head" / "model.safetensors") for name in ("whole", "again"))
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    other = next(name for name in door.HEADS if name != kind)
    with pytest.raises(UserError, match="give that kind"):
        door.main(config(tmp_path / "other", target, f"kind={other}", f"ckpt_path={last}"))


def test_a_fit_that_goes_on_takes_the_rate_and_the_decay_that_are_asked_for(target: Path, tmp_path: Path) -> None:
    """As recipe.json tells; and a checkpoint with a flipped bit, which torch takes, is refused."""
    door.main(config(tmp_path / "before", target, "trainer.max_epochs=1"))
    asked, last, rates = ["trainer.max_epochs=2", "fit.weight_decay=0.5"], tmp_path / "before" / "last.ckpt", []
    for rate in (1e-3, 5e-3):
        after = tmp_path / str(rate)
        door.main(config(after, target, *asked, f"fit.lr={rate}", f"ckpt_path={last}"))
        kept = torch.load(after / "last.ckpt", weights_only=True)
        matrices, flat = kept["optimizer_states"][0]["param_groups"]
        assert (matrices["weight_decay"], flat["weight_decay"]) == (0.5, 0.0)
        rates.append(matrices["lr"])
        recipe = json.loads((after / "head" / "recipe.json").read_text())
        assert recipe["fit"]["weight_decay"] == 0.5 and recipe["fit"]["lr"] == rate
    assert rates[1] == pytest.approx(5 * rates[0])

    content = last.read_bytes()
    with zipfile.ZipFile(last) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    place = largest.header_offset + largest.file_size // 2
    last.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    torch.load(last, weights_only=True)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        door.main(config(tmp_path / "other", target, *asked, f"ckpt_path={last}"))


@pytest.mark.parametrize("folder", ["text_dir", "out"])
def test_a_directory_that_another_run_writes_is_refused(folder: str, target: Path, tmp_path: Path) -> None:
    with in_use(tmp_path / "shared"), pytest.raises(UserError, match=r"shared is in use by process \d+ of"):
        door.main(config(tmp_path / "run", target, "trainer.max_epochs=1", f"{folder}={tmp_path / 'shared'}"))
    assert not list(tmp_path.rglob("*.safetensors")), "no text was written before"
    door.main(config(tmp_path / "run", target, "trainer.max_epochs=1", f"{folder}={tmp_path / 'shared'}"))


def test_one_directory_for_all(target: Path, tmp_path: Path) -> None:
    everything = [f"{name}={tmp_path}" for name in ("out", "text_dir")]
    door.main(config(tmp_path, target, "trainer.max_epochs=1", *everything))
    assert {"config.json", "recipe.json", "text-00000.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_layers_that_the_target_lacks_are_told_before_text_is_written(target: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 99; give layers from 0"):
        door.main(config(tmp_path, target, "kind=chimera", "head.layers=[99]", f"text_dir={tmp_path / 'text'}"))
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [("kind=medusa", "eagle3"), ("ckpt_path=nowhere.ckpt", "no checkpoint"), ("text.tokens=30", "held out")],
)
def test_mistakes_are_told(override: str, message: str, target: Path, tmp_path: Path) -> None:
    changed = [] if "tokens" not in override else [f"text_dir={tmp_path / 'few'}", "text.batch=1"]
    with pytest.raises(UserError, match=message):
        door.main(config(tmp_path, target, override, *changed))
