"""A persistent estimate of the success of every prompt: SPO's baseline without a group."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.advantages.group import batch_normalized
from rl_plugins.functional.advantages.tracked import forget_factor, tracker_update, tracker_value


def prompt_key(prompt: Any) -> str:
    """Make a short name for a prompt (text or conversation), equal in every process and run."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class ValueTracker:
    """One Beta distribution per prompt (SPO, 2509.13232): its mean is the baseline of the prompt's next completion.

    A distribution starts at Jeffreys' prior, `Beta(1/2, 1/2)`. All ranks keep equal trackers: give each tracker the
    completions of all ranks.
    """

    def __init__(self) -> None:
        self.counts: dict[str, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self.counts)

    def _alpha_beta(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        pairs = torch.tensor([self.counts.get(key, (0.5, 0.5)) for key in keys], dtype=torch.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def values(self, keys: Sequence[str]) -> Tensor:
        """Return the expected rewards (N,) of prompts, float64."""
        return tracker_value(*self._alpha_beta(keys))

    def update(self, keys: Sequence[str], rewards: Tensor, forget: Tensor) -> None:
        """Add the rewards of completions to the counts of their prompts.

        Args:
            keys: N prompts, from [`prompt_key`]. If a prompt occurs several times, `forget` acts only once, with its
                first reward.
            rewards: (N,) in [0, 1]; NaN is skipped.
            forget: Factor on the old counts (N,), in [0, 1].

        Raises:
            ValueError: If a reward or factor is outside [0, 1].
        """
        rewards, forget = rewards.double().cpu(), forget.double().cpu()
        seen: set[str] = set()
        for i, key in enumerate(keys):
            rho = torch.ones(1, dtype=torch.float64) if key in seen else forget[i : i + 1]
            alpha, beta = tracker_update(*self._alpha_beta([key]), rewards[i : i + 1], rho)
            if not rewards[i].isnan():
                self.counts[key] = (alpha.item(), beta.item())
                seen.add(key)

    def save(self, path: str | Path) -> None:
        """Write the counts as JSON."""
        Path(path).write_text(json.dumps(self.counts))

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote."""
        self.counts = {key: (float(a), float(b)) for key, (a, b) in json.loads(Path(path).read_text()).items()}


class TrackedAdvantages:
    """SPO's advantages, `A = normalise(r - v(prompt))` over the batch (2509.13232); the tracker is one batch behind.

    The tracker counts the rewards of a batch only when the policy has learnt from it. The old counts are then
    multiplied by a factor that depends on how far the policy has moved on the batch, as in SPO's own code, or by a
    constant `forget`.

    Args:
        options: `forget`, or keyword arguments of [`~rl_plugins.functional.forget_factor`].

    Attributes:
        tracker: The counts.
        unabsorbed: The batch to count next: `keys` and `scores` of all ranks, `rows` of this rank.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.tracker = ValueTracker()
        self.unabsorbed: dict[str, Any] | None = None

    @property
    def needs_rows(self) -> bool:
        """Whether forgetting depends on how far the policy moves, which is measured on the completions."""
        return "forget" not in self.options

    def advantages(self, keys: Sequence[str], scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the advantages (N,) of the completions of all ranks, and metrics.

        Args:
            keys: Prompts, from [`prompt_key`].
            scores: (N,), NaN where a completion cannot be scored.

        Raises:
            ValueError: If a score is outside [0, 1].
        """
        usable = scores[~scores.isnan()]
        if len(usable) and not (float(usable.min()) >= 0.0 and float(usable.max()) <= 1.0):
            raise ValueError(
                f"advantage='value_tracker' tracks the success of prompts, with rewards in [0, 1], but there are "
                f"rewards from {float(usable.min()):g} to {float(usable.max()):g}. Scale them (reward_weights)."
            )
        values = self.tracker.values(keys).to(scores)
        size = values.new_tensor(float(len(self.tracker)))
        metrics = {"value_tracker/value_mean": values.mean(), "value_tracker/prompts": size}
        return batch_normalized(scores - values), metrics

    def remember(self, keys: Sequence[str], scores: Tensor, rows: Any) -> None:
        """Keep a batch, which will be counted once the policy has learnt from it."""
        self.unabsorbed = {"keys": list(keys), "scores": scores, "rows": rows}

    def absorb(self, distances: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Count the rewards of the batch that was kept.

        Args:
            distances: Function of the rows that were kept: how far the policy has moved since on each completion of
                all ranks (N,). It is called only if `needs_rows`.

        Returns:
            Metrics; empty without a batch, and for a constant `forget`.
        """
        if self.unabsorbed is None:
            return {}
        keys, scores, rows = (self.unabsorbed[key] for key in ("keys", "scores", "rows"))
        self.unabsorbed = None
        if self.needs_rows:
            forget = forget_factor(distances(rows), **self.options)
        else:
            forget = torch.full_like(scores, float(self.options["forget"]))
        self.tracker.update(keys, scores, forget)
        return {"value_tracker/forget_mean": forget.mean()} if self.needs_rows else {}
