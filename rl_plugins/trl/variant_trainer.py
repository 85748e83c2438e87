"""GRPO's trainer with other advantages, policy losses and sampling."""

import math
import random
import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_plugins.functional.divergences import kl_k1
from rl_plugins.functional.group_advantages import batch_normalized, group_normalized
from rl_plugins.functional.masking import masked_mean
from rl_plugins.functional.returns import discounted_returns
from rl_plugins.functional.rewards import kl_shaped_rewards, overlong_penalty, terminal_rewards
from rl_plugins.functional.sampling import informative_groups
from rl_plugins.functional.traces import lambda_trace
from rl_plugins.functional.value_tracking import forget_factor
from rl_plugins.modules.value_tracker import ValueTracker, prompt_key
from rl_plugins.objectives.group_advantages import group_advantages
from rl_plugins.trl.batches import Batch, join_rows, num_rows, reordered, select_rows
from rl_plugins.trl.heads_trainer import complete_args
from rl_plugins.trl.policy_trainer import PolicyLossTrainer
from rl_plugins.trl.replay import ReplayBuffer
from rl_plugins.trl.variant_config import GRPOVariantConfig

TRACKER_NAME = "value_tracker.json"
OVERLONG_NAME = "overlong_penalty"
# Columns of a batch that only the trainer reads; they are gone before the loss.
SCORES, INFORMATIVE, TABLE_ROW = "scores", "informative", "table_row"


class GRPOVariantTrainer(PolicyLossTrainer):
    r"""
    Trainer for the variants of GRPO: an advantage, a policy loss and a way of sampling, each by name, or all of a
    paper's by `preset`.

    Takes the arguments of [`~trl.GRPOTrainer`], with a [`GRPOVariantConfig`] for `args`. Whatever a variant does not
    change is TRL's: KL term, entropy bonus, router loss, masks, vLLM, logging.

    Example:

    ```python
    from rl_plugins.trl import GRPOVariantConfig, GRPOVariantTrainer

    trainer = GRPOVariantTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=GRPOVariantConfig("qwen3-dapo", preset="dapo"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Raises:
        TypeError: If `args` is not a `GRPOVariantConfig`, or `dynamic_sampling` has a dataset without a length.
    """

    _tag_names = ["trl", "grpo-variant"]
    _name = "GRPO variant"
    _paper = {
        "title": "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "id": "2402.03300",
        "citation": textwrap.dedent("""\
            @article{shao2024deepseekmath,
                title   = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
                author  = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and others},
                year    = 2024,
                journal = {arXiv preprint},
                eprint  = {arXiv:2402.03300},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: GRPOVariantConfig | None = None,
        *host_args: Any,
        **host_kwargs: Any,
    ) -> None:
        args = complete_args(args, GRPOVariantConfig, model, "GRPOVariant")
        if args.overlong_shaping:
            reward_funcs = with_overlong_penalty(reward_funcs, args)
            classes = host_kwargs.get("reward_processing_classes")
            if classes is not None:
                classes = classes if isinstance(classes, list) else [classes]
                host_kwargs["reward_processing_classes"] = [*classes, None]
        super().__init__(model, reward_funcs, args, *host_args, **host_kwargs)
        if args.dynamic_sampling and not hasattr(self.train_dataset, "__len__"):
            raise TypeError(
                "dynamic_sampling=True draws further prompts by index, but the training dataset is a stream. Give a "
                "dataset with a length, or set dynamic_sampling=False."
            )
        self.value_tracker = ValueTracker() if args.advantage == "value_tracker" else None
        self.replay_buffer = None
        if args.replay_buffer_size:
            seed = args.seed + self.accelerator.process_index
            self.replay_buffer = ReplayBuffer(args.replay_buffer_size, args.replay_max_age, seed)
        self._judged: Tensor | None = None
        self._table_rows = 0
        self._unabsorbed: dict[str, Any] | None = None

    # Rewards

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        assert self._scores is not None
        self._judged = self._scores
        if self.args.overlong_shaping:
            # Whether a group teaches something, or a completion can be scored at all, is for the task's rewards to
            # say, not for lengths.
            lengths = [name == OVERLONG_NAME for name in self.reward_func_names]
            of_lengths = torch.tensor(lengths, device=rewards.device)
            weighted = (rewards * self.reward_weights.to(rewards.device))[:, ~of_lengths]
            unscorable = weighted.isnan().all(dim=1) | self._scores.isnan()
            self._judged = weighted.nansum(dim=1).masked_fill(unscorable, torch.nan)
            self._scores = self._scores.masked_fill(unscorable, torch.nan)
            rewards = rewards.masked_fill(unscorable[:, None] & of_lengths, torch.nan)
        return rewards

    # Sampling

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        self._absorb_rewards()
        self._table_rows = 0
        batch = self._draw(inputs)
        if self.model.training and self.args.samples:
            batch = self._sample(batch)
        if self.args.advantage is not None:
            self._set_advantages(batch, inputs)
        if self.args.policy_loss == "gvpo":
            batch["groups"] = self._group_ids(num_rows(batch)).to(batch["advantages"].device)
        return {key: value for key, value in batch.items() if key not in (SCORES, INFORMATIVE, TABLE_ROW)}

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _group_ids(self, rows: int) -> Tensor:
        return (self.accelerator.process_index * rows + torch.arange(rows)) // self._group_size

    def _draw(self, inputs: list[dict[str, Any]]) -> Batch:
        """One batch from the host, with the scores of its completions and whether their groups are informative."""
        batch = super()._generate_and_score_completions(inputs)
        if "num_images" in batch and self.args.moves_rows:
            raise NotImplementedError(
                "dynamic_sampling, replay_buffer_size and policy_loss='gvpo' move completions within and between "
                "batches, which images do not follow yet. Choose others for prompts with images."
            )
        assert self._scores is not None and self._judged is not None
        informative = informative_groups(self._judged, self._group_size).repeat_interleave(self._group_size)
        rows = torch.arange(len(self._scores), device=self._scores.device) + self._table_rows
        self._table_rows += len(self._scores)
        batch[SCORES], batch[INFORMATIVE], batch[TABLE_ROW] = map(self._own_rows, (self._scores, informative, rows))
        if self.replay_buffer is not None and "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = self._score(batch)
        return batch

    def _sample(self, batch: Batch) -> Batch:
        args, size = self.args, num_rows(batch)
        first = batch[INFORMATIVE].sum().float() / self._group_size
        self._log_metrics({"sampling/informative_groups": self._share_of_groups(first, size)})
        if args.dynamic_sampling:
            batch = self._fill_with_fresh(batch)
        if self.replay_buffer is not None:
            batch = self._fill_with_replayed(batch)
        missing = (~batch[INFORMATIVE]).sum().float() / self._group_size
        self._log_metrics({"sampling/unfilled_groups": self._sum_over_ranks(missing.view(1))[0]})
        if args.reject_uniform:
            reject = ~batch[INFORMATIVE]
            batch[SCORES] = batch[SCORES].masked_fill(reject, torch.nan)
            batch["advantages"] = batch["advantages"].masked_fill(reject, 0.0)
            batch["completion_mask"] = batch["completion_mask"].masked_fill(reject.unsqueeze(1), 0)
        batch["num_items_in_batch"] = self._sum_over_ranks(self._loss_mask(batch).sum().view(1))[0]
        return batch

    def _share_of_groups(self, groups: Tensor, rows: int) -> Tensor:
        total = self.accelerator.num_processes * rows / self._group_size
        return self._sum_over_ranks(groups.view(1))[0] / total

    def _fill_with_fresh(self, batch: Batch) -> Batch:
        """Draw further prompts until every group is informative, or `max_draws` is reached.

        Every rank fills its own slots; all draw together, as often and as much as the one that lacks most needs.
        """
        size, group = num_rows(batch), self._group_size
        slots = size // group
        pool, drawn, found = batch, slots, int(batch[INFORMATIVE].sum()) // group
        draws = 0
        while draws < self.args.max_draws:
            lacking = self.accelerator.gather(torch.tensor([slots - found], device=self.accelerator.device)).max()
            if lacking <= 0:
                break
            totals = torch.tensor([found, drawn], device=self.accelerator.device, dtype=torch.float32)
            rate = float(self._sum_over_ranks(totals)[0].clamp(min=1.0) / self._sum_over_ranks(totals)[1])
            count = min(slots, math.ceil(int(lacking) / rate))
            fresh = self._draw(self._further_prompts(count, draws))
            pool = join_rows([pool, fresh], self._tokenizer.pad_token_id)
            drawn, found, draws = drawn + count, found + int(fresh[INFORMATIVE].sum()) // group, draws + 1
        self._log_metrics({"sampling/draws": torch.tensor(float(draws))})
        # Informative groups first, each kind in the order it was drawn.
        order = torch.argsort((~pool[INFORMATIVE]).int(), stable=True)
        return select_rows(pool, order[:size])

    def _further_prompts(self, groups: int, draw: int) -> list[dict[str, Any]]:
        """Rows of the dataset for some groups of this rank; the same after a resumption."""
        dice = random.Random(f"{self.args.seed} {self._step} {draw} {self.accelerator.process_index}")
        dataset = self.train_dataset
        indices = [dice.randrange(len(dataset)) for _ in range(groups)]
        return [dict(dataset[i]) for i in indices for _ in range(self._group_size)]

    def _fill_with_replayed(self, batch: Batch) -> Batch:
        """Put groups of earlier batches in place of uninformative ones, and keep this batch's informative ones."""
        assert self.replay_buffer is not None
        group, step = self._group_size, self.state.global_step
        informative = batch[INFORMATIVE].view(-1, group)[:, 0]
        empty = (~informative).nonzero().flatten().tolist()
        replayed = self.replay_buffer.draw(len(empty), step)
        for g in informative.nonzero().flatten().tolist():
            rows = select_rows(batch, torch.arange(g * group, (g + 1) * group))
            spread = rows[SCORES][~rows[SCORES].isnan()].std().item()
            self.replay_buffer.add({**rows, TABLE_ROW: torch.full_like(rows[TABLE_ROW], -1)}, spread, step)
        used = torch.tensor([float(len(replayed))], device=self.accelerator.device)
        self._log_metrics({"sampling/replayed_groups": self._sum_over_ranks(used)[0]})
        if not replayed:
            return batch
        pool = join_rows([batch, *replayed], self._tokenizer.pad_token_id)
        order = torch.arange(num_rows(batch)).view(-1, group)
        for i, g in enumerate(empty[: len(replayed)]):
            order[g] = num_rows(batch) + torch.arange(i * group, (i + 1) * group)
        return select_rows(pool, order.flatten())

    # Advantages

    def _set_advantages(self, batch: Batch, inputs: list[dict[str, Any]]) -> None:
        mask = self._loss_mask(batch).bool()
        name, options = self.args.advantage, dict(self.args.advantage_kwargs or {})
        if name == "value_tracker":
            advantages = self._tracked_advantages(batch, inputs)
        elif name == "batch_normalized" and self.args.kl_in_reward:
            advantages = self._token_returns(batch, mask, options)
        else:
            scores, lengths = self.accelerator.gather(batch[SCORES]), self.accelerator.gather(mask.sum(dim=1))
            if name == "lambda_trace":
                whole = self._own_rows(group_normalized(scores, self._group_size))
                advantages = lambda_trace(whole, mask, **options)
            else:
                advantages = self._own_rows(group_advantages(name, scores, self._group_size, lengths, options=options))
        # Scores come in float32 or wider, the host's own advantages in float32.
        batch["advantages"] = advantages.to(torch.float32)
        self._tabulate(batch, mask)

    def _token_returns(self, batch: Batch, mask: Tensor, options: dict[str, Any]) -> Tensor:
        """REINFORCE++: what is left of score and KL penalties at each token, normalised over the batch."""
        if "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = self._score(batch)
        logps, ref_logps = batch["old_per_token_logps"], batch["ref_per_token_logps"]
        mask = mask & ~batch[SCORES].isnan().unsqueeze(1)
        self._log_mean("kl", kl_k1(logps, ref_logps), mask)
        rewards = terminal_rewards(batch[SCORES].nan_to_num(0.0), mask)
        rewards = kl_shaped_rewards(rewards, logps, ref_logps, mask, beta=self.beta)
        returns = discounted_returns(rewards, mask, gamma=1.0)
        return batch_normalized(returns, mask=mask, reduce=self._sum_over_ranks, **options)

    def _tabulate(self, batch: Batch, mask: Tensor) -> None:
        """The advantages that were used, in the host's table of completions; 0 for those that were not."""
        advantages = batch["advantages"]
        if advantages.ndim == 2:
            advantages = masked_mean(advantages, mask, dim=1)
        used = self.accelerator.gather(torch.stack([batch[TABLE_ROW].double(), advantages.double()], dim=1))
        used = used[used[:, 0] >= 0]  # replayed completions are in no table
        table = torch.zeros(self._table_rows, dtype=torch.float64, device=used.device)
        table[used[:, 0].long()] = used[:, 1]
        self._retable_advantages(table)

    # Value tracker

    def _tracked_advantages(self, batch: Batch, inputs: list[dict[str, Any]]) -> Tensor:
        assert self.value_tracker is not None
        keys = gather_object([prompt_key(row["prompt"]) for row in inputs])
        scores = self.accelerator.gather(batch[SCORES])
        usable = scores[~scores.isnan()]
        if len(usable) and not (float(usable.min()) >= 0.0 and float(usable.max()) <= 1.0):
            raise ValueError(
                f"advantage='value_tracker' tracks the success of prompts, with rewards in [0, 1], but there are "
                f"rewards from {float(usable.min()):g} to {float(usable.max()):g}. Scale them (reward_weights)."
            )
        values = self.value_tracker.values(keys).to(scores)
        size = torch.tensor(float(len(self.value_tracker)))
        self._log_metrics({"value_tracker/value_mean": values.mean(), "value_tracker/prompts": size})
        if self.model.training:
            self._remember(batch, keys, scores)
        return self._own_rows(batch_normalized(scores - values))

    def _remember(self, batch: Batch, keys: list[str], scores: Tensor) -> None:
        """Keep what the tracker will absorb once the policy has learnt from this batch."""
        assert self.value_tracker is not None
        rows = None
        if "forget" not in (self.args.advantage_kwargs or {}):
            if "old_per_token_logps" not in batch:
                batch["old_per_token_logps"] = self._score(batch)
            images = self._modality_inputs(batch)
            rows = {key: value for key, value in batch.items() if isinstance(value, Tensor) or key in images}
        self._unabsorbed = {"keys": keys, "scores": scores, "rows": rows}

    def _absorb_rewards(self) -> None:
        """Update the tracker with the last batch: old counts fade by how far the policy has moved on it since.

        `D` is the mean of `|ln pi_then - ln pi_now|` over a completion's tokens, as in SPO's own code; a constant
        `forget` saves the forward pass for it.
        """
        if self._unabsorbed is None or not self.model.training:
            return
        assert self.value_tracker is not None
        keys, scores, rows = (self._unabsorbed[key] for key in ("keys", "scores", "rows"))
        self._unabsorbed = None
        options = dict(self.args.advantage_kwargs or {})
        if rows is None:
            forget = torch.full_like(scores, float(options["forget"]))
        else:
            moved = (rows["old_per_token_logps"] - self._score(rows)).abs()
            distance = self.accelerator.gather(masked_mean(moved, self._loss_mask(rows), dim=1))
            forget = forget_factor(distance, **options)
            self._log_metrics({"value_tracker/forget_mean": forget.mean()})
        self.value_tracker.update(keys, scores, forget)

    # Loss

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        with self._without_kl_term():
            return super()._compute_loss(model, inputs)

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self.args.policy_loss != "gvpo" or self._buffered_inputs is before:
            return inputs
        # The host has shuffled the batch; this loss needs the completions of a prompt in one slice.
        groups = torch.cat([batch["groups"] for batch in self._buffered_inputs])
        self._buffered_inputs = reordered(self._buffered_inputs, torch.argsort(groups, stable=True))
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # Checkpoints

    def _rollout_state(self) -> dict[str, Any]:
        state = super()._rollout_state()
        state["replay"] = None if self.replay_buffer is None else self.replay_buffer.state_dict()
        state["unabsorbed"] = self._unabsorbed
        return state

    def _load_rollout_state(self, state: dict[str, Any]) -> None:
        super()._load_rollout_state(state)
        self._unabsorbed = state["unabsorbed"]
        if self.replay_buffer is not None and state["replay"] is not None:
            self.replay_buffer.load_state_dict(state["replay"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.value_tracker is not None and self.args.should_save:
            directory = self._checkpoint_dir(trial)
            directory.mkdir(parents=True, exist_ok=True)
            self.value_tracker.save(directory / TRACKER_NAME)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.value_tracker is not None:
            path = Path(checkpoint) / TRACKER_NAME
            if not path.is_file():
                raise FileNotFoundError(f"{checkpoint} has no {TRACKER_NAME}: it was not written with value_tracker.")
            self.value_tracker.load(path)


def with_overlong_penalty(reward_funcs: Any, args: GRPOVariantConfig) -> list[Any]:
    """The reward functions and, last, DAPO's soft penalty on length, with weight 1."""
    max_length, cache = args.max_completion_length, args.overlong_cache
    assert cache is not None

    def penalty(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        return overlong_penalty(lengths, max_length=max_length, cache=cache).tolist()

    penalty.__name__ = OVERLONG_NAME
    listed = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    functions = [func for func in listed if func is not None]  # none where environments give the rewards
    if args.reward_weights is not None and len(args.reward_weights) == len(functions):
        args.reward_weights = [*args.reward_weights, 1.0]
    return [*functions, penalty]
