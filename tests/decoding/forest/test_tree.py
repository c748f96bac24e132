"""TokenForest: children are made once, paths read right, and exactly what leads nowhere dies."""

from __future__ import annotations

import numpy as np

from decoding.forest.tree import TokenForest


def test_children_are_made_once() -> None:
    forest = TokenForest()
    a = forest.child(0, 7)
    assert forest.child(0, 7) == a
    assert forest.child(0, 8) != a
    assert forest.child(a, 7) != a
    assert len(forest) == 4


def test_paths_depths_and_ancestors() -> None:
    forest = TokenForest()
    a = forest.child(0, 5)
    b = forest.child(a, 6)
    c = forest.child(b, 5)
    assert forest.path(c) == [5, 6, 5]
    assert forest.path(0) == []
    assert forest.depths[c] == 3


def test_release_stops_at_forks_and_at_what_is_kept() -> None:
    forest = TokenForest()
    a = forest.child(0, 1)
    b, c = forest.child(a, 1), forest.child(a, 2)
    d = forest.child(b, 1)
    assert forest.release([d], keep={c}) == [d, b], "a still leads to c"
    assert forest.release([c], keep={c}) == []
    assert forest.release([c, c], keep=set()) == [c, a]
    assert forest.release([c, a, d], keep=set()) == [], "all of them died before"


def test_the_root_never_dies() -> None:
    forest = TokenForest()
    assert forest.release([0], keep=set()) == []
    assert forest.release([forest.child(0, 1)], keep=set()) == [1]
    assert forest.child(0, 1) == 2, "a dead child comes back as a new node"


def test_random_forests_keep_exactly_the_ancestors_of_what_lives() -> None:
    """After release(all leaves, keep), the living nodes are the kept ones with their ancestors."""
    random = np.random.default_rng(0)
    for _ in range(50):
        forest = TokenForest()
        nodes = [0]
        for _ in range(40):
            nodes.append(forest.child(int(random.choice(nodes)), int(random.integers(3))))
        made = sorted(set(nodes))
        keep = {int(node) for node in random.choice(made, 4)}
        dead = forest.release(made, keep)
        living = {0}
        for node in keep:
            while node > 0:
                living.add(node)
                node = forest.parents[node]
        assert len(dead) == len(set(dead))
        assert set(made) - set(dead) == living
        assert all(dead.index(node) < dead.index(forest.parents[node]) for node in dead if forest.parents[node] in dead)
