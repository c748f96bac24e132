"""Nodes and slots: the tree knows parents, the cache knows slots, a scorer knows a model."""

from decoding.forest.tree import TokenForest as TokenForest
