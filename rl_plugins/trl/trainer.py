"""GRPO's trainer with any training signal: advantages, a critic and a policy loss of ours on TRL's rollouts."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from rl_plugins.hooks import OFF_POLICY_MASK, TOP_ENTROPY, require_hooks
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sources import check_lengths, check_tokenizer, check_trainable_dtype, learned_positions
from rl_plugins.rollouts.batch import REWARD_KEYS, SAMPLING_KEYS, Batch, loss_mask, reordered, without
from rl_plugins.rollouts.rewards import checked, list_reward_funcs
from rl_plugins.rollouts.step_rewards import Completed, StepRewards
from rl_plugins.signals.critic_targets import initial_values, sequence_means
from rl_plugins.signals.critics import Critic
from rl_plugins.signals.entropy import EntropyControl
from rl_plugins.signals.metrics import Metrics, draft_metrics, gradient_metrics
from rl_plugins.signals.online import online_loss
from rl_plugins.signals.options import DraftOptions, HeadOptions, LengthOptions, VariantOptions
from rl_plugins.signals.phasic import PhasicSchedule
from rl_plugins.signals.policy import PolicyLoss, inert_message
from rl_plugins.signals.sampling import GroupSampling, further_rows
from rl_plugins.signals.scores import OVERLONG_NAME, overlong_reward, pay, score, with_unit_weight
from rl_plugins.signals.signals import DraftHeads, GroupSignal, Signal, make_decoder
from rl_plugins.signals.step_loss import step_loss
from rl_plugins.signals.warmup import pause_weight_decay
from rl_plugins.trl.attachments import TrainedAttachments
from rl_plugins.trl.callbacks import AfterStep
from rl_plugins.trl.card_text import Method, head_papers, heads_loading
from rl_plugins.trl.checkpoints import (
    FIRST_ROLLOUT,
    STATE_NAME,
    RenamedWeights,
    check_start,
    checkpoint_folder,
    rollout_file,
)
from rl_plugins.trl.configs import RLConfig
from rl_plugins.trl.environments import Episodes, pays_turns
from rl_plugins.trl.few_prompts import filling
from rl_plugins.trl.host import hide_attachments_from_vllm, log_metrics
from rl_plugins.trl.inputs import check_callback, check_inputs, complete_args
from rl_plugins.trl.model_card import write_model_card
from rl_plugins.trl.reference import lent_name
from rl_plugins.trl.rollouts import RolloutFunc, fill_empty
from rl_plugins.trl.router_loss import connect_balancing

HOST_ARGUMENTS = list(inspect.signature(GRPOTrainer.__init__).parameters)[4:]
"""Names of the host's arguments after model, reward functions and args."""
PASS_ARGUMENTS = ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy")
VALUE_COLUMN = "critic_value"
"""Column of the host's table of completions; reward functions have their own columns there (`log_extra`)."""


class RLTrainer(GRPOTrainer):
    r"""
    `GRPOTrainer` that learns from any [`~rl_plugins.signals.Signal`]: a critic of your own, or any advantage.

    The host, `GRPOTrainer`, generates, scores, batches, logs and saves. The signal turns the scores into advantages;
    its critic, if there is one, records values during the rollout, runs in the training forward and adds its loss. The
    policy loss is [`~rl_plugins.signals.online_loss`], the same as in Lightning. If no option needs a loss of ours,
    TRL's own loss runs.

    Takes the arguments of [`~trl.GRPOTrainer`], with an [`RLConfig`] for `args`.

    Args:
        signal: Says what a scored batch of completions teaches; TRL's own advantages by default.

    Example:

    ```python
    trainer = RLTrainer(model, reward_funcs, RLConfig("run"), train_dataset=dataset, signal=CriticSignal(my_critic))
    ```

    Attributes:
        last_rollout: The newest batch of completions of this process (train or eval): a
            [`~rl_plugins.rollouts.Batch`] without images.

    Raises:
        TypeError: If `args` is of another class, or `dynamic_sampling` has a dataset without a length.
        ValueError: If the model has no LM head, or what is attached to it does not fit the config.
    """

    _tag_names = ["trl", "rl-plugins"]
    _name = "RL"
    config_class: ClassVar[type[RLConfig]] = RLConfig
    _turn_reward: Callable[..., Any] | None

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: RLConfig | None = None,
        *host_args: Any,
        signal: Signal | None = None,
        **host_kwargs: Any,
    ) -> None:
        args = complete_args(args, self.config_class, model)
        if args.off_policy_mask_threshold is not None:
            require_hooks(OFF_POLICY_MASK)
        if args.top_entropy_quantile < 1.0:
            require_hooks(TOP_ENTROPY)
        # Before the host loads anything: the signal looks for saved weights, and a value model copies the policy.
        self._make_parts(args, model, signal)
        named = dict(zip(HOST_ARGUMENTS, host_args, strict=False)) | host_kwargs
        given_weights = args.reward_weights
        if args.overlong_shaping:
            penalty = overlong_reward(LengthOptions.of(args), args.max_completion_length)
            reward_funcs = self._with_reward(reward_funcs, penalty, args, host_kwargs)
        if named.get("environment_factory") is not None:
            # Whether an environment pays for turns is known only once the host has made one.
            self._turn_reward = self._episodes.turn_rewards()
            reward_funcs = self._with_reward(reward_funcs, self._turn_reward, args, host_kwargs)

        given = inspect.signature(super().__init__).bind(model, reward_funcs, args, *host_args, **host_kwargs)
        check_inputs(given.arguments, args)
        loads_reference = args.beta != 0.0 and named.get("peft_config") is None
        with lent_name(model, named.get("processing_class"), loads_reference=loads_reference):
            # A copy of the list, since the host puts loaded reward models in place of their paths.
            super().__init__(model, list_reward_funcs(reward_funcs), args, *host_args, **host_kwargs)
        args.reward_weights = given_weights  # as given, for another trainer with the same config
        self._check_environments()
        self._check_host(args)
        self.train_dataset: Any = filling(self.train_dataset, args.generation_batch_size // self.num_generations)
        if self.use_vllm:  # the model may have come with heads
            hide_attachments_from_vllm(self.vllm_generation)

        self._policy_loss = args.make_policy_loss()
        self._warn_of_inert_loss()
        self._set_up_rollouts(args)
        self._attach(args)
        connect_balancing(self)

    @staticmethod
    def _with_reward(reward_funcs: Any, func: Any, args: RLConfig, host_kwargs: dict[str, Any]) -> list[Any]:
        """List the reward functions and, last, one of ours with weight 1."""
        listed = list_reward_funcs(reward_funcs)
        args.reward_weights = with_unit_weight(args.reward_weights, len(listed))
        classes = host_kwargs.get("reward_processing_classes")
        if classes is not None:
            host_kwargs["reward_processing_classes"] = [*(classes if isinstance(classes, list) else [classes]), None]
        return [*listed, func]

    def _check_environments(self) -> None:
        """Remove the reward function of turns again, if no environment pays for turns."""
        if self._turn_reward is None or pays_turns(self._all_environments()):
            return
        place = self.reward_funcs.index(self._turn_reward)
        self._turn_reward = None
        del self.reward_funcs[place], self.reward_func_names[place], self.reward_processing_classes[place]
        weights = self.reward_weights
        self.reward_weights: Tensor = torch.cat([weights[:place], weights[place + 1 :]])
        if not self.reward_funcs:
            names = ", ".join(sorted({type(environment).__name__ for environment in self._all_environments()}))
            raise ValueError(
                f"There is no reward: no reward_funcs are given, and {names} has neither a get_reward method nor a "
                "turn_reward attribute. Add one of them; see docs/rewards.md."
            )

    def _all_environments(self) -> list[Any]:
        """List the environments that the host has made so far."""
        pools = getattr(self, "_environment_pool", {})
        return [environment for pool in pools.values() for environment in pool]

    def _make_parts(self, args: RLConfig, model: Any, signal: Signal | None) -> None:
        """Make the signal, the sampling and the heads that only draft, and have them find saved weights."""
        self.signal = self.make_signal(args) if signal is None else signal
        if args.multi_objective_aggregation != "sum_then_normalize" and not self.signal.keeps_host_advantages:
            raise ValueError(
                f"multi_objective_aggregation={args.multi_objective_aggregation!r} (GDPO) is an advantage of TRL's "
                "own, and the critic's or the one named by `advantage` would take its place. Use GRPOVariantConfig "
                "without an advantage, or set multi_objective_aggregation='sum_then_normalize'."
            )
        self._episodes = Episodes()
        self._turn_reward = None
        self.sampling = self.make_sampling(args)
        if self.sampling is not None:
            self.sampling.options.check_signal(self.critic is not None)
        self.drafts: DraftHeads | None = None
        if args.speculative and (self.critic is None or self.critic.draft_options is None):
            self.drafts = DraftHeads(HeadOptions.of(args), temperature=args.temperature)
            self.drafts.prepare(model, (args.model_init_kwargs or {}).get("revision"))
        if self.critic is not None:
            trusted = {"trust_remote_code": args.trust_remote_code}
            self.critic.prepare(model, {**trusted, **(args.model_init_kwargs or {})})

    def _set_up_rollouts(self, args: RLConfig) -> None:
        """Set up the state of rollouts, before there is one."""
        self._entropy = EntropyControl(
            args.entropy_coef,
            adaptive=args.use_adaptive_entropy,
            target=args.entropy_target,
            delta=args.entropy_coef_delta,
            low=args.entropy_coef_min,
            high=args.entropy_coef_max,
        )
        self.phasic: PhasicSchedule | None = self.make_phasic(args)
        self._in_rollout = False
        self._rewards: tuple[Tensor, Tensor, Tensor] | None = None
        self._steps = StepRewards(Completed([]))
        self._chosen: list[list[int]] | None = None
        self._cut: Tensor | None = None
        self._table_rows = 0
        self._draft_counts: list[Tensor] = []
        self.last_rollout: Batch = {}
        self._buffered_inputs: list[Batch] | None = self._buffered_inputs

    def _attach(self, args: RLConfig) -> None:
        """Put the critic and the heads that only draft into the policy, after adapters and before the engine."""
        self._attached, self._renamed = TrainedAttachments(self), RenamedWeights(self)
        for learner in (self.critic, self.drafts):
            if learner is not None:
                self._attached.add(learner.attach(self.model, seed=args.seed), learner.learning_rate)
        if self.critic is not None:
            self.critic.copy()
            self.critic.place(self.accelerator.device)
            self.add_callback(AfterStep(self.critic.follow))
            custom: RolloutFunc | None = self.rollout_func
            self.rollout_func: RolloutFunc | None = custom and fill_empty(custom, self.eos_token_ids[0])
        self.decoder = make_decoder(DraftOptions.of(args))
        if self.decoder is not None:
            self.decoder.check(self.model)

    def _check_host(self, args: RLConfig) -> None:
        """Check the model, the tokenizer, the reward functions and the dataset that the host has loaded."""
        if not self.is_deepspeed_enabled:  # DeepSpeed's engine keeps float32 copies
            check_trainable_dtype(self.model)
        rows = self.train_dataset if isinstance(self.train_dataset, Dataset) else [{"prompt": None}]
        processor = self.processing_class
        check_tokenizer(self._tokenizer, None if getattr(processor, "chat_template", None) else rows[0]["prompt"])
        self._positions = learned_positions(self.model)
        if self.reward_func_names == [OVERLONG_NAME]:
            raise ValueError(
                "There are no reward functions, so overlong_shaping=True (preset='dapo' sets it) would train on the "
                "length penalty alone. Give reward_funcs, or an environment with get_reward."
            )
        dynamic = self.sampling is not None and self.sampling.options.dynamic_sampling
        if dynamic and isinstance(self.train_dataset, IterableDataset):
            raise TypeError(
                "dynamic_sampling=True draws further prompts by index, but the training dataset is a stream. Give a "
                "dataset with a length, or set dynamic_sampling=False."
            )

    # The parts of a trainer; override these methods to make another trainer

    def make_signal(self, args: Any) -> Signal:
        """Make the signal from a config; the model is not loaded yet."""
        return GroupSignal(VariantOptions())

    def make_sampling(self, args: Any) -> GroupSampling | None:
        """Make the sampling that replaces or rejects groups of equal rewards; none by default."""
        return None

    def make_phasic(self, args: Any) -> PhasicSchedule | None:
        """Make the schedule of a phasic mode; none by default."""
        return None

    def describe_method(self) -> Method:
        """Say how the policy is trained, for its card: its heads, and whether they drafted its rollouts."""
        method, heads = Method(self._name), MTPHeads.of(self.model)
        if heads is None:
            return method
        learnt_values = self.critic is not None and self.critic.draft_options is not None
        parts = [head_papers(heads)]
        if self.args.speculative:
            parts.append(("The heads drafted its rollouts.", ("speculative_decoding", "speculative_sampling")))
        return Method(method.name, parts=tuple(parts), code=(heads_loading(with_values=learnt_values),))

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write the card of the model, with method, papers and the code that loads it, see [`write_model_card`]."""
        write_model_card(self, self.describe_method(), super().create_model_card, model_name, *args, **kwargs)

    @property
    def critic(self) -> Critic | None:
        """The critic that is trained with the policy, if there is one."""
        return self.signal.critic

    @property
    def draft_heads(self) -> MTPHeads | None:
        """Heads that only draft; `None` where there are none, or the critic's heads draft."""
        return None if self.drafts is None else self.drafts.training.heads

    def add_callback(self, callback: Any) -> None:
        """Add a callback, if it is one of transformers' `Trainer`.

        Raises:
            TypeError: If it is a callback of another host, such as Lightning.
        """
        check_callback(callback)
        super().add_callback(callback)

    # Methods of the protocol `rl_plugins.signals.host.Host`

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.accelerator.device

    @property
    def training(self) -> bool:
        """Whether this is training, and not an evaluation."""
        return self.model.training

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        return self.state.global_step

    @property
    def group_size(self) -> int:
        """Completions per prompt."""
        return self.num_generations if self.training else self.num_generations_eval

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""
        return self.accelerator.reduce(x, reduction="sum")

    def gather_rows(self, x: Tensor) -> Tensor:
        """Join the rows of all ranks."""
        return self.accelerator.gather(x)

    def own_rows(self, x: Tensor) -> Tensor:
        """Pick this rank's rows from those of all ranks."""
        return x.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def gather_objects(self, x: Any) -> list[Any]:
        """Join lists of all ranks."""
        return gather_object(x)

    def log_probs(self, batch: Batch) -> Tensor:
        """Compute the log-probabilities of completions under the current policy, without gradient, batch by batch."""
        size = self.args.per_device_train_batch_size if self.training else self.args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return self._pass(self.model, batch, batch_size=size)[0]

    def _pass(self, model: nn.Module, batch: Batch, **settings: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute log-probabilities and, if asked, entropies (B, T) of completions, and the router loss (0-d)."""
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            **settings,
            **self._modality_inputs(batch),
        )

    def _modality_inputs(self, batch: Batch) -> dict[str, Any]:
        """Pick the keyword arguments of the log-probability pass that are in a batch (images and the like)."""
        accepted = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        return {name: x for name, x in batch.items() if name in accepted and name not in PASS_ARGUMENTS}

    # Rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        metrics, self._table_rows = self.signal.before_rollout(self), 0
        if self.critic is not None:
            self.critic.start()
        self._in_rollout = True
        try:
            batch = self._draw(inputs)
            if self.training and self.sampling is not None and self.sampling.options.samples:
                batch, sampled = self.sampling.sample(batch, self._draw_further, self._tokenizer.pad_token_id, self)
                metrics.add(sampled)
            hosts = batch["advantages"]
            prompts = [row.get("prompt", "") for row in inputs]
            metrics.add(self.signal.advantages(batch, batch["scores"], prompts, self))
        finally:
            self._in_rollout = False
        if batch["advantages"] is not hosts:
            self._tabulate(batch)
        if self._policy_loss is not None:
            self._policy_loss.mark(batch, self)
        log_metrics(self, metrics)
        batch = without(batch, SAMPLING_KEYS)
        images = self._modality_inputs(batch)  # large, and nothing that looks at values needs them
        self.last_rollout = cast(Batch, {name: x for name, x in batch.items() if name not in images})
        return without(batch, REWARD_KEYS)

    def _draw(self, inputs: list[dict[str, Any]]) -> Batch:
        """Get one batch from the host, with the scores of its completions."""
        self._draft_counts = []
        self._episodes.reset(self._all_environments())
        batch: Batch = super()._generate_and_score_completions(inputs)
        moves = self.sampling is not None and self.sampling.options.moves_rows
        moves |= self._policy_loss is not None and self._policy_loss.compares_groups
        if "num_images" in batch and moves:
            raise NotImplementedError(
                "dynamic_sampling, replay_buffer_size and policy losses that compare groups move completions to other "
                "rows or batches. Images are not moved yet. Leave these options out for prompts with images."
            )
        # Only here, since ranks may have taken different numbers of turns. A rollout function leaves no counts.
        if self._draft_counts:
            log_metrics(self, draft_metrics(self.sum_over_ranks(torch.stack(self._draft_counts).sum(0))))
        assert self._rewards is not None
        scores, task_scores, rewards = self._rewards
        batch["scores"] = self.own_rows(scores)
        weights = self.reward_weights.to(rewards.device)
        log_metrics(self, pay(batch, self.own_rows(rewards), weights, self.reward_func_names, self._steps, self))
        if self._cut is not None:
            batch["truncated"] = self._cut
        rows = torch.arange(len(scores), device=scores.device) + self._table_rows
        batch["table_row"], self._table_rows = self.own_rows(rows), self._table_rows + len(scores)
        if self.sampling is not None and self.sampling.options.samples:
            self.sampling.mark(batch, scores, task_scores, self)
        return batch

    def _draw_further(self, groups: int, draw: int) -> Batch:
        """Get a batch of further prompts from the host."""
        return self._draw(self._further_prompts(groups, draw))

    def _further_prompts(self, groups: int, draw: int) -> list[dict[str, Any]]:
        """Draw rows of the dataset for some groups of this rank; a resumed run draws the same rows."""
        rank, dataset = self.accelerator.process_index, self.train_dataset
        rows = further_rows(groups, len(dataset), self.args.seed, self._step, draw, rank)
        return [dict(dataset[i]) for i in rows for _ in range(self.group_size)]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if not self._episodes.playing:
            return self._generate_turn(prompt_ids, *args, **kwargs)
        over = [self._episodes.is_over(row) for row in self._episodes.waiting()]
        images = any(args[:2])  # or what a processor makes of them
        if images or not any(over):  # an episode with images makes one more turn, which earns nothing
            return self._generate_turn(prompt_ids, *args, **kwargs)
        going = [ids for ids, done in zip(prompt_ids, over, strict=True) if not done]
        made, logprobs = self._generate_turn(going, *args, **kwargs) if going else ([], [])
        of_rows = iter(made)
        turns = [[] if done else next(of_rows) for done in over]
        if logprobs is not None:
            of_rows = iter(logprobs)
            logprobs = [[] if done else next(of_rows) for done in over]
        return turns, logprobs

    def _generate_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if not self.use_vllm:  # vLLM's engine has limits of its own
            check_lengths(prompt_ids, self.max_completion_length, self._positions)
        critic, foreign = self.critic, self.use_vllm or self.use_transformers_continuous_batching
        saves = critic is not None and self._in_rollout and not foreign
        with critic.generating(self.model, self.decoder) if saves and critic else nullcontext():
            if self.decoder is None:
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            from rl_plugins.rollouts.speculative.decoder import speculating

            with speculating(self.model, self.decoder):
                result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            output = self.decoder.last
            assert output is not None and output.statistics is not None
            self._draft_counts.append(torch.tensor(output.statistics.counts, device=self.device))
            return result

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
        critic, saves = self.critic, self._in_rollout and model is self.model
        with critic.scoring(logits_to_keep) if saves and critic else nullcontext():
            return host_pass(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        output = super()._generate(prompts)
        completion_ids, self._chosen = output[1], output[2]
        self._cut = self._cut_episodes(completion_ids, output[5])
        return output

    def _cut_episodes(self, completion_ids: list[list[int]], columns: Mapping[str, Any]) -> Tensor | None:
        """Find the rows (B,) whose episode goes on after their last token, if the signal bootstraps there; `None` if
        no rank has such rows. A rollout function marks them by its columns `truncated` and `terminated`."""
        bootstraps = self.signal.bootstrap_truncated
        if bootstraps is False or (bootstraps is None and self.environments is None and self.rollout_func is None):
            return None
        ends, rows_of = [*self.eos_token_ids, self._tokenizer.pad_token_id], list(enumerate(completion_ids))
        says = columns.get("truncated") or [self._episodes.is_truncated(row) for row, _ in rows_of]
        # If nothing says so, an episode goes on whose completion has no end-of-text token.
        over = columns.get("terminated") or [self._episodes.is_over(row) or ids[-1] in ends for row, ids in rows_of]
        cut = [said or (bool(bootstraps) and not done) for said, done in zip(says, over, strict=True)]
        rows = torch.tensor(cut, device=self.device)
        return rows if self.sum_over_ranks(rows.sum().view(1)) > 0 else None

    def _tool_call_loop(
        self, prompts: Any, prompt_ids: Any, completion_ids: Any, completions: Any, logprobs: Any, *args: Any
    ) -> Any:
        self._episodes.begin(self.environments, completions, self._sync_tool_dicts, self._async_tool_dicts)
        try:
            output = super()._tool_call_loop(prompts, prompt_ids, completion_ids, completions, logprobs, *args)
        finally:
            self._episodes.end()
        if self._turn_reward is None and pays_turns(self.environments or []):
            names = ", ".join(sorted({type(each).__name__ for each in self.environments if pays_turns([each])}))
            raise ValueError(
                f"{names} had no turn_reward when it was made and has one now, so what it pays would be lost. Set "
                "turn_reward = None in the class or in __init__."
            )
        tool_mask, _, completion_ids, logprobs = output[:4]
        self._episodes.drop_last_observation(completion_ids, logprobs, chosen=tool_mask)
        return output

    @contextmanager
    def _checked_rewards(self, completion_ids: list[list[int]]) -> Iterator[None]:
        """Replace the reward functions inside the block by wrappers that check arguments and results."""
        self._steps = StepRewards(Completed(completion_ids, self._chosen, self._tokenizer))
        given, step = self.reward_funcs, self.step
        moment = f" in step {step + 1}" if self.training else f" in the evaluation after step {step}"
        self.reward_funcs: list[Any] = [
            func if isinstance(func, nn.Module) else checked(func, name, number, self._steps, moment)
            for number, (func, name) in enumerate(zip(given, self.reward_func_names, strict=True))
        ]
        try:
            yield
        finally:
            self.reward_funcs = given

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        with self._checked_rewards(completion_ids_list):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        *scores, rewards = score(rewards, self.reward_weights.to(rewards.device), self.reward_func_names)
        self._rewards = (scores[0], scores[1], rewards)
        # The host leaves NaN out of its means, but not infinity.
        return rewards.masked_fill(rewards.isinf(), torch.nan)

    def _tabulate(self, batch: Batch) -> None:
        """Put the advantages into the host's table of completions, with 0 for completions that are not used."""
        mask, advantages = loss_mask(batch), batch["advantages"]
        columns = [batch["table_row"], sequence_means(advantages, mask) if advantages.ndim == 2 else advantages]
        if "old_values" in batch:
            columns.append(initial_values(batch["old_values"][..., 0], batch["critic_mask"]))
        used = self.gather_rows(torch.stack([column.double() for column in columns], dim=1))
        used = used[used[:, 0] >= 0]  # replayed completions are in no table
        table = torch.zeros(self._table_rows, dtype=torch.float64, device=used.device)
        table[used[:, 0].long()] = used[:, 1]
        newest = self._logs["advantages"]
        for _ in range(min(len(table), len(newest))):
            newest.pop()
        newest.extend(table.tolist())
        if "old_values" in batch:
            self._logs["extra"][VALUE_COLUMN].extend(used[:, 2].tolist())

    # Batches

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if not self.training:
            return super()._prepare_inputs(generation_batch)
        if self.phasic is not None and self.phasic.auxiliary:
            return self.phasic.next_slice(self)
        self._start_epoch()
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        slices, new = cast(list[Batch], self._buffered_inputs), self._buffered_inputs is not before
        if new and self._policy_loss is not None and self._policy_loss.compares_groups:
            # The host has shuffled the batch; this loss needs the completions of a prompt in one slice.
            groups = torch.cat([batch["groups"] for batch in slices])
            self._buffered_inputs = slices = reordered(slices, torch.argsort(groups, stable=True))
            inputs = slices[self._step % self.args.steps_per_generation]
        if self.phasic is not None:
            # Copies, since the auxiliary phase adds a key that must not reach the policy's loss.
            self.phasic.policy_step([batch.copy() for batch in slices] if new else None)
        return inputs

    def _start_epoch(self) -> None:
        """Prepare a training micro-step; a subclass may reorder the slices for another pass over them."""

    def _num_items(self, inputs: Batch) -> Tensor:
        """Count the real tokens that a loss is averaged over: those of the accumulation window, as in TRL's `dapo`."""
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.training:
            items = items * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return items

    # Loss

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        num_items = self._num_items(inputs)

        def objective() -> tuple[Tensor, Metrics]:
            if self._policy_loss is None:
                return host_loss(model, inputs), Metrics()
            return self._objective(model, inputs, self._policy_loss, num_items)

        host_loss = super()._compute_loss
        loss, metrics = step_loss(
            inputs,
            num_items,
            self,
            objective=objective,
            log_probs=lambda: self._pass(model, inputs)[0],
            signal=self.signal,
            drafts=self.drafts,
            phasic=self.phasic,
        )
        log_metrics(self, metrics)
        return loss

    def _objective(
        self, model: nn.Module, inputs: Batch, loss: PolicyLoss, num_items: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Compute policy loss, KL, entropy bonus and router loss of a micro-batch, with its weight in the window."""
        logps, entropies, router_loss = self._pass(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        assert entropies is not None
        mask, window = loss_mask(inputs), self.current_gradient_accumulation_steps if self.training else 1
        top = None
        if self.top_entropy_quantile < 1.0:
            top = self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
        acted_on = mask if top is None else mask * top
        coefficient = self._entropy.coefficient
        total, metrics = online_loss(
            loss,
            logps,
            self._anchor(logps, inputs, loss),
            inputs["advantages"],
            mask,
            num_items=num_items,
            max_length=self.max_completion_length,
            weights=self._token_weights(logps, top, inputs, loss),
            scale=1.0 / window,
            ref_logps=inputs.get("ref_per_token_logps"),
            beta=0.0 if self.signal.kl_in_reward else self.beta,
            correct_kl=self.args.use_bias_correction_kl,
            kl_level=self.importance_sampling_level,
            entropies=entropies,
            entropy_coef=coefficient,
            entropy_mask=top,
            num_tokens=acted_on.sum().clamp(min=1.0) * window,
            batch={
                "groups": inputs.get("groups"),
                "sampler_weights": inputs.get("importance_sampling_ratio"),
                "prompt_weights": inputs.get("prompt_weights"),
                "reduce": self.sum_over_ranks,
            },
            reduce=self.sum_over_ranks,
            gather=self.gather_rows,
        )
        if self.training and self._entropy.enabled:
            self._entropy.observe(entropies, acted_on)
            if self.accelerator.sync_gradients:
                self._entropy.end_step(self.sum_over_ranks)
                self.entropy_coef = self._entropy.coef
                metrics["entropy_coef"] = torch.tensor(self._entropy.coef)
        if router_loss is not None:
            total = total + self.router_aux_loss_coef * router_loss / window
            metrics["aux_loss"] = self.accelerator.gather_for_metrics(router_loss.detach()).mean()
        return total, metrics

    def _anchor(self, logps: Tensor, inputs: Batch, loss: PolicyLoss) -> Tensor:
        """Return the log-probabilities of the policy in the denominator of the ratio."""
        old_logps = inputs.get("old_per_token_logps", logps.detach())
        sampler = inputs.get("sampling_per_token_logps")
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        if not loss.entry.around_sampler or sampler is None or corrected:
            return old_logps
        return torch.where(sampler.isnan(), old_logps, sampler)  # vLLM leaves some out

    def _token_weights(self, logps: Tensor, top: Tensor | None, inputs: Batch, loss: PolicyLoss) -> Tensor | None:
        """Return the factors that the host puts on its own loss per token; `None` for none."""
        mask, weights = loss_mask(inputs), []
        if self.off_policy_mask_threshold is not None:
            advantages = inputs["advantages"]
            sampler = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps", logps.detach()))
            weights.append(
                self.get_off_policy_mask(
                    advantages if advantages.ndim == 2 else advantages[:, None],
                    logps,
                    sampler,
                    mask,
                    self.off_policy_mask_threshold,
                )
            )
        if top is not None:
            weights.append(top)
        if self.use_vllm and self.vllm_importance_sampling_correction and not loss.corrects_sampler:
            weights.append(inputs["importance_sampling_ratio"])
        return torch.stack([w.expand_as(logps) for w in weights]).prod(dim=0) if weights else None

    @property
    def _learns_off_policy(self) -> bool:
        """Whether the policy can ever differ from the one in the denominator of the loss's ratio."""
        args, loss = self.args, self._policy_loss
        if args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations):
            return True
        if self.sampling is not None and self.sampling.replay_buffer is not None:
            return True
        if not self.use_vllm or loss is None:
            return False
        # With vLLM, the ratios of some losses have the engine's log-probabilities in the denominator.
        return loss.corrects_sampler if self.vllm_importance_sampling_correction else loss.entry.around_sampler

    def _warn_of_inert_loss(self) -> None:
        args, loss = self.args, self._policy_loss
        named = args.policy_loss is not None
        if loss is None or not named or self._learns_off_policy or not self.accelerator.is_main_process:
            return
        message = inert_message(
            loss,
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}, steps_per_generation="
            f"{args.steps_per_generation} and num_iterations={self.num_iterations}",
            "Set num_iterations above 1, or steps_per_generation to a larger multiple of gradient_accumulation_steps.",
        )
        if message is not None:
            warnings.warn(message, stacklevel=3)

    # Training

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, after a check of the launcher and of the checkpoint to resume from.

        Raises:
            FileNotFoundError: If the checkpoint is not there, or was written by another trainer.
            ValueError: If DeepSpeed is asked for in a process that no launcher has started.
        """
        check_start(self, resume_from_checkpoint, self._own_files())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the host's step. While only the critic learns, weight decay is off: it acts even without a gradient."""
        if self.signal.warmup_steps:
            pause_weight_decay(self.optimizer, self.step < self.signal.warmup_steps)
        loss = super().training_step(*args, **kwargs)
        totals = None if self.critic is None else self.critic.gradient_totals(self)
        if totals is not None:
            log_metrics(self, gradient_metrics(totals))
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the host's optimizer, then move attached modules into groups with learning rates of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            self._attached.split_groups(optimizer)
        return optimizer

    # Checkpoints

    def _own_files(self) -> dict[str, bool]:
        """Return the files that this trainer writes into a checkpoint, and whether they have to be there."""
        ours = rollout_file(Path(), self.accelerator.process_index).name
        shared = {STATE_NAME: True} if self.signal.state_dict() else {}
        # The first rank's file marks checkpoints of online trainers; other ranks may not see it.
        return {**self._attached.files(), **shared, FIRST_ROLLOUT: False, ours: True}

    def _rank_state(self) -> dict[str, Any]:
        cycle = self.args.steps_per_generation * self.num_iterations
        return {
            "step": self._step,
            # Between two generations the rest of the batch is still to be learnt from.
            "buffered_inputs": self._buffered_inputs if self._step % cycle else None,
            "draft_length": None if self.decoder is None else self.decoder.state_dict(),
            "phasic": None if self.phasic is None else self.phasic.state_dict(),
            "sampling": None if self.sampling is None else self.sampling.state_dict(),
            "signal": self.signal.rank_state(),
        }

    def _load_rank_state(self, state: dict[str, Any]) -> None:
        self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
        self.signal.load_rank_state(state["signal"])
        kept = (self.decoder, "draft_length"), (self.phasic, "phasic"), (self.sampling, "sampling")
        for part, name in kept:
            if part is not None and state.get(name):
                part.load_state_dict(state[name])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = checkpoint_folder(self, trial)
        torch.save(self._rank_state(), rollout_file(folder, self.accelerator.process_index))
        shared = self.signal.state_dict()
        if shared and self.args.should_save:
            torch.save(shared, folder / STATE_NAME)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Called on every backend, while DeepSpeed skips _load_from_checkpoint.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        # Not map_location=device: accelerate calls a rank's CPU "cpu:0", which torch does not know.
        ours = torch.load(rollout_file(folder, self.accelerator.process_index), map_location="cpu", weights_only=True)
        self._load_rank_state(send_to_device(ours, self.device))
        if self.signal.state_dict():
            self.signal.load_state_dict(torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # A copy, since save_pretrained deletes our keys from the dictionary that it is given.
        super()._save(output_dir, state_dict=None if state_dict is None else dict(state_dict))
        self._attached.save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._renamed.load(resume_from_checkpoint)
        self._attached.load_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._renamed.load(str(self.state.best_model_checkpoint))
        self._attached.load_best(str(self.state.best_model_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self._attached.forgive(load_result.missing_keys)
        if not self._renamed.found(load_result):
            super()._issue_warnings_after_load(load_result)
