"""FSPAD's training: one vector of a token learns to be the target's next state, the other to say
what follows. 2408.15562.

Partial alignment takes the place of unrolling: what is handed on is like the target's states, so
that only the first drafted token is learned. The others are measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from decoding.train_draft.eagle3 import HeadModule, unrolled
from decoding.train_draft.fit import Guess, shifted
from decoding.train_draft.states import Seen

ALIGNMENT = 10.0  # weight of the distance of states over the cross entropy, 1 : 0.1 in the paper's code


class FspadModule(HeadModule):
    """Fits a `SampledHead`.

    Args:
        head, states, steps, options: as for `HeadModule`; `steps` are those of validation.
    """

    def losses(self, seen: Seen) -> Iterator[Guess]:
        """Draft one token from every place, or in validation `steps` in a row."""
        chances = self.target_chances(seen)
        theirs = self.head.fuse(seen.states.to(self.head.lm_head.weight.dtype))
        steps = 1 if self.training else self.steps
        for step, given in enumerate(unrolled(self.head, seen.tokens, theirs, steps)):
            entropy, logits, counts, ahead = self.guess(seen, chances, self.head.logits(given).float(), 1 + step)
            handed, wanted = self.head.handed_on(given).float(), shifted(theirs, ahead).float()
            distance = F.smooth_l1_loss(handed, wanted, reduction="none").mean(-1)
            yield entropy + ALIGNMENT * distance, logits, counts, ahead
