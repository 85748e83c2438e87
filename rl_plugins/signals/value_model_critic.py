"""The critic that is a network of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rl_plugins.functional.alignment import completion_states, value_after
from rl_plugins.nn.attachment import Attachment
from rl_plugins.nn.value_model import ValueModel
from rl_plugins.rollouts.batch import Batch
from rl_plugins.signals.critics import Critic, CriticRun, Values
from rl_plugins.signals.host import Host
from rl_plugins.signals.options import ValueModelOptions, ValueOptions


class ValueModelCritic(Critic):
    """A critic that is a network of its own, run inside the policy's forward (PPO).

    Args:
        options: Say where the network comes from.
        values: Options of the value targets and the value loss.
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
            self.source or self.options.value_model_path,
            policy,
            policy_init_kwargs=init_kwargs,
            init_kwargs=own,
            option="value_model" if self.source else "value_model_path",
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
        """Save the values of the first pass: the policy's, or that of a PEFT model's reference, with equal values."""
        if self._chunks is not None:
            yield
            return
        self._chunks = []
        with self.module.watching(self._chunks.append):
            yield

    def recorded(self, batch: Batch, host: Host) -> Values:
        """Return the values that a pass has saved; without one, make the pass for the old log-probabilities."""
        if self._chunks is None:
            batch["old_per_token_logps"] = host.log_probs(batch)
        assert self._chunks is not None
        whole = torch.cat(self._chunks)
        values, after = _of_completions(whole, batch), None
        if "truncated" in batch:
            mask = batch["completion_mask"]
            after = value_after(whole[:, -(mask.shape[1] + 1) :], mask)
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
    """Pick the values of the completions' states (B, T, 1) from those of whole rows (B, S)."""
    return completion_states(values, batch["completion_ids"].shape[1]).unsqueeze(-1)
