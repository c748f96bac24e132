"""studies/draft_kinds.py: what is measured is what the training measures, one command gives a row of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from decoding import ModelPair
from decoding.pairs.drafts.eagle3 import Eagle3Draft
from decoding.train_draft import __main__ as train_draft
from decoding.train_draft.states import TargetStates
from studies import draft_kinds
from tests.decoding.pairs.test_eagle3 import KNOWN, head_of, target_of
from tests.decoding.pairs.test_head_kinds import KINDS
from tests.decoding.pairs.test_head_kinds import head_of as other_head_of
from tests.decoding.train_draft.test_eagle3 import texts_of
from tests.small_pair import small_pair


@pytest.mark.parametrize("kind", train_draft.HEADS)
def test_what_is_measured_in_a_forest_is_what_training_measures(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place of some texts, drafted node by node, gives the means that validation has."""
    monkeypatch.setattr(draft_kinds, "SPACING", 1)
    target = target_of()
    texts = texts_of(target, 40, 12)[:3]
    head = head_of(target) if kind == "eagle3" else other_head_of(kind, target)
    draft = Eagle3Draft(head) if kind == "eagle3" else KINDS[kind][1](head)
    found, first = draft_kinds.guesses(ModelPair(target, draft), texts)
    states = TargetStates(target, head.shape.layers, texts)
    module: Any = train_draft.HEADS[kind].module(head, states, steps=4).eval()
    seen = states([0, 1, 2])
    chances = target.get_output_embeddings()(seen.last).softmax(-1)
    for step, (_, logits, _, ahead) in enumerate(module.losses(seen)):
        both, same = [], []
        for row in range(3):
            for place in range(2, len(texts[row].tokens) - 5):
                p = chances[row, place + ahead].topk(10)
                q = logits[row, place].topk(min(10, len(KNOWN)))
                pairs: dict[int, float] = dict(
                    zip(p.indices.tolist(), (p.values / p.values.sum()).tolist(), strict=True)
                )
                tokens = [KNOWN[i] for i in q.indices.tolist()]
                both.append(
                    sum(min(pairs.get(t, 0.0), v) for t, v in zip(tokens, q.values.softmax(0).tolist(), strict=True))
                )
                same.append(float(tokens[0] == int(p.indices[0])))
        assert found[step] == pytest.approx(sum(both) / len(both), abs=1e-4)  # sums of float32
        if step == 0:
            assert first == pytest.approx(sum(same) / len(same))


def test_two_rows_that_are_alike_share_all() -> None:
    row = torch.randn(30, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    assert draft_kinds.shared(row, row) == pytest.approx(1)
    other = torch.full_like(row, -torch.inf)
    assert draft_kinds.shared(row, other) == 0


def test_one_command_trains_and_measures_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = small_pair()
    monkeypatch.setattr(ModelPair, "tiny", classmethod(lambda cls, *args, **options: small_pair()))
    monkeypatch.setattr(draft_kinds, "tokens_per_pass", lambda pair, prompts: {1: 1.5, 4: 1.0, 8: 1.0})
    sizes = ["text.batch=8", "text.longest=72", "head.draft_vocab_size=20", "trainer.max_epochs=1"]
    given = ["tiny", "3000", "60", "2", str(tmp_path), ",".join(draft_kinds.KINDS[:-2]), *sizes]
    monkeypatch.setattr("sys.argv", ["draft_kinds", *given])
    draft_kinds.main()
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(draft_kinds.heading().splitlines()[0]) + 2 :]
    assert [line.split(" | ")[0] for line in table] == [f"| {kind}" for kind in draft_kinds.KINDS[:-2]]
    assert all(line.endswith("| 1.50 | 1.00 | 1.00 |") for line in table)
    assert pair.with_draft(f"chimera:{tmp_path / 'chimera' / 'head'}").draft_name.startswith("chimera:")
    monkeypatch.setattr(train_draft, "main", None)
    draft_kinds.main()  # nothing is trained again
