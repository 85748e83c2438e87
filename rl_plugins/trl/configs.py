"""Configs of the trainers: TRL's own, with the options of `rl_plugins.signals.options` as flat fields."""

import warnings
from dataclasses import dataclass, fields
from typing import Any, Self

from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig

from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.signals.advantages import ADVANTAGES
from rl_plugins.signals.checks import check_head_reach
from rl_plugins.signals.options import (
    DraftOptions,
    HeadOptions,
    LengthOptions,
    OnlineValueOptions,
    Options,
    PhasicOptions,
    PolicyOptions,
    PPOValueOptions,
    SamplingOptions,
    SFTHeadOptions,
    ValueHeadOptions,
    ValueModelOptions,
    ValueOptions,
    ValueReplayOptions,
    VariantOptions,
    option,
)
from rl_plugins.signals.policy import POLICY_LOSSES, PolicyLoss
from rl_plugins.signals.presets import GRPO_PRESETS, PPO_PRESETS, Preset, find_preset
from rl_plugins.trl.inputs import settle_options

HOST_FIELDS = {
    "epsilon_low": "epsilon",
    "epsilon_high": "epsilon_high",
    "delta": "delta",
    "level": "importance_sampling_level",
    "temperature_pos": "sapo_temperature_pos",
    "temperature_neg": "sapo_temperature_neg",
    "k_pos": "vespo_k_pos",
    "lambda_pos": "vespo_lambda_pos",
    "k_neg": "vespo_k_neg",
    "lambda_neg": "vespo_lambda_neg",
}
"""Name of TRL's field for each option of a policy loss."""

WITH_PRESETS = (
    f"GRPOVariantConfig(preset=...) has {', '.join(GRPO_PRESETS)}; PPOConfig(preset=...) has {', '.join(PPO_PRESETS)}."
)


def field_default(config: type, name: str) -> Any:
    """Look up the default of a field of a dataclass."""
    (found,) = [f for f in fields(config) if f.name == name]
    return found.default


class PassesGroupCheck(int):
    """The number 1 for `num_generations`, for advantages without a group.

    GRPOConfig refuses a 1 by `if self.num_generations < 2`, which is False for this number.
    """

    def __lt__(self, other: object) -> bool:
        return False


class RemembersSetFields:
    """A config that knows which fields the caller set, so that a preset leaves them alone, whatever their value.

    Raises:
        TypeError: If a preset is given and the config has no presets.
    """

    _set_fields: frozenset[str] = frozenset()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if "preset" in kwargs and "preset" not in {f.name for f in fields(cls)}:  # type: ignore[arg-type]
            raise TypeError(f"{cls.__name__} has no presets. {WITH_PRESETS}")
        config = super().__new__(cls)
        config._set_fields = frozenset(kwargs)
        return config

    def is_set(self, name: str) -> bool:
        """Return whether the caller set a field; `False` after a command-line parser, which sets every field."""
        parsed = self._set_fields >= {f.name for f in fields(self) if f.init}  # type: ignore[arg-type]
        return name in self._set_fields and not parsed

    def apply(self, preset: Preset) -> None:
        """Set the fields of a preset that the caller did not set.

        A command-line parser sets every field; there a field counts as set if it differs from its default.
        """
        for f in fields(self):  # type: ignore[arg-type]
            if f.name not in preset:
                continue
            default = f.default_factory() if callable(f.default_factory) else f.default
            if getattr(self, f.name) == default and not self.is_set(f.name):
                setattr(self, f.name, preset[f.name])


def check_options(config: Any) -> None:
    """Check the fields of every dataclass of options in a config."""
    for kind in type(config).__mro__:
        own = issubclass(kind, Options) and not issubclass(kind, TrainingArguments)
        if own and "check" in vars(kind):
            kind.check(config)  # type: ignore[attr-defined]


@dataclass
class RLConfig(RemembersSetFields, PolicyOptions, DraftOptions, HeadOptions, LengthOptions, GRPOConfig):
    r"""
    Configuration class for [`RLTrainer`], and base class of the configs of the other online trainers.

    Has the parameters of [`~trl.GRPOConfig`], [`~rl_plugins.signals.PolicyOptions`],
    [`~rl_plugins.signals.LengthOptions`], [`~rl_plugins.signals.DraftOptions`] and, for heads that draft,
    [`~rl_plugins.signals.HeadOptions`].
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "policy_loss_kwargs"]

    @property
    def is_groupless(self) -> bool:
        """Whether one completion per prompt is enough."""
        return True

    @property
    def source_of_advantages(self) -> str | None:
        """Source of the advantages, in a few words; `None` for TRL's own."""
        return None

    @property
    def same_scale_rewards(self) -> str | None:
        """Value of TRL's `scale_rewards` that means the same as our advantage, if there is one."""
        return None

    @property
    def needs_own_loss(self) -> bool:
        """Whether TRL's own loss cannot do what is asked for, even where no policy loss is named."""
        return False

    def __post_init__(self) -> None:
        ignore_known_warnings()  # before the host warns
        settle_options(self)
        self.settle()
        generations: Any = getattr(self, "num_generations")  # noqa: B009
        if self.is_groupless and generations == 1:
            setattr(self, "num_generations", PassesGroupCheck(1))  # noqa: B010
        GRPOConfig.__post_init__(self)  # which also parses JSON strings
        setattr(self, "num_generations", generations)  # noqa: B010
        check_options(self)
        if self.overlong_shaping:
            self.overlong_cache = self.penalised_tokens(self.max_completion_length)
        self.check_length(self.max_completion_length)
        self._settle_policy_loss()
        self._check_host_advantages()
        self._check_heads()
        self.check_run()

    def settle(self) -> None:
        """Complete fields that depend on others, before anything is checked."""

    def check_run(self) -> None:
        """Refuse combinations of options, after each has been checked."""

    # Policy loss

    def make_policy_loss(self) -> PolicyLoss | None:
        """Make the loss that the options name; `None` leaves it to TRL.

        Raises:
            ValueError: If a name or an option is unknown.
        """
        named = self.policy_loss is not None
        if not (named or self.aggregation is not None or self.policy_loss_kwargs or self.needs_own_loss):
            return None
        usual = str(self.loss_type)
        return PolicyOptions.as_policy_loss(
            self, usual, self._host_options(self.policy_loss or usual, complete=not named)
        )

    def _host_options(self, name: str, *, complete: bool) -> dict[str, Any]:
        """Read the options of a loss from TRL's own fields.

        Args:
            name: Name of the loss.
            complete: Also take TRL's defaults, as for a loss that only TRL's `loss_type` names. Otherwise the paper's
                defaults hold for fields that were not set.
        """
        accepted = PolicyLoss.accepted(name)
        values = {option: getattr(self, host) for option, host in HOST_FIELDS.items() if option in accepted}
        if not complete:
            values = {o: v for o, v in values.items() if v != field_default(GRPOConfig, HOST_FIELDS[o])}
        low = self.epsilon if complete else values.get("epsilon_low")
        if "epsilon_high" in accepted and values.get("epsilon_high") is None and low is not None:
            values["epsilon_high"] = low  # as in TRL
        return {o: v for o, v in values.items() if v is not None}

    def _settle_policy_loss(self) -> None:
        loss = self.make_policy_loss()
        asked = self.policy_loss is not None or self.aggregation is not None or self.policy_loss_kwargs
        if loss is None or not asked:
            return
        if self.loss_type not in (field_default(GRPOConfig, "loss_type"), loss.name):
            warnings.warn(
                f"loss_type={self.loss_type!r} has no effect: policy_loss={loss.name!r} takes its place.", stacklevel=5
            )
        if not loss.entry.of_trl:  # TRL's own losses ignore fields that they do not read
            self._check_host_fields(loss)
        self.policy_loss, self.aggregation = loss.name, loss.aggregation

    def _check_host_fields(self, loss: PolicyLoss) -> None:
        """Refuse fields of TRL that a loss does not read."""
        accepted = PolicyLoss.accepted(loss.name)
        # With the correction, the KL term also has a ratio at this level.
        corrected = self.beta != 0.0 and self.use_bias_correction_kl
        kept = {"level"} if corrected or loss.entry.fixed_level else set()
        for name, host in HOST_FIELDS.items():
            if name in accepted or name in kept or getattr(self, host) == field_default(GRPOConfig, host):
                continue
            reads = [HOST_FIELDS[name] for name in accepted if name in HOST_FIELDS]
            raise ValueError(
                f"{host}={getattr(self, host)!r} has no effect on policy_loss={loss.name!r}, which reads "
                f"{', '.join(reads) or 'none of the fields of TRL'}. Leave it out, or choose another loss."
            )

    # Combinations

    def _check_host_advantages(self) -> None:
        """Refuse fields of TRL that only change its own advantages, if other advantages are used."""
        source = self.source_of_advantages
        for name in ("scale_rewards", "multi_objective_aggregation") if source else ():
            value = getattr(self, name)
            same = name == "scale_rewards" and value == self.same_scale_rewards
            if value != field_default(GRPOConfig, name) and not same:
                raise ValueError(
                    f"{name}={value!r} has no effect: it is about TRL's own advantages, and here they "
                    f"come from {source}. Leave it at {field_default(GRPOConfig, name)!r}; rewards are summed with "
                    "reward_weights."
                )

    def _check_heads(self) -> None:
        """Refuse drafts that the heads or the engine cannot make."""
        self.check_drafts(self, self.max_completion_length)
        if not self.speculative:
            return
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self, name):
                raise ValueError(
                    f"speculative=True drafts in the model's own generate, which {name}=True does not use. Set one of "
                    "them to False."
                )
        self.check_reference("heads", "speculative")

    def check_reference(self, attached: str, option: str | None = None) -> None:
        """Refuse TRL's moving reference where something is attached to the policy.

        Raises:
            ValueError: If `sync_ref_model` is set.
        """
        if self.sync_ref_model:
            remedy = f"Set one of {option} and sync_ref_model to False." if option else "Set sync_ref_model=False."
            raise ValueError(
                f"sync_ref_model=True cannot work with {attached} attached to the policy: TRL zips the parameters of "
                f"policy and reference one to one, and the reference has no {attached.split()[-1]}. {remedy}"
            )


@dataclass
class MTPCriticConfig(ValueHeadOptions, OnlineValueOptions, ValueReplayOptions, PhasicOptions, RLConfig):
    r"""
    Configuration class for the [`MTPCriticTrainer`].

    Has the parameters of [`~trl.GRPOConfig`], [`~rl_plugins.signals.ValueHeadOptions`],
    [`~rl_plugins.signals.OnlineValueOptions`], [`~rl_plugins.signals.ValueReplayOptions`],
    [`~rl_plugins.signals.PhasicOptions`], [`~rl_plugins.signals.PolicyOptions`],
    [`~rl_plugins.signals.LengthOptions`] and [`~rl_plugins.signals.DraftOptions`].

    Parameters:
        use_critic (`bool`, *optional*, defaults to `True`):
            Whether to use the critic at all. `False` is stock GRPO, with its default of `num_generations` (it needs
            at least 2).
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt. A critic needs only one; the loss is an average over all completions.
    """

    use_critic: bool = option(True, "Whether to use the critic at all. False is stock GRPO.")
    num_generations: int | None = option(
        1, "Completions per prompt. One is enough for the critic. More than one are not compared with each other."
    )

    @property
    def is_groupless(self) -> bool:
        """Whether one completion per prompt is enough, which is so with the critic."""
        return self.use_critic

    @property
    def needs_own_loss(self) -> bool:
        """Whether there is a critic, whose loss shares a forward pass with the policy's."""
        return self.use_critic

    @property
    def source_of_advantages(self) -> str | None:
        """The critic, if it is used."""
        return "the critic (scaled by advantage_scaling)" if self.use_critic else None

    def settle(self) -> None:
        """Without a critic, take TRL's default for the number of completions per prompt, unless the user set one."""
        if self.use_critic or self.num_generations != 1:
            return
        if self.is_set("num_generations"):
            raise ValueError(
                "use_critic=False is stock GRPO, which compares at least 2 generations per prompt, but "
                "num_generations is 1. Set it to 2 or more, or leave it out for TRL's default."
            )
        self.num_generations = field_default(GRPOConfig, "num_generations")

    def check_run(self) -> None:
        """Refuse options that cannot be combined with a critic inside the policy."""
        if not self.use_critic:
            return
        self.check_online(self.beta, self.make_policy_loss(), "GRPOVariantConfig")
        self.check_reference("a critic")
        self.check_values(self)
        check_head_reach(self.num_mtp_heads, self.max_completion_length, "max_completion_length")
        assert self.steps_per_generation is not None
        self.check_cycles(self.steps_per_generation, self.num_iterations, self.gradient_accumulation_steps)


@dataclass
class PPOConfig(PPOValueOptions, ValueModelOptions, RLConfig):
    r"""
    Configuration class for the [`PPOTrainer`].

    Has the parameters of [`~trl.GRPOConfig`], [`~rl_plugins.signals.PPOValueOptions`],
    [`~rl_plugins.signals.ValueModelOptions`], [`~rl_plugins.signals.PolicyOptions`],
    [`~rl_plugins.signals.LengthOptions`] and [`~rl_plugins.signals.DraftOptions`]: `epsilon` is PPO's clip range,
    `beta` the coefficient of the KL penalty, `num_iterations` the number of epochs over a batch of completions,
    `steps_per_generation` the number of minibatches in it and `entropy_coef` the weight of the entropy bonus.

    Parameters:
        preset (`str`, *optional*):
            `"vpg"`: REINFORCE with a learned baseline (the return minus the value, no clipping, one epoch). Fields
            that you set override the preset. (On the command line, a field that you set to its own default counts as
            not set.)
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt.
        beta (`float`, *optional*, defaults to `0.05`):
            Coefficient of the KL penalty; 0 loads no reference model.
        kl_in_reward (`bool`, *optional*, defaults to `True`):
            Whether the KL is subtracted from the token rewards, as PPO does, instead of added to the loss.
        num_iterations (`int`, *optional*, defaults to `4`):
            Epochs over each batch of completions; the minibatches are shuffled anew for each epoch.
        value_loss_type (`str`, *optional*, defaults to `"clipped"`):
            `"squared"`, `"clipped"` (PPO2) or `"huber"`.
    """

    _VALID_DICT_FIELDS = [*RLConfig._VALID_DICT_FIELDS, "value_model_init_kwargs"]

    preset: str | None = option(None, "Name of a paper's method, whose settings become the defaults.", PPO_PRESETS)
    num_generations: int | None = option(1, "Completions per prompt.")
    beta: float = option(0.05, "Coefficient of the KL penalty; 0: no reference model.")
    num_iterations: int = option(4, "Epochs over each batch of completions.")

    @property
    def needs_own_loss(self) -> bool:
        """True: the value loss shares a forward pass with the policy's, and the KL may be in the rewards."""
        return True

    @property
    def source_of_advantages(self) -> str | None:
        """The critic."""
        return "the critic (scaled by advantage_scaling)"

    def settle(self) -> None:
        """Set the fields of the preset, if there is one."""
        if self.preset is not None:
            self.apply(find_preset(self.preset, PPO_PRESETS, WITH_PRESETS))

    def check_run(self) -> None:
        """Refuse options that cannot be combined with a critic."""
        self.check_online(self.beta, self.make_policy_loss(), "GRPOVariantConfig")
        self.check_reference("a critic")


@dataclass
class GRPOVariantConfig(VariantOptions, SamplingOptions, RLConfig):
    r"""
    Configuration class for the [`GRPOVariantTrainer`].

    Has the three choices in which the variants of GRPO differ: advantage ([`~rl_plugins.signals.VariantOptions`]),
    policy loss ([`~rl_plugins.signals.PolicyOptions`]) and sampling ([`~rl_plugins.signals.SamplingOptions`]), besides
    the parameters of [`~trl.GRPOConfig`] and [`~rl_plugins.signals.DraftOptions`].

    Parameters:
        preset (`str`, *optional*):
            The settings of a paper in one word, such as `"dapo"`, `"gspo"` or `"maxrl"`. Fields that you set override
            the preset. (On the command line, a field that you set to its own default counts as not set.)
    """

    _VALID_DICT_FIELDS = [*RLConfig._VALID_DICT_FIELDS, "advantage_kwargs"]

    preset: str | None = option(None, "Name of a paper's method, whose settings become the defaults.", GRPO_PRESETS)

    @property
    def needs_own_loss(self) -> bool:
        """Whether the KL is in the rewards already, so that TRL's own loss would add it a second time."""
        return self.kl_in_reward

    @property
    def source_of_advantages(self) -> str | None:
        """The option `advantage`, if it is given."""
        return None if self.advantage is None else f"advantage={self.advantage!r}"

    @property
    def same_scale_rewards(self) -> str | None:
        """Value of TRL's `scale_rewards` that means this advantage, if there is one."""
        return None if self.advantage not in ADVANTAGES else ADVANTAGES[self.advantage].scale_rewards

    @property
    def moves_rows(self) -> bool:
        """Whether completions change their places in the batch of the host."""
        compares = self.policy_loss in POLICY_LOSSES and PolicyLoss(self.policy_loss).compares_groups
        return self.dynamic_sampling or self.replay_buffer_size > 0 or compares

    @property
    def is_groupless(self) -> bool:
        """Whether the advantage needs no group."""
        return self.advantage in ADVANTAGES and not ADVANTAGES[self.advantage].compares_groups

    def settle(self) -> None:
        """Set the fields of the preset, if there is one."""
        if self.preset is not None:
            self.apply(find_preset(self.preset, GRPO_PRESETS, WITH_PRESETS))

    def check_run(self) -> None:
        """Refuse combinations of advantage, policy loss, sampling and batch size."""
        if self.advantage_kwargs:
            self.advantage_kwargs = self.advantage_options
        loss, group = self.make_policy_loss(), self.num_generations or 1
        assert self.steps_per_generation is not None
        rows = self.per_device_train_batch_size * self.steps_per_generation
        self.check_variant(group, self.beta, loss)
        self.check_sampling(self.advantage, group, self.max_completion_length, rows)
        if loss is not None and loss.compares_groups and self.per_device_train_batch_size % group:
            raise ValueError(
                f"{loss.name} compares the completions of a prompt inside the loss, but num_generations={group} does "
                f"not divide per_device_train_batch_size={self.per_device_train_batch_size}. Set "
                "per_device_train_batch_size to a multiple of num_generations."
            )


@dataclass
class MTPSFTConfig(RemembersSetFields, SFTHeadOptions, ValueOptions, SFTConfig):
    r"""
    Configuration class for the [`MTPSFTTrainer`].

    Has the parameters of [`~trl.SFTConfig`], [`~rl_plugins.signals.SFTHeadOptions`] and
    [`~rl_plugins.signals.ValueOptions`].

    Parameters:
        mtp_loss_coef (`float`, *optional*, defaults to `0.3`):
            lambda_1, weight of the heads' token loss (DeepSeek-V3 uses 0.3, later 0.1).
        freeze_trunk (`bool`, *optional*, defaults to `False`):
            Whether to train the heads only. This gives heads to a finished model, and pretrains the critic on scored
            completions without imitating the bad ones.
    """

    freeze_trunk: bool = option(False, "Whether to train the heads only.")

    def __post_init__(self) -> None:
        ignore_known_warnings()  # before the host warns
        settle_options(self)
        check_options(self)
        if self.max_length is not None:
            check_head_reach(self.num_mtp_heads, self.max_length - 1, "max_length - 1")
        SFTConfig.__post_init__(self)
        if self.freeze_trunk and self.ddp_find_unused_parameters is None:
            # Only the heads learn, and they run in every forward. DDP could not find them: it searches the graph of
            # the model's output, and with a frozen trunk this output has no graph.
            self.ddp_find_unused_parameters: bool | None = False
