"""GRPO's trainer with a policy loss of our own, and what every trainer built on it needs."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from rl_plugins.functional.alignment import completion_labels, completion_states
from rl_plugins.functional.policy_losses.aggregation import prompt_weights
from rl_plugins.functional.ratios import LOG_PROB_LIMIT, within_clamp
from rl_plugins.hooks import OFF_POLICY_MASK, TOP_ENTROPY, require_hooks
from rl_plugins.nn.head_run import HeadRun
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sources import check_lengths, check_tokenizer, learned_positions
from rl_plugins.nn.token_loss import logit_divisor
from rl_plugins.rollouts.rewards import checked, list_reward_funcs
from rl_plugins.signals.online import draft_metrics, reference_kl
from rl_plugins.signals.policy import averaged, clip_shares, inert_message, policy_loss
from rl_plugins.trl.attachments import AttachmentTrainer, attach_heads, find_saved_heads
from rl_plugins.trl.few_prompts import filling
from rl_plugins.trl.host import hide_critics_from_vllm
from rl_plugins.trl.reference import lent_name

if TYPE_CHECKING:
    from rl_plugins.rollouts.speculative.decoder import SpeculativeDecoder

Batch = dict[str, Any]

HOST_ARGUMENTS = list(inspect.signature(GRPOTrainer.__init__).parameters)[4:]
"""Names of the host's arguments after model, reward functions and args."""
HOST_CLIP_METRICS = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")


class PolicyLossTrainer(AttachmentTrainer, GRPOTrainer):
    """`GRPOTrainer` whose policy loss may come from `functional/`; base of our online trainers.

    The host still computes everything around the policy loss (log-probabilities, KL term, entropy bonus, router loss):
    it is given advantages of zero, so its own policy term vanishes, and ours is added. Off-policy mask, entropy
    quantile and the correction for vLLM weigh our loss as they weigh the host's.

    Also here: the scores of a batch before the host turns them into advantages, and exact resumption in the middle of
    a generation batch.
    """

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *host_args: Any, **host_kwargs: Any) -> None:
        if args.off_policy_mask_threshold is not None:
            require_hooks(OFF_POLICY_MASK)
        if args.top_entropy_quantile < 1.0:
            require_hooks(TOP_ENTROPY)
        named = dict(zip(HOST_ARGUMENTS, host_args, strict=False)) | host_kwargs
        loads_reference = args.beta != 0.0 and named.get("peft_config") is None
        with lent_name(model, named.get("processing_class"), loads_reference=loads_reference):
            # A copy of the list, since the host puts loaded reward models in place of their paths.
            super().__init__(model, list_reward_funcs(reward_funcs), args, *host_args, **host_kwargs)
        rows = self.train_dataset if isinstance(self.train_dataset, Dataset) else [{"prompt": None}]
        processor = self.processing_class
        check_tokenizer(self._tokenizer, None if getattr(processor, "chat_template", None) else rows[0]["prompt"])
        self._positions = learned_positions(self.model)
        self.train_dataset: Any = filling(self.train_dataset, args.generation_batch_size // self.num_generations)
        if self.use_vllm:  # the model may have come with heads or native layers
            hide_critics_from_vllm(self.vllm_generation)
        self._policy_loss = args.make_policy_loss()
        self._warn_of_inert_loss()
        self._host_inputs: Batch | None = None
        self._loss_pass: tuple[Tensor, Tensor | None] | None = None
        self._scores: Tensor | None = None
        self.decoder: SpeculativeDecoder | None = None
        self.draft_heads: MTPHeads | None = None
        self._draft_counts: list[Tensor] = []
        if args.speculative and not self._drafts_with_critic:
            self.draft_heads = attach_heads(self, find_saved_heads(model, args))
            self.draft_heads.draft_only()
            if args.mtp_loss_coef:
                self._draft_divisor = logit_divisor(self.model.config, self.temperature)
            else:
                self.draft_heads.requires_grad_(False)  # DDP would wait for their gradient
            self._set_up_decoder()

    # Speculative rollouts

    @property
    def _drafts_with_critic(self) -> bool:
        """Whether the heads that draft are a critic's, which are attached and trained as such."""
        return False

    def _set_up_decoder(self) -> None:
        """Decode speculatively from now on, if the options say so; the heads are there."""
        args = self.args
        if args.speculative:
            from rl_plugins.rollouts.speculative.decoder import SpeculativeDecoder  # see rl_plugins.rollouts

            self.decoder = SpeculativeDecoder(args.num_draft_tokens, draft_cost=args.draft_cost, values=False)
            self.decoder.check(self.model)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if not self.use_vllm:  # whose engine has limits of its own
            check_lengths(prompt_ids, self.max_completion_length, self._positions)
        if self.decoder is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        from rl_plugins.rollouts.speculative.decoder import speculating

        with speculating(self.model, self.decoder):
            result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        output, self.decoder.recorder = self.decoder.last, None
        assert output is not None and output.statistics is not None
        self._draft_counts.append(torch.tensor(output.statistics.counts, device=self.accelerator.device))
        return result

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        self._draft_counts = []
        output = super()._generate_and_score_completions(inputs)
        self._weigh_prompts(output)
        # Here, since ranks may have taken different numbers of turns; none, where a rollout function generates.
        if self._draft_counts:
            self._log_metrics(draft_metrics(self._sum_over_ranks(torch.stack(self._draft_counts).sum(0))))
        return output

    @contextmanager
    def _drafts_learning(self, inputs: Batch) -> Iterator[HeadRun | None]:
        """Take the token loss of heads that draft in the forward pass inside the block."""
        if self.draft_heads is None or not self.args.mtp_loss_coef:
            yield None
            return
        num_tokens, mask = inputs["completion_ids"].shape[1], self._loss_mask(inputs)
        labels = completion_labels(
            inputs["prompt_ids"], inputs["completion_ids"], mask, self.draft_heads.config.num_heads
        )
        with self.draft_heads.running(
            partial(completion_states, num_tokens=num_tokens),
            lm_head=self._lm_head(),
            labels=labels,
            divisor=self._draft_divisor,
            detach_tokens=self.args.mtp_detach_trunk or self._warming_up,
            with_values=False,
        ) as run:
            yield run

    # Rewards

    @contextmanager
    def _checked_rewards(self, num_completions: int) -> Iterator[None]:
        """Put stand-ins that check arguments and results in place of the reward functions inside the block."""
        given, step = self.reward_funcs, self.state.global_step
        moment = f" in step {step + 1}" if self.model.training else f" in the evaluation after step {step}"
        self.reward_funcs: list[Any] = [
            func if isinstance(func, nn.Module) else checked(func, name, num_completions, moment)
            for func, name in zip(given, self.reward_func_names, strict=True)
        ]
        try:
            yield
        finally:
            self.reward_funcs = given

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        with self._checked_rewards(len(prompts)):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        infinite = rewards.isinf()
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        unusable = rewards.isnan().all(dim=1) | infinite.any(dim=1)
        # Of all ranks, NaN where a completion cannot be scored.
        self._scores = weighted.masked_fill(unusable, torch.nan)
        # The host leaves NaN out of its means, but not infinity.
        return rewards.masked_fill(infinite, torch.nan)

    def _own_rows(self, x: Tensor) -> Tensor:
        """This rank's rows of a tensor gathered from all ranks."""
        num_rows = len(x) // self.accelerator.num_processes
        start = self.accelerator.process_index * num_rows
        return x[start : start + num_rows]

    # Log-probabilities

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logps, entropies, router_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._host_inputs is not None:
            logps = self._hold_host_ratios(logps, self._host_inputs)
            self._loss_pass = (logps, entropies)
        return logps, entropies, router_loss

    @staticmethod
    def _hold_host_ratios(logps: Tensor, inputs: Batch) -> Tensor:
        """Keep the ratios that the host is about to take exponentials of inside the clamp of our own losses.

        The host has no clamp: one forced or filtered token makes its loss NaN, even at an advantage of 0.
        """
        logps = logps.clamp(min=-LOG_PROB_LIMIT)
        if inputs.get("old_per_token_logps") is not None:
            inputs["old_per_token_logps"] = within_clamp(inputs["old_per_token_logps"], logps)
        if inputs.get("ref_per_token_logps") is not None:
            reference = inputs["ref_per_token_logps"].clamp(min=-LOG_PROB_LIMIT)
            # The ratio of the KL term is the other way round, and so are the signs.
            inputs["ref_per_token_logps"] = -within_clamp(-reference, -logps)
        return logps

    def _modality_inputs(self, batch: Batch) -> Batch:
        """Keyword arguments of the log-probability pass that a batch carries (images and the like)."""
        accepted = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        own = ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size")
        return {name: batch[name] for name in accepted if name in batch and name not in own}

    def _logps(self, model: nn.Module, batch: Batch, batch_size: int | None = None) -> Tensor:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        return self._get_per_token_logps_and_entropies(
            model, ids, mask, batch["completion_ids"].shape[1], batch_size, **self._modality_inputs(batch)
        )[0]

    def _score(self, batch: Batch) -> Tensor:
        """Log-probabilities of a batch under the current policy, without gradient, in training-sized chunks."""
        train = self.model.training
        size = self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            return self._logps(self.model, batch, size)

    # Loss

    @property
    def _learns_off_policy(self) -> bool:
        """Whether the loss ever sees a policy that is not the one its ratio starts from."""
        args, loss = self.args, self._policy_loss
        if args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations):
            return True
        # With vLLM, these two start from the engine's log-probabilities.
        corrected = self.vllm_importance_sampling_correction
        return bool(self.use_vllm and loss is not None and loss.name == ("vespo" if corrected else "dppo"))

    def _warn_of_inert_loss(self) -> None:
        if self._policy_loss is None or self._learns_off_policy or not self.accelerator.is_main_process:
            return
        args = self.args
        message = inert_message(
            self._policy_loss,
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}, steps_per_generation="
            f"{args.steps_per_generation} and num_iterations={self.num_iterations}",
            "Set num_iterations above 1, or steps_per_generation to a larger multiple of gradient_accumulation_steps.",
        )
        if message is not None:
            warnings.warn(message, stacklevel=2)

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _weigh_prompts(self, batch: Batch) -> None:
        """Put `prompt_weights` (B,) into a batch whose groups are whole, over all ranks, where the loss needs them: as
        rows of the batch they survive the host's shuffle and split."""
        if self._policy_loss is not None and self._policy_loss.aggregation == "prompt":
            lengths = self.accelerator.gather(self._loss_mask(batch).sum(dim=1))
            batch["prompt_weights"] = self._own_rows(prompt_weights(lengths, self._group_size))

    def _loss_mask(self, batch: Batch) -> Tensor:
        mask = batch["completion_mask"]
        return mask * batch["tool_mask"] if "tool_mask" in batch else mask

    def _num_items(self, inputs: Batch) -> Tensor:
        """Real tokens that a loss is averaged over: the accumulation window's, over all ranks, as DAPO counts them."""
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            items = items * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return items

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        with self._drafts_learning(inputs) as run:
            loss = self._objective(model, inputs)
        return loss if run is None else loss + self._token_term(run, self._num_items(inputs))

    @property
    def _warming_up(self) -> bool:
        """Whether the policy stays as it is for now."""
        return False

    def _objective(self, model: nn.Module, inputs: Batch) -> Tensor:
        """The loss, without the token loss of heads that draft."""
        own_kl = self._policy_loss is not None and self._policy_loss.aggregation == "prompt"
        self._host_inputs = dict(inputs)
        if self._policy_loss is not None:
            self._host_inputs["advantages"] = torch.zeros_like(inputs["advantages"])
        try:
            with self._host_beta(0.0 if own_kl else self.beta):
                loss = super()._compute_loss(model, self._host_inputs)
            assert self._loss_pass is not None
            logps, entropies = self._loss_pass
        finally:
            self._host_inputs = self._loss_pass = None
        if own_kl and self.beta != 0.0:
            loss = loss + self._kl_term(logps, inputs)
        return loss if self._policy_loss is None else loss + self._policy_term(logps, entropies, inputs)

    def _policy_term(self, logps: Tensor, entropies: Tensor | None, inputs: Batch) -> Tensor:
        loss = self._policy_loss
        assert loss is not None
        mask, advantages = self._loss_mask(inputs), inputs["advantages"]
        term, cut = policy_loss(
            loss,
            logps,
            self._anchor(logps, inputs),
            advantages,
            mask,
            weights=self._token_weights(logps, entropies, inputs),
            num_items=self._num_items(inputs),
            max_length=self.max_completion_length,
            batch={
                "groups": inputs.get("groups"),
                "sampler_weights": inputs.get("importance_sampling_ratio"),
                "prompt_weights": inputs.get("prompt_weights"),
                "reduce": self._sum_over_ranks,
            },
        )
        self._replace_clip_metrics(cut, advantages, mask)
        return self._share_of_window(term)

    def _kl_term(self, logps: Tensor, inputs: Batch) -> Tensor:
        """The KL term, averaged in a way that no loss type of the host has; else as the host's."""
        assert self._policy_loss is not None
        mask = self._loss_mask(inputs)
        divergence = reference_kl(
            logps,
            inputs.get("old_per_token_logps", logps.detach()),
            inputs["ref_per_token_logps"],
            mask,
            correct=self.args.use_bias_correction_kl,
            level=self.importance_sampling_level,
        )
        self._log_mean("kl", divergence, mask)
        term = averaged(
            self._policy_loss,
            divergence,
            mask,
            num_items=self._num_items(inputs),
            max_length=self.max_completion_length,
            batch=inputs,
        )
        return self._share_of_window(self.beta * term)

    def _share_of_window(self, term: Tensor) -> Tensor:
        """A term of the loss of one micro-batch, as its part of the accumulation window."""
        if self._entropy_bonus_enabled:
            # The host has logged its share, which is the KL term.
            self._metrics[self._mode]["policy_loss"][-1] += self.accelerator.gather(term.detach()).mean().item()
        if self._policy_loss is not None and self._policy_loss.aggregation != "token" and self.model.training:
            term = term / self.current_gradient_accumulation_steps
        return term

    def _anchor(self, logps: Tensor, inputs: Batch) -> Tensor:
        """Log-probabilities that the ratio starts from."""
        old_logps = inputs.get("old_per_token_logps")
        old_logps = logps.detach() if old_logps is None else old_logps
        sampler = inputs.get("sampling_per_token_logps")
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        if self._policy_loss is None or self._policy_loss.name != "dppo" or sampler is None or corrected:
            return old_logps
        # DPPO's trust region is around the engine that sampled (2602.04879, section 5.2). vLLM leaves some out.
        return torch.where(sampler.isnan(), old_logps, sampler)

    def _token_weights(self, logps: Tensor, entropies: Tensor | None, inputs: Batch) -> Tensor | None:
        """The factors that the host puts on its own loss per token; `None` for none."""
        mask, weights = self._loss_mask(inputs), []
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
        if self.top_entropy_quantile < 1.0:
            weights.append(self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile))
        corrects_itself = self._policy_loss is not None and "sampler_weights" in self._policy_loss.batch_arguments
        if self.use_vllm and self.vllm_importance_sampling_correction and not corrects_itself:
            weights.append(inputs["importance_sampling_ratio"])
        return torch.stack([w.expand_as(logps) for w in weights]).prod(dim=0) if weights else None

    def _replace_clip_metrics(self, cut: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """What the host logged about clipping is about advantages of zero."""
        metrics = self._metrics[self._mode]
        for name in HOST_CLIP_METRICS:
            if metrics.get(f"clip_ratio/{name}"):
                metrics[f"clip_ratio/{name}"].pop()
        means, rows = clip_shares(cut, advantages, mask, reduce=self._sum_over_ranks)
        rows = self.accelerator.gather(rows)
        self._log_metrics({**means, "clip_ratio/low_min": rows[:, 0].min(), "clip_ratio/high_max": rows[:, 1].max()})

    def _without_kl_term(self) -> AbstractContextManager[None]:
        """Leave the KL out of the loss where the rewards carry it."""
        return self._host_beta(0.0 if self.args.kl_in_reward else self.beta)

    @contextmanager
    def _host_beta(self, beta: float) -> Iterator[None]:
        """Have the host compute its loss with this coefficient of the KL term."""
        own: float = self.beta
        self.beta: float = beta
        try:
            yield
        finally:
            self.beta = own

    # Metrics

    def _retable_advantages(self, advantages: Tensor) -> None:
        """Put our advantages, one per completion of all ranks, in place of the newest ones of the host's table."""
        table = self._logs["advantages"]
        for _ in range(min(len(advantages), len(table))):
            table.pop()
        table.extend(advantages.tolist())

    # Checkpoints

    def _rollout_state(self) -> dict[str, Any]:
        cycle = self.args.steps_per_generation * self.num_iterations
        return {
            "step": self._step,
            # Between two generations the rest of the batch is still to be learnt from.
            "buffered_inputs": self._buffered_inputs if self._step % cycle else None,
            "draft_length": None if self.decoder is None else self.decoder.state_dict(),
        }

    def _load_rollout_state(self, state: dict[str, Any]) -> None:
        self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
        if self.decoder is not None and state.get("draft_length"):
            self.decoder.load_state_dict(state["draft_length"])

    def _own_files(self) -> dict[str, bool]:
        # The first rank's file marks checkpoints of online trainers; other ranks may not see it.
        return {**super()._own_files(), "rollout_0.pt": False, self._rollout_file(Path()).name: True}

    def _check_checkpoint(self, directory: Path) -> None:
        path = self._rollout_file(directory)
        if not path.is_file() and any(directory.glob(path.with_stem("rollout_*").name)):
            raise FileNotFoundError(
                f"{directory} has no {path.name}. Resume with as many processes as wrote the checkpoint, from storage "
                "that all of them see."
            )
        super()._check_checkpoint(directory)

    def _rollout_file(self, directory: Path) -> Path:
        return directory / f"rollout_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Ours first: a checkpoint that has the host's files is then whole, even if the job dies in between.
        directory = self._checkpoint_dir(trial)
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self._rollout_state(), self._rollout_file(directory))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._rollout_file(Path(checkpoint))
        # Not map_location=device: torch does not know the "cpu:0" that accelerate names a rank's CPU.
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._load_rollout_state(send_to_device(state, self.accelerator.device))
