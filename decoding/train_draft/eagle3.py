"""EAGLE-3's training: the head is unrolled, so that it learns from its own features. 2503.01840."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from decoding.engine.feature_head import FeatureHead
from decoding.errors import UserError
from decoding.train_draft.states import Seen, TargetStates
from decoding.train_draft.text import Document

TOP = 10  # tokens that acceptance is measured over, on both sides


def unrolled(head: FeatureHead, tokens: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
    """Draft k = 1..steps tokens in a row, from every place.

    Features of the k-th are the head's own of the one before; only those of the first are the
    target's. A query sees the target's past up to its place, and its own steps since.

    Args:
        tokens: [B, T].
        features: fused states of the target at these tokens, [B, T, H].

    Yields:
        For each k, [B, T, H]: at place i, what predicts token i + k + 1 from the tokens up to i +
        k. Places
        from T - k on are of no use.
    """
    length, groups = tokens.shape[1], head.groups
    seen = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    own = torch.eye(length, dtype=torch.bool, device=tokens.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    places = torch.arange(length, device=tokens.device)[None]
    for step in range(steps):
        turned = head.rotary_emb(features, places + step)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, turned: Any = turned, mask: Tensor = seen
        ) -> Tensor:  # [B, T, heads, D]
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *turned)
            keys.append(k)
            values.append(v.transpose(1, 2))
            all_keys, all_values = (torch.cat(part, 2).repeat_interleave(groups, 1) for part in (keys, values))
            mixed = F.scaled_dot_product_attention(q, all_keys, all_values, attn_mask=mask)
            return mixed.transpose(1, 2).flatten(2)

        ahead = F.pad(tokens[:, 1 + step :], (0, min(1 + step, length)))[:, :length]
        features = head(F.embedding(ahead, head.embedding).to(features.dtype), features, attend)
        yield features
        seen = torch.cat([seen, own], 1)


class HeadModule(LightningModule):
    """Fits a head to what its target would write.

    The loss is the cross entropy of the target's distribution, as far as it lies on the head's
    tokens, at each unrolled step; later steps count less.

    Args:
        head: new, or one to go on with.
        states: of the texts.
        steps: tokens drafted in a row.
        decay: weight of a step over the one before.
        lr, weight_decay: of AdamW; the rate rises for the first 3% and falls in a cosine.
        max_seconds: the rate is zero, and the fit ends, after so long; None: after the trainer's
            epochs.
    """

    def __init__(
        self,
        head: FeatureHead,
        states: TargetStates,
        steps: int = 4,
        decay: float = 0.8,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        max_seconds: float | None = None,
    ) -> None:
        super().__init__()
        self.head = head
        self._states = (states,)  # no part of the module: it has the target in it
        self.steps, self.decay, self.lr, self.weight_decay = steps, decay, lr, weight_decay
        self.max_seconds, self._began = max_seconds, 0.0
        self._sums: Tensor | None = None

    def target_logits(self, seen: Seen) -> Tensor:
        """The target's logits of the head's tokens, [B, T, Vd] float32."""
        output = self._states[0].target.get_output_embeddings()
        weight = output.weight.index_select(0, self.head.token_ids.to(output.weight.device))
        return F.linear(seen.last.to(weight.dtype), weight).float()

    def losses(self, seen: Seen) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each step: (cross entropy, logits of the head, places that count), [B, T], [B, T,
        Vd], [B, T].
        """
        logits = self.target_logits(seen)
        chances = (logits - seen.mass[..., None]).exp()  # [B, T, Vd], less than one in sum
        features = self.head.fuse(seen.states.to(self.head.fc.weight.dtype))
        places = torch.arange(seen.tokens.shape[1], device=chances.device)[None]
        for step, states in enumerate(unrolled(self.head, seen.tokens, features, self.steps)):
            guessed = self.head.logits(states).float()
            told = F.pad(chances[:, 1 + step :], (0, 0, 0, min(1 + step, chances.shape[1])))
            of = places + 1 + step  # the token whose follower is predicted
            counts = (of < seen.lengths[:, None] - 1) & (of >= seen.starts[:, None] - 1)
            yield -(told * guessed.log_softmax(-1)).sum(-1), guessed, counts

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """The loss of a batch of texts, given by their numbers."""
        seen = self._states[0](batch.tolist())
        total = torch.zeros((), device=seen.tokens.device)
        for step, (entropy, _, counts) in enumerate(self.losses(seen)):
            total = total + self.decay**step * entropy[counts].sum() / counts.sum().clamp(min=1)
        loss = total / sum(self.decay**step for step in range(self.steps))
        if not torch.isfinite(loss):
            raise UserError(f"The loss is {loss.item()}; lower fit.lr ({self.lr}).")
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        """Acceptance, of held-out texts."""
        seen = self._states[0](batch.tolist())
        output = self._states[0].target.get_output_embeddings()
        ids, found = self.head.token_ids, []
        best = [part.topk(min(TOP, part.shape[-1]), -1) for part in output(seen.last).float().unbind(0)]
        top, tokens = torch.stack([b.values for b in best]), torch.stack([b.indices for b in best])
        told, length = top.softmax(-1), seen.tokens.shape[1]
        for step, (entropy, guessed, counts) in enumerate(self.losses(seen)):
            mine = guessed.topk(min(TOP, guessed.shape[-1]), -1)
            q, q_tokens = mine.values.softmax(-1), ids[mine.indices]
            ahead = min(1 + step, length)
            p, p_tokens = (F.pad(x[:, ahead:], (0, 0, 0, ahead)) for x in (told, tokens))
            same = p_tokens[..., :, None] == q_tokens[..., None, :]
            both = torch.minimum(p[..., :, None], q[..., None, :]).where(same, 0.0).sum((-1, -2))
            first = p_tokens[..., 0] == q_tokens[..., 0]
            row = [both[counts].sum(), first[counts].sum(), entropy[counts].sum(), counts.sum()]
            found.append(torch.stack([value.double() for value in row]))
        sums = torch.stack(found)
        self._sums = sums if self._sums is None else self._sums + sums

    def on_validation_epoch_end(self) -> None:
        """The means of the epoch."""
        assert self._sums is not None
        means = self._sums[:, :3] / self._sums[:, 3:].clamp(min=1)
        self._sums = None
        for step, (accepted, agreed, entropy) in enumerate(means.tolist(), 1):
            self.log_dict({f"val/accepted_{step}": accepted, f"val/top1_{step}": agreed, f"val/loss_{step}": entropy})
        self.log("val/accepted", float(means[:, 0].mean()), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the rate is set batch by batch."""
        weights = [w for w in self.head.parameters() if w.requires_grad]
        flat, matrices = [w for w in weights if w.ndim < 2], [w for w in weights if w.ndim >= 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))

    def on_fit_start(self) -> None:
        """The clock of max_seconds starts."""
        self._began = time.monotonic()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set the rate by what is done, of the steps or of the time."""
        done = self.trainer.global_step / max(1.0, float(self.trainer.estimated_stepping_batches))
        if self.max_seconds is not None:
            done = max(done, (time.monotonic() - self._began) / self.max_seconds)
            self.trainer.should_stop = self.trainer.should_stop or done >= 1
        rate = min(1.0, (self.trainer.global_step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * max(rate, 0.01)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A shared embedding is no weight of the head, so nothing of the target is in a
        checkpoint.
        """
        checkpoint["head_shape"] = repr(self.head.shape)


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
