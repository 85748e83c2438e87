"""Online reinforcement learning of language models: prompts in, rollouts, one objective per training step."""

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_plugins.functional.alignment import completion_states
from rl_plugins.functional.log_probs import token_entropies, token_log_probs
from rl_plugins.functional.policy_losses.aggregation import prompt_weights
from rl_plugins.lightning.accumulation import batches_ahead, is_accumulating, window_size
from rl_plugins.lightning.progress import RolloutProgressBar
from rl_plugins.lightning.prompts import Row, rows_of
from rl_plugins.lightning.ranks import gather_rows, own_rows, rank, sum_over_ranks, world_size
from rl_plugins.lightning.reference import Reference
from rl_plugins.lightning.rollouts import average_logged, counts_of, cut_rollout, describe_rollout
from rl_plugins.lightning.speculation import DraftingModule
from rl_plugins.nn.sources import check_lengths, check_tokenizer, learned_positions
from rl_plugins.rollouts.batch import Batch, num_rows, select_rows
from rl_plugins.rollouts.completions import Completions, eos_token_ids, generate_completions
from rl_plugins.rollouts.rewards import (
    NOT_COLUMNS,
    REWARD_ARGUMENTS,
    RewardFunc,
    as_completions,
    as_reward_funcs,
    call_rewards,
    check_reward_arguments,
    check_weights,
    prompt_tokens,
    reward_name,
    weighted_scores,
)
from rl_plugins.signals.checks import (
    check_above,
    check_at_least,
    check_head_reach,
    check_unit_interval,
    check_whole,
)
from rl_plugins.signals.online import online_loss
from rl_plugins.signals.policy import PolicyLoss, inert_message

Metrics = dict[str, Tensor]


class OnlineModule(DraftingModule):
    """Base of the modules that learn from their own completions.

    A batch is a list of prompts (rows with a `prompt`, text or messages, and whatever columns the reward functions
    read). `training_step` generates `num_generations` completions of each, scores them, and makes
    `steps_per_generation * num_iterations` training steps of them, one slice at a time; where that is more than one,
    the loader has to repeat each batch as often, which [`PromptDataModule`] does. Gradient accumulation, clipping,
    precision and strategies are the Trainer's.

    Override `generate` for rollouts of your own, `score` for rewards, `advantages` for another signal,
    `configure_optimizers` for another optimizer.

    Args:
        model: The policy: a model, a PEFT model around one, or a folder or hub id.
        tokenizer: Its tokenizer; by default that of the model's folder or hub id.
        reward_funcs: Reward functions with TRL's signature, `(prompts, completions, completion_ids, **columns) ->
            one number or None per completion`; reward models or their paths; or a list of these.
        reward_weights: Weight of each function; ones by default.
        num_generations: G, completions per prompt.
        max_completion_length: T, longest completion in tokens.
        temperature: Of sampling; log-probabilities are taken at it, too.
        top_p: Share of the probability that is sampled from.
        top_k: Tokens that are sampled from; 0 for all.
        min_p: Smallest probability relative to the largest.
        repetition_penalty: Of sampling; 1 for none.
        generation_kwargs: Further fields of transformers' `GenerationConfig`, such as `{"no_repeat_ngram_size": 3}`.
        steps_per_generation: Slices that a batch of completions is cut into, one for each training step.
        num_iterations: Passes over the slices.
        policy_loss: One of [`~rl_plugins.signals.POLICY_LOSSES`]; TRL's default, `dapo`, if none is named.
        policy_loss_kwargs: Its options, such as `{"epsilon_high": 0.28}`.
        aggregation: How it is averaged; as usual for it by default.
        beta: Coefficient of the KL to the reference, which is the policy as it is given.
        use_bias_correction_kl: Weigh the KL term by the importance ratio, as TRL does by default.
        entropy_coef: Weight of the entropy bonus.
        mask_truncated_completions: Leave completions that did not end out of the loss.
        speculative: Let MTP heads draft the completions (see [`~rl_plugins.rollouts.SpeculativeDecoder`]). A module
            without heads of its own gets some, which learn from every rollout.
        speculative_kwargs: Options of that: `num_draft_tokens`, `draft_cost` (0.2; `None` measures it);
            and, in a module without heads of its own, those of [`~rl_plugins.lightning.speculation.DraftHeads`].
        kwargs: For [`LanguageModule`].

    Attributes:
        last_rollout: The newest batch of completions of this rank, for reports.
        last_extras: What the reward functions said of them with `log_extra`, by column.

    Raises:
        TypeError: If the model is no transformers model, or a reward function cannot be called.
        ValueError: If the model has no LM head, or a setting is unknown or out of range.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunc | PreTrainedModel | str | list[RewardFunc | PreTrainedModel | str] | None = None,
        *,
        reward_weights: list[float] | None = None,
        num_generations: int = 8,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        generation_kwargs: dict[str, Any] | None = None,
        steps_per_generation: int = 1,
        num_iterations: int = 1,
        policy_loss: str | None = None,
        policy_loss_kwargs: dict[str, Any] | None = None,
        aggregation: str | None = None,
        beta: float = 0.0,
        use_bias_correction_kl: bool = True,
        entropy_coef: float = 0.0,
        mask_truncated_completions: bool = False,
        speculative: bool = False,
        speculative_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, tokenizer, **kwargs)
        check_at_least(1, num_generations=num_generations, max_completion_length=max_completion_length)
        check_at_least(1, steps_per_generation=steps_per_generation, num_iterations=num_iterations)
        check_whole(num_generations=num_generations, max_completion_length=max_completion_length)
        check_whole(steps_per_generation=steps_per_generation, num_iterations=num_iterations)
        check_at_least(0, beta=beta, entropy_coef=entropy_coef, top_k=top_k, min_p=min_p)
        check_unit_interval(top_p=top_p)
        check_above(0, repetition_penalty=repetition_penalty)
        check_above(0, temperature=temperature)  # rollouts are sampled
        self.reward_funcs = as_reward_funcs(reward_funcs)
        # Other columns are known when rows are.
        check_reward_arguments(self.reward_funcs, REWARD_ARGUMENTS, complete=False)
        self.reward_weights = check_weights(reward_weights, len(self.reward_funcs))
        self.num_generations, self.max_completion_length = num_generations, max_completion_length
        self.steps_per_generation, self.num_iterations = steps_per_generation, num_iterations
        self.temperature, self.beta, self.entropy_coef = temperature, beta, entropy_coef
        self.sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            **(generation_kwargs or {}),
        }
        self.policy_loss = PolicyLoss(policy_loss or self.usual_loss, aggregation or "", policy_loss_kwargs or {})
        self._loss_is_named = policy_loss is not None
        if self.batch_repeats == 1:  # else it depends on the Trainer
            self._warn_of_inert_loss()
        self.use_bias_correction_kl = use_bias_correction_kl
        self.mask_truncated_completions = mask_truncated_completions
        self.reference = Reference(self.model) if beta != 0.0 else None
        if speculative:
            heads = (speculative_kwargs or {}).get("num_mtp_heads", 1)
            check_head_reach(heads, max_completion_length, "max_completion_length")
            self.set_up_drafting(model, temperature, speculative_kwargs or {})
        self.last_rollout: Batch = {}
        self.last_extras: dict[str, list[Any]] = {}
        self._reward_metrics: dict[str, list[float]] = {}
        self._slices: list[Batch] = []
        self._prompts: list[Any] = []
        self._position = 0
        self._rollout_metrics: Metrics = {}
        self._queue: deque[tuple[list[Any], Batch, Metrics]] = deque()

    usual_loss = "dapo"

    @property
    def batch_repeats(self) -> int:
        """Training steps of one batch of prompts; the loader repeats each batch as often."""
        return self.steps_per_generation * self.num_iterations

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Roll out if the last batch of completions is used up, then one objective on one slice."""
        inputs, rollout_metrics = self._next_inputs(batch)
        self.router_weights = inputs["router_weight"], inputs["row_weight"]
        loss, metrics = self.loss_with_drafts(self.loss, inputs)
        tokens, rows = sum_over_ranks(counts_of(inputs)[1:3])
        by_rows = [name for name in rollout_metrics if name != "kl" and not name.startswith("critic/")]
        self.metric_weights |= dict.fromkeys(by_rows, rows)
        # The rollout's with every step, since loggers may look at any of them.
        self.log_step(loss, {**rollout_metrics, **metrics}, tokens, shown=("loss", "reward"))
        return loss

    def _next_inputs(self, batch: Any) -> tuple[Batch, Metrics]:
        """The slice of this training step and what its rollout said; completions of the whole accumulation window are
        there before its first loss, so that their tokens can be counted. The policy is the same for all of them."""
        rows = rows_of(batch)
        if not self._queue:
            window = [rows, *(map(rows_of, batches_ahead(self)) if is_accumulating(self) else ())]
            self._queue.extend(self._prepare(part) for part in window)
            self._count_window()
        prompts, inputs, metrics = self._queue.popleft()
        if [row["prompt"] for row in rows] != prompts:
            self._queue.clear()
            raise ValueError(
                "This batch has other prompts than it had when the accumulation window began. Change batches in the "
                "loader or in a transfer hook, always in the same way, or set accumulate_grad_batches=1."
            )
        return inputs, metrics

    def _count_window(self) -> None:
        """Put into every slice of the window what its losses are divided by."""
        size, number = window_size(self), len(self._queue)
        total = sum_over_ranks(torch.stack([counts_of(inputs) for _, inputs, _ in self._queue]).sum(0))
        items, tokens, rows, real = (total / (world_size() * size)).clamp(min=1e-9)
        for _, inputs, _ in self._queue:
            own = counts_of(inputs)
            inputs.update(num_items=items, num_tokens=tokens)
            inputs["row_weight"] = own[2] / rows
            inputs["micro_batch_weight"] = torch.full_like(rows, size / number)
            inputs["router_weight"] = own[3] / real

    def _prepare(self, rows: list[Row]) -> tuple[list[Any], Batch, Metrics]:
        """Prompts, slice and the rollout's metrics of the next training step; rolls out if the last batch of
        completions is used up."""
        position = self._position
        if position == 0:
            rollout, self._rollout_metrics = self.rollout(rows)
            group = self.num_generations if self.policy_loss.name == "gvpo" else None
            self._slices = cut_rollout(rollout, self.steps_per_generation, whole_groups_of=group)
        elif [row["prompt"] for row in rows] != self._prompts:
            raise ValueError(
                f"One batch of prompts makes steps_per_generation * num_iterations = {self.batch_repeats} training "
                "steps, but the loader went on to the next. Give Trainer.fit a PromptDataModule, which repeats "
                "batches, or set both to 1."
            )
        elif position % self.steps_per_generation == 0:
            self._slices = self._next_epoch(self._slices)
        self._prompts = [row["prompt"] for row in rows]
        self._position = (position + 1) % self.batch_repeats
        return self._prompts, dict(self._slices[position % self.steps_per_generation]), self._rollout_metrics

    def _next_epoch(self, slices: list[Batch]) -> list[Batch]:
        """The slices of another pass over the same completions."""
        return slices

    def on_train_epoch_start(self) -> None:
        """A batch of completions is not carried over into a new epoch of prompts, nor from a run that was stopped."""
        self._position = 0
        self._queue.clear()

    def on_fit_start(self) -> None:
        """Say so if the policy loss that was named cannot act."""
        super().on_fit_start()
        if self.batch_repeats > 1:
            self._warn_of_inert_loss()

    def _warn_of_inert_loss(self) -> None:
        if not self._loss_is_named or self._is_off_policy():
            return
        accumulate = self.trainer.accumulate_grad_batches if self._trainer is not None else None
        message = inert_message(
            self.policy_loss,
            f"steps_per_generation={self.steps_per_generation} and num_iterations={self.num_iterations}"
            + (f" and accumulate_grad_batches={accumulate}" if accumulate else ""),
            "Set num_iterations above 1, or steps_per_generation to a larger multiple of the Trainer's "
            "accumulate_grad_batches.",
        )
        if message is not None:
            rank_zero_warn(message)

    def on_train_start(self) -> None:
        """Give every rank dice of its own, as TRL does: after `seed_everything` all would draw the same numbers."""
        resumed = self._resumed is not None
        super().on_train_start()
        if not resumed and rank() > 0:
            torch.manual_seed(torch.initial_seed() + rank())

    def on_train_epoch_end(self) -> None:
        """The same for a checkpoint that is written now: Lightning goes on from it with the next epoch's order."""
        self._position = 0

    # Rollout

    def rollout(self, rows: Sequence[Row]) -> tuple[Batch, Metrics]:
        """Complete prompts, score the completions, and say what they are worth.

        Returns:
            The batch: `prompt_ids`, `prompt_mask` (B, P), `completion_ids`, `completion_mask` (B, T), `advantages`
            (B,) or (B, T), `num_items` (0-d), and what else the loss needs; and metrics (0-d, of all ranks).
        """
        self.last_rollout = {}
        if self.decoder is not None:
            self.decoder.last = None  # a `generate` of one's own may do without
        self._check_rows(rows)
        repeated = [row for row in rows for _ in range(self.num_generations)]
        completions = self.complete([row["prompt"] for row in repeated])
        rewards = self.score(repeated, completions).to(self.device)
        batch: Batch = {
            "prompt_ids": completions.prompt_ids,
            "prompt_mask": completions.prompt_mask,
            "completion_ids": completions.completion_ids,
            "completion_mask": completions.completion_mask,
        }
        metrics = self._describe(completions, rewards)
        if self.mask_truncated_completions:
            batch["completion_mask"] = completions.completion_mask * completions.ended.long().unsqueeze(1)
        self.add_log_probs(batch)
        scores = weighted_scores(rewards, self.reward_weights)
        metrics |= self.add_advantages(batch, scores, repeated)
        batch["num_items"] = self._num_items(batch)
        if self.policy_loss.aggregation == "prompt":
            lengths = gather_rows(batch["completion_mask"].sum(1))
            batch["prompt_weights"] = own_rows(prompt_weights(lengths, self.num_generations))
        self.last_rollout |= {**batch, "scores": scores}
        return batch, metrics

    def _check_rows(self, rows: Sequence[Row]) -> None:
        """Before anything is generated: can the prompts be rendered, and the reward functions be called?"""
        check_tokenizer(self.tokenizer, rows[0]["prompt"])
        if type(self).score is OnlineModule.score:
            columns = [key for key in rows[0] if key not in NOT_COLUMNS]
            check_reward_arguments(self.reward_funcs, [*REWARD_ARGUMENTS, *columns])

    def complete(self, prompts: Sequence[Any]) -> Completions:
        """Call `generate`; what a subclass of ours does around it."""
        return self.generate(prompts)

    def generate(self, prompts: Sequence[Any]) -> Completions:
        """One completion of every prompt (text or messages) by the model's own `generate`. Override it for rollouts
        of your own: tools, another engine, several turns."""
        prompt_ids = prompt_tokens(self.tokenizer, prompts)
        check_lengths(prompt_ids, self.max_completion_length, learned_positions(self.model))
        return generate_completions(
            self.model,
            prompt_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            eos=eos_token_ids(self.model, self.tokenizer),
            max_completion_length=self.max_completion_length,
            sampling=self.sampling,
            listener=self._progress(),
            decoder=self.decoder,
        )

    def score(self, rows: Sequence[Row], completions: Completions) -> Tensor:
        """Rewards (B, F) of the reward functions, NaN for none. Override it for rewards from elsewhere."""
        prompts, ids = [row["prompt"] for row in rows], completions.token_lists()
        columns: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0] if key not in NOT_COLUMNS}
        columns["trainer_state"] = self._trainer  # of TRL's state, functions mostly read global_step
        columns["log_metric"] = lambda name, value: self._reward_metrics.setdefault(name, []).append(float(value))
        columns["log_extra"] = lambda column, values: self.last_extras.update({column: list(values)})
        texts = as_completions(self.tokenizer, prompts, ids)
        return call_rewards(self.reward_funcs, prompts, texts, ids, columns, self._moment)

    @property
    def _moment(self) -> str:
        """When reward functions are called, for their errors."""
        if self._trainer is None:
            return ""
        step = self.trainer.global_step
        return f" in step {step + 1}" if self.training else f" in the validation after step {step}"

    @abstractmethod
    def add_advantages(self, batch: Batch, scores: Tensor, rows: Sequence[Row]) -> Metrics:
        """Put `advantages` (B,) or (B, T) into a batch, and whatever else the loss needs.

        Args:
            batch: Prompts, completions and log-probabilities of this rank.
            scores: One number per completion (B,), NaN where it cannot be scored.
            rows: The prompts' rows.

        Returns:
            Metrics of all ranks.
        """

    def add_log_probs(self, batch: Batch) -> None:
        """Log-probabilities of the policy that sampled, where the loss will be taken under another one, and of the
        reference."""
        if self._is_off_policy():
            batch["old_per_token_logps"] = self.log_probs(batch)
        if self.reference is not None:
            with self.reference.active(self):
                batch["ref_per_token_logps"] = self.log_probs(batch, self.reference.model)

    def _is_off_policy(self) -> bool:
        """Whether the policy changes between sampling and the last loss on it."""
        accumulate = self.trainer.accumulate_grad_batches if self._trainer is not None else 1
        return self.batch_repeats > accumulate or accumulate % self.batch_repeats != 0

    def _describe(self, completions: Completions, rewards: Tensor) -> Metrics:
        names = [reward_name(func) for func in self.reward_funcs]
        metrics = describe_rollout(completions, rewards, self.reward_weights, names, self.num_generations)
        logged, self._reward_metrics = self._reward_metrics, {}
        return {**metrics, **average_logged(logged, self.device), **self.acceptance_metrics()}

    def _num_items(self, batch: Batch) -> Tensor:
        """Real tokens per rank and slice: what DAPO's loss of a training step is divided by."""
        tokens = sum_over_ranks(batch["completion_mask"].sum().float())
        return tokens.clamp(min=1.0) / world_size() / self.steps_per_generation

    def _progress(self) -> Any:
        bars = [] if self._trainer is None else [self.trainer.progress_bar_callback]
        return next((bar.on_rollout_token for bar in bars if isinstance(bar, RolloutProgressBar)), None)

    # Loss

    def log_probs(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """`ln pi(y_t|s_t)` (B, T) without gradient, in slices of the size that training has."""
        model = self.model if model is None else model
        parts = torch.arange(num_rows(batch)).chunk(self.steps_per_generation)
        with torch.no_grad():
            return torch.cat([self._pass(select_rows(batch, part), model)[0] for part in parts])

    def _pass(self, batch: Batch, model: nn.Module | None = None, *, entropy: bool = False) -> tuple[Tensor, Any]:
        """Log-probabilities and entropies (B, T) of completions."""
        model, num_tokens = self.model if model is None else model, batch["completion_ids"].shape[1]
        output = model(
            input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            logits_to_keep=num_tokens + 1,
            use_cache=False,
        )
        logits = completion_states(output.logits, num_tokens)
        logps = token_log_probs(logits, batch["completion_ids"], temperature=self.temperature)
        if not entropy:
            return logps, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.entropy_coef != 0.0):
            return logps, token_entropies(logits, temperature=self.temperature)

    def loss(self, inputs: Batch) -> tuple[Tensor, Metrics]:
        """The objective on one slice, and its metrics (0-d, of all ranks)."""
        logps, entropies = self._pass(inputs, entropy=True)
        return self.policy_objective(logps, entropies, inputs)

    def policy_objective(
        self, logps: Tensor, entropies: Tensor | None, inputs: Batch, *, beta: float | None = None
    ) -> tuple[Tensor, Metrics]:
        """[`~rl_plugins.signals.online_loss`] with this module's settings."""
        by_micro_batch = self.policy_loss.aggregation == "micro_batch"
        return online_loss(
            self.policy_loss,
            logps,
            inputs.get("old_per_token_logps", logps.detach()),
            inputs["advantages"],
            inputs["completion_mask"],
            num_items=inputs["num_items"],
            num_tokens=inputs.get("num_tokens"),
            weight=inputs.get("micro_batch_weight" if by_micro_batch else "row_weight", 1.0),
            max_length=self.max_completion_length,
            ref_logps=inputs.get("ref_per_token_logps"),
            beta=self.beta if beta is None else beta,
            correct_kl=self.use_bias_correction_kl,
            entropies=entropies,
            entropy_coef=self.entropy_coef,
            batch={
                "groups": inputs.get("groups"),
                "prompt_weights": inputs.get("prompt_weights"),
                "reduce": sum_over_ranks,
            },
            reduce=sum_over_ranks,
        )

    # Validation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Roll out, and log `eval_reward` and what else a rollout says."""
        rows = rows_of(batch)
        _, metrics = self.rollout(rows)
        self.log_metrics(metrics, prefix="eval_", shown=("reward",), rows=len(rows))

    # Checkpoints

    def rank_state(self) -> dict[str, Any]:
        """Between two rollouts the rest of the completions is still to be learnt from."""
        mid = self._position != 0
        return {
            **super().rank_state(),
            "position": self._position,
            "slices": self._slices if mid else [],
            "prompts": self._prompts if mid else [],
            "rollout_metrics": self._rollout_metrics if mid else {},
        }

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Go on in the middle of a batch of completions."""
        super().load_rank_state(state)
        self._queue.clear()
        self._position, self._prompts = state["position"], state["prompts"]
        self._slices = [move_data_to_device(part, self.device) for part in state["slices"]]
        self._rollout_metrics = move_data_to_device(state["rollout_metrics"], self.device)
