"""A persistent estimate of the success of every prompt: SPO's baseline without a group."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_plugins.functional.value_tracking import tracker_update, tracker_value


def prompt_key(prompt: Any) -> str:
    """A short name for a prompt (text or conversation), equal in every process and run."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class ValueTracker:
    """One Beta distribution per prompt (SPO, 2509.13232): its mean is the baseline of the prompt's next completion.

    Starts at Jeffreys' prior, `Beta(1/2, 1/2)`. Every rank keeps the same tracker: give it the completions of all.
    """

    def __init__(self) -> None:
        self.counts: dict[str, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self.counts)

    def _alpha_beta(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        pairs = torch.tensor([self.counts.get(key, (0.5, 0.5)) for key in keys], dtype=torch.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def values(self, keys: Sequence[str]) -> Tensor:
        """Expected rewards (N,) of prompts, float64."""
        return tracker_value(*self._alpha_beta(keys))

    def update(self, keys: Sequence[str], rewards: Tensor, forget: Tensor) -> None:
        """Add the rewards of completions to the counts of their prompts.

        Args:
            keys: N prompts, from [`prompt_key`]. Of several completions of one prompt the later ones forget nothing.
            rewards: (N,) in [0, 1]; NaN is passed over.
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
