"""Online reinforcement learning of language models in Lightning: rollouts from prompts, and the loss of each step."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_plugins.functional.alignment import completion_states
from rl_plugins.functional.log_probs import token_entropies, token_log_probs
from rl_plugins.lightning.accumulation import batches_ahead, is_accumulating, window_size
from rl_plugins.lightning.language import LanguageCallback, LanguageTraining, log_metrics
from rl_plugins.lightning.models import load_language_model, load_tokenizer
from rl_plugins.lightning.progress import RolloutProgressBar
from rl_plugins.lightning.prompts import Row, rows_of
from rl_plugins.lightning.ranks import gather_objects, gather_rows, own_rows, rank, sum_over_ranks, world_size
from rl_plugins.lightning.reference import Reference
from rl_plugins.lightning.slices import average_logged, counts_of, cut_rollout, describe_rollout
from rl_plugins.nn.attachment import base_model_of
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sharding import gathers_in_forward
from rl_plugins.nn.sources import check_language_model, check_lengths, check_tokenizer, learned_positions
from rl_plugins.rollouts.batch import REWARD_KEYS, SAMPLING_KEYS, Batch, loss_mask, num_rows, select_rows, without
from rl_plugins.rollouts.completions import Completions, eos_token_ids, generate_completions
from rl_plugins.rollouts.episodes import TextEnvironment, Turns, play_episodes
from rl_plugins.rollouts.rewards import (
    NOT_COLUMNS,
    REWARD_ARGUMENTS,
    RewardFunc,
    as_completions,
    as_reward_funcs,
    call_rewards,
    check_reward_arguments,
    check_weights,
    list_reward_funcs,
    prompt_tokens,
    reward_name,
)
from rl_plugins.rollouts.step_rewards import Completed, StepRewards, TokenRewards
from rl_plugins.signals.checks import check_above, check_at_least, check_unit_interval, check_whole
from rl_plugins.signals.critics import Critic
from rl_plugins.signals.metrics import Metrics, draft_metrics
from rl_plugins.signals.online import online_loss
from rl_plugins.signals.options import DraftOptions, HeadOptions, PolicyOptions, SamplingOptions, split_options
from rl_plugins.signals.phasic import PhasicSchedule
from rl_plugins.signals.policy import inert_message
from rl_plugins.signals.sampling import GroupSampling, further_rows
from rl_plugins.signals.scores import OVERLONG_NAME, overlong_reward, pay, score, with_unit_weight
from rl_plugins.signals.signals import DraftHeads, Signal, make_decoder
from rl_plugins.signals.step_loss import step_loss
from rl_plugins.signals.warmup import pause_weight_decay


class RLModule(LightningModule):
    """Module that generates completions and learns from them by any [`~rl_plugins.signals.Signal`]; base of the other
    online modules.

    A batch is a list of prompts: rows with a `prompt`, text or messages, and the columns that the reward functions
    read. `training_step` generates `num_generations` completions of each prompt, scores them, and makes
    `steps_per_generation * num_iterations` training steps on them, one slice at a time. If this is more than one step,
    the loader must repeat each batch as many times, as [`PromptDataModule`] does. Gradient accumulation, clipping,
    precision and strategies are options of the Trainer.

    Override `generate` for rollouts of your own, `score` for rewards, `configure_optimizers` for another optimizer.

    Related options (`policy`, `drafts`, `heads`, ...) are a dataclass of `rl_plugins.signals`. Each of its fields may
    be given by its name instead: `policy_loss="gspo_token"` for `policy=PolicyOptions(policy_loss="gspo_token")`.

    Args:
        model: The policy: a model, a PEFT model around one, or a folder or hub id.
        tokenizer: Its tokenizer; by default that of the model's folder or hub id.
        reward_funcs: Reward functions with TRL's signature, `(prompts, completions, completion_ids, **columns) ->
            one number, list or None per completion` (for a list, [`~rl_plugins.rollouts.rewards_per`] declares the
            unit of its rewards); reward models or their paths; or a list of these.
        signal: Computes the advantages of a scored batch of completions.
        policy: The policy loss; TRL's default, `dapo`, if none is named.
        drafts: Speculative rollouts.
        heads: Heads that draft, where the signal has no critic with heads.
        sampling: Groups of equal rewards, and the penalty on length.
        reward_weights: Weight of each function; ones by default.
        environment: Makes a [`~rl_plugins.rollouts.TextEnvironment`] that answers the policy's turns and may give a
            reward for each; then reward functions are optional.
        max_turns: Most turns of the policy in an episode.
        max_turn_length: Longest turn in tokens.
        num_generations: G, completions per prompt.
        max_completion_length: T, longest completion in tokens.
        temperature: Temperature of sampling, and of the log-probabilities in the loss.
        top_p: Total probability of the most probable tokens, from which alone a token is sampled.
        top_k: Number of most probable tokens, from which alone a token is sampled; 0 for all tokens.
        min_p: Smallest probability of a token that may be sampled, relative to the largest.
        repetition_penalty: Of sampling; 1 for none.
        generation_kwargs: Further fields of transformers' `GenerationConfig`, such as `{"no_repeat_ngram_size": 3}`.
        steps_per_generation: Slices that a batch of completions is cut into, one for each training step.
        num_iterations: Passes over the slices.
        beta: Coefficient of the KL to the reference, which is the policy before training.
        use_bias_correction_kl: Weight the KL term by the importance ratio, as TRL does by default.
        entropy_coef: Weight of the entropy bonus.
        mask_truncated_completions: Leave completions that did not end out of the loss.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of AdamW; biases and norms are left out.
        lr_scheduler_type: Name of a schedule of transformers' `get_scheduler`: `linear`, `cosine`, `constant`, ...
        warmup_steps: Optimizer steps of linear warm-up.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        model_init_kwargs: For loading a model by its name, such as `{"dtype": "bfloat16"}`; float32 by default.
        options: Fields of `policy`, `drafts`, `heads` and `sampling`.

    Attributes:
        last_rollout: The newest batch of completions of this rank, for reports.
        last_extras: Columns that the reward functions gave to `log_extra` for that batch.

    Raises:
        TypeError: If the model is not a transformers model, a reward function cannot be called, or a setting does not
            exist.
        FileNotFoundError: If there is no model of that name.
        ValueError: If the model has no LM head or is an encoder-decoder, or a setting is unknown or out of range.
    """

    usual_loss = "dapo"
    """Policy loss where none is named."""

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunc | PreTrainedModel | str | list[RewardFunc | PreTrainedModel | str] | None = None,
        *,
        signal: Signal,
        policy: PolicyOptions = PolicyOptions(),  # noqa: B008  # frozen
        drafts: DraftOptions = DraftOptions(),  # noqa: B008
        heads: HeadOptions = HeadOptions(),  # noqa: B008
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
        reward_weights: list[float] | None = None,
        environment: Callable[[], TextEnvironment] | None = None,
        max_turns: int | None = None,
        max_turn_length: int | None = None,
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
        beta: float = 0.0,
        use_bias_correction_kl: bool = True,
        entropy_coef: float = 0.0,
        mask_truncated_completions: bool = False,
        learning_rate: float = 1e-6,
        weight_decay: float = 0.0,
        lr_scheduler_type: str = "linear",
        warmup_steps: int = 0,
        gradient_checkpointing: bool = False,
        model_init_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        made = split_options(options, policy=policy, drafts=drafts, heads=heads, sampling=sampling)
        policy, drafts, heads, sampling = made["policy"], made["drafts"], made["heads"], made["sampling"]
        if options:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(options)}.")
        self.language = LanguageTraining(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            lr_scheduler_type=lr_scheduler_type,
            warmup_steps=warmup_steps,
        )
        check_at_least(1, num_generations=num_generations, max_completion_length=max_completion_length)
        check_at_least(1, steps_per_generation=steps_per_generation, num_iterations=num_iterations)
        check_whole(num_generations=num_generations, max_completion_length=max_completion_length)
        check_whole(steps_per_generation=steps_per_generation, num_iterations=num_iterations)
        check_at_least(0, beta=beta, entropy_coef=entropy_coef, top_k=top_k, min_p=min_p)
        check_unit_interval(top_p=top_p)
        check_above(0, repetition_penalty=repetition_penalty)
        check_above(0, temperature=temperature)  # rollouts are sampled
        self.signal, self.policy_loss = signal, policy.as_policy_loss(self.usual_loss)
        self.num_generations, self.max_completion_length = num_generations, max_completion_length
        self.steps_per_generation, self.num_iterations = steps_per_generation, num_iterations
        self.temperature, self.beta, self.entropy_coef = temperature, beta, entropy_coef
        self.use_bias_correction_kl = use_bias_correction_kl
        self.mask_truncated_completions = mask_truncated_completions
        self.generation: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            **(generation_kwargs or {}),
        }
        check_at_least(1, max_turns=max_turns, max_turn_length=max_turn_length)
        self.environment, self.max_turns, self.max_turn_length = environment, max_turns, max_turn_length
        self._environments: list[TextEnvironment] = []
        self._has_paid = False
        self._episode_rows: list[Row] = []
        self._steps = StepRewards(Completed([]))
        self._set_up_rewards(reward_funcs, reward_weights, sampling)
        self._loss_is_named = policy.policy_loss is not None
        if self.batch_repeats == 1:  # else the Trainer's accumulation decides, see `on_fit_start`
            self._warn_of_inert_loss()
        self._set_up_model(model, tokenizer, model_init_kwargs, gradient_checkpointing)
        self._set_up_drafts(model, drafts, heads)
        self.last_rollout: Batch = {}
        self.last_extras: dict[str, list[Any]] = {}
        self._reward_metrics: dict[str, list[float]] = {}
        self._slices: list[Batch] = []
        self._prompts: list[Any] = []
        self._position = 0
        self.phasic: PhasicSchedule | None = None
        self._further_draws = 0
        self._rollout_metrics = Metrics()
        self._queue: deque[tuple[list[Any], Batch, Metrics]] = deque()

    # Set-up

    def _set_up_rewards(self, reward_funcs: Any, weights: list[float] | None, sampling: SamplingOptions) -> None:
        sampling.check_signal(self.critic is not None)
        sampling.check_length(self.max_completion_length)
        elsewhere = self.environment is not None or type(self).score is not RLModule.score
        elsewhere |= type(self).generate is not RLModule.generate
        functions = as_reward_funcs(reward_funcs) if list_reward_funcs(reward_funcs) or not elsewhere else []
        if sampling.overlong_shaping:
            weights = with_unit_weight(weights, len(functions))
            functions = [*functions, overlong_reward(sampling, self.max_completion_length)]
        self.reward_funcs: list[RewardFunc] = functions
        # The columns of the data are known only when there are rows, see `_check_rows`.
        check_reward_arguments(self.reward_funcs, REWARD_ARGUMENTS, complete=False)
        self.reward_weights = check_weights(weights, len(self.reward_funcs))
        self.sampling = GroupSampling(sampling)

    def _set_up_model(
        self, model: Any, tokenizer: Any, init_kwargs: Mapping[str, Any] | None, checkpointing: bool
    ) -> None:
        """Load the policy, and put the critic into it."""
        check_language_model(model, init_kwargs)  # before saved heads are looked for, and anything is copied or loaded
        if self.critic is not None:
            self.critic.prepare(model, init_kwargs)
        self.model = load_language_model(model, init_kwargs)
        self.tokenizer = load_tokenizer(tokenizer, model)
        if checkpointing:
            base_model_of(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.reference = Reference(self.model) if self.beta != 0.0 else None
        if self.critic is not None:
            self.language.attached.append((self.critic.attach(self.model), self.critic.learning_rate))

    def _set_up_drafts(self, model: Any, drafts: DraftOptions, heads: HeadOptions) -> None:
        """Decode speculatively, if the options say so, with the critic's heads or with heads that only draft."""
        self.decoder = make_decoder(drafts)
        self.drafts: DraftHeads | None = None
        if self.decoder is None:
            return
        own = None if self.critic is None else self.critic.draft_options
        drafts.check_drafts(heads if own is None else own, self.max_completion_length)
        if own is None:
            self.drafts = DraftHeads(heads, temperature=self.temperature)
            self.drafts.prepare(model)
            self.language.attached.append((self.drafts.attach(self.model), self.drafts.learning_rate))
        self.decoder.check(self.model)

    @property
    def critic(self) -> Critic | None:
        """The critic that is trained together with the policy, if there is one."""
        return self.signal.critic

    @property
    def draft_heads(self) -> MTPHeads | None:
        """Heads that only draft; `None` where there are none, or the critic's heads draft."""
        return None if self.drafts is None else self.drafts.training.heads

    @property
    def batch_repeats(self) -> int:
        """Number of training steps on one batch of prompts; the loader repeats each batch as many times."""
        return self.steps_per_generation * self.num_iterations

    @property
    def auxiliary_repeats(self) -> tuple[int, int]:
        """Number of batches of prompts in a policy phase, and number of further times that the loader repeats the last
        of them for the auxiliary phase."""
        if self.phasic is None:
            return 1, 0
        return self.phasic.every, self.phasic.every * self.phasic.epochs * self.steps_per_generation

    def configure_callbacks(self) -> list[Callback]:
        """Return the `LanguageCallback` that the module needs, which Lightning adds to the Trainer's callbacks."""
        return [LanguageCallback()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group the trainable parameters by learning rate and weight decay, for AdamW or an optimizer of your own."""
        return self.language.parameter_groups(self)

    def configure_optimizers(self) -> Any:
        """Make AdamW, and a schedule that changes the learning rate after each optimizer step. Override this method
        for an optimizer of your own."""
        return self.language.configure_optimizers(self)

    # The methods by which a signal calls the module (`rl_plugins.signals.host.Host`)

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        return 0 if self._trainer is None else self.trainer.global_step

    @property
    def group_size(self) -> int:
        """Number of completions per prompt."""
        return self.num_generations

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""
        return sum_over_ranks(x)

    def gather_rows(self, x: Tensor) -> Tensor:
        """Join the rows of all ranks."""
        return gather_rows(x)

    def own_rows(self, x: Tensor) -> Tensor:
        """Take this rank's rows out of the rows of all ranks."""
        return own_rows(x)

    def gather_objects(self, x: Sequence[Any]) -> list[Any]:
        """Join lists of all ranks."""
        return [item for part in gather_objects(list(x)) for item in part]

    def log_probs(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """Compute `ln pi(y_t|s_t)` (B, T) of completions, without gradient, in slices as large as in training."""
        num_tokens, critic = batch["completion_ids"].shape[1], self.critic if model is None else None
        parts = torch.arange(num_rows(batch)).chunk(self.steps_per_generation)
        with torch.no_grad(), nullcontext() if critic is None else critic.scoring(num_tokens):
            scored = [self._pass(select_rows(batch, part), model or self.model)[0] for part in parts]
        return torch.cat(scored)

    def _pass(self, batch: Batch, model: nn.Module, *, entropy: bool = False) -> tuple[Tensor, Any]:
        """Compute log-probabilities and entropies (B, T) of completions."""
        num_tokens = batch["completion_ids"].shape[1]
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

    # Rollout

    def rollout(self, rows: Sequence[Row]) -> tuple[Batch, Metrics]:
        """Complete prompts, score the completions, and let the signal compute their advantages.

        Returns:
            The batch (see [`~rl_plugins.rollouts.Batch`]), and metrics (0-d, over all ranks).
        """
        metrics = self.signal.before_rollout(self)
        if self.critic is not None:
            self.critic.start()
        self.last_rollout = {}
        batch, prompts, drawn = self._draw(rows)
        metrics.add(drawn)
        if self.training and self.sampling.options.samples:
            pad = self.tokenizer.pad_token_id
            batch, sampled = self.sampling.sample(batch, self._draw_further, pad, self)
            metrics.add(sampled)
        scores = batch["scores"]
        metrics.add(self.signal.advantages(batch, scores, prompts, self))
        batch["num_items"] = self._num_items(batch)
        self.policy_loss.mark(batch, self)
        batch = without(batch, SAMPLING_KEYS)
        self.last_rollout = batch.copy()
        return without(batch, REWARD_KEYS), metrics

    def _draw(self, rows: Sequence[Row]) -> tuple[Batch, list[Any], Metrics]:
        """Complete prompts and score the completions; return the batch, the prompt of each completion, and metrics."""
        if self.decoder is not None:
            self.decoder.last = None  # a `generate` that overrides ours may not use the decoder
        self._check_rows(rows)
        repeated = [row for row in rows for _ in range(self.num_generations)]
        prompts = [row["prompt"] for row in repeated]
        self._episode_rows = repeated
        completions = self._complete(prompts)
        rewards, names, weights = self._scored(repeated, completions)
        batch: Batch = {
            "prompt_ids": completions.prompt_ids,
            "prompt_mask": completions.prompt_mask,
            "completion_ids": completions.completion_ids,
            "completion_mask": completions.completion_mask,
        }
        if completions.tool_mask is not None:
            batch["tool_mask"] = completions.tool_mask
        metrics = self._describe(completions, rewards, names, weights)
        if self.mask_truncated_completions:
            batch["completion_mask"] = completions.completion_mask * completions.ended.long().unsqueeze(1)
        if self._is_off_policy():
            batch["old_per_token_logps"] = self.log_probs(batch)
        if self.reference is not None:
            with self.reference.active(self):
                batch["ref_per_token_logps"] = self.log_probs(batch, self.reference.model)
        cut = self._cut_episodes(completions)
        if cut is not None:
            batch["truncated"] = cut
        scores, task_scores, rewards = score(rewards, weights, names)
        batch["scores"] = scores
        metrics.add(pay(batch, rewards, weights, names, self._steps, self))
        if self.sampling.options.samples:
            self.sampling.mark(batch, gather_rows(scores), gather_rows(task_scores), self)
        return batch, prompts, metrics

    def _scored(self, rows: Sequence[Row], completions: Completions) -> tuple[Tensor, list[str], Tensor | None]:
        """Return the rewards (B, F) of completions by F functions, the functions' names, and their weights."""
        own = completions.completion_mask if completions.tool_mask is None else completions.tool_mask
        mask = completions.completion_mask * own
        self._steps = StepRewards(Completed(completions.token_lists(), completions.policy_lists(), self.tokenizer))
        scored = self.score(rows, completions)
        names, weights = [reward_name(func) for func in self.reward_funcs], self.reward_weights
        if isinstance(scored, TokenRewards):
            names, weights = ["score"], None
            scored = self._steps.take_tokens(0, scored.rewards, mask).unsqueeze(1)
        elif scored.shape[1] != len(names):  # an overriding `score` has rewards of its own
            weights, columns = None, range(1, scored.shape[1] + 1)
            names = ["score"] if len(columns) == 1 else [f"score_{column}" for column in columns]
        rewards = scored.to(self.device)
        if completions.rewards is not None:
            earned = self._steps.take_tokens(len(names), completions.rewards, mask)
            rewards, names = torch.cat([rewards, earned.to(rewards)[:, None]], dim=1), [*names, "environment"]
            weights = None if weights is None else torch.cat([weights, weights.new_ones(1)])
        if rewards.shape[1] == 0:
            raise ValueError(
                "There are no rewards: no reward_funcs, no environment, and `generate` returns no `rewards`. Give one "
                "of them, or override `score`."
            )
        return rewards, names, weights

    def _cut_episodes(self, completions: Completions) -> Tensor | None:
        """Return which rows (B,) were cut, so that the critic bootstraps from the state after their last token.

        The option `bootstrap_truncated` decides which cuts count. `None` if no rank has such a row.
        """
        bootstraps, told = self.signal.bootstrap_truncated, completions.truncated
        if bootstraps is False or (bootstraps is None and told is None):
            return None
        cut = torch.zeros_like(completions.ended) if told is None else told
        if bootstraps:
            cut = cut | ~completions.ended
        return cut if self.sum_over_ranks(cut.sum().view(1)) > 0 else None

    def _draw_further(self, groups: int, draw: int) -> Batch:
        """Draw further prompts from the training data; a resumed run draws the same ones."""
        dataset = self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        # The draws are counted, since several rollouts may belong to the same optimizer step.
        rows = further_rows(groups, len(dataset), torch.initial_seed(), self._further_draws)
        self._further_draws += 1
        return self._draw([dataset[i] for i in rows])[0]

    def _check_rows(self, rows: Sequence[Row]) -> None:
        """Check, before anything is generated, that prompts can be rendered and reward functions be called."""
        check_tokenizer(self.tokenizer, rows[0]["prompt"])
        if type(self).score is RLModule.score:
            columns = [key for key in rows[0] if key not in NOT_COLUMNS]
            check_reward_arguments(self.reward_funcs, [*REWARD_ARGUMENTS, *columns])

    def _complete(self, prompts: Sequence[Any]) -> Completions:
        """Call `generate`. Meanwhile the critic saves values, unless `generate` is overridden, since the decoding
        steps of another `generate` are not known."""
        ours = getattr(self.generate, "__func__", None) is RLModule.generate
        saves = ours and self.environment is None  # values of several turns come from a forward pass afterwards
        with self.critic.generating(self.model, self.decoder) if self.critic and saves else nullcontext():
            return self.generate(prompts)

    def generate(self, prompts: Sequence[Any]) -> Completions:
        """Complete every prompt (text or messages) once by the model's own `generate`, or play an episode if there is
        an environment. Override this method for rollouts of your own, for example with tools or another engine."""
        if self.environment is not None:
            return self._play(prompts, self.environment)
        prompt_ids = prompt_tokens(self.tokenizer, prompts)
        check_lengths(prompt_ids, self.max_completion_length, learned_positions(self.model))
        return self._generate_ids(prompt_ids, self.max_completion_length)

    def _generate_ids(self, prompt_ids: Sequence[Sequence[int]], max_length: int) -> Completions:
        return generate_completions(
            self.model,
            prompt_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            eos=eos_token_ids(self.model, self.tokenizer),
            max_completion_length=max_length,
            sampling=self.generation,
            listener=self._progress(),
            decoder=self.decoder,
        )

    def _play(self, prompts: Sequence[Any], environment: Callable[[], TextEnvironment]) -> Completions:
        """Play an episode for every prompt. Environments are made once and reset for every episode."""
        self._environments += [environment() for _ in range(len(prompts) - len(self._environments))]
        together = gathers_in_forward(self.model)
        rows = [{key: value for key, value in row.items() if key != "completion"} for row in self._episode_rows]
        others = {reward_name(func) for func in self.reward_funcs} - {OVERLONG_NAME}
        alone = not others and not self._has_paid and type(self).score is RLModule.score
        played = play_episodes(
            self._generate_ids,
            prompts,
            self._environments[: len(prompts)],
            Turns(
                self.tokenizer,
                eos_token_ids(self.model, self.tokenizer),
                self.max_completion_length,
                self.max_turns,
                self.max_turn_length,
            ),
            rows=rows,
            pad_token_id=self.tokenizer.pad_token_id,
            device=self.device,
            any_rank=self._on_any_rank if together else bool,
            must_pay=self._on_any_rank if alone else None,
        )
        if alone:
            assert played.rewards is not None
            self._has_paid = self._on_any_rank(not bool(played.rewards.isnan().all()))
        return played

    def _on_any_rank(self, holds: bool) -> bool:
        return bool(self.sum_over_ranks(torch.tensor([float(holds)], device=self.device)) > 0)

    def score(self, rows: Sequence[Row], completions: Completions) -> Tensor | TokenRewards:
        """Call the F reward functions, and return their rewards (B, F), NaN for none. Override this method for rewards
        from elsewhere, and return such a tensor, or [`~rl_plugins.rollouts.TokenRewards`] with a reward for every
        token."""
        prompts, ids = [row["prompt"] for row in rows], completions.token_lists()
        columns: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0] if key not in NOT_COLUMNS}
        columns["trainer_state"] = self._trainer  # functions for TRL mostly read `global_step`, which it has
        columns["log_metric"] = lambda name, value: self._reward_metrics.setdefault(name, []).append(float(value))
        columns["log_extra"] = lambda column, values: self.last_extras.update({column: list(values)})
        texts = as_completions(self.tokenizer, prompts, ids)
        self._steps = StepRewards(Completed(ids, completions.policy_lists(), self.tokenizer))
        if not self.reward_funcs:
            return torch.zeros(len(rows), 0)
        return call_rewards(self.reward_funcs, prompts, texts, ids, columns, self._moment, steps=self._steps)

    @property
    def _moment(self) -> str:
        """Time at which reward functions are called, in words, for error messages."""
        if self._trainer is None:
            return ""
        step = self.trainer.global_step
        return f" in step {step + 1}" if self.training else f" in the validation after step {step}"

    def _is_off_policy(self) -> bool:
        """Return whether the policy changes between a rollout and the last loss on it.

        A rollout gives `batch_repeats` micro-steps, and an optimizer step takes `accumulate_grad_batches` micro-steps:
        - 4 and 2: the third slice of a rollout meets a policy that the first two have changed;
        - 2 and 3: the third micro-step begins a rollout that ends in the next optimizer step;
        - 2 and 4: two whole rollouts share a step, and all their slices meet the policy that sampled them.
        """
        accumulate = self.trainer.accumulate_grad_batches if self._trainer is not None else 1
        return self.batch_repeats > accumulate or accumulate % self.batch_repeats != 0

    def _describe(
        self, completions: Completions, rewards: Tensor, names: Sequence[str], weights: Tensor | None
    ) -> Metrics:
        metrics = describe_rollout(completions, rewards, weights, names, self.num_generations)
        logged, self._reward_metrics = self._reward_metrics, {}
        metrics |= average_logged(logged, self.device)
        if self.decoder is not None and self.decoder.last is not None:
            assert self.decoder.last.statistics is not None
            counts = torch.tensor(self.decoder.last.statistics.counts, device=self.device)
            metrics |= draft_metrics(sum_over_ranks(counts))
        return metrics

    def _num_items(self, batch: Batch) -> Tensor:
        """Return the number of real tokens per rank and slice, by which DAPO's loss of a training step is divided."""
        tokens = sum_over_ranks(loss_mask(batch).sum().float())
        return tokens.clamp(min=1.0) / world_size() / self.steps_per_generation

    def _progress(self) -> Any:
        bars = [] if self._trainer is None else [self.trainer.progress_bar_callback]
        return next((bar.on_rollout_token for bar in bars if isinstance(bar, RolloutProgressBar)), None)

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Generate completions if the last batch of them is used up, and return the loss on one slice.

        The first batch of an epoch begins a rollout, and a policy phase where there are phases. Completions are not
        carried over from the epoch before, nor from a `Trainer.fit` that was stopped.
        """
        if batch_idx == 0:  # Lightning calls no hook at the start of an epoch that it resumes at
            self._begin_anew()
        if self.signal.warmup_steps:  # while only the critic learns: weight decay would change the policy, too
            for optimizer in self.trainer.optimizers:  # `self.optimizers()` is a list only under DeepSpeed
                pause_weight_decay(optimizer, self.step < self.signal.warmup_steps)
        inputs, rollout_metrics = self._next_inputs(batch)
        self.language.router_weights = inputs["router_weight"], inputs["row_weight"]
        loss, metrics = self.loss(inputs)
        tokens, rows = sum_over_ranks(counts_of(inputs)[1:3])
        by_rows = [name for name in rollout_metrics if name != "kl" and not name.startswith("critic/")]
        # Every step has the metrics of the rollout, since loggers may read any step.
        every = Metrics(rollout_metrics, dict.fromkeys(by_rows, rows))
        every.add(metrics)
        self.language.log_step(self, loss, every, tokens, shown=("loss", "reward"))
        return loss

    def _next_inputs(self, batch: Any) -> tuple[Batch, Metrics]:
        """Return the slice of this training step, and the metrics of its rollout.

        All completions of an accumulation window are generated before its first loss, so that their tokens can be
        counted. The policy is the same for all of them.
        """
        rows = rows_of(batch)
        if not self._queue:
            window = [rows, *(map(rows_of, batches_ahead(self)) if is_accumulating(self) else ())]
            self._queue.extend(self._prepare(part) for part in window)
            self._count_window()
        prompts, inputs, metrics = self._queue.popleft()
        if [row["prompt"] for row in rows] != prompts:
            self._queue.clear()
            raise ValueError(
                "This batch has other prompts than when gradient accumulation began. The loader or a transfer hook "
                "changes the batch differently each time. Make this change deterministic, or set "
                "accumulate_grad_batches=1."
            )
        return inputs, metrics

    def _count_window(self) -> None:
        """Put the numbers by which the losses are divided into every slice of the window."""
        size, number = window_size(self), len(self._queue)
        total = sum_over_ranks(torch.stack([counts_of(inputs) for _, inputs, _ in self._queue]).sum(0))
        items, tokens, rows, real = (total / (world_size() * size)).clamp(min=1e-9)
        for _, inputs, _ in self._queue:
            own = counts_of(inputs)
            inputs["num_items"], inputs["num_tokens"] = items, tokens
            inputs["row_weight"] = own[2] / rows
            inputs["micro_batch_weight"] = torch.full_like(rows, size / number)
            inputs["router_weight"] = own[3] / real

    def _prepare(self, rows: list[Row]) -> tuple[list[Any], Batch, Metrics]:
        """Return prompts, slice and rollout metrics of the next training step; generate completions if the last batch
        of them is used up."""
        position, phasic = self._position, self.phasic
        if phasic is not None and phasic.auxiliary:
            self._check_repeated(rows)
            return self._prompts, phasic.next_slice(self).copy(), Metrics()
        if position == 0:
            rollout, self._rollout_metrics = self.rollout(rows)
            group = self.num_generations if self.policy_loss.compares_groups else None
            self._slices = cut_rollout(rollout, self.steps_per_generation, whole_groups_of=group)
        else:
            self._check_repeated(rows)
            if position % self.steps_per_generation == 0:
                self._slices = self.next_epoch(self._slices)
        if phasic is not None:
            phasic.policy_step([part.copy() for part in self._slices] if position == 0 else None)
        self._prompts = [row["prompt"] for row in rows]
        self._position = (position + 1) % self.batch_repeats
        inputs = self._slices[position % self.steps_per_generation].copy()
        return self._prompts, inputs, self._rollout_metrics

    def _check_repeated(self, rows: list[Row]) -> None:
        if [row["prompt"] for row in rows] != self._prompts:
            phasic = self.phasic is not None
            extra = ", and of more in the auxiliary phase" if phasic else ""
            instead = "" if phasic else ", or set steps_per_generation and num_iterations to 1"
            raise ValueError(
                f"One batch of prompts is the batch of steps_per_generation * num_iterations = {self.batch_repeats} "
                f"training steps{extra}, but the loader went on to the next batch. Give Trainer.fit a "
                f"PromptDataModule, which repeats batches{instead}."
            )

    def next_epoch(self, slices: list[Batch]) -> list[Batch]:
        """Return the slices of another pass over the same completions."""
        return slices

    def on_fit_start(self) -> None:
        """Warn if the named policy loss has no effect with these settings; refuse phases that end inside an optimizer
        step."""
        if self.batch_repeats > 1:
            self._warn_of_inert_loss()
        if self.phasic is not None:
            accumulate = self.trainer.accumulate_grad_batches
            self.phasic.options.check_cycles(
                self.steps_per_generation, self.num_iterations, accumulate, option="accumulate_grad_batches"
            )

    def _warn_of_inert_loss(self) -> None:
        if not self._loss_is_named or self._is_off_policy() or self.sampling.replay_buffer is not None:
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

    def on_train_epoch_end(self) -> None:
        """Drop the rest of the completions, also for a checkpoint that is written now.

        Lightning resumes such a checkpoint with the order of the next epoch.
        """
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._position = 0
        self._queue.clear()
        if self.phasic is not None:
            self.phasic.reset()

    # Loss

    def loss(self, inputs: Batch) -> tuple[Tensor, Metrics]:
        """Compute the loss on one slice, and its metrics (0-d, over all ranks)."""

        def objective() -> tuple[Tensor, Metrics]:
            return self._objective(*self._pass(inputs, self.model, entropy=True), inputs)

        return step_loss(
            inputs,
            inputs["num_items"],
            self,
            objective=objective,
            log_probs=lambda: self._pass(inputs, self.model, entropy=False)[0],
            signal=self.signal,
            drafts=self.drafts,
            phasic=self.phasic,
        )

    def _objective(self, logps: Tensor, entropies: Tensor | None, inputs: Batch) -> tuple[Tensor, Metrics]:
        """Call [`~rl_plugins.signals.online_loss`] with this module's settings."""
        by_micro_batch = self.policy_loss.aggregation == "micro_batch"
        loss, metrics = online_loss(
            self.policy_loss,
            logps,
            inputs.get("old_per_token_logps", logps.detach()),
            inputs["advantages"],
            loss_mask(inputs),
            num_items=inputs["num_items"],
            max_length=self.max_completion_length,
            scale=inputs.get("micro_batch_weight", 1.0) if by_micro_batch else inputs.get("row_weight", 1.0),
            ref_logps=inputs.get("ref_per_token_logps"),
            beta=0.0 if self.signal.kl_in_reward else self.beta,
            correct_kl=self.use_bias_correction_kl,
            entropies=entropies,
            entropy_coef=self.entropy_coef or None,
            num_tokens=inputs.get("num_tokens"),
            batch={
                "groups": inputs.get("groups"),
                "prompt_weights": inputs.get("prompt_weights"),
                "reduce": sum_over_ranks,
            },
            reduce=sum_over_ranks,
        )
        if "policy_loss" in metrics:
            self._weigh_policy_loss(metrics, inputs)
        return loss, metrics

    def _weigh_policy_loss(self, metrics: Metrics, inputs: Batch) -> None:
        """Make the metric `policy_loss` a mean that can be averaged over the micro-batches of a window."""
        aggregation, own = self.policy_loss.aggregation, loss_mask(inputs).sum().float()
        tokens, rows = sum_over_ranks(torch.stack([own, own.new_tensor(num_rows(inputs))]))
        if aggregation == "token":  # so far it is divided by the tokens of the window
            metrics["policy_loss"] *= inputs["num_items"] * world_size() / tokens.clamp(min=1.0)
            metrics.counts["policy_loss"] = tokens
        else:
            metrics.counts["policy_loss"] = torch.ones_like(rows) if aggregation == "micro_batch" else rows

    # Validation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Generate completions, and log `eval_reward` and the other metrics of a rollout."""
        rows = rows_of(batch)
        _, metrics = self.rollout(rows)
        log_metrics(self, metrics, prefix="eval_", shown=("reward",), rows=len(rows))

    # Checkpoints

    def draft_state(self) -> dict[str, Any]:
        """Return the state of the decoder: the shares of drafts that were accepted."""
        return {} if self.decoder is None else self.decoder.state_dict()

    def load_draft_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the decoder, so that it drafts as many tokens; `state` is empty if it was not saved."""
        if self.decoder is not None:
            self.decoder.load_state_dict(state)

    def rank_state(self) -> dict[str, Any]:
        """Return the state of this rank for a checkpoint.

        Between two rollouts it contains the completions, the rest of which is still to be learnt from.
        """
        mid = self._position != 0 or (self.phasic is not None and self.phasic.auxiliary)
        return {
            "phasic": None if self.phasic is None else self.phasic.state_dict(),
            "draft_length": self.draft_state(),
            "position": self._position,
            "further_draws": self._further_draws,
            "slices": self._slices if mid else [],
            "prompts": self._prompts if mid else [],
            "rollout_metrics": dict(self._rollout_metrics) if mid else {},
            "sampling": self.sampling.state_dict(),
            "signal": self.signal.rank_state(),
        }

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of this rank, so that it continues in the middle of a batch of completions."""
        self._queue.clear()
        self.load_draft_state(state.get("draft_length", {}))
        self._position, self._prompts = state["position"], state["prompts"]
        self._further_draws = state["further_draws"]
        self._slices = [move_data_to_device(part, self.device) for part in state["slices"]]
        self._rollout_metrics = Metrics(move_data_to_device(dict(state["rollout_metrics"]), self.device))
        if self.phasic is not None and state.get("phasic"):
            self.phasic.load_state_dict(move_data_to_device(state["phasic"], self.device))
        self.sampling.load_state_dict(move_data_to_device(state["sampling"], self.device))
        self.signal.load_rank_state(move_data_to_device(state["signal"], self.device))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of every rank, the state that they share, and the shapes of all parameters."""
        self.language.save_checkpoint(self, checkpoint, self.rank_state(), self.signal.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and keep the state of every rank until training continues.

        Raises:
            ValueError: If the checkpoint was written by another module or for another architecture.
        """
        shared = self.language.load_checkpoint(self, checkpoint)
        if self._trainer is not None and shared:
            self.signal.load_state_dict(shared)

    def on_train_start(self) -> None:
        """Restore the state of a checkpoint, or give every rank a seed of its own, as TRL does.

        Without this, all ranks would draw the same random numbers after `seed_everything`.

        Raises:
            TypeError: If `dynamic_sampling` is to draw further prompts from a stream.
        """
        self._check_further_prompts()
        state = self.language.take_resumed(self)
        if state is not None:
            self.load_rank_state(state)
            return
        if rank() > 0:
            torch.manual_seed(torch.initial_seed() + rank())
        if self.sampling.replay_buffer is not None:
            self.sampling.replay_buffer.generator.manual_seed(torch.initial_seed())

    def _check_further_prompts(self) -> None:
        if self._trainer is None or not self.sampling.options.dynamic_sampling:
            return
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                "dynamic_sampling=True draws further prompts by index, but the training data are a stream. Give "
                "Trainer.fit a loader of a dataset with a length, such as PromptDataModule, or set "
                "dynamic_sampling=False."
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model and tokenizer as transformers does, and the attached modules beside them. TRL and
        `AutoModelForCausalLM.from_pretrained` can read the folder. Call this method on all ranks; rank 0 writes."""
        self.language.save_pretrained(self, directory)
