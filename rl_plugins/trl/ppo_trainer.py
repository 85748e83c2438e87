"""PPO with a separate value model, on GRPO's trainer."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import disable_dropout_in_model

from rl_plugins.functional.alignment import completion_states
from rl_plugins.nn.value_model import ValueModel
from rl_plugins.rollouts.batch import reordered
from rl_plugins.trl.heads_trainer import complete_args
from rl_plugins.trl.policy_trainer import Batch
from rl_plugins.trl.ppo_config import PPOConfig
from rl_plugins.trl.value_trainer import ValueTrainer


class PPOTrainer(ValueTrainer):
    r"""
    Trainer for Proximal Policy Optimization with a separate value model (Schulman et al.,
    1707.06347; for language models Ouyang et al., 2203.02155).

    `L = L_clip + lambda_2 L_value - c H`: clipped policy and value losses and an entropy bonus, on advantages by GAE
    from token rewards that carry the score at the last token and a KL penalty at each. Minibatches are shuffled anew
    for each epoch over a batch of completions. Policy and value model are trained by one engine and one optimizer.

    Takes the arguments of [`~trl.GRPOTrainer`] (reward functions and reward models alike), with a [`PPOConfig`] for
    `args`, and shares everything but the origin of the values with [`MTPCriticTrainer`].

    Args:
        value_model: A [`ValueModel`], a transformers model whose trunk is copied, or a path or hub id. By default
            `args.value_model_path`, else the one attached to or saved with the policy, else a copy of the policy's
            trunk as it is before training.

    Example:

    ```python
    from rl_plugins.trl import PPOConfig, PPOTrainer

    trainer = PPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=PPOConfig("qwen3-ppo"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Attributes:
        value_model: The critic.
        last_rollout: As for [`MTPCriticTrainer`], with values (B, T, 1).

    Raises:
        TypeError: If `args` is not a `PPOConfig`, or the value model is none of the above.
        ValueError: If the value model does not know the policy's tokens.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": textwrap.dedent("""\
            @article{schulman2017ppo,
                title   = {{Proximal Policy Optimization Algorithms}},
                author  = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year    = 2017,
                journal = {arXiv preprint},
                eprint  = {arXiv:1707.06347},
            }"""),
    }
    value_model: ValueModel | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        *host_args: Any,
        value_model: ValueModel | PreTrainedModel | str | None = None,
        **host_kwargs: Any,
    ) -> None:
        args = complete_args(args, PPOConfig, model, "PPO")
        own: Any = args.value_model_init_kwargs  # a command line's JSON has been parsed by now
        critic = ValueModel.prepare(
            value_model or args.value_model_path,
            model,
            policy_init_kwargs={"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})},
            init_kwargs=own,
        )
        super().__init__(model, reward_funcs, args, *host_args, **host_kwargs)
        critic.attach(self.model)
        self.value_model = critic
        if args.disable_dropout:  # the host has done so for the policy
            disable_dropout_in_model(critic)
        if args.gradient_checkpointing:
            critic.trunk.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self._attach(critic, args.value_learning_rate)
        self._set_up_rollouts()
        self._new_values: Tensor | None = None

    @property
    def critic_module(self) -> ValueModel | None:
        """The value model."""
        return self.value_model

    # Values

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        host_pass = super()._get_per_token_logps_and_entropies
        # The first pass of a rollout gives the values: the policy's, or that of a PEFT model's reference.
        if not self._in_rollout or model is not self.model or self._new_values is not None:
            return host_pass(model, input_ids, *args, **kwargs)
        assert self.value_model is not None
        chunks: list[Tensor] = []
        with self.value_model.watching(chunks.append):
            result = host_pass(model, input_ids, *args, **kwargs)
        self._new_values = torch.cat(chunks)
        return result

    def _recorded_values(self, output: Batch) -> tuple[Tensor, Tensor]:
        charged = self.args.kl_in_reward and self.beta != 0.0
        # The host may have had no use for the old log-probabilities; values then come from its pass for a PEFT
        # model's reference, if it made one.
        if self._new_values is None or (charged and "old_per_token_logps" not in output):
            output["old_per_token_logps"] = self._score(output)
        assert self._new_values is not None
        values = completion_states(self._new_values, output["completion_ids"].shape[1]).unsqueeze(-1)
        return values, values

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        self._new_values = None
        return super()._generate_and_score_completions(inputs)

    @contextmanager
    def _training_values(self, inputs: Batch, *, warming_up: bool) -> Iterator[list[Tensor]]:
        assert self.value_model is not None
        record: list[Tensor] = []
        with self.value_model.watching(record.append):
            yield record

    def _critic_loss(self, record: list[Tensor], inputs: Batch) -> Tensor:
        (values,) = record
        values = completion_states(values, inputs["completion_ids"].shape[1]).unsqueeze(-1)
        return self._value_term(
            values, inputs["returns"], inputs["critic_mask"], self._num_items(inputs), inputs["old_values"]
        )

    # Minibatches

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        steps = self.args.steps_per_generation
        new_epoch = self._step % steps == 0 and self._step % (steps * self.num_iterations) != 0
        if self.model.training and new_epoch and self._buffered_inputs is not None:
            rows = sum(len(batch["completion_ids"]) for batch in self._buffered_inputs)
            if "pixel_values" not in self._buffered_inputs[0]:  # images do not line up with rows
                self._buffered_inputs = reordered(self._buffered_inputs, torch.randperm(rows))
        return super()._prepare_inputs(generation_batch)
