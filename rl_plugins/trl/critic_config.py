"""Options of `MTPCriticTrainer`."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from rl_plugins.objectives.critic import SCALINGS
from rl_plugins.trl.heads_config import MTPHeadsArguments, check_choice, check_unit_interval
from rl_plugins.trl.host import require_tested_trl


class _SingleGeneration(int):
    """1 that passes GRPO's check for at least two generations, which a critic does not need."""

    def __lt__(self, other: object) -> bool:
        return False


@dataclass
class MTPCriticConfig(MTPHeadsArguments, GRPOConfig):
    r"""
    Configuration class for the [`MTPCriticTrainer`].

    This class includes the parameters that are specific to training with a critic. Those of [`~trl.GRPOConfig`] and
    of [`MTPHeadsArguments`] apply as well.

    Parameters:
        > Parameters that control the critic

        use_critic (`bool`, *optional*, defaults to `True`):
            Whether to use the critic at all. `False` is stock GRPO (and needs `num_generations >= 2`).
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt. The critic needs one; more are averaged over.
        lam_policy (`float`, *optional*, defaults to `0.95`):
            Lambda of the policy's advantages.
        length_adaptive_alpha (`float`, *optional*):
            Replaces `lam_policy` by VAPO's `1 - 1 / (alpha * length)`; the paper uses 0.05.
        advantage_scaling (`str`, *optional*, defaults to `"whiten"`):
            `"whiten"` over the batch, `"value"` (divide by the standard deviation that V(s_0) implies) or `"none"`.
        reward_range (`list[float]`, *optional*, defaults to `[0.0, 1.0]`):
            Smallest and largest reward, for `advantage_scaling="value"`.
        kl_in_reward (`bool`, *optional*, defaults to `False`):
            Whether to subtract `beta` times the KL from the token rewards instead of adding it to the loss.
        value_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps in which only the heads learn.

        > Parameters that control the phasic mode

        phasic_every (`int`, *optional*, defaults to `0`):
            Run an auxiliary phase after every this many generation batches; 0 turns the phasic mode off.
        phasic_epochs (`int`, *optional*, defaults to `1`):
            Passes over the stored batches in one auxiliary phase.
        phasic_kl_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the KL term that holds the policy during an auxiliary phase.
    """

    num_generations: int | None = field(
        default=1, metadata={"help": "Completions per prompt. The critic needs one; more are averaged over."}
    )
    use_critic: bool = field(default=True, metadata={"help": "Whether to use the critic at all. False is stock GRPO."})
    lam_policy: float = field(default=0.95, metadata={"help": "Lambda of the policy's advantages."})
    length_adaptive_alpha: float | None = field(
        default=None, metadata={"help": "Replaces lam_policy by VAPO's 1 - 1 / (alpha * length)."}
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
    value_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps in which only the heads learn."})
    phasic_every: int = field(
        default=0,
        metadata={"help": "Run an auxiliary phase after every this many generation batches; 0: off."},
    )
    phasic_epochs: int = field(default=1, metadata={"help": "Passes over the stored batches in one auxiliary phase."})
    phasic_kl_coef: float = field(
        default=1.0,
        metadata={"help": "Weight of the KL term that holds the policy during an auxiliary phase."},
    )

    def __post_init__(self) -> None:
        require_tested_trl()
        if self.use_critic:
            self._check_critic_arguments()
        generations = self.num_generations
        if self.use_critic and generations == 1:
            self.num_generations = _SingleGeneration(1)
        super().__post_init__()
        self.num_generations = generations
        if self.phasic_every:
            self._check_phasic_alignment()
        if self.ddp_find_unused_parameters is None:
            # The heads run in every forward; looking for unused parameters marks them ready twice.
            self.ddp_find_unused_parameters: bool | None = False

    def _check_critic_arguments(self) -> None:
        self.check_heads_arguments()
        check_choice("advantage_scaling", self.advantage_scaling, SCALINGS)
        check_unit_interval(lam_policy=self.lam_policy)
        if self.length_adaptive_alpha is not None and self.length_adaptive_alpha <= 0:
            raise ValueError(f"length_adaptive_alpha must be above 0, got {self.length_adaptive_alpha}.")
        if len(self.reward_range) != 2 or self.reward_range[0] >= self.reward_range[1]:
            raise ValueError(f"reward_range must be [smallest, largest], got {self.reward_range}.")
        for name in ("value_warmup_steps", "phasic_every", "phasic_kl_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.phasic_every and self.phasic_epochs < 1:
            raise ValueError(f"phasic_epochs must be at least 1, got {self.phasic_epochs}.")
        if self.kl_in_reward and self.beta == 0.0:
            raise ValueError("kl_in_reward=True subtracts beta * KL from the rewards, but beta is 0. Set beta > 0.")
        if self.sync_ref_model:
            raise ValueError(
                "sync_ref_model=True cannot work with MTP heads: TRL zips the parameters of policy and reference "
                "one to one, and the reference has no heads. Set sync_ref_model=False, or use_critic=False."
            )

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
