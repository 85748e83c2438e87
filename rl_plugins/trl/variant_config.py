"""Options of `GRPOVariantTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from rl_plugins.settings import with_numbers
from rl_plugins.signals.advantages import ADVANTAGES, GROUPLESS, check_advantage
from rl_plugins.signals.checks import check_choice
from rl_plugins.trl.inputs import settle_options
from rl_plugins.trl.policy_config import PolicyLossArguments
from rl_plugins.trl.presets import GRPO_PRESETS, NamedArguments, apply_preset


@dataclass
class GRPOVariantConfig(NamedArguments, PolicyLossArguments, GRPOConfig):
    r"""
    Configuration class for the [`GRPOVariantTrainer`].

    This class includes the three choices in which the variants of GRPO differ: advantage, policy loss (see
    [`PolicyLossArguments`]) and sampling. Those of [`~trl.GRPOConfig`] apply as well.

    Parameters:
        preset (`str`, *optional*):
            The settings of a paper in one word, such as `"dapo"`, `"gspo"` or `"maxrl"`. What you set wins. (On the
            command line a field set to its own default cannot be told from one that was not set.)

        > Parameters that control the advantage

        advantage (`str`, *optional*):
            One of [`~rl_plugins.signals.ADVANTAGES`]; `None` leaves it to TRL's `scale_rewards`.
        advantage_kwargs (`dict` or `str`, *optional*):
            Options of the advantage, such as `{"k": 4}` for `"pass_at_k"`.
        kl_in_reward (`bool`, *optional*, defaults to `False`):
            Whether to subtract `beta` times the KL from the reward of each token instead of adding it to the loss
            (`advantage="batch_normalized"` only: REINFORCE++).

        > Parameters that control the sampling

        dynamic_sampling (`bool`, *optional*, defaults to `False`):
            Whether to draw further prompts until every group of the batch has rewards that differ (DAPO).
        max_draws (`int`, *optional*, defaults to `10`):
            Largest number of further draws for one batch. What is still missing then is filled with groups that teach
            nothing, and counted in `sampling/unfilled_groups`.
        reject_uniform (`bool`, *optional*, defaults to `False`):
            Whether to leave groups whose rewards are all equal out of the loss and of all batch statistics
            (Reinforce-Rej).
        overlong_shaping (`bool`, *optional*, defaults to `False`):
            Whether to add DAPO's soft penalty on completions near `max_completion_length`.
        overlong_cache (`int`, *optional*):
            Tokens before the limit at which the penalty sets in; a fifth of `max_completion_length` by default.
        replay_buffer_size (`int`, *optional*, defaults to `0`):
            Groups per process to keep and use again in place of groups that teach nothing; 0: off.
        replay_max_age (`int`, *optional*, defaults to `8`):
            Optimizer steps after which a kept group is forgotten.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "policy_loss_kwargs", "advantage_kwargs"]

    preset: str | None = field(
        default=None, metadata={"help": "The settings of a paper in one word.", "choices": [*GRPO_PRESETS]}
    )
    advantage: str | None = field(
        default=None,
        metadata={"help": "Advantage by name (None: TRL's scale_rewards).", "choices": [*ADVANTAGES]},
    )
    advantage_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the advantage, as a dict or a JSON string."}
    )
    kl_in_reward: bool = field(
        default=False,
        metadata={"help": "Whether to subtract beta times the KL from the token rewards (batch_normalized only)."},
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Whether to draw further prompts until every group has rewards that differ."},
    )
    max_draws: int = field(default=10, metadata={"help": "Largest number of further draws for one batch."})
    reject_uniform: bool = field(
        default=False, metadata={"help": "Whether to leave groups of equal rewards out of loss and statistics."}
    )
    overlong_shaping: bool = field(
        default=False, metadata={"help": "Whether to penalise completions near max_completion_length."}
    )
    overlong_cache: int | None = field(
        default=None,
        metadata={"help": "Tokens before the limit at which the penalty sets in (default: a fifth of it)."},
    )
    replay_buffer_size: int = field(
        default=0, metadata={"help": "Groups per process to use again in place of those that teach nothing; 0: off."}
    )
    replay_max_age: int = field(default=8, metadata={"help": "Optimizer steps after which a kept group is forgotten."})

    @property
    def groupless(self) -> bool:
        """Whether the advantage needs no group."""
        return self.advantage in GROUPLESS

    @property
    def own_advantages(self) -> str | None:
        """Advantages come from `advantage`, where it is given."""
        return None if self.advantage is None else f"advantage={self.advantage!r}"

    @property
    def scales_rewards_like(self) -> str | None:
        """The host has three of the advantages, too."""
        return {"group_centered": "none", "group_centered_batch_scaled": "batch"}.get(self.advantage or "")

    def __post_init__(self) -> None:
        settle_options(self)
        apply_preset(self, GRPO_PRESETS)
        super().__post_init__()
        if self.overlong_shaping and self.overlong_cache is None:
            self.overlong_cache = max(1, self.max_completion_length // 5)
        self._check_advantage()
        self._check_combinations()
        self._check_sampling()
        self._check_whole_groups()

    @property
    def samples(self) -> bool:
        """Whether anything is done about groups that teach nothing."""
        return self.dynamic_sampling or self.reject_uniform or self.replay_buffer_size > 0

    @property
    def moves_rows(self) -> bool:
        """Whether completions leave the place in the batch that the host gave them."""
        return self.dynamic_sampling or self.replay_buffer_size > 0 or self.policy_loss == "gvpo"

    def _check_advantage(self) -> None:
        kwargs = self.advantage_kwargs or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f"advantage_kwargs must be a dict or JSON of one, got {kwargs!r}.")
        if kwargs:
            self.advantage_kwargs = kwargs = with_numbers(kwargs)
        if self.advantage is None:
            if kwargs:
                raise ValueError("advantage_kwargs are options of an advantage, but advantage is None. Name one.")
        else:
            check_choice("advantage", self.advantage, ADVANTAGES)
        if self.advantage == "pass_at_k" and not 1 <= int(kwargs.get("k", 0)) < (self.num_generations or 0):
            raise ValueError(
                f"pass_at_k draws k of the num_generations={self.num_generations} completions of a prompt, but k is "
                f"{kwargs.get('k')}. Set advantage_kwargs={{'k': ...}} to at least 1 and less than num_generations: "
                "with all of them drawn every advantage is 0."
            )
        if self.advantage is not None:
            check_advantage(self.advantage, kwargs, self.num_generations or 1)

    def _check_combinations(self) -> None:
        if self.advantage in ("max_likelihood", "value_tracker") and self.overlong_shaping:
            raise ValueError(
                f"advantage={self.advantage!r} needs rewards of at least 0, and the penalty of overlong_shaping=True "
                "is negative. Set one or the other."
            )
        if self.advantage == "group_centered_rescaled" and self.reject_uniform:
            raise ValueError(
                "advantage='group_centered_rescaled' makes up for groups that teach nothing, and reject_uniform=True "
                "takes them out: together they would correct twice. Set one or the other."
            )
        if self.policy_loss == "gvpo" and (self.advantage == "lambda_trace" or self.kl_in_reward):
            raise ValueError(
                "policy_loss='gvpo' compares whole completions: it takes one advantage for each, and "
                "advantage='lambda_trace' or kl_in_reward=True gives one for each token."
            )
        if self.kl_in_reward and (self.advantage != "batch_normalized" or self.beta == 0.0):
            raise ValueError(
                "kl_in_reward=True subtracts beta * KL from token rewards, which needs "
                f"advantage='batch_normalized' and beta > 0; they are {self.advantage!r} and {self.beta}."
            )

    def _check_sampling(self) -> None:
        if self.samples and self.num_generations == 1:
            raise ValueError(
                "dynamic_sampling, reject_uniform and replay_buffer_size compare the completions of a prompt, but "
                "num_generations is 1. Set it to at least 2."
            )
        if self.samples and self.advantage == "value_tracker":
            raise ValueError(
                "advantage='value_tracker' needs no groups and counts every reward of a prompt, but dynamic_sampling, "
                "reject_uniform and replay_buffer_size take some prompts out of the batch. Set one or the other."
            )
        if self.max_draws < 1:
            raise ValueError(f"max_draws must be at least 1, got {self.max_draws}.")
        for name in ("replay_buffer_size", "replay_max_age"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.overlong_shaping and not 0 < (self.overlong_cache or 0) <= self.max_completion_length:
            raise ValueError(
                f"overlong_cache must be between 1 and max_completion_length={self.max_completion_length}, got "
                f"{self.overlong_cache}."
            )

    def _check_whole_groups(self) -> None:
        """Where groups are moved, or compared inside the loss, they must not be cut in two."""
        rows = self.per_device_train_batch_size * self.steps_per_generation
        group = self.num_generations or 1
        if (self.dynamic_sampling or self.replay_buffer_size) and rows % group:
            raise ValueError(
                f"dynamic_sampling and replay_buffer_size move whole groups, but num_generations={group} does not "
                f"divide the {rows} completions of a process (per_device_train_batch_size * steps_per_generation)."
            )
        if self.policy_loss == "gvpo" and self.per_device_train_batch_size % group:
            raise ValueError(
                f"gvpo compares the completions of a prompt inside the loss, but num_generations={group} does not "
                f"divide per_device_train_batch_size={self.per_device_train_batch_size}."
            )
