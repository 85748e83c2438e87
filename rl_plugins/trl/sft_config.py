"""Options of `MTPSFTTrainer`."""

from dataclasses import dataclass, field

from trl import SFTConfig

from rl_plugins.signals.checks import check_head_reach
from rl_plugins.signals.native_checks import check_native_settings
from rl_plugins.trl.heads_config import MTPHeadsArguments
from rl_plugins.trl.inputs import settle_options
from rl_plugins.trl.presets import NamedArguments


@dataclass
class MTPSFTConfig(NamedArguments, MTPHeadsArguments, SFTConfig):
    r"""
    Configuration class for the [`MTPSFTTrainer`].

    Those of [`~trl.SFTConfig`] and of [`MTPHeadsArguments`] apply as well.

    Parameters:
        mtp_loss_coef (`float`, *optional*, defaults to `0.3`):
            lambda_1, weight of the heads' token loss (DeepSeek-V3 uses 0.3, later 0.1).
        freeze_trunk (`bool`, *optional*, defaults to `False`):
            Whether to train the heads only. This gives heads to a finished model, and pretrains the critic on scored
            completions without imitating the bad ones.
        native_mtp (`bool`, *optional*, defaults to `False`):
            Whether to train the architecture's own MTP layers (deepseek_v3, glm4_moe) instead of parallel heads: those
            of the model's checkpoint, or `num_mtp_heads` new ones. They have no values, and are saved where
            `generate(use_mtp=True)` reads them.
    """

    mtp_loss_coef: float = field(default=0.3, metadata={"help": "lambda_1, weight of the heads' token loss."})
    freeze_trunk: bool = field(default=False, metadata={"help": "Whether to train the heads only."})
    native_mtp: bool = field(
        default=False,
        metadata={"help": "Whether to train the architecture's own MTP layers instead of parallel heads."},
    )

    def __post_init__(self) -> None:
        settle_options(self)
        self.check_heads_arguments()
        if self.max_length is not None:
            check_head_reach(self.num_mtp_heads, self.max_length - 1, "max_length - 1")
        if self.native_mtp:
            check_native_settings(self.mtp_loss_coef, self.mtp_heads_path)
        super().__post_init__()
        if self.freeze_trunk and self.ddp_find_unused_parameters is None:
            # The heads are all that learns, and run in every forward, which no longer has a graph to look for them in.
            self.ddp_find_unused_parameters: bool | None = False
