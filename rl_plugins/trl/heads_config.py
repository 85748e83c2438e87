"""Options of MTP heads: those that draft, and those that also output values."""

from dataclasses import dataclass, field

from rl_plugins.nn.target_heads import check_polyak
from rl_plugins.signals.checks import check_at_least
from rl_plugins.trl.speculative_config import TokenHeadsArguments
from rl_plugins.trl.value_config import ValueArguments


@dataclass
class MTPHeadsArguments(ValueArguments, TokenHeadsArguments):
    r"""
    Options of multi-token-prediction value heads, mixed into the trainers' configs; those of [`ValueArguments`] and
    [`TokenHeadsArguments`] apply as well. Head k predicts token t+k and the value of state t+k-1; head 1 is the
    critic.

    Parameters:
        > Parameters that control the heads' losses

        value_grad_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the value gradient that enters the trunk; 0 detaches the trunk from the critic.
        value_grad_clip (`float`, *optional*, defaults to `1.0`):
            Largest norm of one token's value gradient into the trunk, in units of the unweighted squared error;
            `None` does not clamp.

        > Parameters that control the target heads

        target_tau (`float`, *optional*, defaults to `0.05`):
            Step of the target heads towards the online heads after every optimizer step, above 0 and at most 1.
        target_update_every (`int`, *optional*):
            Copy the online heads every this many steps instead of averaging.
        bootstrap_lookahead (`bool`, *optional*, defaults to `False`):
            Whether to bootstrap from the mean of all heads' forecasts of the next state instead of head 1's alone.
    """

    value_grad_scale: float = field(
        default=1.0,
        metadata={"help": "Factor on the value gradient that enters the trunk; 0 detaches the trunk."},
    )
    value_grad_clip: float | None = field(
        default=1.0,
        metadata={"help": "Largest norm of one token's value gradient into the trunk; None: no clamp."},
    )
    target_tau: float = field(default=0.05, metadata={"help": "Step of the target heads towards the online heads."})
    target_update_every: int | None = field(
        default=None, metadata={"help": "Copy the online heads every this many steps instead of averaging."}
    )
    bootstrap_lookahead: bool = field(
        default=False,
        metadata={"help": "Whether to bootstrap from the mean of all heads' forecasts of the next state."},
    )

    def check_heads_arguments(self) -> None:
        """Validate before any work starts.

        Raises:
            ValueError: Naming the option and its valid values.
        """
        self.check_value_arguments()
        self.check_token_heads()
        check_at_least(1, target_update_every=self.target_update_every)
        check_polyak(target_tau=self.target_tau, target_update_every=self.target_update_every)
        if getattr(self, "fp16", False) and self.value_grad_clip is not None:
            raise ValueError(
                "value_grad_clip does not know the loss scale of fp16 and would clamp every token. Use bf16=True, or "
                "set value_grad_clip=None."
            )
        check_at_least(0, value_grad_scale=self.value_grad_scale, value_grad_clip=self.value_grad_clip)
