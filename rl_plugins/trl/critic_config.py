"""Options of `MTPCriticTrainer`."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from rl_plugins.signals.checks import check_head_reach
from rl_plugins.trl.heads_config import MTPHeadsArguments
from rl_plugins.trl.inputs import settle_options
from rl_plugins.trl.policy_config import field_default
from rl_plugins.trl.presets import NamedArguments
from rl_plugins.trl.value_config import OnlineValueArguments


@dataclass
class MTPCriticConfig(NamedArguments, MTPHeadsArguments, OnlineValueArguments, GRPOConfig):
    r"""
    Configuration class for the [`MTPCriticTrainer`].

    This class includes the parameters that are specific to a critic inside the policy. Those of [`~trl.GRPOConfig`],
    [`MTPHeadsArguments`], [`OnlineValueArguments`] and [`PolicyLossArguments`] apply as well.

    Parameters:
        > Parameters that control the critic

        use_critic (`bool`, *optional*, defaults to `True`):
            Whether to use the critic at all. `False` is stock GRPO, with its default of `num_generations` (it needs
            at least 2).

        > Parameters that control the phasic mode

        phasic_every (`int`, *optional*, defaults to `0`):
            Run an auxiliary phase after every this many generation batches; 0 turns the phasic mode off.
        phasic_epochs (`int`, *optional*, defaults to `1`):
            Passes over the stored batches in one auxiliary phase.
        phasic_kl_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the KL term that holds the policy during an auxiliary phase.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "policy_loss_kwargs"]

    use_critic: bool = field(default=True, metadata={"help": "Whether to use the critic at all. False is stock GRPO."})
    phasic_every: int = field(
        default=0,
        metadata={"help": "Run an auxiliary phase after every this many generation batches; 0: off."},
    )
    phasic_epochs: int = field(default=1, metadata={"help": "Passes over the stored batches in one auxiliary phase."})
    phasic_kl_coef: float = field(
        default=1.0,
        metadata={"help": "Weight of the KL term that holds the policy during an auxiliary phase."},
    )

    @property
    def groupless(self) -> bool:
        """Whether one completion per prompt will do: with the critic."""
        return self.use_critic

    @property
    def own_advantages(self) -> str | None:
        """Advantages come from values, with the critic."""
        return super().own_advantages if self.use_critic else None

    def __post_init__(self) -> None:
        settle_options(self)
        if self.use_critic:
            self._check_critic_arguments()
        elif self.num_generations == 1:
            self._settle_generations()
        super().__post_init__()
        if self.phasic_every:
            self._check_phasic_alignment()

    def _settle_generations(self) -> None:
        """Without a critic, TRL's number of completions per prompt, unless one was asked for."""
        if self.is_named("num_generations"):
            raise ValueError(
                "use_critic=False is stock GRPO, which compares at least 2 generations per prompt, but "
                "num_generations is 1. Set it to 2 or more, or leave it out for TRL's default."
            )
        self.num_generations = field_default(GRPOConfig, "num_generations")

    def _check_critic_arguments(self) -> None:
        self.check_heads_arguments()
        self.check_online_value_arguments()
        check_head_reach(self.num_mtp_heads, self.max_completion_length, "max_completion_length")
        for name in ("phasic_every", "phasic_kl_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.phasic_every and self.phasic_epochs < 1:
            raise ValueError(f"phasic_epochs must be at least 1, got {self.phasic_epochs}.")
        if self.kl_in_reward and self.beta == 0.0:
            raise ValueError("kl_in_reward=True subtracts beta * KL from the rewards, but beta is 0. Set beta > 0.")

    def _check_phasic_alignment(self) -> None:
        """An auxiliary phase is made of ordinary training steps, so it must fill whole generation cycles and optimizer
        steps."""
        cycle = self.steps_per_generation * self.num_iterations
        policy_phase = self.phasic_every * cycle
        auxiliary_phase = self.phasic_every * self.phasic_epochs * self.steps_per_generation
        accumulation = self.gradient_accumulation_steps
        if auxiliary_phase % cycle or policy_phase % accumulation or auxiliary_phase % accumulation:
            raise ValueError(
                f"phasic_every={self.phasic_every} and phasic_epochs={self.phasic_epochs} do not fill whole cycles of "
                f"steps_per_generation * num_iterations = {cycle} micro-steps and gradient_accumulation_steps = "
                f"{accumulation}. Choose phasic_every * phasic_epochs as a multiple of num_iterations, and both "
                "phases as multiples of the accumulation."
            )
