"""The critic inside the policy: multi-token-prediction heads that also output a value."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rl_plugins.nn.attachment import Attachment
from rl_plugins.nn.gradient import GradientStats
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sequential_heads import SequentialHeads
from rl_plugins.nn.sharding import whole_module, whole_parameters
from rl_plugins.nn.target_heads import PolyakTarget, RowCopy, ValueCopy
from rl_plugins.rollouts.batch import Batch
from rl_plugins.rollouts.kept_rows import JudgedRows
from rl_plugins.rollouts.values import WholeRows
from rl_plugins.signals.critic_targets import value_losses
from rl_plugins.signals.critics import Critic, TrunkCritic
from rl_plugins.signals.heads import HeadTraining
from rl_plugins.signals.host import Ranks
from rl_plugins.signals.metrics import Metrics
from rl_plugins.signals.options import ValueHeadOptions, ValueOptions, ValueReplayOptions
from rl_plugins.signals.value_replay import KeptRollout, RolloutOfRows, ValueReplay


class HeadCritic(TrunkCritic):
    """The critic inside the policy: multi-token-prediction heads that also output a value, with slow copies.

    `L = lambda_2 L_TD + lambda_1 L_MTP`: the heads also learn to predict tokens, so that they can draft completions.

    Args:
        options: Heads, value gradient and targets.
        values: Options of the value targets and the value loss.
        replay: Options of the replay, in which a copy of the heads learns from cached states; off by default.
        temperature: Temperature of sampling.

    Raises:
        ValueError: If the value loss cannot be combined with the replay.
    """

    module: MTPHeads

    def __init__(
        self,
        options: ValueHeadOptions,
        values: ValueOptions,
        replay: ValueReplayOptions | None = None,
        *,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(values)
        self.options = self.draft_options = options
        self.replay_options = ValueReplayOptions() if replay is None else replay
        self.replay_options.check_values(values)
        self.training = HeadTraining(options, temperature=temperature)
        self.lookahead, self.learning_rate = options.bootstrap_lookahead, options.head_learning_rate
        self._stats: GradientStats | None = None
        self._limit: Tensor | None = None

    @property
    def polyak_target(self) -> PolyakTarget | None:
        """The slow heads; `None` where a replay teaches the copy of the heads, and before there is a copy."""
        return self.target if isinstance(self.target, PolyakTarget) else None

    def prepare(self, policy: Any, init_kwargs: Mapping[str, Any] | None = None) -> None:
        """Find saved heads."""
        self.training.prepare(policy, (init_kwargs or {}).get("revision"))

    def attach(self, model: nn.Module, *, seed: int = 0) -> Attachment:
        """Give the policy heads, or go on with those that it has."""
        self.module = self.training.attach(model, seed=seed)
        self.ahead, self._seed = self.module.ahead, seed
        return self.module

    # 1. Record: a replay of sequential heads needs whole rows, which only a pass has

    @contextmanager
    def generating(self, model: nn.Module, decoder: Any = None) -> Iterator[None]:
        """Save values while the model generates, unless they are computed from whole rows."""
        rows = isinstance(self.target, RowCopy)
        with nullcontext() if rows else super().generating(model, decoder):
            yield

    def _pass(self, num_tokens: int) -> WholeRows | JudgedRows:
        if not isinstance(self.target, RowCopy):
            return super()._pass(num_tokens)
        assert isinstance(self.module, SequentialHeads) and self.replay is not None
        return JudgedRows(self.module, self.target, num_tokens, self.replay.room)

    def _kept_rollout(self, rewards: Tensor, mask: Tensor, after: Tensor | None) -> KeptRollout:
        judged = self._passes[0] if self._passes else None
        if not isinstance(judged, JudgedRows):
            return super()._kept_rollout(rewards, mask, after)
        rows = judged.kept()
        self._passes = []
        count = len(rows.input_ids)
        return RolloutOfRows(rows, rewards[:count], mask[:count], None if after is None else after[:count])

    @contextmanager
    def learning(
        self, batch: Batch, num_items: Tensor, *, alone: bool, scale: float | None = None
    ) -> Iterator[HeadRun]:
        """Run the heads in the policy's forward; `scale` replaces `value_grad_scale`."""
        select, labels = self.training.completions(batch)
        with self.running(select, labels, num_items, alone=alone, scale=scale) as run:
            yield run

    @contextmanager
    def running(
        self,
        select: Callable[[Tensor], Tensor],
        labels: Tensor | None,
        num_items: Tensor,
        *,
        alone: bool = False,
        scale: float | None = None,
        target: PolyakTarget | None = None,
    ) -> Iterator[HeadRun]:
        """Run the heads on any states of the policy's next forward.

        Args:
            select: Picks the states from the trunk's hidden states.
            labels: Token of each head (B, T, K), -100 where there is none.
            num_items: Real tokens that the losses are averaged over.
            alone: Keep all gradient out of the trunk.
            scale: Replaces `value_grad_scale`.
            target: Slow heads to run on the same states, if no rollout has saved values to bootstrap from.
        """
        options, clip = self.options, self.options.value_grad_clip
        # One token's squared error of 1 has this gradient, so the clip is in units of the unweighted error.
        self._limit = None if clip is None else (clip * self.values.value_loss_coef / num_items).float()
        own = options.value_grad_scale if scale is None else scale
        with self.training.running(
            select,
            labels,
            alone=alone,
            value_grad_scale=0.0 if alone else own,
            value_grad_norm=self._limit,
            target=target,
        ) as run:
            self._stats = run.stats
            yield run

    def loss(self, run: Any, batch: Batch, num_items: Tensor, ranks: Ranks) -> tuple[Tensor, Metrics]:
        """Compute lambda_2 L_TD + lambda_1 L_MTP of a run, and the metrics of both."""
        values, metrics = self.value_term(
            run.values, batch["returns"], batch["critic_mask"], num_items, batch["old_values"], ranks
        )
        tokens, token_metrics = self.training.loss(run, num_items, ranks)
        metrics.add(token_metrics)
        return values + tokens, metrics

    def value_term(
        self, values: Tensor, returns: Tensor, mask: Tensor, num_items: Tensor, old_values: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Metrics]:
        """Compute lambda_2 L_TD of values (B, T, K), and scale the clamp's limit as the host will scale the loss."""
        term, metrics = Critic.value_term(self, values, returns, mask, num_items, old_values, ranks)
        limit, self._limit = self._limit, None
        if limit is not None and term.requires_grad:
            # Hosts scale a loss before its backward pass: by one over the number of micro-batches, DeepSpeed by that
            # once more, float16 by its loss scale. The clamp's limit needs the same factor. This factor is the
            # gradient of the term, which is known before the clamp runs, since the clamp comes later in the backward:
            #     loss --factor--> term (this hook) --> values --> heads --> clamp (reads `limit`) --> trunk
            term.register_hook(lambda grad: limit.mul_(grad.float()) and None)
        return term, metrics

    def gradient_totals(self, ranks: Ranks) -> Tensor | None:
        """Sum up what the clamp has measured in the last backward pass, over all ranks."""
        stats, self._stats = self._stats, None
        return None if stats is None else ranks.sum_over_ranks(stats.totals(ranks.device))

    def copy(self) -> None:
        """Make the target heads, or the copy that a replay teaches."""
        heads, options, replay = self.training.heads, self.options, self.replay_options
        copied = heads if replay.value_replay and isinstance(heads, SequentialHeads) else heads.value_path
        with whole_parameters(list(copied.parameters())), whole_module(copied):
            if not replay.value_replay:
                self.target = PolyakTarget(heads, tau=options.target_tau, period=options.target_update_every)
            elif isinstance(heads, SequentialHeads):
                self.target = RowCopy(heads)
                if self.training.fresh:
                    self.target.begin_afresh(self._seed)
            else:
                self.target = ValueCopy(heads)
        if replay.value_replay:
            loss = value_losses()[self.values.value_loss_type]
            number = heads.config.num_heads
            self.replay = ValueReplay(
                self.target, replay, num_heads=number, loss=loss, ahead=self.ahead, seed=self._seed
            )

    def place(self, device: torch.device) -> None:
        """Move the target heads to a device."""
        assert self.target is not None
        self.target.to(device)

    def follow(self, step: int) -> None:
        """Move the target heads, unless a replay teaches them."""
        if isinstance(self.target, PolyakTarget):
            with whole_parameters(list(self.module.value_path.parameters())) as online:
                self.target.update(online, step=step)

    def state_dict(self) -> dict[str, Any]:
        """Return the target heads, or with a replay its copy of the heads and its optimizer."""
        if self.replay is not None:
            return self.replay.state_dict()
        assert self.target is not None
        return {key: value.cpu() for key, value in self.target.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore [`state_dict`]."""
        if self.replay is not None:
            self.replay.load_state_dict(state)
            return
        assert self.target is not None
        self.target.load_state_dict(dict(state))
