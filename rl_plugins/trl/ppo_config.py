"""Options of `PPOTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from rl_plugins.trl.inputs import settle_options
from rl_plugins.trl.presets import PPO_PRESETS, NamedArguments, apply_preset
from rl_plugins.trl.value_config import OnlineValueArguments


@dataclass
class PPOConfig(NamedArguments, OnlineValueArguments, GRPOConfig):
    r"""
    Configuration class for the [`PPOTrainer`].

    This class includes the parameters that are specific to PPO with a separate value model. Those of
    [`~trl.GRPOConfig`], [`OnlineValueArguments`] and [`PolicyLossArguments`] apply as well: `epsilon` is PPO's clip
    range, `beta` the coefficient of the KL penalty, `num_iterations` the number of epochs over a batch of completions
    and `steps_per_generation` the number of minibatches in it, `entropy_coef` the weight of the entropy bonus.

    Parameters:
        preset (`str`, *optional*):
            `"vpg"`: REINFORCE with a learned baseline (the return minus the value, no clipping, one epoch). What you
            set wins. (On the command line a field set to its own default cannot be told from one that was not set.)
        value_model_path (`str`, *optional*):
            Where the value model comes from: a folder or hub id of any model with the policy's tokenizer. By default
            it has the policy's architecture and starts from the policy's weights.
        value_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for loading it, on top of the policy's `model_init_kwargs` (of which another model shares
            `dtype` and `attn_implementation`).
        value_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate of the value model; `None` uses `learning_rate`.
        beta (`float`, *optional*, defaults to `0.05`):
            Coefficient of the KL penalty; 0 loads no reference model.
        kl_in_reward (`bool`, *optional*, defaults to `True`):
            Whether the KL is subtracted from the token rewards, as PPO does, instead of added to the loss.
        num_iterations (`int`, *optional*, defaults to `4`):
            Epochs over each batch of completions, whose minibatches are shuffled anew for each.
        value_loss_type (`str`, *optional*, defaults to `"clipped"`):
            `"squared"`, `"clipped"` (PPO2) or `"huber"`.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "policy_loss_kwargs", "value_model_init_kwargs"]

    preset: str | None = field(
        default=None, metadata={"help": "A paper's settings in one word.", "choices": [*PPO_PRESETS]}
    )
    value_model_path: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id that the value model starts from (default: the policy's)."},
    )
    value_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for loading the value model."}
    )
    value_learning_rate: float | None = field(
        default=1e-5, metadata={"help": "Learning rate of the value model; None uses learning_rate."}
    )
    beta: float = field(default=0.05, metadata={"help": "Coefficient of the KL penalty; 0: no reference model."})
    kl_in_reward: bool = field(
        default=True,
        metadata={"help": "Whether the KL is subtracted from the token rewards instead of added to the loss."},
    )
    num_iterations: int = field(default=4, metadata={"help": "Epochs over each batch of completions."})
    value_loss_type: str = field(
        default="clipped", metadata={"help": "Value loss.", "choices": ["squared", "clipped", "huber"]}
    )

    def __post_init__(self) -> None:
        settle_options(self)
        apply_preset(self, PPO_PRESETS)
        self.check_online_value_arguments()
        if self.value_learning_rate is not None and self.value_learning_rate < 0:
            raise ValueError(f"value_learning_rate must be at least 0, got {self.value_learning_rate}.")
        super().__post_init__()
