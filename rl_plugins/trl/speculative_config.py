"""Options of MTP heads as drafters, and of rollouts that they speed up."""

from dataclasses import dataclass, field

from rl_plugins.signals.checks import check_at_least, check_head_reach


@dataclass
class TokenHeadsArguments:
    r"""
    Options of multi-token-prediction heads.

    Parameters:
        > Parameters that control the heads

        num_mtp_heads (`int`, *optional*, defaults to `2`):
            K, number of heads. Head k predicts token t+k.
        mtp_inner_size (`int`, *optional*):
            Width of each head's residual block. Defaults to the model's hidden size.
        mtp_heads_path (`str`, *optional*):
            Directory with heads saved by an earlier run. By default, heads beside the model's weights are loaded if
            `model` is a path, and new ones are made otherwise.
        head_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Learning rate of the heads; `None` uses `learning_rate`. Fresh heads need more than the policy does.
        mtp_loss_coef (`float`, *optional*, defaults to `0.1`):
            lambda_1, weight of the heads' token loss.
        mtp_detach_trunk (`bool`, *optional*, defaults to `True`):
            Whether to keep the token loss out of the trunk.
    """

    num_mtp_heads: int = field(
        default=2,
        metadata={"help": "K, number of heads. Head k predicts token t+k, and a critic's the value of state t+k-1."},
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

    def check_token_heads(self) -> None:
        """Validate before any work starts.

        Raises:
            ValueError: Naming the option and its valid values.
        """
        check_at_least(1, num_mtp_heads=self.num_mtp_heads, mtp_inner_size=self.mtp_inner_size)
        check_at_least(0, mtp_loss_coef=self.mtp_loss_coef, head_learning_rate=self.head_learning_rate)


@dataclass
class SpeculativeArguments(TokenHeadsArguments):
    r"""
    Options of speculative rollouts, mixed into the trainers' configs. The heads of [`TokenHeadsArguments`] draft, and
    learn from every rollout; a trainer whose critic has heads drafts with those.

    Parameters:
        > Parameters that control speculative rollouts

        speculative (`bool`, *optional*, defaults to `False`):
            Whether MTP heads draft the completions, which the model then verifies several tokens at a time (see
            [`~rl_plugins.rollouts.SpeculativeDecoder`]). The distribution of the completions stays what it is.
        num_draft_tokens (`int`, *optional*):
            Most tokens to draft per step; as many as there are heads by default. Fewer are drafted while that pays.
        draft_cost (`float`, *optional*, defaults to `0.2`):
            What one more draft costs, in units of a step without drafts, from which follows how many pay. `None`
            measures it; the number of drafts, and with it which completions a seed gives, then depend on the clock.
    """

    speculative: bool = field(default=False, metadata={"help": "Whether MTP heads draft the completions."})
    num_draft_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens to draft per step (default: as many as there are heads)."}
    )
    draft_cost: float | None = field(
        default=0.2,
        metadata={"help": "Cost of one more draft in units of a step without drafts; None: measured."},
    )

    def check_speculation(self) -> None:
        """Validate before any work starts.

        Raises:
            ValueError: Naming the option and its valid values.
        """
        if not self.speculative:
            return
        self.check_token_heads()
        check_at_least(0, draft_cost=self.draft_cost)
        check_head_reach(self.num_mtp_heads, getattr(self, "max_completion_length", None), "max_completion_length")
        if self.num_draft_tokens is not None and not 1 <= self.num_draft_tokens <= self.num_mtp_heads:
            raise ValueError(
                f"num_draft_tokens must be between 1 and num_mtp_heads={self.num_mtp_heads}, since each head drafts "
                f"one token; got {self.num_draft_tokens}. To draft nothing, set speculative=False."
            )
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self, name, False):
                raise ValueError(
                    f"speculative=True drafts in the model's own generate, which {name}=True does not use. Set one of "
                    "them to False."
                )
        if getattr(self, "sync_ref_model", False):
            raise ValueError(
                "sync_ref_model=True cannot work with heads attached to the policy: TRL zips the parameters of policy "
                "and reference one to one, and the reference has no heads. Set one of speculative and sync_ref_model "
                "to False."
            )
