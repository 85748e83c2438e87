"""PPO with a separate value model, in Lightning."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_plugins.functional.alignment import completion_states
from rl_plugins.lightning.online_module import Metrics
from rl_plugins.lightning.prompts import Row
from rl_plugins.lightning.value_module import ValueModule
from rl_plugins.nn.sources import check_language_model
from rl_plugins.nn.value_model import ValueModel
from rl_plugins.rollouts.batch import Batch, num_rows, reordered
from rl_plugins.rollouts.rewards import RewardFunc
from rl_plugins.signals.checks import check_at_least


class PPOModule(ValueModule):
    r"""Proximal Policy Optimization with a separate value model (Schulman et al., 1707.06347; for
    language models Ouyang et al., 2203.02155).

    `L = L_clip + lambda_2 L_value - c H`, on advantages by GAE from token rewards that carry the score at the last
    token and a KL penalty at each. Slices are shuffled anew for each pass over a batch of completions. Policy and
    value model are trained by one optimizer and one engine.

    ```python
    from lightning.pytorch import Trainer
    from rl_plugins.lightning import PPOModule, PromptDataModule

    module = PPOModule("Qwen/Qwen3-0.6B", reward_funcs=accuracy_reward, steps_per_generation=4)
    Trainer(max_steps=1000, gradient_clip_val=1.0).fit(module, PromptDataModule(dataset, batch_size=64))
    ```

    Args:
        model: See [`OnlineModule`].
        tokenizer: See [`OnlineModule`].
        reward_funcs: See [`OnlineModule`].
        value_model: A [`ValueModel`], a transformers model whose trunk is copied, or a path or hub id; by default the
            one attached to or saved with the policy, else a copy of the policy's trunk.
        value_model_init_kwargs: For loading it, on top of the policy's `model_init_kwargs`.
        value_learning_rate: Its learning rate; `None` for `learning_rate`.
        policy_loss: See [`OnlineModule`]; PPO's clipped loss if none is named.
        beta: Coefficient of the KL penalty.
        kl_in_reward: See [`ValueModule`].
        num_iterations: Passes over each batch of completions.
        value_loss_type: See [`ValueModule`].
        kwargs: For [`ValueModule`].

    Raises:
        TypeError: As [`OnlineModule`]; if the value model is none of the above.
        ValueError: As [`ValueModule`]; if the value model does not know the policy's tokens.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunc | PreTrainedModel | str | list[RewardFunc | PreTrainedModel | str] | None = None,
        *,
        value_model: ValueModel | PreTrainedModel | str | None = None,
        value_model_init_kwargs: dict[str, Any] | None = None,
        value_learning_rate: float | None = 1e-5,
        policy_loss: str | None = None,
        beta: float = 0.05,
        kl_in_reward: bool = True,
        num_iterations: int = 4,
        value_loss_type: str = "clipped",
        **kwargs: Any,
    ) -> None:
        check_language_model(model, kwargs.get("model_init_kwargs"))  # before its trunk is copied or loaded
        critic = ValueModel.prepare(
            value_model,
            model,
            policy_init_kwargs=kwargs.get("model_init_kwargs"),
            init_kwargs=value_model_init_kwargs,
        )
        super().__init__(
            model,
            tokenizer,
            reward_funcs,
            policy_loss=policy_loss,
            beta=beta,
            kl_in_reward=kl_in_reward and beta != 0.0,
            num_iterations=num_iterations,
            value_loss_type=value_loss_type,
            **kwargs,
        )
        check_at_least(0, value_learning_rate=value_learning_rate)
        self.value_learning_rate = value_learning_rate
        critic.train().attach(self.model)
        if kwargs.get("gradient_checkpointing"):
            critic.trunk.gradient_checkpointing_enable({"use_reentrant": False})
        self._new_values: Tensor | None = None

    usual_loss = "ppo_clip"

    @property
    def value_model(self) -> ValueModel:
        """The critic, which is a submodule of the policy."""
        found = ValueModel.of(self.model)
        assert found is not None
        return found

    def learning_rates(self) -> dict[str, float | None]:
        """The value model has its own."""
        return {**super().learning_rates(), ValueModel.name: self.value_learning_rate}

    def restore_hooks(self) -> None:
        """The value model runs in a hook of the policy."""
        super().restore_hooks()
        self.value_model.hook(self.model)

    # Values

    def rollout(self, rows: Sequence[Row]) -> tuple[Batch, Metrics]:
        """As [`OnlineModule.rollout`]; the policy's first pass over the completions gives their values."""
        self._new_values = None
        return super().rollout(rows)

    def log_probs(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """As [`OnlineModule.log_probs`], with values where there are none yet."""
        if model is not None or self._new_values is not None:
            return super().log_probs(batch, model)
        chunks: list[Tensor] = []
        with self.value_model.watching(chunks.append):
            logps = super().log_probs(batch)
        self._new_values = torch.cat(chunks)
        return logps

    def recorded_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """From the pass for the old log-probabilities."""
        if "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = self.log_probs(batch)
        assert self._new_values is not None
        values = completion_states(self._new_values, batch["completion_ids"].shape[1]).unsqueeze(-1)
        return values, values

    @contextmanager
    def training_values(self, inputs: Batch, *, warming_up: bool) -> Iterator[list[Tensor]]:
        """The value model runs in the policy's forward."""
        record: list[Tensor] = []
        with self.value_model.watching(record.append):
            yield record

    def critic_loss(self, record: list[Tensor], inputs: Batch) -> tuple[Tensor, Metrics]:
        """lambda_2 L_value."""
        (values,) = record
        values = completion_states(values, inputs["completion_ids"].shape[1]).unsqueeze(-1)
        return self._value_term(values, inputs)

    def _next_epoch(self, slices: list[Batch]) -> list[Batch]:
        return reordered(slices, torch.randperm(sum(num_rows(part) for part in slices)))

    # Export

    def _save_extras(self, directory: Path) -> None:
        super()._save_extras(directory)
        self.value_model.save(directory)
