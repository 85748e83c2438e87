"""Options that every trainer with MTP value heads shares."""

from dataclasses import dataclass, field

from rl_plugins.objectives.checks import check_unit_interval
from rl_plugins.trl.value_config import ValueArguments


@dataclass
class MTPHeadsArguments(ValueArguments):
    r"""
    Options of multi-token-prediction value heads, mixed into the trainers' configs; those of [`ValueArguments`] apply
    as well.

    Parameters:
        > Parameters that control the heads

        num_mtp_heads (`int`, *optional*, defaults to `2`):
            K, number of heads. Head k predicts token t+k and the value of state t+k-1; head 1 is the critic.
        mtp_inner_size (`int`, *optional*):
            Width of each head's residual block. Defaults to the model's hidden size.
        mtp_heads_path (`str`, *optional*):
            Directory with heads saved by an earlier run. By default, heads beside the model's weights are loaded if
            `model` is a path, and new ones are made otherwise.
        head_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Learning rate of the heads; `None` uses `learning_rate`. Fresh heads need more than the policy does.

        > Parameters that control the heads' losses

        mtp_loss_coef (`float`, *optional*, defaults to `0.1`):
            lambda_1, weight of the heads' token loss.
        mtp_detach_trunk (`bool`, *optional*, defaults to `True`):
            Whether to keep the token loss out of the trunk.
        value_grad_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the value gradient that enters the trunk; 0 detaches the trunk from the critic.
        value_grad_clip (`float`, *optional*, defaults to `1.0`):
            Largest norm of one token's value gradient into the trunk, in units of the unweighted squared error;
            `None` does not clamp.

        > Parameters that control the target heads

        target_tau (`float`, *optional*, defaults to `0.05`):
            Step of the target heads towards the online heads after every optimizer step.
        target_update_every (`int`, *optional*):
            Copy the online heads every this many steps instead of averaging.
        bootstrap_lookahead (`bool`, *optional*, defaults to `False`):
            Whether to bootstrap from the mean of all heads' forecasts of the next state instead of head 1's alone.
    """

    num_mtp_heads: int = field(
        default=2,
        metadata={"help": "K, number of heads. Head k predicts token t+k and the value of state t+k-1."},
    )
    mtp_inner_size: int | None = field(
        default=None,
        metadata={"help": "Width of each head's residual block (default: the model's hidden size)."},
    )
    mtp_heads_path: str | None = field(
        default=None, metadata={"help": "Directory with heads saved by an earlier run."}
    )
    head_learning_rate: float | None = field(
        default=1e-4, metadata={"help": "Learning rate of the heads; None uses learning_rate."}
    )
    mtp_loss_coef: float = field(default=0.1, metadata={"help": "lambda_1, weight of the heads' token loss."})
    mtp_detach_trunk: bool = field(
        default=True, metadata={"help": "Whether to keep the heads' token loss out of the trunk."}
    )
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
        check_unit_interval(target_tau=self.target_tau)
        if getattr(self, "fp16", False) and self.value_grad_clip is not None:
            raise ValueError(
                "value_grad_clip does not know the loss scale of fp16 and would clamp every token. Use bf16=True, or "
                "set value_grad_clip=None."
            )
        for name in ("num_mtp_heads", "mtp_inner_size", "target_update_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("mtp_loss_coef", "value_grad_scale", "value_grad_clip", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
