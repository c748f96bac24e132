"""Shared noise: one exponential variable for each (path, token), a fixed function of a prompt's seed. Design 5.2.

Counter-based: no state, any order, the same numbers in numpy and in torch, on a CPU and on a GPU. Beam sampling keeps
the smallest keys E / P, an exponential race (1903.06059); a draft that runs the race on Q with the same E guesses it.

A path is hashed to 64 bits, token by token: hash(path + v) = mix(hash(path) ^ token_code(v)), with the finaliser of
SplitMix64 as `mix`. E(path, v) is read off hash(path + v) by a second finaliser, that of MurmurHash3, so that neither a
node's noise nor its children's hashes say anything of each other. Both finalisers are bijections. Therefore siblings
never collide, and two given children of different parents do with chance 2^-64. Among n of them no two collide but with
chance n^2 / 2^65: 4e-8 for the 1.2 million of a step of 8 beams over 150,000 tokens, 3e-10 for the 100,000 nodes of a
long prompt's forest. A collision of two candidates makes one pair of numbers equal; one of two nodes makes their
children's numbers equal. Neither can be aimed at by a text, since a prompt's seed is drawn at random.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from decoding.dice.sampling import FloatArray, IntArray
from decoding.support.compiled import inlined

Words = TypeVar("Words", IntArray, Tensor)  # 64-bit words as int64, in either library: both wrap around

# U = (k + 1/2) / 2^52 with k of 52 bits: float64 holds all of these exactly, and none is 0 or 1 (with 53 bits the
# largest would round to 1). What is drawn are the smallest of E / P, so what counts are small E, and these are a grid
# of step 2^-52: each token's chance is right to 2^-53, a step over 150,000 tokens to 2e-11 in total variation, and two
# of them have one E with chance 3e-6. With 32 bits it would be 2e-5, and two or three ties in every step.
BITS = 52


def _signed(word: int) -> int:
    """An unsigned 64-bit word as int64 has it."""
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_SPLITMIX = (30, _signed(0xBF58476D1CE4E5B9), 27, _signed(0x94D049BB133111EB), 31)
_MURMUR = (33, _signed(0xFF51AFD7ED558CCD), 33, _signed(0xC4CEB9FE1A85EC53), 33)


@inlined
def _shifted(words: Words, bits: int) -> Words:
    """Logical right shift: int64 shifts its sign in, so that is masked away."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


@inlined
def _finalised(words: Words, rounds: tuple[int, int, int, int, int]) -> Words:
    """Shift-xor and multiply by odd constants: each step can be undone, and every bit reaches every other."""
    first, times, second, times_again, third = rounds
    words = (words ^ _shifted(words, first)) * times
    words = (words ^ _shifted(words, second)) * times_again
    return words ^ _shifted(words, third)


def token_codes(tokens: Words) -> Words:
    """A 64-bit word for each token id, different for different ids; the outputs of SplitMix64."""
    return _finalised(tokens * _GOLDEN + _GOLDEN, _SPLITMIX)


def root_hash(seed: int) -> int:
    """Hash of the empty path, from a prompt's seed of up to 64 bits."""
    word = np.array([_signed(seed % (1 << 64))], dtype=np.int64)
    # Finalised twice: with the words of tokens alone, seed 3 and token 5 would be seed 5 and token 3.
    return int(_finalised(token_codes(word), _MURMUR)[0])


@inlined
def child_hashes(parents: Words, codes: Words) -> Words:
    """Hashes of paths that are one token longer; hashes of the parents and codes of the tokens, of one shape."""
    return _finalised(parents ^ codes, _SPLITMIX)


@inlined
def _numerators(hashes: Words) -> Words:
    """k of U = (k + 1/2) / 2^52."""
    return _shifted(_finalised(hashes + _GOLDEN, _MURMUR), 64 - BITS)


@inlined
def exponentials(hashes: IntArray) -> FloatArray:
    """E = -log U of each path, float64, by its hash; any shape."""
    return -np.log((_numerators(hashes) + 0.5) * 2.0**-BITS)


def exponential_grid(parents: IntArray, vocabulary: int, device: torch.device) -> Tensor:
    """E of every continuation of some paths, [B, V] float64 on `device`, by the hashes [B] of the paths.

    The same U as those of `exponentials`, bit by bit; the two libraries' logarithms may differ in the last place.
    """
    rows = torch.from_numpy(parents).to(device)[:, None]
    hashes = child_hashes(rows, _code_row(vocabulary, device)[None])
    return (_numerators(hashes).double() + 0.5).mul_(2.0**-BITS).log_().neg_()


@functools.lru_cache(4)
def _code_row(vocabulary: int, device: torch.device) -> Tensor:
    return token_codes(torch.arange(vocabulary, dtype=torch.int64, device=device))


@functools.lru_cache(4)
def _code_table(vocabulary: int) -> IntArray:
    return token_codes(np.arange(vocabulary, dtype=np.int64))


def seed_of(stream: torch.Generator) -> int:
    """A prompt's seed, drawn from its stream."""
    return int(torch.randint(-(1 << 63), (1 << 63) - 1, (1,), generator=stream, device=stream.device))


class Paths(Protocol):
    """Nodes by number, as `TokenForest` has them."""

    tokens: list[int]
    parents: list[int]


class PathNoise:
    """The noise of one prompt's forest: the hashes of its nodes, kept as they are asked for.

    Args:
        seed: of the prompt.
        forest: whose paths they are.
        vocabulary: V; token ids are less.
    """

    def __init__(self, seed: int, forest: Paths, vocabulary: int) -> None:
        self._forest, self._codes = forest, _code_table(vocabulary)
        self._hashes: dict[int, int] = {0: root_hash(seed)}

    def hashes(self, nodes: Sequence[int]) -> IntArray:
        """Of the paths to some nodes, [N]."""
        known = self._hashes
        missing = [node for node in dict.fromkeys(nodes) if node not in known]
        if missing:
            parents = self.hashes([self._forest.parents[node] for node in missing])
            codes = self._codes[[self._forest.tokens[node] for node in missing]]
            known.update(zip(missing, child_hashes(parents, codes).tolist(), strict=True))
        return np.array([known[node] for node in nodes], dtype=np.int64)

    def words(self, parents: IntArray, tokens: IntArray) -> tuple[IntArray, IntArray]:
        """Hashes of the parents and codes of the tokens of (parent node, token) pairs, [S] each."""
        return self.hashes(parents.tolist()), self._codes[tokens]

    def of(self, parents: IntArray, tokens: IntArray) -> FloatArray:
        """E of (parent node, token) pairs, [S]."""
        return exponentials(child_hashes(*self.words(parents, tokens)))

    def grid(self, parents: IntArray, device: torch.device) -> Tensor:
        """E of every token after each of some nodes, [B, V] on `device`."""
        return exponential_grid(self.hashes(parents.tolist()), len(self._codes), device)

    def forget(self, dead: Iterable[int]) -> None:
        """Nodes died."""
        for node in dead:
            self._hashes.pop(node, None)
