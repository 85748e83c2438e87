"""Heads that learn along with supervised fine-tuning, from the same forward pass."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from rl_plugins.functional.alignment import completion_states, mtp_labels, predicted_mask
from rl_plugins.functional.rewards import terminal_rewards
from rl_plugins.nn.attachment import Attachment
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.signals.critic_targets import critic_targets, rollout_metrics
from rl_plugins.signals.head_critic import HeadCritic
from rl_plugins.signals.host import Ranks
from rl_plugins.signals.metrics import Metrics

Inputs = Mapping[str, Any]
"""Tensors of a batch: `input_ids`, `labels` (B, L), and perhaps `attention_mask` and `position_ids` (B, L)."""


def row_rewards(rewards: Sequence[Any]) -> Tensor:
    """Turn the `reward` column of a batch into a tensor (B,), NaN for None.

    Raises:
        TypeError: If a reward is not a number, such as a list for the steps of a row.
    """
    for reward in rewards:
        check_row_reward(reward)
    return torch.tensor([math.nan if reward is None else float(reward) for reward in rewards])


def check_row_reward(reward: Any) -> None:
    """Refuse a reward of a demonstration that is not one number.

    Raises:
        TypeError: If it is a list, a text or the like.
    """
    if reward is None or isinstance(reward, Real) or (isinstance(reward, Tensor) and reward.numel() == 1):
        return
    raise TypeError(
        f"The `reward` column holds {reward!r} ({type(reward).__name__}), but a row of supervised fine-tuning has one "
        "number, paid at its last token, or None. Give the sum of the steps' rewards; steps are for reward functions "
        "of the online trainers."
    )


class HeadsAlong:
    """MTP heads that learn tokens from demonstrations, and values from demonstrations with a reward.

    `lambda_1 L_MTP (+ lambda_2 L_TD)`: the first token of a row counts as its prompt, all others as the completion.

    Args:
        critic: The heads with their values and targets.
    """

    def __init__(self, critic: HeadCritic) -> None:
        self.critic = critic

    def attach(self, model: nn.Module, *, seed: int = 0) -> Attachment:
        """Give the model heads, or go on with those that it has."""
        return self.critic.attach(model, seed=seed)

    def learning(self, inputs: Inputs, rewards: Tensor | None, num_items: Tensor) -> AbstractContextManager[HeadRun]:
        """Run the heads in the model's next forward.

        Args:
            inputs: The batch.
            rewards: Rewards of the rows (B,), NaN for none; `None` where the batch has none.
            num_items: Labels that the losses are averaged over.
        """
        options, labels = self.critic.options, None
        select = partial(completion_states, num_tokens=inputs["labels"].shape[1] - 1)
        if options.mtp_loss_coef:
            positions, ahead = inputs.get("position_ids"), self.critic.ahead
            labels = select(mtp_labels(inputs["labels"], options.num_mtp_heads, positions, ahead=ahead))
        if rewards is None:
            # Values learn nothing and send nothing into the trunk, so heads that are decoder layers run once.
            return self.critic.running(select, labels, num_items, scale=0.0)
        return self.critic.running(select, labels, num_items, target=self.critic.polyak_target)

    def loss(
        self, run: HeadRun, inputs: Inputs, rewards: Tensor | None, num_items: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Metrics]:
        """Compute the losses of the heads in a run, and their metrics."""
        tokens, metrics = self.critic.training.loss(run, num_items, ranks)
        values, value_metrics = self._value_term(run, inputs, rewards, num_items, ranks)
        metrics.add(value_metrics)
        return tokens + values, metrics

    def _value_term(
        self, run: HeadRun, inputs: Inputs, rewards: Tensor | None, num_items: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Metrics]:
        """Compute lambda_2 L_TD on scored rows. The state that predicts token p+1 counts if this token has a label."""
        values, options = run.values, self.critic.values
        assert values is not None
        if rewards is None:
            return 0.0 * values.sum(), Metrics()  # keeps the value weights in the graph, which DDP needs
        old_values = values.detach()
        target_values = old_values if run.target_values is None else run.target_values
        mask = predicted_mask(inputs["labels"]) & rewards.isfinite().unsqueeze(1)
        targets = critic_targets(
            terminal_rewards(rewards.nan_to_num(0.0, 0.0, 0.0), mask),
            old_values,
            target_values,
            mask,
            estimator=options.advantage_estimator,
            gamma=options.gamma,
            lam_value=options.lam_value,
            time_unit=options.time_unit,
            lookahead=self.critic.lookahead,
            ahead=self.critic.ahead,
        )
        reduce, ahead = ranks.sum_over_ranks, self.critic.ahead
        metrics = Metrics(
            rollout_metrics(targets, old_values, target_values, mask, ahead=ahead, reduce=reduce),
            ranks.sum_over_ranks(mask.sum().float()),
        )
        term, value_metrics = self.critic.value_term(values, targets.returns, mask, num_items, old_values, ranks)
        metrics.add(value_metrics)
        return term, metrics
