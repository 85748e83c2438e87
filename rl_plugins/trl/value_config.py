"""Options of everything that has a value function, wherever its values come from."""

from dataclasses import dataclass, field

from rl_plugins.signals.checks import check_choice, check_unit_interval
from rl_plugins.signals.critic_targets import ESTIMATORS, SCALINGS, value_losses
from rl_plugins.trl.policy_config import PolicyLossArguments


@dataclass
class ValueArguments:
    r"""
    Options of value targets and value losses.

    Parameters:
        value_loss_coef (`float`, *optional*, defaults to `0.1`):
            lambda_2, weight of the value loss.
        value_loss_type (`str`, *optional*, defaults to `"squared"`):
            `"squared"`, `"clipped"` (PPO2) or `"huber"`.
        value_clip_range (`float`, *optional*, defaults to `0.2`):
            Range around the old value for `value_loss_type="clipped"`.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount factor.
        advantage_estimator (`str`, *optional*, defaults to `"gae"`):
            `"gae"`, `"td"` (one-step temporal difference, both lambdas 0) or `"mc"` (Monte Carlo, both 1).
        lam_value (`float`, *optional*, defaults to `1.0`):
            Lambda of the value targets.
    """

    value_loss_coef: float = field(default=0.1, metadata={"help": "lambda_2, weight of the value loss."})
    value_loss_type: str = field(
        default="squared",
        metadata={"help": "Value loss.", "choices": ["squared", "clipped", "huber"]},
    )
    value_clip_range: float = field(
        default=0.2, metadata={"help": "Range around the old value for value_loss_type='clipped'."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    advantage_estimator: str = field(
        default="gae",
        metadata={"help": "Advantage estimator: gae, td or mc.", "choices": ["gae", "td", "mc"]},
    )
    lam_value: float = field(default=1.0, metadata={"help": "Lambda of the value targets."})

    def check_value_arguments(self) -> None:
        """Validate before any work starts.

        Raises:
            ValueError: Naming the option and its valid values.
        """
        check_choice("advantage_estimator", self.advantage_estimator, ESTIMATORS)
        check_choice("value_loss_type", self.value_loss_type, tuple(value_losses()))
        check_unit_interval(gamma=self.gamma, lam_value=self.lam_value)
        if self.value_clip_range <= 0:
            raise ValueError(f"value_clip_range must be above 0, got {self.value_clip_range}.")
        if self.value_loss_coef < 0:
            raise ValueError(f"value_loss_coef must be at least 0, got {self.value_loss_coef}.")


@dataclass
class OnlineValueArguments(ValueArguments, PolicyLossArguments):
    r"""
    Options of online training with values: how they become advantages.

    Parameters:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt. A critic needs one; more are averaged over.
        lam_policy (`float`, *optional*, defaults to `0.95`):
            Lambda of the policy's advantages.
        length_adaptive_alpha (`float`, *optional*):
            Replaces `lam_policy` by VAPO's `1 - 1 / (alpha * length)`; the paper uses 0.05.
        discounted_objective (`bool`, *optional*, defaults to `False`):
            Whether the advantage of token `t` weighs `gamma^t`, as the gradient of the discounted return has it; most
            code leaves it out, so that late tokens count as much as early ones.
        advantage_scaling (`str`, *optional*, defaults to `"whiten"`):
            `"whiten"` over the batch, `"value"` (divide by the standard deviation that V(s_0) implies) or `"none"`.
        reward_range (`list[float]`, *optional*, defaults to `[0.0, 1.0]`):
            Smallest and largest reward, for `advantage_scaling="value"`.
        kl_in_reward (`bool`, *optional*, defaults to `False`):
            Whether to subtract `beta` times the KL from the token rewards instead of adding it to the loss.
        value_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps in which only the critic learns.
    """

    num_generations: int | None = field(
        default=1, metadata={"help": "Completions per prompt. The critic needs one; more are averaged over."}
    )
    lam_policy: float = field(default=0.95, metadata={"help": "Lambda of the policy's advantages."})
    length_adaptive_alpha: float | None = field(
        default=None, metadata={"help": "Replaces lam_policy by VAPO's 1 - 1 / (alpha * length)."}
    )
    discounted_objective: bool = field(
        default=False,
        metadata={"help": "Whether the advantage of token t weighs gamma^t, as the discounted return has it."},
    )
    advantage_scaling: str = field(
        default="whiten",
        metadata={
            "help": "whiten over the batch, value (divide by the standard deviation that V(s_0) implies) or none.",
            "choices": ["none", "whiten", "value"],
        },
    )
    reward_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "Smallest and largest reward, for advantage_scaling='value'."},
    )
    kl_in_reward: bool = field(
        default=False,
        metadata={"help": "Whether to subtract beta times the KL from the token rewards instead of the loss term."},
    )
    value_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps in which only the critic learns."})

    @property
    def own_advantages(self) -> str | None:
        """Advantages come from values."""
        return "the critic (scaled by advantage_scaling)"

    def check_online_value_arguments(self) -> None:
        """Validate before any work starts.

        Raises:
            ValueError: Naming the option and its valid values.
        """
        self.check_value_arguments()
        check_choice("advantage_scaling", self.advantage_scaling, SCALINGS)
        check_unit_interval(lam_policy=self.lam_policy)
        if self.length_adaptive_alpha is not None and self.length_adaptive_alpha <= 0:
            raise ValueError(f"length_adaptive_alpha must be above 0, got {self.length_adaptive_alpha}.")
        if len(self.reward_range) != 2 or self.reward_range[0] >= self.reward_range[1]:
            raise ValueError(f"reward_range must be [smallest, largest], got {self.reward_range}.")
        if self.value_warmup_steps < 0:
            raise ValueError(f"value_warmup_steps must be at least 0, got {self.value_warmup_steps}.")
        if self.policy_loss == "gvpo":
            raise ValueError(
                "policy_loss='gvpo' compares the completions of a prompt as wholes; a critic's advantages are one per "
                "token. Choose another loss, or GRPOVariantConfig(preset='gvpo')."
            )
        if getattr(self, "sync_ref_model", False):
            raise ValueError(
                "sync_ref_model=True cannot work with a critic attached to the policy: TRL zips the parameters of "
                "policy and reference one to one, and the reference has no critic. Set sync_ref_model=False."
            )
