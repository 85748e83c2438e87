"""The critic, from the first value to the last gradient.

A critic lives through five moments, in the order of this file:

1. **record**: a completion is generated, and the values of its states are saved on the way or by one pass afterwards;
2. **estimate**: rewards and values become advantages for the policy and regression targets for the values
   ([`CriticSignal`]; the equations are in `critic_targets.py`);
3. **learn**: the policy's training forward computes the values once more, with gradient;
4. **loss**: the values regress on their targets;
5. **follow**: after the optimizer's step, slow copies of the values move.

[`HeadCritic`] has its values from heads inside the policy, [`ValueModelCritic`] from a second network. Another critic
is another subclass: [`TrunkCritic`] does everything for a module that reads the hidden states of the policy's trunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rl_plugins.functional.alignment import completion_states
from rl_plugins.functional.log_probs import kl_k1
from rl_plugins.functional.masking import masked_moments, zero_masked
from rl_plugins.functional.rewards import kl_shaped_rewards
from rl_plugins.nn.attachment import Attachment
from rl_plugins.nn.gradient import GradientStats
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sharding import whole_module, whole_parameters
from rl_plugins.nn.target_heads import PolyakTarget
from rl_plugins.nn.value_model import ValueModel
from rl_plugins.rollouts.batch import Batch, loss_mask
from rl_plugins.rollouts.values import EachStep, ValueRecord, WholeRows
from rl_plugins.signals.critic_targets import critic_signal, value_loss, value_losses
from rl_plugins.signals.heads import HeadTraining
from rl_plugins.signals.host import Host, Ranks
from rl_plugins.signals.metrics import Metrics, head_metrics
from rl_plugins.signals.options import (
    HeadOptions,
    OnlineValueOptions,
    ValueHeadOptions,
    ValueModelOptions,
    ValueOptions,
)
from rl_plugins.signals.signals import Signal


class Values(NamedTuple):
    """Values of the states of a batch of completions.

    Attributes:
        online: (B, T, K).
        target: Those to bootstrap from (B, T, K).
        after: Target value of the state after each completion's last token (B,), for episodes that were cut there;
            `None` where none was.
    """

    online: Tensor
    target: Tensor
    after: Tensor | None = None


@dataclass
class CriticRun:
    """Values (B, T, K) of one training forward, there once it has run."""

    values: Tensor | None = None


class Critic(ABC):
    """Where values come from.

    Args:
        values: Targets and loss of the values.
    """

    lookahead = False
    """Whether the mean of all heads' forecasts bootstraps, instead of head 1's alone."""
    ahead = 1
    """How many tokens further each of its values looks than the one before it."""
    learning_rate: float | None = None
    """Learning rate of the module; `None` for the policy's."""

    draft_options: HeadOptions | None = None
    """Options of its heads, if it has heads that can draft."""

    target: PolyakTarget | None = None
    """Slow copies of what gives the values, once [`copy`] has made them."""

    def __init__(self, values: ValueOptions) -> None:
        self.values = values

    # Attached

    def prepare(self, policy: Any, init_kwargs: Mapping[str, Any] | None = None) -> None:
        """Look for saved weights, before the policy is loaded.

        Args:
            policy: As the user gave it.
            init_kwargs: Keyword arguments that a path is loaded with.
        """

    @abstractmethod
    def attach(self, model: nn.Module, *, seed: int = 0) -> Attachment:
        """Put the module into the policy, so that the policy's engine trains it."""

    # 1. Record

    @abstractmethod
    def start(self) -> None:
        """Forget the values of the last rollout."""

    def generating(self, model: nn.Module, decoder: Any = None) -> AbstractContextManager[None]:
        """Save values while the model's own `generate` runs inside the block.

        Args:
            model: The policy.
            decoder: Decodes speculatively, if there is one.
        """
        return nullcontext()

    @abstractmethod
    def scoring(self, num_tokens: int) -> AbstractContextManager[None]:
        """Save the values of completions of `num_tokens` tokens, and of the state after each, from a pass over them
        inside the block."""

    @abstractmethod
    def recorded(self, batch: Batch, host: Host) -> Values:
        """Give the values of a batch just generated, from a pass of their own where none were saved."""

    # 3. Learn

    @abstractmethod
    def learning(
        self, batch: Batch, num_items: Tensor, *, alone: bool, scale: float | None = None
    ) -> AbstractContextManager[Any]:
        """Compute the values in the policy's forward inside the block, and give the run that has them afterwards.

        Args:
            batch: Completions.
            num_items: Real tokens that the losses are averaged over.
            alone: Whether only the critic learns, so that no gradient may enter the trunk.
            scale: Factor on the value gradient that enters the trunk, instead of the critic's own.
        """

    # 4. Loss

    def loss(self, run: Any, batch: Batch, num_items: Tensor, ranks: Ranks) -> tuple[Tensor, Metrics]:
        """lambda_2 L_TD of a run, and its metrics."""
        return self.value_term(
            run.values, batch["returns"], batch["critic_mask"], num_items, batch["old_values"], ranks
        )

    def value_term(
        self, values: Tensor, returns: Tensor, mask: Tensor, num_items: Tensor, old_values: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Metrics]:
        """lambda_2 L_TD of values (B, T, K) with gradient; arguments as for
        [`~rl_plugins.signals.value_loss`]."""
        options = self.values
        loss, sums, counts = value_loss(
            values,
            returns,
            mask,
            num_items=num_items,
            loss=value_losses(options.value_clip_range)[options.value_loss_type],
            old_values=old_values,
            ahead=self.ahead,
        )
        return options.value_loss_coef * loss, head_metrics("critic/value_loss", sums, counts, ranks.sum_over_ranks)

    def gradient_totals(self, ranks: Ranks) -> Tensor | None:
        """Say what the backward pass showed of the value gradient into the trunk, of all ranks: sum of norms, clamped
        tokens, tokens (3,); `None` where there was none."""
        return None

    # 5. Follow

    def copy(self) -> None:
        """Make slow copies of what is attached, before an engine wraps or shards it."""

    def place(self, device: torch.device) -> None:
        """Move slow copies, which are no part of the policy, to the device of this rank."""

    def follow(self, step: int) -> None:
        """Move slow copies after optimizer step number `step`."""

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, the same on every rank, beside the attached module's own weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore [`state_dict`]."""


class TrunkCritic(Critic):
    """A critic whose module reads the hidden states of the policy's trunk: `module(states) -> values (B, T, K)`, where
    the states are hidden states (B, T, D), or what [`Attachment.states`] makes of them.

    A subclass attaches the module; everything else is here. Values are saved while the model's own `generate` makes
    the completions; for other engines, several turns and the like they come from the pass for the old
    log-probabilities, or from a pass of their own.
    """

    module: Attachment

    def __init__(self, values: ValueOptions) -> None:
        super().__init__(values)
        self.start()

    def start(self) -> None:
        """Forget the records of the last rollout."""
        self._turns: list[tuple[ValueRecord, EachStep | None]] = []
        self._passes: list[WholeRows] = []

    @contextmanager
    def generating(self, model: nn.Module, decoder: Any = None) -> Iterator[None]:
        """Save the values of every state from which a token is chosen inside the block."""
        record = ValueRecord(self.module, self.target)
        if decoder is not None:
            self._turns.append((record, None))
            decoder.recorder = record
            try:
                yield
            finally:
                decoder.recorder = None
            return
        steps = EachStep(record)
        self._turns.append((record, steps))
        with steps.following(model):
            yield

    @contextmanager
    def scoring(self, num_tokens: int) -> Iterator[None]:
        """Save the values of whole rows that go through the model inside the block."""
        rows = WholeRows(ValueRecord(self.module, self.target), num_tokens)
        self._passes.append(rows)
        with self.module.watching(rows):
            yield

    def recorded(self, batch: Batch, host: Host) -> Values:
        """Give values saved while generating, else of the pass for the old log-probabilities, else of a new pass.

        The state after the last token of an episode that was cut is in no step of generation, but in every pass.
        """
        cut = "truncated" in batch
        saved = None if cut else self._saved(batch, host)
        if saved is not None:
            return saved
        if "old_per_token_logps" not in batch:
            # A pass without the policy's adapters, for the reference, may have come first: it counts for nothing.
            self._passes.clear()
            batch["old_per_token_logps"] = host.log_probs(batch)
        # The first pass is the policy's; a second one is the reference of a PEFT model.
        rows = self._passes[0]
        values = rows.record.finish(batch["completion_ids"].shape[1])
        if values is None:
            raise RuntimeError(
                f"{type(self.module).__name__} has seen no hidden states of the policy: its hook was taken off, as "
                "Lightning's DeepSpeed strategy does before an evaluation. Put it back with `hook(model)`."
            )
        return Values(*values, rows.after(values[1], batch["completion_mask"]) if cut else None)

    def _saved(self, batch: Batch, host: Host) -> Values | None:
        """Values saved while generating, if every rank has those of these very completions."""
        saved = None
        if len(self._turns) == 1:  # several turns do not make one completion
            record, steps = self._turns[0]
            saved = record.finish(batch["completion_ids"].shape[1])
            if steps is not None and not steps.made(batch["completion_ids"], loss_mask(batch)):
                saved = None
        # Together, since the pass that takes their place is one of all ranks.
        missing = torch.tensor([float(saved is None)], device=host.device)
        return None if host.sum_over_ranks(missing) > 0 or saved is None else Values(*saved)

    def learning(
        self, batch: Batch, num_items: Tensor, *, alone: bool, scale: float | None = None
    ) -> AbstractContextManager[Any]:
        """Run the module in the policy's forward; `alone` and `scale` are for modules with gradient into the trunk."""
        return self._observed(batch)

    @contextmanager
    def _observed(self, batch: Batch) -> Iterator[CriticRun]:
        run, num_tokens = CriticRun(), batch["completion_ids"].shape[1]

        def observe(hidden: Tensor) -> tuple[Tensor | None, ...]:
            if run.values is not None:
                return ()
            run.values = self.module(completion_states(self.module.states(hidden), num_tokens))
            return (run.values,)

        with self.module.watching(observe):
            yield run


class HeadCritic(TrunkCritic):
    """The critic inside the policy: multi-token-prediction heads that also output a value, with slow copies.

    `L = lambda_2 L_TD + lambda_1 L_MTP`: the heads predict tokens, too, which sharpens them as drafters.

    Args:
        options: Heads, value gradient and targets.
        values: Targets and loss of the values.
        temperature: Of sampling.
    """

    module: MTPHeads

    def __init__(self, options: ValueHeadOptions, values: ValueOptions, *, temperature: float = 1.0) -> None:
        super().__init__(values)
        self.options = self.draft_options = options
        self.training = HeadTraining(options, temperature=temperature)
        self.lookahead, self.learning_rate = options.bootstrap_lookahead, options.head_learning_rate
        self._stats: GradientStats | None = None
        self._limit: Tensor | None = None

    def prepare(self, policy: Any, init_kwargs: Mapping[str, Any] | None = None) -> None:
        """Find saved heads."""
        self.training.prepare(policy, (init_kwargs or {}).get("revision"))

    def attach(self, model: nn.Module, *, seed: int = 0) -> Attachment:
        """Give the policy heads, or go on with those that it has."""
        self.module = self.training.attach(model, seed=seed)
        self.ahead = self.module.ahead
        return self.module

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
            target: Slow heads to run on the same states, where the bootstrap is not from a rollout.
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
        """lambda_2 L_TD + lambda_1 L_MTP of a run, and their metrics."""
        values, metrics = self.value_term(
            run.values, batch["returns"], batch["critic_mask"], num_items, batch["old_values"], ranks
        )
        tokens, token_metrics = self.training.loss(run, num_items, ranks)
        metrics.add(token_metrics)
        return values + tokens, metrics

    def value_term(
        self, values: Tensor, returns: Tensor, mask: Tensor, num_items: Tensor, old_values: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Metrics]:
        """lambda_2 L_TD of values (B, T, K), whose clamp keeps its units whatever the host does to the loss."""
        term, metrics = Critic.value_term(self, values, returns, mask, num_items, old_values, ranks)
        limit, self._limit = self._limit, None
        if limit is not None and term.requires_grad:
            # Hosts scale a loss before its backward pass: by one over the number of micro-batches, DeepSpeed by that
            # once more, float16 by its loss scale. The clamp's limit has to grow alike. The gradient of this term is
            # that factor; it is known before the clamp runs, which lies further back in the same graph:
            #     loss --factor--> term (this hook) --> values --> heads --> clamp (reads `limit`) --> trunk
            term.register_hook(lambda grad: limit.mul_(grad.float()) and None)
        return term, metrics

    def gradient_totals(self, ranks: Ranks) -> Tensor | None:
        """Say what the clamp saw in the last backward pass."""
        stats, self._stats = self._stats, None
        return None if stats is None else ranks.sum_over_ranks(stats.totals(ranks.device))

    def copy(self) -> None:
        """Make the target heads."""
        heads, options = self.training.heads, self.options
        with whole_parameters(list(heads.value_path.parameters())), whole_module(heads.value_path):
            self.target = PolyakTarget(heads, tau=options.target_tau, period=options.target_update_every)

    def place(self, device: torch.device) -> None:
        """Move the target heads to a device."""
        assert self.target is not None
        self.target.to(device)

    def follow(self, step: int) -> None:
        """Move the target heads."""
        assert self.target is not None
        with whole_parameters(list(self.module.value_path.parameters())) as online:
            self.target.update(online, step=step)

    def state_dict(self) -> dict[str, Any]:
        """The target heads."""
        assert self.target is not None
        return {key: value.cpu() for key, value in self.target.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the target heads."""
        assert self.target is not None
        self.target.load_state_dict(dict(state))


class ValueModelCritic(Critic):
    """A critic that is a network of its own, run inside the policy's forward (PPO).

    Args:
        options: Where the network comes from.
        values: Targets and loss of the values.
        source: A [`ValueModel`], a transformers model whose trunk is copied, or a path or hub id; by default
            `options.value_model_path`, else the one attached to or saved with the policy, else a copy of its trunk.
        checkpointing: Keyword arguments of gradient checkpointing; `None` for none.
    """

    module: ValueModel

    def __init__(
        self,
        options: ValueModelOptions,
        values: ValueOptions,
        source: Any = None,
        *,
        checkpointing: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(values)
        self.options, self.source, self.checkpointing = options, source, checkpointing
        self.learning_rate = options.value_learning_rate
        self._chunks: list[Tensor] | None = None

    def prepare(self, policy: Any, init_kwargs: Mapping[str, Any] | None = None) -> None:
        """Load the network, or copy it from the policy as it is before training."""
        own: Any = self.options.value_model_init_kwargs
        self.module = ValueModel.prepare(
            self.source or self.options.value_model_path, policy, policy_init_kwargs=init_kwargs, init_kwargs=own
        )

    def attach(self, model: nn.Module, *, seed: int = 0) -> Attachment:
        """Put the network into the policy."""
        self.module.attach(model)
        if self.checkpointing is not None:
            self.module.trunk.gradient_checkpointing_enable(dict(self.checkpointing) or None)
        return self.module

    def start(self) -> None:
        """Forget the values of the last rollout."""
        self._chunks = None

    @contextmanager
    def scoring(self, num_tokens: int) -> Iterator[None]:
        """Save the values of the first pass: the policy's, or that of a PEFT model's reference, which is as good."""
        if self._chunks is not None:
            yield
            return
        self._chunks = []
        with self.module.watching(self._chunks.append):
            yield

    def recorded(self, batch: Batch, host: Host) -> Values:
        """Give the values of the pass for the old log-probabilities."""
        if self._chunks is None:
            batch["old_per_token_logps"] = host.log_probs(batch)
        assert self._chunks is not None
        whole = torch.cat(self._chunks)
        values, after = _of_completions(whole, batch), None
        if "truncated" in batch:
            mask = batch["completion_mask"].bool()
            lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1, keepdim=True)
            after = whole[:, -(mask.shape[1] + 1) :].gather(1, lengths).squeeze(1)
        return Values(values, values, after)

    @contextmanager
    def learning(
        self, batch: Batch, num_items: Tensor, *, alone: bool, scale: float | None = None
    ) -> Iterator[CriticRun]:
        """Run the network in the policy's forward; it has no gradient into the policy."""
        run = CriticRun()

        def observe(values: Tensor) -> None:
            run.values = _of_completions(values, batch)

        with self.module.watching(observe):
            yield run


def _of_completions(values: Tensor, batch: Batch) -> Tensor:
    """Values (B, S) of whole rows as those of the completions' states (B, T, 1)."""
    return completion_states(values, batch["completion_ids"].shape[1]).unsqueeze(-1)


class CriticSignal(Signal):
    """A critic's values as training signal: an advantage for every token, and a value loss.

    Args:
        critic: Where the values come from; made with [`OnlineValueOptions`].
    """

    critic: Critic

    def __init__(self, critic: Critic) -> None:
        assert isinstance(critic.values, OnlineValueOptions)
        self.critic, self.options = critic, critic.values

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL is subtracted from the rewards instead of added to the loss."""
        return self.options.kl_in_reward

    @property
    def bootstrap_truncated(self) -> bool | None:
        """Whether episodes that were cut are worth V(s_T)."""
        return self.options.bootstrap_truncated

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps in which only the critic learns."""
        return self.options.value_warmup_steps

    # 2. Estimate

    def advantages(self, batch: Batch, scores: Tensor, prompts: Any, host: Host) -> Metrics:
        """Put advantages, value targets and TD errors of every token into a batch just generated."""
        options = self.options
        charged = self.kl_in_reward and host.beta != 0.0
        values, target_values, after = self.critic.recorded(batch, host)
        if charged and "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = host.log_probs(batch)
        mask = loss_mask(batch).bool() & scores.isfinite().unsqueeze(1)
        rewards, kl = zero_masked(batch["rewards"], mask), Metrics()
        if charged:
            logps, ref_logps = batch["old_per_token_logps"], batch["ref_per_token_logps"]
            kl["kl"] = masked_moments(kl_k1(logps, ref_logps), mask, reduce=host.sum_over_ranks)[0]
            rewards = kl_shaped_rewards(rewards, logps, ref_logps, mask, beta=host.beta)
        targets, advantages, metrics = critic_signal(
            rewards,
            values,
            target_values,
            mask,
            scaling=options.advantage_scaling,
            reward_range=(options.reward_range[0], options.reward_range[1]),
            reduce=host.sum_over_ranks,
            estimator=options.advantage_estimator,
            time_unit=options.time_unit,
            after=None if after is None else after * batch["truncated"],
            gamma=options.gamma,
            lam_policy=options.lam_policy,
            lam_value=options.lam_value,
            length_alpha=options.length_adaptive_alpha,
            lookahead=self.critic.lookahead,
            ahead=self.critic.ahead,
            discounted_objective=options.discounted_objective,
        )
        batch["advantages"], batch["returns"], batch["td_errors"] = advantages, targets.returns, targets.td_errors
        batch["old_values"], batch["critic_mask"] = values, mask
        return Metrics({**metrics, **kl})

    def state_dict(self) -> dict[str, Any]:
        """State of the critic."""
        return self.critic.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the critic."""
        self.critic.load_state_dict(state)
