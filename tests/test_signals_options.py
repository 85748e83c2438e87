"""Options: one dataclass per concept, frozen, checked when made, and the same in both hosts."""

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

from rl_plugins import signals
from rl_plugins.lightning import GRPOModule, MTPCriticModule, MTPSFTModule, PPOModule
from rl_plugins.signals import (
    DraftOptions,
    HeadOptions,
    LengthOptions,
    OnlineValueOptions,
    PhasicOptions,
    PolicyOptions,
    PPOValueOptions,
    SamplingOptions,
    SFTHeadOptions,
    ValueHeadOptions,
    ValueOptions,
    VariantOptions,
)
from rl_plugins.signals.options import Options, split_options
from rl_plugins.trl import GRPOVariantConfig, MTPCriticConfig, MTPSFTConfig, PPOConfig

KINDS = [getattr(signals, name) for name in signals.__all__ if name.endswith("Options")]
PAIRS = [
    (MTPCriticModule, MTPCriticConfig),
    (PPOModule, PPOConfig),
    (GRPOModule, GRPOVariantConfig),
    (MTPSFTModule, MTPSFTConfig),
]


def declared(kind: type) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(kind)}


def default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_frozen_and_copied(kind: type[Options]) -> None:
    options = kind()
    name = dataclasses.fields(options)[0].name  # type: ignore[arg-type]
    with pytest.raises(
        dataclasses.FrozenInstanceError, match=rf"{kind.__name__} is frozen.*replace\(options, {name}="
    ):
        setattr(options, name, None)
    for other in (copy.deepcopy(options), pickle.loads(pickle.dumps(options)), dataclasses.replace(options)):  # type: ignore[type-var]
        assert other == options


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_one_text(kind: type[Options]) -> None:
    for name, field in declared(kind).items():
        assert f"        {name}: {field.metadata['help']}" in (kind.__doc__ or "")
        for base in kind.__mro__[1:]:
            if dataclasses.is_dataclass(base) and name in declared(base):
                assert declared(base)[name].metadata == field.metadata, "only the default may differ"


def test_no_option_belongs_to_two_concepts() -> None:
    """But for one name, which both kinds of signal have: the KL in the rewards."""
    owners: dict[str, set[str]] = {}
    for kind in KINDS:
        for name in declared(kind):
            first = next(base for base in reversed(kind.__mro__) if name in vars(base).get("__annotations__", {}))
            owners.setdefault(name, set()).add(first.__name__)
    shared = {name: found for name, found in owners.items() if len(found) > 1}
    assert shared == {"kl_in_reward": {"OnlineValueOptions", "VariantOptions"}}


@pytest.mark.parametrize(("module", "config"), PAIRS)
def test_both_hosts_have_the_options_of_a_concept(module: type, config: type) -> None:
    """By the same name, with the same default and text."""
    arguments = {
        **inspect.signature(module.__init__).parameters,
        **inspect.signature(module.__mro__[1].__init__).parameters,  # type: ignore[misc]
        **inspect.signature(module.__init__).parameters,
    }
    kinds = [type(p.default) for p in arguments.values() if isinstance(p.default, Options)]
    assert kinds
    flat = declared(config)
    grouped = declared(SamplingOptions).keys() - declared(LengthOptions).keys()
    for kind in kinds:
        for name, field in declared(kind).items():
            if name in grouped and config is not GRPOVariantConfig:
                continue  # critics refuse these, in Lightning as soon as one is given
            assert flat[name].metadata.get("help") == field.metadata["help"] and default(flat[name]) == default(field)
    own = {f.name for f in dataclasses.fields(config) if "help" in f.metadata and f.name in OURS}
    assert own <= {name for kind in kinds for name in declared(kind)}


OURS = {name for kind in KINDS for name in declared(kind)}


def test_defaults_that_differ() -> None:
    assert (OnlineValueOptions().value_loss_type, OnlineValueOptions().kl_in_reward) == ("squared", False)
    assert (PPOValueOptions(gamma=0.9).value_loss_type, PPOValueOptions(gamma=0.9).kl_in_reward) == ("clipped", True)
    assert (ValueHeadOptions().mtp_loss_coef, SFTHeadOptions(num_mtp_heads=3).mtp_loss_coef) == (0.1, 0.3)


def test_text_becomes_numbers() -> None:
    options: Any = OnlineValueOptions(gamma="9e-1", value_warmup_steps="3", lam_policy=1)  # type: ignore[arg-type]
    assert (options.gamma, options.value_warmup_steps, options.lam_policy) == (0.9, 3, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadOptions(num_mtp_heads=0), "num_mtp_heads must be at least 1, got 0"),
        (lambda: HeadOptions(num_mtp_heads=1.5), "num_mtp_heads"),
        (lambda: ValueHeadOptions(target_tau=0.0), "tau"),
        (lambda: ValueOptions(gamma=1.5), r"gamma must be in \[0, 1\], got 1.5"),
        (lambda: ValueOptions(advantage_estimator="q"), "Unknown advantage_estimator 'q'; choose one of gae, td, mc"),
        (lambda: OnlineValueOptions(reward_range=[1.0, 0.0]), r"reward_range must be \[smallest, largest\]"),
        (lambda: PolicyOptions(policy_loss="no"), "Unknown policy_loss 'no'"),
        (lambda: PolicyOptions(policy_loss="dapo", policy_loss_kwargs={"ratio": 1}), "has no option 'ratio'"),
        (lambda: VariantOptions(advantage_kwargs={"k": 2}), "advantage is None"),
        (lambda: SamplingOptions(max_draws=0), "max_draws must be at least 1, got 0"),
        (lambda: PhasicOptions(phasic_every=1, phasic_epochs=0), "phasic_epochs must be at least 1, got 0"),
        (lambda: DraftOptions(speculative=True, draft_cost=-1.0), "draft_cost must be at least 0, got -1"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("option", [{"dynamic_sampling": True}, {"reject_uniform": True}, {"replay_buffer_size": 4}])
def test_groups_are_not_sampled_for_a_critic(tiny_model: Any, tokenizer: Any, reward: Any, option: Any) -> None:
    with pytest.raises(ValueError, match="a critic does not compare them"):
        MTPCriticModule(tiny_model(), tokenizer, reward, num_generations=2, **option)
    SamplingOptions(**option).check_signal(False)


def test_options_are_sorted_into_their_dataclasses() -> None:
    given = {"gamma": 0.5, "num_mtp_heads": 3, "other": 1}
    heads, values = ValueHeadOptions(mtp_loss_coef=0.7), OnlineValueOptions(lam_policy=0.4)
    made = split_options(given, heads=heads, values=values, drafts=None)
    assert given == {"other": 1}, "what belongs to none is left for the caller"
    assert made == {
        "heads": ValueHeadOptions(mtp_loss_coef=0.7, num_mtp_heads=3),
        "values": OnlineValueOptions(lam_policy=0.4, gamma=0.5),
    }
    assert (heads.num_mtp_heads, values.gamma) == (1, 1.0)
    assert OnlineValueOptions.of(PPOValueOptions(gamma=0.3)) == OnlineValueOptions(
        gamma=0.3, value_loss_type="clipped", lam_policy=0.95, calibrate_values=False, kl_in_reward=True
    )
