"""The critic inside the policy, in Lightning."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_plugins.functional.alignment import completion_labels, completion_states
from rl_plugins.lightning.heads import HeadsModule
from rl_plugins.lightning.online_module import Metrics, OnlineModule
from rl_plugins.lightning.prompts import Row
from rl_plugins.lightning.ranks import sum_over_ranks
from rl_plugins.lightning.value_module import ValueModule
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.rollouts.batch import Batch
from rl_plugins.rollouts.completions import Completions
from rl_plugins.rollouts.rewards import RewardFunc
from rl_plugins.rollouts.values import EachStep, ValueRecord, WholeRows
from rl_plugins.signals.checks import check_head_reach


class MTPCriticModule(HeadsModule, ValueModule):
    r"""Online reinforcement learning with a critic inside the policy: multi-token-prediction heads that also output a
    value. One network, one completion per prompt, an advantage for every token.

    `L = L_policy + lambda_1 L_MTP + lambda_2 L_TD`; see [`~rl_plugins.signals.critic_targets`] for the equations.

    ```python
    from lightning.pytorch import Trainer
    from rl_plugins.lightning import MTPCriticModule, PromptDataModule

    module = MTPCriticModule("Qwen/Qwen3-0.6B", reward_funcs=accuracy_reward)
    Trainer(max_steps=1000, gradient_clip_val=1.0).fit(module, PromptDataModule(dataset, batch_size=64))
    module.save_pretrained("qwen3-critic")  # loads in TRL: MTPCriticTrainer(model="qwen3-critic", ...)
    ```

    Brings a [`PolyakCallback`] along, for its target heads.

    Args:
        model: See [`OnlineModule`]. Heads attached to it, or saved beside its weights, are trained on.
        tokenizer: See [`OnlineModule`].
        reward_funcs: See [`OnlineModule`].
        num_mtp_heads: K, number of heads. Head k predicts token t+k and the value of state t+k-1.
        mtp_inner_size: Width of each head's residual block; the model's hidden size by default.
        mtp_heads_path: Folder of heads saved by an earlier run.
        head_learning_rate: Learning rate of the heads; `None` for `learning_rate`. Fresh heads need more than the
            policy does.
        mtp_loss_coef: lambda_1, weight of the heads' token loss.
        mtp_detach_trunk: Keep the token loss out of the trunk.
        value_grad_scale: Factor on the value gradient that enters the trunk; 0 detaches the trunk.
        value_grad_clip: Largest norm of one token's value gradient into the trunk; `None` for no clamp.
        target_tau: Step of the target heads towards the online heads after every optimizer step.
        target_update_every: Copy the online heads every this many optimizer steps instead.
        bootstrap_lookahead: Bootstrap from the mean of all heads' forecasts of the next state.
        kwargs: For [`ValueModule`].

    Raises:
        TypeError: As [`OnlineModule`].
        ValueError: As [`ValueModule`]; if the model's heads are others than the settings say.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunc | PreTrainedModel | str | list[RewardFunc | PreTrainedModel | str] | None = None,
        *,
        num_mtp_heads: int = 2,
        mtp_inner_size: int | None = None,
        mtp_heads_path: str | None = None,
        head_learning_rate: float | None = 1e-4,
        mtp_loss_coef: float = 0.1,
        mtp_detach_trunk: bool = True,
        value_grad_scale: float = 1.0,
        value_grad_clip: float | None = 1.0,
        target_tau: float = 0.05,
        target_update_every: int | None = None,
        bootstrap_lookahead: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, tokenizer, reward_funcs, **kwargs)
        check_head_reach(num_mtp_heads, self.max_completion_length, "max_completion_length")
        self.signal["lookahead"] = bootstrap_lookahead
        self.train_heads(
            model,
            head_learning_rate=head_learning_rate,
            target_tau=target_tau,
            target_update_every=target_update_every,
            num_heads=num_mtp_heads,
            inner_size=mtp_inner_size,
            heads_path=mtp_heads_path,
            token_loss_coef=mtp_loss_coef,
            detach_trunk=mtp_detach_trunk,
            value_loss_coef=self.value_loss_coef,
            value_grad_scale=value_grad_scale,
            value_grad_clip=value_grad_clip,
            temperature=self.temperature,
        )
        self.check_drafting()
        self._record: ValueRecord | None = None
        self._steps: EachStep | None = None
        self._passes: list[ValueRecord] = []

    def _set_up_draft_heads(self, source: object, temperature: float, options: dict[str, Any]) -> None:
        if options:
            raise ValueError(
                f"speculative_kwargs has {', '.join(options)}, but the heads that draft are the critic's own here: "
                "give their settings as arguments of the module."
            )

    # Rollout: values saved while generating

    def rollout(self, rows: Sequence[Row]) -> tuple[Batch, Metrics]:
        """As [`OnlineModule.rollout`], with the values of every token saved while it is generated."""
        self._record, self._steps, self._passes = None, None, []
        return super().rollout(rows)

    def complete(self, prompts: Sequence[Any]) -> Completions:
        """As [`OnlineModule.complete`], recording the values of every decoding step."""
        if getattr(self.generate, "__func__", None) is not OnlineModule.generate:
            return super().complete(prompts)  # whose decoding steps may be anything
        self._record = ValueRecord(self.mtp_heads, self.polyak_target)
        if self.decoder is not None:
            self.decoder.recorder = self._record
            return super().complete(prompts)
        self._steps = EachStep(self._record)
        with self._steps.following(self.model):
            return super().complete(prompts)

    def log_probs(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """As [`OnlineModule.log_probs`]; the policy's first pass in a rollout is kept for its values."""
        if model is not None or self._passes:
            return super().log_probs(batch, model)
        record = ValueRecord(self.mtp_heads, self.polyak_target)
        self._passes.append(record)
        with self.mtp_heads.watching(WholeRows(record, batch["completion_ids"].shape[1])):
            return super().log_probs(batch)

    def recorded_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values saved while generating where the model's own `generate` made the completions, else from the pass for
        the old log-probabilities, else from a pass of their own."""
        saved = self._saved_values(batch)
        needs_log_probs = self.kl_in_reward and "old_per_token_logps" not in batch
        if needs_log_probs or (saved is None and not self._passes):
            batch["old_per_token_logps"] = self.log_probs(batch)
        if saved is None:
            saved = self._passes[0].finish(batch["completion_ids"].shape[1])
        assert saved is not None
        return saved

    def _saved_values(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Values saved while generating, if every rank has those of these very completions."""
        ids = batch["completion_ids"]
        saved = None if self._record is None else self._record.finish(ids.shape[1])
        if self._steps is not None:
            saved = saved if self._steps.made(ids, batch["completion_mask"]) else None
        # Together, since the pass that takes their place is one of all ranks.
        missing = torch.tensor(float(saved is None), device=self.device)
        return None if sum_over_ranks(missing) > 0 else saved

    # Loss

    @contextmanager
    def training_values(self, inputs: Batch, *, warming_up: bool) -> Iterator[HeadRun]:
        """The heads run in the policy's forward."""
        num_tokens, mask = inputs["completion_ids"].shape[1], inputs["completion_mask"]
        num_heads = self.mtp_heads.config.num_heads
        with self.head_training.running(
            partial(completion_states, num_tokens=num_tokens),
            completion_labels(inputs["prompt_ids"], inputs["completion_ids"], mask, num_heads),
            inputs["num_items"],
            heads_only=warming_up,
        ) as run:
            yield run

    def critic_loss(self, record: HeadRun, inputs: Batch) -> tuple[Tensor, Metrics]:
        """lambda_2 L_TD + lambda_1 L_MTP."""
        assert record.values is not None
        value_term, metrics = self._value_term(record.values, inputs)
        self.head_training.keep_units(value_term)
        token_term, token_metrics, weights = self.head_training.token_term(record, inputs["num_items"])
        self.metric_weights |= weights
        return value_term + token_term, {**metrics, **token_metrics}
