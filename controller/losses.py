"""Losses: accept probabilities a[i, k] (draft i, k accepted before it) -> P(K_w = k), the likelihood of logged bits,
of survivors, and of what is regretted.

Design section 8: one table of accept probabilities answers every width, so widths agree with each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def count_table(accept: Tensor) -> Tensor:
    """The distribution of the accepted count of the first m drafts, for every m.

    One step of the recursion: P(K_{m+1} = k) = P(K_m = k) (1 - a[m, k]) + P(K_m = k - 1) a[m, k - 1].

    Args:
        accept: probabilities [..., W, W]; entries with k > i are not reached and not read.

    Returns:
        [..., W + 1, W + 1] with a gradient; row m is P(K_m = k), zero for k > m.
    """
    width = accept.shape[-1]
    start = torch.zeros_like(accept[..., 0, :])  # [..., W]
    zero = start[..., :1]
    row = torch.concatenate((zero + 1, start), -1)  # [..., W + 1] K_0 = 0
    rows = [row]
    for draft in range(width):
        gain = row[..., :width] * accept[..., draft, :]  # [..., W]
        row = torch.concatenate((row[..., :width] - gain, zero), -1) + torch.concatenate((zero, gain), -1)
        rows.append(row)
    return torch.stack(rows, -2)


def tails(table: Tensor) -> Tensor:
    """P(K >= M) from P(K = k) along the last axis; [..., W + 1] -> [..., W + 1], clipped to 0..1."""
    return table.flip(-1).cumsum(-1).flip(-1).clamp(0, 1)


def accepted_before(bits: Tensor) -> Tensor:
    """k_i, how many drafts before draft i were accepted; [N, W] bool -> [N, W] int64."""
    counts = bits.long()
    return counts.cumsum(-1) - counts


def bit_logits(accept_logits: Tensor, bits: Tensor) -> Tensor:
    """Logits of the logged bits given their history: a[i, k_i]; [N, W, W], [N, W] -> [N, W]."""
    return accept_logits.gather(-1, accepted_before(bits)[..., None]).squeeze(-1)


def count_nll(accept_logits: Tensor, bits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each accept bit given the bits before it, in nats.

    Summed over a row it is the exact -log P(bits). With the closed form E[bit | history] as `labels` the
    expectation is the same and the variance is less.

    Args:
        accept_logits: [N, W, W] float.
        bits: [N, W] bool; entries past a row's draft width are computed too, to be masked by the caller.
        labels: [N, W] probabilities in place of the bits; None: the bits.

    Returns:
        [N, W] float.
    """
    labels = bits if labels is None else labels
    return F.binary_cross_entropy_with_logits(bit_logits(accept_logits, bits), labels.float(), reduction="none")


def is_draft(rows: Mapping[str, Tensor]) -> Tensor:
    """Which entries of the padded bits are drafts; [N, W] bool."""
    return torch.arange(rows["bits"].shape[1], device=rows["bits"].device) < rows["draft_width"][:, None]


def bernoulli_nll(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The same for probabilities instead of logits: [..] and [..] -> [..]; clipped at 1e-6 (float32 columns)."""
    probabilities = probabilities.clamp(1e-6, 1 - 1e-6)
    return F.binary_cross_entropy(probabilities, labels.to(probabilities.dtype), reduction="none")


def survivor_nll(survivor_logits: Tensor, slot: Tensor, kept_width: Tensor) -> Tensor:
    """Negative log-likelihood of survivor slots that were seen among `kept_width` beams only.

    Censoring: a layer kept at c beams says nothing about slots beyond c, so the softmax is over slots 1..c. A row
    with c = 1 has likelihood one whatever the logits.

    Args:
        survivor_logits: [N, R] float, of slots 1..R.
        slot: [N] int64, 1-based; rows with 0 (no survivor) must be masked by the caller (see `knows_survivor`).
        kept_width: [N] int64, c.

    Returns:
        [N] float.
    """
    return -censored(survivor_logits, kept_width).gather(-1, (slot.clamp(min=1) - 1)[:, None]).squeeze(-1)


def censored(survivor_logits: Tensor, kept_width: Tensor) -> Tensor:
    """Log-probabilities of slots 1..c, given that the survivor is one of them; [N, R], [N] -> [N, R]."""
    slots = torch.arange(1, survivor_logits.shape[-1] + 1, device=survivor_logits.device)
    return survivor_logits.masked_fill(slots > kept_width.clamp(min=1)[:, None], float("-inf")).log_softmax(-1)


def knows_survivor(slot: Tensor, kept_width: Tensor) -> Tensor:
    """Rows whose survivor slot is known and could have been another; [N] bool."""
    return (slot > 0) & (kept_width > 1) & (slot <= kept_width)


def regret_steps(slot_deficits: Tensor, slot: Tensor, kept_width: Tensor) -> tuple[Tensor, Tensor]:
    """What each slot added: by how many nats the best line among the first k + 1 slots was ahead of that among k.

    Args:
        slot_deficits: [N, R] nats behind the best in slot order, anything past c; see `traces.recorder.deficits`.
        slot: [N] int64, the survivor's; 0 where nothing is known.
        kept_width: [N] int64, c.

    Returns:
        [N, R - 1] steps of k = 1..R-1, 0 or more; and a mask of those that were seen, k < c.
    """
    least = slot_deficits.cummin(-1).values
    places = torch.arange(1, slot_deficits.shape[-1], device=slot.device)
    seen = (places < kept_width[:, None]) & (slot > 0)[:, None]
    return torch.where(seen, least[:, :-1] - least[:, 1:], 0.0), seen


def regret_nll(log_steps: Tensor, steps: Tensor) -> Tensor:
    """Poisson deviance without its constant, exp(o) - y o: least where exp(o) is the mean of y >= 0; [..] -> [..]."""
    return log_steps.exp() - steps * log_steps
