"""Latency tables of devices that are not at hand, from their data sheets: a roofline, and stated
assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decoding.cost_table import NODE_COUNTS, LatencyTable
from decoding.pairs.inflate import Shape, shape_of
from decoding.support.checks import number

# As far as forests go: small passes say nothing of where arithmetic takes longer than reading.
_NODES = (*NODE_COUNTS, *range(64, 513, 32))


def modelled(
    target_size: str | Mapping[str, Any],
    draft_size: str | Mapping[str, Any],
    bytes_per_second: float,
    flop_per_second: float,
    bandwidth_share: float = 0.65,
    compute_share: float = 0.5,
    bytes_per_weight: int = 2,
    context_tokens: int = 128,
    launch: float = 0.0,
    iteration: float = 0.0,
    layer: float = 0.0,
    device: str = "modelled",
) -> LatencyTable:
    """A table for two Llamas: a pass takes what its bytes take or what its arithmetic takes,
    whichever is longer.

    Not a measurement. Bytes are the weights that a pass multiplies (an embedding table is looked
    up, unless it is also the head) and the keys and values of the context; arithmetic is two
    operations a weight and node.

    Args:
        target_size, draft_size: names in `decoding.pairs.inflate.SHAPES`, or mappings with the
            fields of `Shape`.
        bytes_per_second, flop_per_second: of the device's data sheet, the latter dense and in the
            weights' dtype.
        bandwidth_share, compute_share: shares of these that passes are assumed to reach, in (0, 1].
        bytes_per_weight: 2 for bfloat16.
        context_tokens: behind the forest.
        launch: seconds that each pass is assumed to take besides: to start it, and to bring its
            results to the host.
        iteration, layer: assumed host seconds, as in `LatencyTable`.
        device: its name, shown with the table.

    Returns:
        Seconds of passes over up to 512 nodes.

    Raises:
        UserError: unknown sizes, or numbers that no device can have.
    """
    for name, value, least, most in (
        ("bytes_per_second", bytes_per_second, 1, None),
        ("flop_per_second", flop_per_second, 1, None),
        ("bandwidth_share", bandwidth_share, 1e-6, 1),
        ("compute_share", compute_share, 1e-6, 1),
        ("bytes_per_weight", bytes_per_weight, 1, 8),
        ("context_tokens", context_tokens, 0, None),
        ("launch", launch, 0, None),
    ):
        number(f"{name} of a modelled device", value, least, most)

    def seconds(shape: Shape, nodes: int) -> float:
        weights = pass_weights(shape)
        slots = context_tokens + nodes
        size = bytes_per_weight * (weights + slots * kv_numbers(shape))
        memory = size / (bytes_per_second * bandwidth_share)
        return max(memory, 2 * weights * nodes / (flop_per_second * compute_share)) + launch

    target, draft = (tuple(seconds(shape_of(size), nodes) for nodes in _NODES) for size in (target_size, draft_size))
    return LatencyTable(_NODES, target, draft, device, iteration, layer)


def pass_weights(shape: Shape) -> int:
    """Weights that a pass multiplies."""
    return shape.parameters - (0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size)


def kv_numbers(shape: Shape) -> int:
    """Numbers in one token's keys and values of all layers."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
