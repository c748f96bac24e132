"""Ways to decode, by name: `METHODS[name](pair, config, settings)` is a function
`(prompts, streams) -> results`.

Those of this engine are settings of DSBDDecoder, so that a comparison with it compares methods and
not implementations; the `hf_` ones are transformers' own `generate`, the `ct2_` one CTranslate2's,
in a process of its own. A policy of anybody's own is a
method too: by its dotted name, or by that of its YAML in conf/policy (`find_method`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from decoding.config import DecodingConfig
from decoding.decoder import DSBDDecoder, Prompts
from decoding.errors import UserError
from decoding.measure.ctranslate2_generate import Peer
from decoding.measure.oracles import SurvivorOracle
from decoding.measure.transformers_generate import Streams, hf_generate
from decoding.pairs.pair import ModelPair
from decoding.policies.bandit import BanditWidth
from decoding.policies.base import DRAFT_DEPTH, DRAFT_WIDTH, SKIP, SURPLUS, TARGET_WIDTH, Knob, WidthPolicy
from decoding.policies.exploration import RandomWidth, UniformWidth
from decoding.policies.fixed import FixedWidth
from decoding.policies.hand_set import EntropyWidth, GapWidth, MassWidth
from decoding.policies.key_gap import KeyGapWidth
from decoding.policies.threshold import ExpectedWidth, ThresholdWidth
from decoding.results import DecodeResult
from decoding.support.entry import CONF_DIR
from decoding.support.names import is_dotted, locate

Generate = Callable[[Prompts, Streams], list[DecodeResult]]
Settings = Mapping[str, Any]
TRANSFORMERS, CTRANSLATE2 = "transformers", "ctranslate2"
PEERS = (TRANSFORMERS, CTRANSLATE2)  # families of methods that are not of this engine

# Fields of DecodingConfig that a row of this engine may set beside its method's knobs.
FLAGS = (
    Knob("exact", kind=bool, of_config=True),
    SURPLUS,
    Knob("refill", kind=str, of_config=True),
    Knob("warp", kind=str, of_config=True),
    Knob("one_beam_cache", kind=bool, of_config=True),
    Knob("verification", kind=str, of_config=True),
    Knob("oversample", kind=int, of_config=True),
)
_OF_CONFIG = {knob.name for knob in (TARGET_WIDTH, DRAFT_WIDTH, DRAFT_DEPTH, *FLAGS)}


@dataclass(frozen=True)
class Method:
    """A way to decode.

    Args:
        name: by which rows ask for it.
        build: (pair, config, settings) -> Generate.
        knobs: settings that are worth sweeping, in the order of a row's name.
        fixed: DecodingConfig fields that it always has.
        family: as of a WidthPolicy; or one of `PEERS`.
        inexact: it is nothing without its own surplus and refill, and has them where the config
            says `exact`, too.
        drafts: another draft than the pair's changes it.
        batches: it decodes prompts together.
        arguments: names of further settings that it takes, those of a policy that are not worth
            sweeping.
        policy: makes its policy of a row's settings; None where it has none of its own.
    """

    name: str
    build: Callable[[ModelPair, DecodingConfig, Settings], Generate]
    knobs: tuple[Knob, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    family: str = "control"
    inexact: bool = False
    drafts: bool = True
    batches: bool = True
    arguments: tuple[str, ...] = ()
    policy: Callable[[Settings], WidthPolicy] | None = None

    def configure(self, config: DecodingConfig, settings: Settings) -> DecodingConfig:
        """The config with the method's and the row's settings; narrower widths pull others along."""
        changes: dict[str, Any] = {name: value for name, value in settings.items() if name in _OF_CONFIG}
        changes.update(self.fixed)
        if self.inexact:
            changes["exact"] = False
        width = changes.get("target_width", config.target_width)
        changes["min_width"] = min(config.min_width, width)
        changes["num_return_sequences"] = min(config.num_return_sequences, width)
        if "draft_width" not in changes:
            changes["draft_width"] = max(config.draft_width, width)
        return config.with_changes(**changes)

    def __call__(self, pair: ModelPair, config: DecodingConfig, settings: Settings | None = None) -> Generate:
        """The method for a pair, with a row's settings."""
        settings = settings or {}
        return self.build(pair, self.configure(config, settings), settings)


# ----------------------------------------------------------------------------------------- policies


def policy_method(
    policy: type[WidthPolicy], name: str | None = None, make: Callable[..., WidthPolicy] | None = None, **options: Any
) -> Method:
    """DSBDDecoder with a policy; one policy object serves all prompts of a row.

    Args:
        policy: its class, which declares knobs and family.
        name: of the method; None: the policy's.
        make: called with the arguments that a row sets, as keywords; None: the class.
        options: further fields of `Method`.
    """
    make = make or policy
    options = {"knobs": policy.knobs, "family": policy.family, **options}

    def made(settings: Settings) -> WidthPolicy:
        return make(**arguments_of(options["knobs"], settings))

    def build(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
        return partial(DSBDDecoder(pair, config, made(settings)).generate, halve=False)

    return Method(name or policy.name, build, policy=made, **options)


def arguments_of(knobs: tuple[Knob, ...], settings: Settings) -> dict[str, Any]:
    """Those of a row's settings that a policy is made with, by its own arguments' names."""
    named = {knob.name: knob.argument or knob.name for knob in knobs if not knob.of_config}
    return {named.get(name, name): value for name, value in settings.items() if name not in _OF_CONFIG}


def find_method(name: Any, methods: Mapping[str, Method], said: str = "policies holds") -> Method:
    """A method by its name, the name of a YAML in conf/policy, or the dotted name of a WidthPolicy.

    Args:
        methods: by name; they come first.
        said: how a sentence about the name begins.

    Raises:
        UserError: none of the three.
    """
    if name in methods:
        return methods[name]
    if isinstance(name, str) and (CONF_DIR / "policy" / f"{name}.yaml").is_file():
        return _of_yaml(name)
    if isinstance(name, str) and is_dotted(name):
        return _of_class(name, name, f"{said} {name!r}, which")
    others = sorted({path.stem for path in (CONF_DIR / "policy").glob("*.yaml")} - set(methods))
    raise UserError(
        f"{said} {name!r}; choose among {', '.join([*methods, *others])}, or give the dotted name of a WidthPolicy "
        "of your own, such as mine.HalfWidth."
    )


def _of_yaml(name: str) -> Method:
    """The policy that conf/policy/<name>.yaml describes; what is in it may be set by a row."""
    path = CONF_DIR / "policy" / f"{name}.yaml"
    node: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    dotted = node.get("_target_") if isinstance(node, dict) else None
    if not isinstance(dotted, str):
        raise UserError(f"{path} has no _target_; give the dotted name of a WidthPolicy there.")
    return _of_class(name, dotted, str(path), node)


def _of_class(name: str, dotted: str, where: str, node: Any = None) -> Method:
    """A policy's class, or a method that makes one, by its dotted name; `node` has the arguments."""
    try:
        make = locate(dotted)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where} needs {dotted}, which cannot be imported: {error}.") from error
    policy = make if inspect.isclass(make) else getattr(make, "__self__", None)
    if not (inspect.isclass(policy) and issubclass(policy, WidthPolicy)):
        raise UserError(f"{where} needs {dotted}, which is no WidthPolicy; derive it from decoding.WidthPolicy.")
    given = {"_target_": dotted, **(node or {})}
    further = [key for key in dict.fromkeys([*given, *inspect.signature(make).parameters]) if key[0] != "_"]
    return policy_method(policy, name, partial(_instantiated, given, where), arguments=tuple(further))


def _instantiated(node: Mapping[str, Any], where: str, **arguments: Any) -> WidthPolicy:
    """A policy from its node, with a row's arguments in place of the node's."""
    try:
        cfg = OmegaConf.create({**node, **arguments})
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"{where} has no {missing[0]}; give it in the row, as {missing[0]}: ...")
        policy: WidthPolicy = instantiate(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"{where} cannot be read: {str(error).splitlines()[0]}") from error
    return policy


# ------------------------------------------------------------------------------------------ methods


def _engine_alone(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
    return partial(DSBDDecoder(pair, config.with_changes(draft_depth=0)).generate, halve=False)


def _widest(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
    return partial(DSBDDecoder(pair, config, FixedWidth()).generate, halve=False)


def _oracle_survivor(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
    return SurvivorOracle.make(pair, config)


def _ctranslate2(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
    peer = Peer(pair, settings.get("compute_type", "float32"))
    return lambda prompts, streams: peer.generate(prompts, config)


def _transformers(name: str, assisted: bool = False, **options: Any) -> Method:
    def build(pair: ModelPair, config: DecodingConfig, settings: Settings) -> Generate:
        def generate(prompts: Prompts, generator: Streams) -> list[DecodeResult]:
            return hf_generate(pair, prompts, config, generator, assisted, config.target_width)

        return generate

    return Method(name, build, family=TRANSFORMERS, drafts=assisted, batches=False, **options)


_DRAFT = (DRAFT_WIDTH, DRAFT_DEPTH)
_WIDTH = (TARGET_WIDTH,)
_ALL_BEAMS = {"one_beam_cache": False}
_SEARCH = {"mode": "beam_search", "temperature": 1.0, "top_k": None, "top_p": None, "replacement": False}
_CHAIN = {"target_width": 1, "draft_width": 1}
_SAMPLE = {"mode": "beam_sample"}  # whatever the config says: their names do
_PAPER: dict[str, Any] = {
    "knobs": tuple(knob for knob in ThresholdWidth.knobs if knob is not SURPLUS),
    "family": "control",
}
_BY_REJECTION: dict[str, Any] = {
    "knobs": tuple(knob for knob in FixedWidth.knobs if knob is not SKIP),
    "family": "control",
}
POLICIES: dict[str, type[WidthPolicy]] = {
    policy.name: policy
    for policy in (
        FixedWidth,
        ThresholdWidth,
        ExpectedWidth,
        MassWidth,
        GapWidth,
        EntropyWidth,
        KeyGapWidth,
        BanditWidth,
        RandomWidth,
        UniformWidth,
    )
}
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("multinomial", _engine_alone, fixed=_CHAIN | _SAMPLE | _ALL_BEAMS, drafts=False),
        # A fixed width that drafts nothing: one of the settings that someone would tune.
        Method("beam_sample", _engine_alone, _WIDTH, _SAMPLE | _ALL_BEAMS, family="hand-set", drafts=False),
        Method("speculative", _widest, (DRAFT_DEPTH,), _CHAIN),  # a chain of single drafts, 2211.17192
        Method(
            "multi_draft", _widest, _DRAFT, {"target_width": 1}
        ),  # SpecInfer, 2305.09781: several drafts, one sample
        *map(policy_method, POLICIES.values()),
        # Beam sampling by the target alone, its width drawn anew for each token.
        policy_method(
            UniformWidth,
            "random_beam_sample",
            knobs=(),
            fixed={"draft_depth": 0} | _SAMPLE | _ALL_BEAMS,
            arguments=("seed", "widths"),
            drafts=False,
        ),
        # Equal widths under the paper's rule, beside `fixed` under the config's.
        policy_method(FixedWidth, "rejection", fixed={"verification": "rejection"}, **_BY_REJECTION),
        policy_method(ThresholdWidth, "threshold_as_shipped", partial(ThresholdWidth, as_shipped=True), **_PAPER),
        # The paper's rule as its authors ran it, widths by the right probabilities.
        policy_method(
            ThresholdWidth,
            "paper",
            fixed={"surplus": "drop", "refill": "full", "one_beam_cache": True, "verification": "rejection"},
            inexact=True,
            **_PAPER,
        ),
        # Not achievable: compare what it models, not what it takes.
        Method("oracle_survivor", _oracle_survivor, _DRAFT, batches=False),
        Method("beam_search", _engine_alone, _WIDTH, _SEARCH | _ALL_BEAMS, drafts=False),
        Method("speculative_beam_search", _widest, (*_WIDTH, *_DRAFT), _SEARCH),
        _transformers("hf_sample", fixed=_CHAIN | _SAMPLE),
        _transformers("hf_beam_sample", knobs=_WIDTH, fixed=_SAMPLE),
        _transformers("hf_beam_search", knobs=_WIDTH, fixed=_SEARCH),
        Method(
            "ct2_beam_search",
            _ctranslate2,
            (*_WIDTH, Knob("compute_type", kind=str, axis="compute_types")),
            _SEARCH,
            family=CTRANSLATE2,
            drafts=False,
            batches=False,
        ),
        _transformers("hf_assisted", assisted=True, fixed=_CHAIN),
    )
}
