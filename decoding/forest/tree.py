"""TokenForest: the tokens of all hypotheses of a prompt, as nodes with parents. It knows nothing of
slots or models.
"""

from __future__ import annotations


class TokenForest:
    """Nodes in order of creation; node 0 is the prompt's last token, its depth 0.

    A node lives while a beam ends in it or it has a living child; `release` reports the nodes that
    die.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = [-1]
        self.parents: list[int] = [-1]
        self.depths: list[int] = [0]
        self._children: list[dict[int, int]] = [{}]  # token -> node

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, parent: int, token: int) -> int:
        """The child of `parent` that carries `token`; made if there is none yet."""
        child = self._children[parent].get(token)
        if child is not None:
            return child
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self._children.append({})
        self._children[parent][token] = node
        return node

    def find(self, parent: int, token: int) -> int | None:
        """The living child of `parent` that carries `token`."""
        return self._children[parent].get(token)

    def path(self, node: int) -> list[int]:
        """Tokens from the prompt's end to `node`."""
        tokens = []
        while node > 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def release(self, leaves: list[int], keep: set[int]) -> list[int]:
        """Let go of the paths that end in `leaves`, except what leads to a node of `keep` or has
        other children.

        Returns:
            The nodes that died, children before parents.
        """
        dead = []
        for leaf in sorted(leaves, reverse=True):
            node = leaf
            while node > 0 and node not in keep and not self._children[node]:
                parent = self.parents[node]
                if self._children[parent].get(self.tokens[node]) != node:
                    break  # died before
                del self._children[parent][self.tokens[node]]
                dead.append(node)
                node = parent
        return dead
