"""Groups of completions whose rewards are all equal: their advantages are zero, so others may replace them."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.advantages.group import informative_groups
from rl_plugins.rollouts.batch import Batch, join_rows, loss_mask, num_rows, select_rows
from rl_plugins.signals.host import Host
from rl_plugins.signals.metrics import Metrics
from rl_plugins.signals.options import SamplingOptions
from rl_plugins.signals.replay import ReplayBuffer


def further_rows(count: int, length: int, *key: object) -> list[int]:
    """Draw `count` rows of a dataset of `length` rows; the same key gives the same rows, also in a resumed run."""
    dice = random.Random(" ".join(map(str, key)))
    return [dice.randrange(length) for _ in range(count)]


class GroupSampling:
    """Fills a batch with groups whose rewards differ: fresh ones (DAPO's dynamic sampling) and kept ones (replay).

    A batch has `scores` (B,), NaN for a completion that cannot be scored, and `informative` (B,), whether the rewards
    of the group differ. It may have `table_row` (B,), the row of a completion in the host's table of completions, -1
    for none.

    Args:
        options: Options of the sampling.
        seed: Seed of the draws from the replay buffer, different on every rank.
    """

    def __init__(self, options: SamplingOptions, *, seed: int = 0) -> None:
        self.options = options
        self.replay_buffer: ReplayBuffer | None = None
        if options.replay_buffer_size:
            self.replay_buffer = ReplayBuffer(options.replay_buffer_size, options.replay_max_age, seed)

    def mark(self, batch: Batch, scores: Tensor, task_scores: Tensor, host: Host) -> None:
        """Put `scores` and `informative` of this rank into a batch; for a replay, also the old log-probabilities.

        Args:
            batch: Completions of this rank.
            scores: Scores of the completions of all ranks (N,).
            task_scores: These scores without the penalty on length (N,).
            host: The trainer or module.
        """
        informative = informative_groups(task_scores, host.group_size).repeat_interleave(host.group_size)
        batch["scores"], batch["informative"] = host.own_rows(scores), host.own_rows(informative)
        if self.replay_buffer is not None and "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = host.log_probs(batch)

    def sample(
        self, batch: Batch, draw: Callable[[int, int], Batch], pad_token_id: int, host: Host
    ) -> tuple[Batch, Metrics]:
        """Replace or reject groups whose rewards are all equal, as the options say.

        Args:
            batch: Marked completions of this rank.
            draw: `(groups, number of the draw) -> marked completions` of as many further prompts.
            pad_token_id: Token that pads shorter rows.
            host: The trainer or module.

        Returns:
            A batch of the same size, and metrics.
        """
        size, group = num_rows(batch), host.group_size
        first = batch["informative"].sum().float() / group
        total = host.sum_over_ranks(first.new_full((1,), size / group))[0]
        metrics = Metrics({"sampling/informative_groups": host.sum_over_ranks(first.view(1))[0] / total})
        if self.options.dynamic_sampling:
            batch, draws = self._fill_with_fresh(batch, draw, pad_token_id, host)
            metrics["sampling/draws"] = torch.tensor(float(draws))
        if self.replay_buffer is not None:
            batch, used = self._fill_with_replayed(batch, self.replay_buffer, pad_token_id, host)
            metrics["sampling/replayed_groups"] = host.sum_over_ranks(first.new_full((1,), float(used)))[0]
        missing = (~batch["informative"]).sum().float() / group
        metrics["sampling/unfilled_groups"] = host.sum_over_ranks(missing.view(1))[0]
        if self.options.reject_uniform:
            reject = ~batch["informative"]
            batch["scores"] = batch["scores"].masked_fill(reject, torch.nan)
            if "advantages" in batch:  # the host's own
                batch["advantages"] = batch["advantages"].masked_fill(reject, 0.0)
            batch["completion_mask"] = batch["completion_mask"].masked_fill(reject.unsqueeze(1), 0)
        batch["num_items_in_batch"] = host.sum_over_ranks(loss_mask(batch).sum().view(1))[0]
        return batch, metrics

    def _fill_with_fresh(
        self, batch: Batch, draw: Callable[[int, int], Batch], pad_token_id: int, host: Host
    ) -> tuple[Batch, int]:
        """Draw further prompts until every group is informative, or `max_draws` is reached.

        Every rank fills its own batch. All ranks draw together: the rank that lacks most groups decides how often they
        draw, and how many prompts.
        """
        size, group = num_rows(batch), host.group_size
        slots = size // group
        pool, drawn, found = batch, slots, int(batch["informative"].sum()) // group
        draws = 0
        while draws < self.options.max_draws:
            lacking = int(host.gather_rows(torch.tensor([slots - found], device=host.device)).max())
            if lacking <= 0:
                break
            totals = torch.tensor([found, drawn], device=host.device, dtype=torch.float32)
            all_found, all_drawn = host.sum_over_ranks(totals).tolist()
            # If the share of informative groups stays found / drawn, this many further prompts are enough.
            count = min(slots, math.ceil(lacking * all_drawn / max(all_found, 1.0)))
            fresh = draw(count, draws)
            pool = join_rows([pool, fresh], pad_token_id)
            drawn, found, draws = drawn + count, found + int(fresh["informative"].sum()) // group, draws + 1
        # Informative groups first, each kind in the order it was drawn.
        order = torch.argsort((~pool["informative"]).int(), stable=True)
        return select_rows(pool, order[:size]), draws

    def _fill_with_replayed(
        self, batch: Batch, buffer: ReplayBuffer, pad_token_id: int, host: Host
    ) -> tuple[Batch, int]:
        """Replace uninformative groups by groups of earlier batches, and keep this batch's informative groups."""
        group, step = host.group_size, host.step
        informative = batch["informative"].view(-1, group)[:, 0]
        empty = (~informative).nonzero().flatten().tolist()
        replayed = buffer.draw(len(empty), step)
        for g in informative.nonzero().flatten().tolist():
            rows = select_rows(batch, torch.arange(g * group, (g + 1) * group))
            spread = rows["scores"][~rows["scores"].isnan()].std().item()
            if "table_row" in rows:
                rows["table_row"] = torch.full_like(rows["table_row"], -1)
            buffer.add(rows, spread, step)
        if not replayed:
            return batch, 0
        pool = join_rows([batch, *replayed], pad_token_id)
        order = torch.arange(num_rows(batch)).view(-1, group)
        for i, g in enumerate(empty[: len(replayed)]):
            order[g] = num_rows(batch) + torch.arange(i * group, (i + 1) * group)
        return select_rows(pool, order.flatten()), len(replayed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank for a checkpoint."""
        return {} if self.replay_buffer is None else self.replay_buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore [`state_dict`]."""
        if self.replay_buffer is not None and state:
            self.replay_buffer.load_state_dict(state)
