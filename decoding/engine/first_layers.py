"""A model's first layers, embedding, final norm and head, as a model of their own that shares the
weights.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from decoding.errors import UserError


def first_layers(target: Any, count: int) -> Any:
    """A model of the target's class that runs its first `count` blocks.

    Modules along the way to the list of blocks are shallow copies with configs of their own;
    everything else, weights included, is the target's own. It works for any model that keeps its
    blocks in one nn.ModuleList.

    Args:
        target: a transformers causal LM.
        count: 1 to one less than it has.

    Raises:
        UserError: too few or too many, or a model whose blocks cannot be found or taken apart.
    """
    layers = target.config.get_text_config().num_hidden_layers
    kind = getattr(target.config, "model_type", type(target).__name__)
    if not 1 <= count < layers:
        allowed = f"give layers:1 to layers:{layers - 1}" if layers > 1 else "it has none to leave out"
        raise UserError(f"draft is 'layers:{count}', but the target ({kind}) has {layers} layers; {allowed}.")
    path = _path_to_blocks(target, layers, kind)
    configs: dict[int, Any] = {}
    draft = _copied(target, configs, count, kind)
    draft.generation_config = copy.deepcopy(getattr(target, "generation_config", None))
    at = draft
    for name in path[:-1]:
        below = _copied(at.get_submodule(name), configs, count, kind)
        at._modules[name] = below
        at = below
    at._modules[path[-1]] = nn.ModuleList(list(at.get_submodule(path[-1]))[:count])
    return draft.eval()


def _path_to_blocks(target: Any, layers: int, kind: str) -> list[str]:
    """Names from the model down to its list of blocks."""
    found = [name for name, m in target.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        lists = ", ".join(outermost) or "none"
        raise UserError(
            f"The target ({kind}) cannot draft with its own layers: of its lists of modules exactly one must have "
            f"{layers} blocks, which {lists} {'has' if not outermost else 'have'}. Give another draft, such as ngram."
        )
    return outermost[0].split(".")


def _copied(module: Any, configs: dict[int, Any], count: int, kind: str) -> Any:
    """A module with the same children and weights, tables of its own to change, and a config of
    `count` layers.
    """
    if "forward" in vars(module):
        raise UserError(
            f"The target ({kind}) cannot draft with its own layers: its forward is wrapped, as device_map over several "
            "devices does. Load it on one device, or give another draft, such as ngram."
        )
    twin = copy.copy(module)
    for name, value in vars(twin).items():
        if isinstance(value, dict):  # children, weights, hooks
            vars(twin)[name] = copy.copy(value)
    config = getattr(module, "config", None)
    if config is not None:
        if id(config) not in configs:
            configs[id(config)] = _cut(config, count)
        twin.config = configs[id(config)]
    return twin


def _cut(config: Any, count: int) -> Any:
    """A copy of a config for the first `count` layers."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = count
    if kinds is not None:
        text.layer_types = list(kinds)[:count]
    return cut
