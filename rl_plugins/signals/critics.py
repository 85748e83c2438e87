"""The critic, from the first value to the last gradient.

A critic works in five stages. The sections of this file have their numbers:

1. **record**: the values of a completion's states are saved while it is generated, or in one pass afterwards;
2. **estimate**: rewards and values become advantages for the policy and regression targets for the values
   ([`CriticSignal`]; the equations are in `critic_targets.py`);
3. **learn**: the policy's training forward computes the values once more, with gradient;
4. **loss**: the values regress on their targets;
5. **follow**: after the optimizer's step, the slow copies of the module follow its new weights.

With a replay, a copy of the module also learns between two rollouts, from cached states ([`ValueReplay`]).

[`HeadCritic`] has its values from heads inside the policy, [`ValueModelCritic`] from a second network; each has a file
of its own. For a critic of your own, write another subclass: [`TrunkCritic`] does nearly all of the work if your
module reads the hidden states of the policy's trunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
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
from rl_plugins.nn.target_heads import RowCopy, ValueCopy
from rl_plugins.rollouts.batch import Batch, loss_mask
from rl_plugins.rollouts.kept_rows import JudgedRows
from rl_plugins.rollouts.kept_states import KeptStates
from rl_plugins.rollouts.values import EachStep, ValueRecord, WholeRows
from rl_plugins.signals.critic_targets import critic_signal, critic_targets, value_loss, value_losses
from rl_plugins.signals.host import Host, Ranks
from rl_plugins.signals.metrics import Metrics, head_metrics
from rl_plugins.signals.options import (
    HeadOptions,
    OnlineValueOptions,
    ValueOptions,
)
from rl_plugins.signals.signals import Signal
from rl_plugins.signals.value_replay import KeptRollout, RolloutOfStates, ValueReplay, ValueTargets


class Values(NamedTuple):
    """Values of the states of a batch of completions.

    Attributes:
        online: Values of the module that is trained (B, T, K); with a replay, those of its copy.
        target: Values to bootstrap from (B, T, K).
        after: Target value of the state after each completion's last token (B,), for episodes that were cut there;
            `None` if no episode was cut.
    """

    online: Tensor
    target: Tensor
    after: Tensor | None = None


@dataclass
class CriticRun:
    """Values (B, T, K) of one training forward; `None` until the forward has run."""

    values: Tensor | None = None


class Critic(ABC):
    """Base class of critics, which compute values of states and learn them.

    Args:
        values: Options of the value targets and the value loss.
    """

    lookahead = False
    """Whether to bootstrap from the mean of all heads' forecasts, instead of from head 1's alone."""
    ahead = 1
    """Number of tokens by which each of the K values looks further ahead than the value before it."""
    learning_rate: float | None = None
    """Learning rate of the module; `None` for the policy's."""

    draft_options: HeadOptions | None = None
    """Options of its heads, if it has heads that can draft."""

    target: ValueCopy | RowCopy | None = None
    """Copy of the module, slow or taught by a replay; `None` until [`copy`] has made it."""
    replay: ValueReplay | None = None
    """Replay that teaches this copy between rollouts, if there is one."""

    def __init__(self, values: ValueOptions) -> None:
        self.values = values

    # Attach

    def prepare(self, policy: Any, init_kwargs: Mapping[str, Any] | None = None) -> None:
        """Look for saved weights, before the policy is loaded.

        Args:
            policy: Model or path, as the user gave it.
            init_kwargs: Keyword arguments with which a path is loaded.
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
        """Save values from a pass inside the block over completions of `num_tokens` tokens, also those of the states
        after the last tokens."""

    @abstractmethod
    def recorded(self, batch: Batch, host: Host) -> Values:
        """Return the saved values of a batch just generated; if there are none, compute them in one more pass."""

    def replay_states(
        self, rewards: Tensor, after: Tensor | None, mask: Tensor, targets: ValueTargets, ranks: Ranks
    ) -> Metrics:
        """Let the copy learn from the states of the batch just generated and of earlier ones, if there is a replay.

        Args:
            rewards: (B, T), 0 at masked positions.
            after: Values of the states after the last tokens (B,), 0 where an episode has ended there.
            mask: Tokens that the values learn from (B, T).
            targets: Makes value targets.
            ranks: Sums over ranks; all ranks call this method at the same time.
        """
        return Metrics()

    # 3. Learn

    @abstractmethod
    def learning(
        self, batch: Batch, num_items: Tensor, *, alone: bool, scale: float | None = None
    ) -> AbstractContextManager[Any]:
        """Compute the values in the policy's forward inside the block, and yield the run that then holds them.

        Args:
            batch: Completions.
            num_items: Real tokens that the losses are averaged over.
            alone: Whether only the critic learns, so that no gradient may enter the trunk.
            scale: Factor on the value gradient that enters the trunk; `None` for the critic's own factor.
        """

    # 4. Loss

    def loss(self, run: Any, batch: Batch, num_items: Tensor, ranks: Ranks) -> tuple[Tensor, Metrics]:
        """Compute lambda_2 L_TD of a run, and its metrics."""
        return self.value_term(
            run.values, batch["returns"], batch["critic_mask"], num_items, batch["old_values"], ranks
        )

    def value_term(
        self, values: Tensor, returns: Tensor, mask: Tensor, num_items: Tensor, old_values: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Metrics]:
        """Compute lambda_2 L_TD of values (B, T, K) with gradient; the arguments are those of
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
        """Describe the value gradient that entered the trunk in the last backward pass, over all ranks: sum of norms,
        clamped tokens, tokens (3,); `None` if there was no such gradient."""
        return None

    # 5. Follow

    def copy(self) -> None:
        """Make the copies of the attached module, before an engine wraps or shards it."""

    def place(self, device: torch.device) -> None:
        """Move the copies, which are no part of the policy, to the device of this rank."""

    def follow(self, step: int) -> None:
        """Update the slow copies after optimizer step number `step`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint that is equal on all ranks, without the attached module's own weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore [`state_dict`]."""

    def rank_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint that differs from rank to rank."""
        return {} if self.replay is None else self.replay.rank_state()

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Restore [`rank_state`]."""
        if self.replay is not None:
            self.replay.load_rank_state(state)


class TrunkCritic(Critic):
    """A critic whose module reads the hidden states of the policy's trunk: `module(states) -> values (B, T, K)`, where
    the states are hidden states (B, T, D), or what [`Attachment.states`] makes of them.

    A subclass attaches the module; everything else is here. Values are saved while the model's own `generate` makes
    the completions. With other engines, or completions of several turns, they come from the pass for the old
    log-probabilities, or from a separate pass.
    """

    module: Attachment

    def __init__(self, values: ValueOptions) -> None:
        super().__init__(values)
        self.start()

    def start(self) -> None:
        """Forget the records of the last rollout."""
        self._turns: list[tuple[ValueRecord, EachStep | None]] = []
        self._passes: list[WholeRows | JudgedRows] = []
        self._kept: KeptStates | None = None

    def _record(self) -> ValueRecord:
        """Begin a record of values, which also keeps the states if there is a replay."""
        kept = None if self.replay is None else KeptStates(self.replay.room)
        return ValueRecord(self.module, self.target, kept=kept, online=self.replay is None)

    def _pass(self, num_tokens: int) -> WholeRows | JudgedRows:
        """Begin to observe a pass over whole rows."""
        return WholeRows(self._record(), num_tokens)

    @contextmanager
    def generating(self, model: nn.Module, decoder: Any = None) -> Iterator[None]:
        """Save the values of every state from which a token is chosen inside the block."""
        record = self._record()
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
        self._passes.append(self._pass(num_tokens))
        with self.module.watching(self._passes[-1]):
            yield

    def recorded(self, batch: Batch, host: Host) -> Values:
        """Return values saved during generation, else those of the pass for the old log-probabilities, or a new pass.

        If an episode was cut, the values come from a pass: no step of generation reads the state after the last token.
        """
        cut = "truncated" in batch
        saved = None if cut else self._saved(batch, host)
        if saved is not None:
            return saved
        if "old_per_token_logps" not in batch:
            # A pass for the reference, without the policy's adapters, may have come first; its values are dropped.
            self._passes.clear()
            batch["old_per_token_logps"] = host.log_probs(batch)
        # The first pass is the policy's; a second one is the reference of a PEFT model.
        rows = self._passes[0]
        values = rows.finish()
        if values is None:
            raise RuntimeError(
                f"{type(self.module).__name__} has seen no hidden states of the policy: its hook was taken off, as "
                "Lightning's DeepSpeed strategy does before an evaluation. Put it back with `hook(model)`."
            )
        if isinstance(rows, WholeRows):
            self._kept = rows.record.kept
        return Values(*values, rows.after(values[1], batch["completion_mask"]) if cut else None)

    def replay_states(
        self, rewards: Tensor, after: Tensor | None, mask: Tensor, targets: ValueTargets, ranks: Ranks
    ) -> Metrics:
        """Let the copy learn, if there is a replay."""
        if self.replay is None:
            return Metrics()
        return self.replay.learn(self._kept_rollout(rewards, mask, after), targets, ranks)

    def _kept_rollout(self, rewards: Tensor, mask: Tensor, after: Tensor | None) -> KeptRollout:
        """Hand over the states of the batch just generated, without keeping them here."""
        assert self._kept is not None
        states, rows = self._kept.of(mask)
        self._kept = None
        return RolloutOfStates(states, rewards[:rows], mask[:rows], None if after is None else after[:rows])

    def _saved(self, batch: Batch, host: Host) -> Values | None:
        """Return the values saved during generation, if every rank has saved those of exactly these completions."""
        saved = record = None
        if len(self._turns) == 1:  # the records of several turns do not make up one completion
            record, steps = self._turns[0]
            saved = record.finish(batch["completion_ids"].shape[1])
            if steps is not None and not steps.made(batch["completion_ids"], loss_mask(batch)):
                saved = None
        # All ranks decide together, since all of them have to take part in the pass that is the alternative.
        missing = torch.tensor([float(saved is None)], device=host.device)
        if host.sum_over_ranks(missing) > 0 or saved is None or record is None:
            return None
        self._kept = record.kept
        return Values(*saved)

    def learning(
        self, batch: Batch, num_items: Tensor, *, alone: bool, scale: float | None = None
    ) -> AbstractContextManager[Any]:
        """Run the module in the policy's forward; `alone` and `scale` only matter for gradient into the trunk."""
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


class CriticSignal(Signal):
    """A critic's values as training signal: an advantage for every token, and a value loss.

    Args:
        critic: Gives the values; made with [`OnlineValueOptions`].
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
        """Whether episodes that were cut are worth V(s_T) after their last token."""
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
        after = None if after is None else after * batch["truncated"]
        targets, advantages, metrics = critic_signal(
            rewards,
            values,
            target_values,
            mask,
            scaling=options.advantage_scaling,
            reward_range=(options.reward_range[0], options.reward_range[1]),
            reduce=host.sum_over_ranks,
            after=after,
            cut=batch.get("truncated"),
            discounted_objective=options.discounted_objective,
            calibrate=options.calibrate_values,
            **self._estimation(),
        )
        batch["advantages"], batch["returns"], batch["td_errors"] = advantages, targets.returns, targets.td_errors
        batch["old_values"], batch["critic_mask"] = values, mask
        learned = Metrics()
        if host.training:
            learned = self.critic.replay_states(rewards, after, mask, self._value_targets(), host)
        return Metrics({**metrics, **kl, **learned})

    def _estimation(self) -> dict[str, Any]:
        """Return the options that make targets of rewards and values, as keyword arguments of [`critic_targets`]."""
        options = self.options
        return {
            "estimator": options.advantage_estimator,
            "time_unit": options.time_unit,
            "gamma": options.gamma,
            "lam_policy": options.lam_policy,
            "lam_value": options.lam_value,
            "length_alpha": options.length_adaptive_alpha,
            "lookahead": self.critic.lookahead,
            "ahead": self.critic.ahead,
        }

    def _value_targets(self) -> ValueTargets:
        """Return the function that makes value targets in a replay, which bootstrap from the copy's own values."""
        options, estimation = self.options, self._estimation()

        def make(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor | None) -> Tensor:
            return critic_targets(rewards, values, values, mask, after=after, **estimation).returns

        observed = options.advantage_estimator == "mc" or (
            options.advantage_estimator == "gae" and options.lam_value == 1.0
        )
        return ValueTargets(make, not observed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the critic."""
        return self.critic.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the critic."""
        self.critic.load_state_dict(state)

    def rank_state(self) -> dict[str, Any]:
        """Return the rollouts that this rank's critic keeps."""
        return self.critic.rank_state()

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Restore [`rank_state`]."""
        self.critic.load_rank_state(state)
