"""A fit of any kind of draft: what it guesses against what its target would write, Lightning's part
of it.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from decoding.errors import UserError
from decoding.train_draft.states import Seen, TargetStates
from decoding.train_draft.text import Document

TOP = 10  # tokens that acceptance is measured over, on both sides
Guess = tuple[Tensor, Tensor, Tensor, int]


class DraftModule(LightningModule):
    """Fits a draft to what its target would write.

    The loss is the cross entropy of the target's distribution, as far as it lies on the draft's
    tokens, at each drafted step, and what kinds of drafts add to it; later steps count less.

    Args:
        states: of the texts.
        decay: weight of a step over the one before.
        lr, weight_decay: of AdamW; the rate rises for 50 batches and falls in a cosine.
        max_seconds: the rate is zero, and the fit ends, after so long; None: after the trainer's
            epochs.
    """

    def __init__(
        self,
        states: TargetStates,
        decay: float = 0.8,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        max_seconds: float | None = None,
    ) -> None:
        super().__init__()
        self._states = (states,)  # no part of the module: it has the target in it
        self.decay, self.lr, self.weight_decay = decay, lr, weight_decay
        self.max_seconds, self._began, self._spent = max_seconds, 0.0, 0.0
        self._sums: Tensor | None = None

    @property
    @abstractmethod
    def token_ids(self) -> Tensor:
        """[Vd] the target's ids of the tokens that the draft proposes."""

    @abstractmethod
    def losses(self, seen: Seen) -> Iterator[Guess]:
        """Draft at every place of some texts.

        Yields:
            For each drafted step: what is fitted [B, T], logits of the draft [B, T, Vd], places
            that count [B, T], and how far ahead of its place the token is whose follower is
            guessed.
        """

    def target_chances(self, seen: Seen) -> Tensor:
        """The target's chances of the draft's tokens, [B, T, Vd] float32; less than one in sum."""
        output = self._states[0].target.get_output_embeddings()
        weight = output.weight.index_select(0, self.token_ids.to(output.weight.device))
        return (F.linear(seen.last.to(weight.dtype), weight).float() - seen.mass[..., None]).exp()

    def guess(self, seen: Seen, chances: Tensor, logits: Tensor, ahead: int) -> Guess:
        """One item of `losses`, by the logits of a step."""
        of = torch.arange(seen.tokens.shape[1], device=chances.device)[None] + ahead
        counts = (of < seen.lengths[:, None] - 1) & (of >= seen.starts[:, None] - 1)
        return -(shifted(chances, ahead) * logits.log_softmax(-1)).sum(-1), logits, counts, ahead

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """The loss of a batch of texts, given by their numbers."""
        seen = self._states[0](batch.tolist())
        total, weights = torch.zeros((), device=seen.tokens.device), 0.0
        for step, (loss, _, counts, _) in enumerate(self.losses(seen)):
            total = total + self.decay**step * loss[counts].sum() / counts.sum().clamp(min=1)
            weights += self.decay**step
        loss = total / weights
        if not torch.isfinite(loss):
            raise UserError(f"The loss is {loss.item()}; lower fit.lr ({self.lr}).")
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        """Acceptance, of held-out texts."""
        seen = self._states[0](batch.tolist())
        output = self._states[0].target.get_output_embeddings()
        ids, found = self.token_ids, []
        best = [part.topk(min(TOP, part.shape[-1]), -1) for part in output(seen.last).float().unbind(0)]
        top, tokens = torch.stack([b.values for b in best]), torch.stack([b.indices for b in best])
        told = top.softmax(-1)
        for loss, guessed, counts, ahead in self.losses(seen):
            mine = guessed.topk(min(TOP, guessed.shape[-1]), -1)
            q, q_tokens = mine.values.softmax(-1), ids[mine.indices]
            p, p_tokens = (shifted(x, ahead) for x in (told, tokens))
            same = p_tokens[..., :, None] == q_tokens[..., None, :]
            both = torch.minimum(p[..., :, None], q[..., None, :]).where(same, 0.0).sum((-1, -2))
            first = p_tokens[..., 0] == q_tokens[..., 0]
            row = [both[counts].sum(), first[counts].sum(), loss[counts].sum(), counts.sum()]
            found.append(torch.stack([value.double() for value in row]))
        sums = torch.stack(found)
        self._sums = sums if self._sums is None else self._sums + sums

    def on_validation_epoch_end(self) -> None:
        """The means of the epoch."""
        assert self._sums is not None
        means = self._sums[:, :3] / self._sums[:, 3:].clamp(min=1)
        self._sums = None
        for step, (accepted, agreed, loss) in enumerate(means.tolist(), 1):
            self.log_dict({f"val/accepted_{step}": accepted, f"val/top1_{step}": agreed, f"val/loss_{step}": loss})
        self.log("val/accepted", float(means[:, 0].mean()), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the rate is set batch by batch."""
        weights = [w for w in self.parameters() if w.requires_grad]
        flat, matrices = [w for w in weights if w.ndim < 2], [w for w in weights if w.ndim >= 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))

    def on_fit_start(self) -> None:
        """The clock of max_seconds starts, or goes on."""
        self._began = time.monotonic() - self._spent

    def on_train_start(self) -> None:
        """This fit's weight decay holds, not that of the checkpoint it goes on from."""
        matrices, _ = self.trainer.optimizers[0].param_groups
        matrices["weight_decay"] = self.weight_decay

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what is fitted, and how long it has run, so that a fit that goes on has the rest of
        max_seconds.
        """
        checkpoint["draft"] = type(self).__name__
        checkpoint["seconds"] = time.monotonic() - self._began

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read it again; a checkpoint without it begins the clock anew."""
        kind = checkpoint.get("draft", type(self).__name__)
        if kind != type(self).__name__:
            raise UserError(f"ckpt_path is of a {kind}, where kind asks for a {type(self).__name__}; give that kind.")
        self._spent = float(checkpoint.get("seconds", 0.0))

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set the rate by what is done, of the steps or of the time."""
        done = self.trainer.global_step / max(1.0, float(self.trainer.estimated_stepping_batches))
        if self.max_seconds is not None:
            done = max(done, (time.monotonic() - self._began) / self.max_seconds)
            self.trainer.should_stop = self.trainer.should_stop or done >= 1
        rate = min(1.0, (self.trainer.global_step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * max(rate, 0.01)


def shifted(values: Tensor, ahead: int) -> Tensor:
    """Move values so many places to the front, nothing at the end; [B, T, ...] both ways."""
    ahead = min(ahead, values.shape[1])
    return F.pad(values[:, ahead:], (*[0, 0] * (values.ndim - 2), 0, ahead))


class TextData(LightningDataModule):
    """Batches of numbers of texts, of about as many tokens each.

    Args:
        texts: all; those of `Document.held_out` are the validation split.
        batch_tokens: tokens of a batch, padding included.
        seed: of the order.
    """

    def __init__(self, texts: Sequence[Document], batch_tokens: int, seed: int = 0) -> None:
        super().__init__()
        self.batch_tokens, self.seed = batch_tokens, seed
        self.train = [i for i, text in enumerate(texts) if not text.held_out]
        self.val = [i for i, text in enumerate(texts) if text.held_out]
        self._lengths = [len(text.tokens) for text in texts]
        if not self.train or not self.val:
            raise UserError(
                f"There are {len(texts)} texts, of which {len(self.val)} are held out; raise text.tokens until "
                "there are some of both."
            )

    def batches(self, numbers: Sequence[int], generator: torch.Generator | None) -> list[list[int]]:
        """Texts of about one length together; in a random order with a generator."""
        order = list(numbers)
        if generator is not None:
            order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
            chunk = max(64, len(order) // 8)
        else:
            chunk = len(order)
        found: list[list[int]] = []
        for first in range(0, len(order), chunk):
            group: list[int] = []
            for number in sorted(order[first : first + chunk], key=self._lengths.__getitem__):
                if group and (len(group) + 1) * self._lengths[number] > self.batch_tokens:
                    found.append(group)
                    group = []
                group.append(number)
            found.append(group)
        if generator is not None:
            found = [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
        return found

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches in a new order every epoch, the same for equal seeds."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        return _loader(self.batches(self.train, generator))

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The held-out texts."""
        return _loader(self.batches(self.val, None))


def _loader(batches: list[list[int]]) -> DataLoader[Tensor]:
    return DataLoader([torch.tensor(batch) for batch in batches], batch_size=None)  # type: ignore[arg-type]
