"""GRPO's trainer with the critic inside the policy."""

import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_plugins.functional.alignment import completion_labels, completion_states
from rl_plugins.functional.log_probs import kl_to_sampler
from rl_plugins.functional.masking import zero_masked
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.token_loss import logit_divisor
from rl_plugins.rollouts.values import EachStep, ValueRecord, WholeRows
from rl_plugins.trl.attachments import find_saved_heads
from rl_plugins.trl.critic_config import MTPCriticConfig
from rl_plugins.trl.heads_trainer import MTPHeadsTrainer, complete_args
from rl_plugins.trl.phasic import PhasicSchedule
from rl_plugins.trl.policy_trainer import Batch
from rl_plugins.trl.value_trainer import ValueTrainer


class MTPCriticTrainer(MTPHeadsTrainer, ValueTrainer):
    r"""
    Trainer for online reinforcement learning with a critic inside the policy: multi-token-prediction heads that also
    output a value. One network, one completion per prompt, an advantage for every token.

    `L = L_policy + lambda_1 L_MTP + lambda_2 L_TD`, where `L_policy` is any TRL loss type, or any loss of
    [`~rl_plugins.signals.POLICY_LOSSES`] but `gvpo`, on the critic's advantages (see
    [`~rl_plugins.signals.critic_targets`] for the equations).

    Takes the arguments of [`~trl.GRPOTrainer`], with an [`MTPCriticConfig`] for `args`. With `use_critic=False` it is
    that trainer.

    Example:

    ```python
    from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer

    trainer = MTPCriticTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=MTPCriticConfig("qwen3-critic"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Attributes:
        last_rollout: The newest batch of completions of this process (train or eval): the host's tensors without
            images, and `old_values` (B, T, K), `returns`, `td_errors`, `critic_mask` (B, T) and `scores` (B,).

    Raises:
        TypeError: If `args` is not an `MTPCriticConfig`.
        ValueError: If the model has no LM head, or its heads do not fit the config.
    """

    _tag_names = ["trl", "mtp-critic"]
    _name = "MTPCritic"
    _paper = {
        "title": "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        "id": "1506.02438",
        "citation": textwrap.dedent("""\
            @inproceedings{schulman2016gae,
                title     = {{High-Dimensional Continuous Control Using Generalized Advantage Estimation}},
                author    = {John Schulman and Philipp Moritz and Sergey Levine and Michael Jordan and Pieter Abbeel},
                year      = 2016,
                booktitle = {International Conference on Learning Representations},
                eprint    = {arXiv:1506.02438},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: MTPCriticConfig | None = None,
        *host_args: Any,
        **host_kwargs: Any,
    ) -> None:
        args = complete_args(args, MTPCriticConfig, model, "MTPCritic")
        saved_heads = find_saved_heads(model, args) if args.use_critic else None
        super().__init__(model, reward_funcs, args, *host_args, **host_kwargs)
        self._recorders: list[tuple[ValueRecord, EachStep | None] | None] = []
        self._passes: list[ValueRecord] = []
        self._phasic: PhasicSchedule | None = None
        self.last_rollout: Batch = {}
        if args.use_critic:
            self._set_up_heads(saved_heads)
            self._set_up_rollouts()
            self._set_up_decoder()
            if args.mtp_loss_coef:
                self._logit_divisor = logit_divisor(self.model.config, self.temperature)
            if args.phasic_every:
                cycle = args.steps_per_generation * self.num_iterations
                self._phasic = PhasicSchedule(args.phasic_every, args.phasic_epochs, cycle)

    @property
    def _drafts_with_critic(self) -> bool:
        return self.args.use_critic

    # Rollout: values saved while generating

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        self._recorders, self._passes = [], []
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._recorders, self._passes = [], []

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if not self._in_rollout or self.mtp_heads is None:
            return super()._generate_single_turn(*args, **kwargs)
        if self.use_vllm or self.use_transformers_continuous_batching:
            self._recorders.append(None)
            return super()._generate_single_turn(*args, **kwargs)
        record = ValueRecord(self.mtp_heads, self.polyak_target)
        if self.decoder is not None:
            self._recorders.append((record, None))
            self.decoder.recorder = record
            return super()._generate_single_turn(*args, **kwargs)
        steps = EachStep(record)
        self._recorders.append((record, steps))
        with steps.following(self.model):
            return super()._generate_single_turn(*args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        host_pass = super()._get_per_token_logps_and_entropies
        if not self._in_rollout or self.mtp_heads is None or model is not self.model:
            return host_pass(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        record = ValueRecord(self.mtp_heads, self.polyak_target)
        self._passes.append(record)
        with self.mtp_heads.watching(WholeRows(record, logits_to_keep)):
            return host_pass(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def _recorded_values(self, output: Batch) -> tuple[Tensor, Tensor]:
        """Online and target values (B, T, K): saved while generating where one turn made the whole completion,
        else from the host's pass for the old log-probabilities, else from a pass of our own."""
        needs_logps = self.args.kl_in_reward and "old_per_token_logps" not in output
        saved = self._saved_values(output)
        if needs_logps or (saved is None and "old_per_token_logps" not in output):
            self._passes.clear()
            output["old_per_token_logps"] = self._score(output)
        if saved is None:  # the first pass is the policy's; a second one is the reference of a PEFT model
            saved = self._passes[0].finish(output["completion_ids"].shape[1])
        assert saved is not None
        return saved

    def _saved_values(self, output: Batch) -> tuple[Tensor, Tensor] | None:
        """Values saved while generating, if every rank has those of these very completions."""
        only = self._recorders[0] if len(self._recorders) == 1 else None
        record, steps = only or (None, None)
        saved = None if record is None else record.finish(output["completion_ids"].shape[1])
        if steps is not None:
            saved = saved if steps.made(output["completion_ids"], self._loss_mask(output)) else None
        # Together, since the pass that takes their place is one of all ranks.
        missing = torch.tensor([float(saved is None)], device=self.accelerator.device)
        return None if self._sum_over_ranks(missing) > 0 else saved

    # Loss

    @contextmanager
    def _training_values(self, inputs: Batch, *, warming_up: bool) -> Iterator[HeadRun]:
        with self._running(inputs, self.args.value_grad_scale, heads_only=warming_up) as run:
            yield run

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        if "held_logps" in inputs:
            return self._auxiliary_loss(model, inputs)
        return super()._compute_loss(model, inputs)

    def _running(
        self, inputs: Batch, value_grad_scale: float, *, heads_only: bool = False
    ) -> AbstractContextManager[HeadRun]:
        args, num_tokens = self.args, inputs["completion_ids"].shape[1]
        labels = None
        if args.mtp_loss_coef:
            mask = self._loss_mask(inputs)
            labels = completion_labels(inputs["prompt_ids"], inputs["completion_ids"], mask, args.num_mtp_heads)
        select = partial(completion_states, num_tokens=num_tokens)
        return self._running_heads(select, labels, self._num_items(inputs), value_grad_scale, heads_only=heads_only)

    def _critic_loss(self, run: HeadRun, inputs: Batch) -> Tensor:
        assert run.values is not None
        num_items = self._num_items(inputs)
        value_term = self._value_term(
            run.values, inputs["returns"], inputs["critic_mask"], num_items, inputs["old_values"]
        )
        return value_term + self._token_term(run, num_items)

    # Phasic mode

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if self._phasic is None or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._phasic.auxiliary:
            if self._phasic.starting:
                for batch in self._phasic.stored:
                    batch["held_logps"] = self._score(batch)
            return self._phasic.next_slice()
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        # Copies, since the auxiliary phase adds a key that must not reach the policy's loss.
        new = None if self._buffered_inputs is before else [dict(batch) for batch in self._buffered_inputs]
        self._phasic.policy_step(new)
        return inputs

    def _auxiliary_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Value loss into heads and trunk, and a KL term that holds the policy (PPG, 2009.04416, equation 4)."""
        with self._running(inputs, 1.0) as run:
            logps = self._logps(model, inputs)
        mask = self._loss_mask(inputs)
        divergence = kl_to_sampler(zero_masked(logps, mask), zero_masked(inputs["held_logps"], mask))
        self._log_mean("phasic/kl", divergence, mask)
        hold = divergence.masked_fill(~mask.bool(), 0.0).sum() / self._num_items(inputs)
        return self.args.phasic_kl_coef * hold + self._critic_loss(run, inputs)

    # Checkpoints

    def _rollout_state(self) -> dict[str, Any]:
        return {**super()._rollout_state(), "phasic": None if self._phasic is None else self._phasic.state_dict()}

    def _load_rollout_state(self, state: dict[str, Any]) -> None:
        super()._load_rollout_state(state)
        if self._phasic is not None and state["phasic"] is not None:
            self._phasic.load_state_dict(state["phasic"])
