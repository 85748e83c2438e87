"""GRPO's trainer that does something about groups of completions that teach nothing."""

import math
import random
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from rl_plugins.functional.advantages.group import informative_groups
from rl_plugins.functional.rewards import overlong_penalty
from rl_plugins.rollouts.batch import Batch, join_rows, num_rows, select_rows
from rl_plugins.rollouts.rewards import list_reward_funcs
from rl_plugins.trl.policy_trainer import PolicyLossTrainer
from rl_plugins.trl.replay import ReplayBuffer
from rl_plugins.trl.variant_config import GRPOVariantConfig

OVERLONG_NAME = "overlong_penalty"
# Columns of a batch that only the trainer reads; they are gone before the loss.
SCORES, INFORMATIVE, TABLE_ROW = "scores", "informative", "table_row"


class SamplingTrainer(PolicyLossTrainer):
    """`GRPOTrainer` with dynamic sampling, rejection of uniform groups, a replay buffer and overlong shaping; base of
    [`GRPOVariantTrainer`].

    Its batches carry `scores` (B,), NaN for a completion that cannot be scored, `informative` (B,), and `table_row`
    (B,), the place of a completion in the host's table, -1 for one that is not in it.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOVariantConfig,
        *host_args: Any,
        **host_kwargs: Any,
    ) -> None:
        if args.overlong_shaping:
            reward_funcs = with_overlong_penalty(reward_funcs, args)
            classes = host_kwargs.get("reward_processing_classes")
            if classes is not None:
                classes = classes if isinstance(classes, list) else [classes]
                host_kwargs["reward_processing_classes"] = [*classes, None]
        super().__init__(model, reward_funcs, args, *host_args, **host_kwargs)
        if self.reward_func_names == [OVERLONG_NAME]:
            raise ValueError(
                "There are no reward functions, so overlong_shaping=True (preset='dapo' sets it) would train on the "
                "length penalty alone. Give reward_funcs, or an environment with get_reward."
            )
        if args.dynamic_sampling and isinstance(self.train_dataset, IterableDataset):
            raise TypeError(
                "dynamic_sampling=True draws further prompts by index, but the training dataset is a stream. Give a "
                "dataset with a length, or set dynamic_sampling=False."
            )
        self.replay_buffer = None
        if args.replay_buffer_size:
            seed = args.seed + self.accelerator.process_index
            self.replay_buffer = ReplayBuffer(args.replay_buffer_size, args.replay_max_age, seed)
        self._judged: Tensor | None = None
        self._table_rows = 0

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

    def _group_ids(self, rows: int) -> Tensor:
        return (self.accelerator.process_index * rows + torch.arange(rows)) // self._group_size

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        self._table_rows = 0
        batch = self._draw(inputs)
        return self._sample(batch) if self.model.training and self.args.samples else batch

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
        self._weigh_prompts(batch)
        return batch

    @property
    def _learns_off_policy(self) -> bool:
        return super()._learns_off_policy or self.args.replay_buffer_size > 0

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
            all_found, all_drawn = self._sum_over_ranks(totals).tolist()
            count = min(slots, math.ceil(int(lacking) * all_drawn / max(all_found, 1.0)))
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

    # Checkpoints

    def _rollout_state(self) -> dict[str, Any]:
        replay = None if self.replay_buffer is None else self.replay_buffer.state_dict()
        return {**super()._rollout_state(), "replay": replay}

    def _load_rollout_state(self, state: dict[str, Any]) -> None:
        super()._load_rollout_state(state)
        if self.replay_buffer is not None and state["replay"] is not None:
            self.replay_buffer.load_state_dict(state["replay"])


def with_overlong_penalty(reward_funcs: Any, args: GRPOVariantConfig) -> list[Any]:
    """The reward functions and, last, DAPO's soft penalty on length, with weight 1."""
    max_length, cache = args.max_completion_length, args.overlong_cache
    assert cache is not None

    def penalty(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        return overlong_penalty(lengths, max_length=max_length, cache=cache).tolist()

    penalty.__name__ = OVERLONG_NAME
    functions = list_reward_funcs(reward_funcs)  # none where environments give the rewards
    if args.reward_weights is not None and len(args.reward_weights) == len(functions):
        args.reward_weights = [*args.reward_weights, 1.0]
    return [*functions, penalty]
