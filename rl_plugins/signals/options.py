"""Options, one dataclass for each concept, which TRL's configs inherit and Lightning's modules take as an argument.

An option has the same name, default and text everywhere. A trainer that prefers another default declares it in one
line. A dataclass of options checks its values when it is made. An object of such a class is frozen; inside a config of
TRL, the options are fields like any other.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from rl_plugins.functional.policy_losses.aggregation import AGGREGATIONS
from rl_plugins.functional.turns import TIME_UNITS
from rl_plugins.nn.mtp_heads import HEAD_TYPES
from rl_plugins.nn.target_heads import check_polyak
from rl_plugins.settings import settle_numbers, with_numbers
from rl_plugins.signals.advantages import ADVANTAGES, check_advantage
from rl_plugins.signals.checks import (
    check_above,
    check_at_least,
    check_choice,
    check_head_reach,
    check_unit_interval,
    check_whole,
)
from rl_plugins.signals.critic_targets import ESTIMATORS, SCALINGS, value_losses
from rl_plugins.signals.policy import POLICY_LOSSES, PolicyLoss

MTP_LOSS_TYPES = ("tokens", "distribution")


def option(default: Any, text: str, choices: Iterable[str] | None = None) -> Any:
    """Declare a field with its text, which command lines, docstrings and documentation show."""
    metadata: dict[str, Any] = {"help": text}
    if choices is not None:
        metadata["choices"] = [*choices]
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _default(kind: type, name: str) -> Any:
    return next(f.default for f in fields(kind) if f.name == name)


def with_default(kind: type, name: str, default: Any) -> Any:
    """Declare a field of another dataclass of options anew, with another default."""
    (found,) = [f for f in fields(kind) if f.name == name]
    return option(default, found.metadata["help"], found.metadata.get("choices"))


class Options:
    """Base class of the dataclasses below: it turns text into numbers, calls `check`, and then freezes the fields.

    Raises:
        TypeError: If an option should be a number and is not.
        ValueError: If an option is out of range; the message names it.
    """

    __slots__ = ("_settled",)  # neither a field, nor an attribute that command lines would take for one
    _settled: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [f"        {name}: {text}" for name, text in _texts(cls).items()]
        if own and "Args:" not in (cls.__doc__ or ""):
            cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "    Args:", *own, "    "])

    def __post_init__(self) -> None:
        settle_numbers(self)
        self.check()
        object.__setattr__(self, "_settled", True)

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_settled", False):
            raise dataclasses.FrozenInstanceError(
                f"{type(self).__name__} is frozen. Make another one: dataclasses.replace(options, {name}=...)."
            )
        object.__setattr__(self, name, value)

    def check(self) -> None:
        """Refuse options that cannot work, before any work starts."""

    @classmethod
    def of(cls, config: Any) -> Self:
        """Copy these options from a config, which has fields of the same names and perhaps others."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})  # type: ignore[arg-type]


def _texts(cls: type) -> dict[str, str]:
    """Collect the texts of the fields that a class declares or inherits, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for name in vars(base).get("__annotations__", {}):
            declared = vars(base).get(name)
            declared = vars(base).get("__dataclass_fields__", {}).get(name, declared)
            if isinstance(declared, dataclasses.Field) and "help" in declared.metadata:
                found[name] = declared.metadata["help"]
    return found


def split_options(given: dict[str, Any], **kinds: Options | None) -> dict[str, Any]:
    """Sort options that were given one by one into the dataclasses that they belong to.

    Args:
        given: Options by name. Those that belong to one of `kinds` are removed.
        kinds: An object with options for each argument of the caller, whose fields the given options replace.

    Returns:
        The objects with options by argument.
    """
    made: dict[str, Any] = {}
    for argument, options in kinds.items():
        if options is None:
            continue
        names = {f.name for f in fields(options)}  # type: ignore[arg-type]
        own = {name: given.pop(name) for name in names & given.keys()}
        made[argument] = dataclasses.replace(options, **own) if own else options  # type: ignore[type-var]
    return made


@dataclass
class HeadOptions(Options):
    """Multi-token-prediction heads, and how they learn to predict tokens."""

    mtp_head_type: str = option(
        "parallel",
        "parallel (small blocks that read one hidden state) or sequential (decoder layers that also read the tokens, "
        "as in DeepSeek-V3).",
        HEAD_TYPES,
    )
    num_mtp_heads: int = option(
        1,
        "Number of heads, K. Parallel head k predicts token t+k, and in a critic the value of state t+k-1. Every "
        "sequential head predicts token t and the value of state t, from the trunk's state k tokens before.",
    )
    mtp_inner_size: int | None = option(
        None, "Width of each parallel head's residual block. None is the model's hidden size."
    )
    mtp_heads_path: str | None = option(
        None,
        "Folder of heads that an earlier run has saved. None loads the heads beside the model's weights if the model "
        "is given by its path, and makes new ones if there are none.",
    )
    head_learning_rate: float | None = option(
        1e-4, "Learning rate of the heads. None uses the policy's. New heads need a larger one than the policy."
    )
    mtp_loss_coef: float = option(0.1, "lambda_1, weight of the heads' token loss.")
    mtp_loss_type: str = option(
        "tokens",
        "tokens (cross-entropy with the tokens that follow) or distribution (cross-entropy with the model's own "
        "distribution of these tokens). The second makes better drafters from equally many tokens.",
        MTP_LOSS_TYPES,
    )
    mtp_loss_share: float = option(
        0.25,
        "Share of the tokens on which the heads' token loss is computed, drawn at random in every step. The loss is "
        "scaled up, so that its mean is that over all tokens. The LM head runs on this share only.",
    )
    mtp_detach_trunk: bool = option(True, "Whether to keep the heads' token loss out of the trunk.")

    def check(self) -> None:
        """Refuse heads that cannot be made or trained."""
        check_choice("mtp_head_type", self.mtp_head_type, HEAD_TYPES)
        if self.mtp_head_type == "sequential" and self.mtp_inner_size is not None:
            raise ValueError(
                f"mtp_inner_size={self.mtp_inner_size} is the width of a parallel head. Sequential heads are decoder "
                "layers of the model's own shape: leave it out, or set mtp_head_type='parallel'."
            )
        check_choice("mtp_loss_type", self.mtp_loss_type, MTP_LOSS_TYPES)
        check_unit_interval(mtp_loss_share=self.mtp_loss_share)
        check_above(0, mtp_loss_share=self.mtp_loss_share)
        check_at_least(1, num_mtp_heads=self.num_mtp_heads, mtp_inner_size=self.mtp_inner_size)
        check_whole(num_mtp_heads=self.num_mtp_heads, mtp_inner_size=self.mtp_inner_size)
        check_at_least(0, mtp_loss_coef=self.mtp_loss_coef, head_learning_rate=self.head_learning_rate)


@dataclass
class ValueHeadOptions(HeadOptions):
    """Multi-token-prediction heads that also output values: their gradient into the trunk, and their slow copies."""

    value_grad_scale: float = option(
        1.0, "Factor on the value gradient that enters the trunk; 0 detaches the trunk from the critic."
    )
    value_grad_clip: float | None = option(
        1.0,
        "Largest norm of one token's value gradient into the trunk, in units of the unweighted squared error; None "
        "does not clamp.",
    )
    target_tau: float = option(
        0.05, "Step of the target heads towards the online heads after every optimizer step, above 0 and at most 1."
    )
    target_update_every: int | None = option(
        None,
        "Number of optimizer steps after which the online heads are copied to the target heads. None moves the target "
        "heads a little after every step instead (target_tau).",
    )
    bootstrap_lookahead: bool = option(
        False,
        "Whether to bootstrap from the mean of all heads' forecasts of the next state instead of head 1's alone.",
    )

    def check(self) -> None:
        """Refuse heads that cannot be made or trained, and target heads that would not follow them."""
        HeadOptions.check(self)
        if self.bootstrap_lookahead and self.num_mtp_heads == 1:
            raise ValueError(
                "bootstrap_lookahead averages the forecasts of several heads, and num_mtp_heads is 1. Set "
                "num_mtp_heads to 2 or more, or leave out bootstrap_lookahead."
            )
        check_at_least(1, target_update_every=self.target_update_every)
        check_polyak(target_tau=self.target_tau, target_update_every=self.target_update_every)
        check_at_least(0, value_grad_scale=self.value_grad_scale, value_grad_clip=self.value_grad_clip)


@dataclass
class SFTHeadOptions(ValueHeadOptions):
    """Multi-token-prediction heads in supervised fine-tuning, where their token loss weighs more (DeepSeek-V3 begins
    with 0.3 and ends with 0.1)."""

    mtp_loss_coef: float = with_default(ValueHeadOptions, "mtp_loss_coef", 0.3)
    mtp_loss_share: float = with_default(ValueHeadOptions, "mtp_loss_share", 1.0)


@dataclass
class ValueOptions(Options):
    """Value targets and value losses."""

    value_loss_coef: float = option(0.1, "lambda_2, weight of the value loss.")
    value_loss_type: str = option("squared", "squared, clipped (PPO2) or huber.", value_losses())
    value_clip_range: float = option(0.2, "Range around the old value for value_loss_type='clipped'.")
    gamma: float = option(1.0, "Discount factor.")
    advantage_estimator: str = option(
        "gae", "gae, td (one-step temporal difference, both lambdas 0) or mc (Monte Carlo, both 1).", ESTIMATORS
    )
    lam_value: float = option(1.0, "Lambda of the value targets.")
    time_unit: str = option(
        "token",
        "token, or turn: gamma and the lambdas act once at the end of each turn of a conversation instead of once per "
        "token.",
        TIME_UNITS,
    )

    def check(self) -> None:
        """Refuse unknown names, and numbers out of range."""
        check_choice("time_unit", self.time_unit, TIME_UNITS)
        check_choice("advantage_estimator", self.advantage_estimator, ESTIMATORS)
        check_choice("value_loss_type", self.value_loss_type, value_losses())
        check_unit_interval(gamma=self.gamma, lam_value=self.lam_value)
        check_above(0, value_clip_range=self.value_clip_range)
        check_at_least(0, value_loss_coef=self.value_loss_coef)


@dataclass
class OnlineValueOptions(ValueOptions):
    """Values in online training: how they become advantages, and how the loss of the critic is weighted."""

    lam_policy: float = option(
        1.0,
        "Lambda of the policy's advantages. With 1 the values are a baseline alone. Below 1 they replace a part of "
        "the observed rewards, which helps if they are nearly exact and harms if they are not.",
    )
    calibrate_values: bool = option(
        True,
        "Whether to correct the values before they become advantages, by a line that is fitted to the returns of the "
        "batch. Values that explain nothing then become the mean of the batch, and do no harm.",
    )
    length_adaptive_alpha: float | None = option(
        None,
        "Alpha of VAPO's lambda by length, 1 - 1 / (alpha * length), which replaces lam_policy. The paper uses 0.05.",
    )
    discounted_objective: bool = option(
        False,
        "Whether to multiply the advantage of token t by gamma^t, as the gradient of the discounted return does. Most "
        "code leaves this factor out, so that late tokens count as much as early ones.",
    )
    advantage_scaling: str = option(
        "whiten",
        "whiten (mean 0 and variance 1 over the batch), value (divide by the standard deviation that V(s_0) implies) "
        "or none.",
        SCALINGS,
    )
    reward_range: list[float] = option([0.0, 1.0], "Smallest and largest reward, for advantage_scaling='value'.")
    kl_in_reward: bool = option(
        False, "Whether to subtract beta times the KL from the token rewards instead of adding it to the loss."
    )
    value_warmup_steps: int = option(0, "Optimizer steps in which only the critic learns.")
    bootstrap_truncated: bool | None = option(
        None,
        "Whether an episode that was cut is worth V(s_T) after its last token instead of 0. None: if the environment "
        "says that it truncated the episode. True: also if max_completion_length cut the completion. False: never.",
    )

    def check(self) -> None:
        """Refuse unknown names, and numbers out of range."""
        ValueOptions.check(self)
        check_choice("advantage_scaling", self.advantage_scaling, SCALINGS)
        check_unit_interval(lam_policy=self.lam_policy)
        check_above(0, length_adaptive_alpha=self.length_adaptive_alpha)
        if len(self.reward_range) != 2 or self.reward_range[0] >= self.reward_range[1]:
            raise ValueError(f"reward_range must be [smallest, largest], got {self.reward_range}.")
        check_at_least(0, value_warmup_steps=self.value_warmup_steps)

    def check_online(self, beta: float, loss: PolicyLoss | None, instead: str) -> None:
        """Refuse a KL in the rewards without a reference, and policy losses that compare whole completions.

        Args:
            beta: Coefficient of the KL. A class with `kl_in_reward=True` by default accepts 0, which turns the KL off.
            loss: The policy loss; `None` for the host's own.
            instead: Class that accepts such a loss as `preset`; the message names it.

        Raises:
            ValueError: If either is asked for.
        """
        if self.kl_in_reward and beta == 0.0 and not _default(type(self), "kl_in_reward"):
            raise ValueError("kl_in_reward=True subtracts beta * KL from the rewards, but beta is 0. Set beta > 0.")
        if loss is not None and loss.compares_groups:
            raise ValueError(
                f"policy_loss={loss.name!r} compares the completions of a prompt as wholes; a critic's advantages are "
                f"one per token. Choose another loss, or {instead}(preset={loss.name!r})."
            )


@dataclass
class ValueReplayOptions(Options):
    """Replay of values: a copy of the heads learns values many times from cached hidden states, without a forward pass
    of the trunk. So the values learn faster than the policy."""

    value_replay: int = option(
        0,
        "Passes over the cached states after every rollout, by a copy of the heads whose values the advantages use. 0 "
        "turns the replay off.",
    )
    value_replay_rollouts: int = option(
        8, "Number of rollouts whose states are cached. The states of older rollouts come from an older trunk."
    )
    value_replay_size: int = option(
        65536,
        "Largest number of states that a process caches. A state has the size of one hidden state in the model's "
        "dtype: 65536 states of width 1024 are 128 MiB in bfloat16.",
    )
    value_replay_learning_rate: float = option(1e-3, "Learning rate of the copy of the heads, which Adam trains.")

    def check(self) -> None:
        """Refuse numbers out of range."""
        check_at_least(0, value_replay=self.value_replay)
        check_at_least(1, value_replay_rollouts=self.value_replay_rollouts, value_replay_size=self.value_replay_size)
        check_whole(
            value_replay=self.value_replay,
            value_replay_rollouts=self.value_replay_rollouts,
            value_replay_size=self.value_replay_size,
        )
        check_above(0, value_replay_learning_rate=self.value_replay_learning_rate)

    def check_values(self, values: ValueOptions) -> None:
        """Refuse the clipped value loss with a replay: it needs the heads' old values, and only the copy's are saved.

        Raises:
            ValueError: If both are asked for.
        """
        if self.value_replay and values.value_loss_type == "clipped":
            raise ValueError(
                "value_loss_type='clipped' needs the heads' own values of the rollout, but with value_replay a "
                "rollout has the values of a copy. Set value_loss_type='squared' or 'huber', or value_replay=0."
            )


@dataclass
class PPOValueOptions(OnlineValueOptions):
    """Values in PPO: a clipped value loss, the lambda of GAE, and the KL in the rewards."""

    value_loss_type: str = with_default(OnlineValueOptions, "value_loss_type", "clipped")
    lam_policy: float = with_default(OnlineValueOptions, "lam_policy", 0.95)
    calibrate_values: bool = with_default(OnlineValueOptions, "calibrate_values", False)
    kl_in_reward: bool = with_default(OnlineValueOptions, "kl_in_reward", True)


@dataclass
class ValueModelOptions(Options):
    """A separate value model, the critic of PPO."""

    value_model_path: str | None = option(
        None,
        "Folder or hub id of the model from which the value model starts. It needs the policy's tokenizer. None "
        "starts from the policy.",
    )
    value_model_init_kwargs: dict[str, Any] | str | None = option(
        None,
        "Keyword arguments for loading the value model, in addition to the policy's model_init_kwargs. A model of "
        "another name gets only dtype, attn_implementation and trust_remote_code of those.",
    )
    value_learning_rate: float | None = option(1e-5, "Learning rate of the value model; None uses learning_rate.")

    def check(self) -> None:
        """Refuse a negative learning rate."""
        check_at_least(0, value_learning_rate=self.value_learning_rate)


@dataclass
class PolicyOptions(Options):
    """The policy loss, by name, and how it is averaged."""

    policy_loss: str | None = option(
        None,
        "Name of the loss per token. None uses TRL's loss_type; in Lightning it is dapo, and ppo_clip for PPO.",
        POLICY_LOSSES,
    )
    policy_loss_kwargs: dict[str, Any] | str | None = option(
        None,
        "Options of policy_loss, as a dict or a JSON string, such as {'ratio': 0.0002} for clip_cov. A missing option "
        "comes from TRL's field of that meaning (epsilon, epsilon_high, delta, ...) if the field is set, else from "
        "the paper.",
    )
    aggregation: str | None = option(
        None,
        "Average of the loss: token (TRL's dapo), prompt (DAPO's equation, CISPO, ScaleRL), sequence (GRPO), constant "
        "(Dr. GRPO), sequence_sum (LUSPO) or micro_batch (BNPO). None is the usual one of the loss.",
        AGGREGATIONS,
    )

    def check(self) -> None:
        """Refuse unknown names and options."""
        if not isinstance(self.policy_loss_kwargs or {}, dict):
            raise ValueError(f"policy_loss_kwargs must be a dict or JSON of one, got {self.policy_loss_kwargs!r}.")
        if self.policy_loss is not None:
            check_choice("policy_loss", self.policy_loss, POLICY_LOSSES)
            self.as_policy_loss()

    def as_policy_loss(self, usual: str = "dapo", defaults: Mapping[str, Any] | None = None) -> PolicyLoss:
        """Make the policy loss that these options name.

        Args:
            usual: Name of the loss where the options have none.
            defaults: Options of the loss, which `policy_loss_kwargs` overrides.

        Raises:
            ValueError: If a name or an option is unknown.
        """
        name, given = self.policy_loss or usual, self.policy_loss_kwargs or {}
        assert isinstance(given, dict)
        return PolicyLoss(name, self.aggregation or "", {**(defaults or {}), **given})


@dataclass
class DraftOptions(Options):
    """Speculative rollouts: MTP heads draft the completions, which the model then verifies several tokens at a time.

    The distribution of the completions stays as it is without drafts.
    """

    speculative: bool = option(False, "Whether MTP heads draft the completions.")
    num_draft_tokens: int | None = option(
        None,
        "Largest number of drafts per step. None is the number of heads. Fewer are drafted where this is faster.",
    )
    draft_cost: float | None = option(
        0.2,
        "Time of one more draft, in units of a step without drafts. It decides how many drafts are made. None "
        "measures it. The completions of a seed then depend on the clock.",
    )

    def check(self) -> None:
        """Refuse numbers out of range."""
        if self.speculative:
            check_at_least(0, draft_cost=self.draft_cost)

    def check_drafts(self, heads: HeadOptions, max_completion_length: int | None) -> None:
        """Refuse heads that cannot draft as many tokens as wanted, or that look beyond every completion.

        Raises:
            ValueError: If a number does not fit.
        """
        if not self.speculative:
            return
        check_head_reach(heads.num_mtp_heads, max_completion_length, "max_completion_length")
        if self.num_draft_tokens is not None and not 1 <= self.num_draft_tokens <= heads.num_mtp_heads:
            raise ValueError(
                f"num_draft_tokens must be between 1 and num_mtp_heads={heads.num_mtp_heads}, since each head drafts "
                f"one token; got {self.num_draft_tokens}. To draft nothing, set speculative=False."
            )


@dataclass
class VariantOptions(Options):
    """The advantage of a variant of GRPO, by name."""

    advantage: str | None = option(
        None,
        "Name of the advantage. None uses TRL's scale_rewards; in Lightning it is group_normalized.",
        ADVANTAGES,
    )
    advantage_kwargs: dict[str, Any] | str | None = option(
        None, "Options of the advantage, as a dict or a JSON string, such as {'k': 4} for pass_at_k."
    )
    kl_in_reward: bool = option(
        False,
        "Whether to subtract beta times the KL from the reward of each token instead of adding it to the loss. Only "
        "advantages that are made of the rewards of tokens allow this: batch_normalized (REINFORCE++) and "
        "reward_to_go.",
    )

    def check(self) -> None:
        """Refuse an unknown advantage, and options without one."""
        if not isinstance(self.advantage_kwargs or {}, dict):
            raise ValueError(f"advantage_kwargs must be a dict or JSON of one, got {self.advantage_kwargs!r}.")
        if self.advantage is None and self.advantage_kwargs:
            raise ValueError("advantage_kwargs are options of an advantage, but advantage is None. Name one.")
        if self.advantage is not None:
            check_choice("advantage", self.advantage, ADVANTAGES)

    @property
    def advantage_options(self) -> dict[str, Any]:
        """Options of the advantage, with numbers in place of text."""
        given = self.advantage_kwargs or {}
        assert isinstance(given, dict)
        return with_numbers(given)

    @property
    def is_groupless(self) -> bool:
        """Whether one completion per prompt is enough."""
        return self.advantage is not None and not ADVANTAGES[self.advantage].compares_groups

    def check_variant(self, num_generations: int, beta: float, loss: PolicyLoss | None) -> None:
        """Refuse an advantage that does not fit the number of completions, the KL or the policy loss.

        Raises:
            ValueError: If a combination cannot work.
        """
        if self.advantage is not None:
            check_advantage(self.advantage, self.advantage_options, num_generations)
        entry = None if self.advantage is None else ADVANTAGES[self.advantage]
        if self.kl_in_reward and (entry is None or entry.of_rewards is None or beta == 0.0):
            ones = [repr(name) for name, known in ADVANTAGES.items() if known.of_rewards is not None]
            raise ValueError(
                "kl_in_reward=True subtracts beta * KL from token rewards, which needs "
                f"advantage={' or '.join(ones)} and beta > 0; they are {self.advantage!r} and {beta}."
            )
        per_token = self.kl_in_reward or (entry is not None and entry.per_token)
        if loss is not None and loss.compares_groups and per_token:
            given = "kl_in_reward=True" if self.kl_in_reward else f"advantage={self.advantage!r}"
            raise ValueError(
                f"policy_loss={loss.name!r} compares whole completions and takes one advantage for each, but {given} "
                f"gives one for each token. Choose another policy_loss, or do without {given}."
            )


@dataclass
class LengthOptions(Options):
    """DAPO's soft penalty on long completions (2503.14476, equation 13)."""

    overlong_shaping: bool = option(
        False, "Whether to add DAPO's soft penalty on completions near max_completion_length."
    )
    overlong_cache: int | None = option(
        None,
        "Number of tokens before max_completion_length over which the penalty of overlong_shaping grows. None is a "
        "fifth of max_completion_length.",
    )

    def penalised_tokens(self, max_completion_length: int) -> int:
        """Return how many tokens before the limit the penalty on length begins."""
        return max(1, max_completion_length // 5) if self.overlong_cache is None else self.overlong_cache

    def check_length(self, max_completion_length: int) -> None:
        """Refuse a penalty that would begin before the first token, or never.

        Raises:
            ValueError: If `overlong_cache` is out of range.
        """
        if self.overlong_shaping and not 0 < self.penalised_tokens(max_completion_length) <= max_completion_length:
            raise ValueError(
                f"overlong_cache must be between 1 and max_completion_length={max_completion_length}, got "
                f"{self.overlong_cache}."
            )


@dataclass
class SamplingOptions(LengthOptions):
    """Groups of completions whose rewards are all equal: replaced by fresh or earlier groups, or left out.

    If all completions of a prompt have the same reward, advantages that compare them are zero.
    """

    dynamic_sampling: bool = option(
        False, "Whether to draw further prompts until every group of the batch has rewards that differ (DAPO)."
    )
    max_draws: int = option(
        10,
        "Largest number of further draws for one batch. sampling/unfilled_groups counts the groups that are then "
        "still missing.",
    )
    reject_uniform: bool = option(
        False,
        "Whether to leave groups whose rewards are all equal out of the loss and of all batch statistics "
        "(Reinforce-Rej).",
    )
    replay_buffer_size: int = option(
        0,
        "Number of groups that a process keeps, to use them again in place of groups whose rewards are all equal. 0 "
        "turns this off.",
    )
    replay_max_age: int = option(8, "Optimizer steps after which a kept group is forgotten.")

    def check(self) -> None:
        """Refuse numbers out of range."""
        check_at_least(1, max_draws=self.max_draws)
        check_at_least(0, replay_buffer_size=self.replay_buffer_size, replay_max_age=self.replay_max_age)

    @property
    def samples(self) -> bool:
        """Whether anything is done about groups of equal rewards."""
        return self.dynamic_sampling or self.reject_uniform or self.replay_buffer_size > 0

    @property
    def moves_rows(self) -> bool:
        """Whether completions change their places in the batch."""
        return self.dynamic_sampling or self.replay_buffer_size > 0

    @property
    def _chosen(self) -> str:
        """The options that are on, with their values."""
        names = ("dynamic_sampling", "reject_uniform", "replay_buffer_size")
        return " and ".join(f"{name}={value}" for name in names if (value := getattr(self, name)))

    def check_signal(self, has_critic: bool) -> None:
        """Refuse these options together with a critic, whose saved values belong to the completions as generated.

        Raises:
            ValueError: If both are asked for.
        """
        if has_critic and self.samples:
            raise ValueError(
                f"{self._chosen}: this is for advantages that compare the completions of a prompt, and a critic does "
                "not compare them. Leave it out."
            )

    def check_sampling(
        self, advantage: str | None, num_generations: int, max_completion_length: int, rows: int | None = None
    ) -> None:
        """Refuse sampling that does not fit the advantage, or the way in which completions are batched.

        Args:
            advantage: Name of the advantage; `None` for the host's own.
            num_generations: Completions per prompt.
            max_completion_length: Longest completion in tokens.
            rows: Completions of a process in one rollout; `None` where this is not known.

        Raises:
            ValueError: If a combination cannot work.
        """
        entry = None if advantage is None else ADVANTAGES[advantage]
        if entry is not None and entry.nonnegative and self.overlong_shaping:
            raise ValueError(
                f"advantage={advantage!r} needs rewards of at least 0, and the penalty of overlong_shaping=True "
                "is negative. Set one or the other."
            )
        if entry is not None and entry.rescales and self.reject_uniform:
            raise ValueError(
                f"advantage={advantage!r} makes up for groups of equal rewards, and reject_uniform=True "
                "takes them out: together they would correct twice. Set one or the other."
            )
        if self.samples and num_generations == 1:
            raise ValueError(
                f"With {self._chosen} the completions of a prompt are compared, but num_generations is 1. Set "
                "num_generations to at least 2."
            )
        if self.samples and entry is not None and entry.tracks_prompts:
            raise ValueError(
                f"advantage={advantage!r} needs no groups and counts every reward of a prompt, but with "
                f"{self._chosen} some prompts are taken out of the batch. Set one or the other."
            )
        if rows is not None and self.moves_rows and rows % num_generations:
            raise ValueError(
                f"With {self._chosen} whole groups are moved, but num_generations={num_generations} does not divide "
                f"the {rows} completions of a process. Make this number a multiple of num_generations, by the batch "
                "size or by steps_per_generation."
            )


@dataclass
class PhasicOptions(Options):
    """Phasic Policy Gradient (2009.04416): after phases of the policy, values learn while a KL term holds the policy.

    So a critic inside the policy can learn for longer from the same completions, without moving the policy.
    """

    phasic_every: int = option(
        0, "Number of rollouts after which an auxiliary phase runs. 0 turns the phasic mode off."
    )
    phasic_epochs: int = option(1, "Passes over the stored completions in one auxiliary phase.")
    phasic_kl_coef: float = option(
        1.0, "Weight of the KL term that keeps the policy where it was when an auxiliary phase began."
    )

    def check(self) -> None:
        """Refuse numbers out of range."""
        check_at_least(0, phasic_every=self.phasic_every, phasic_kl_coef=self.phasic_kl_coef)
        if self.phasic_every:
            check_at_least(1, phasic_epochs=self.phasic_epochs)

    def check_cycles(
        self,
        steps_per_generation: int,
        num_iterations: int,
        accumulation: int,
        *,
        option: str = "gradient_accumulation_steps",
    ) -> None:
        """Refuse phases that would end inside a rollout or inside an optimizer step.

        Args:
            steps_per_generation: Micro-batches that one rollout is cut into.
            num_iterations: Passes over a rollout.
            accumulation: Micro-batches of an optimizer step.
            option: Name that the host gives to `accumulation`.

        Raises:
            ValueError: If a phase would end there.
        """
        if not self.phasic_every:
            return
        cycle = steps_per_generation * num_iterations
        policy_phase = self.phasic_every * cycle
        auxiliary_phase = self.phasic_every * self.phasic_epochs * steps_per_generation
        if auxiliary_phase % cycle or policy_phase % accumulation or auxiliary_phase % accumulation:
            raise ValueError(
                f"phasic_every={self.phasic_every} makes a policy phase of {policy_phase} micro-batches, and with "
                f"phasic_epochs={self.phasic_epochs} an auxiliary phase of {auxiliary_phase}. {option} = "
                f"{accumulation} must divide both numbers, and steps_per_generation * num_iterations = {cycle} must "
                "divide the second. Change phasic_every or phasic_epochs."
            )
