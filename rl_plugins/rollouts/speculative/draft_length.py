"""How many tokens to draft: as many as pay."""

import math
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from rl_plugins.functional.acceptance import expected_tokens

MEASURED_STEPS = 2
"""Steps with the same number of drafts after which their time is known."""

REMEMBERED_STEPS = 9
"""Newest steps of which that time is the shortest: whatever else the machine does only adds to it."""

FIRST_GUESS = 0.5
"""Acceptance of the first draft before anything is known."""

LONGEST_WAIT = 512
"""Most steps without a try."""


class DraftLength:
    """Chooses k, the number of drafts, that brings most tokens per unit of time:
    `argmax_k (1 + sum_{j <= k} prod_{i <= j} a_i) / (1 + c k)` (Leviathan et al., 2211.17192, theorem 3.8, with a
    rate for each place).

    `a_j`, how often draft j is accepted once it is reached, is a running mean over the last `memory` completions'
    steps. `c` is the time that one more draft costs (by the heads, and in the model's verification), in units of a
    step without drafts. After `probe_every` steps with the same k another is tried, all drafts or none, and after
    twice as many each time that this changes nothing.

    Args:
        max_drafts: K.
        cost: c; `None` takes the time of steps with k drafts as it is measured, for each size of the batch, instead of
            `1 + c k`. With a number the same seed gives the same completions, which the clock would spoil.
        adaptive: Whether to choose at all; otherwise always K.
        memory: Rows' steps that the running means go back.
        probe_every: Steps with the same k before another is tried.
    """

    def __init__(
        self,
        max_drafts: int,
        cost: float | None = None,
        *,
        adaptive: bool = True,
        memory: int = 64,
        probe_every: int = 128,
    ) -> None:
        self.max_drafts, self.cost, self.adaptive = max_drafts, cost, adaptive
        self.memory, self.probe_every = memory, probe_every
        self._passed, self._reached = [0.0] * max_drafts, [0.0] * max_drafts
        self._times: dict[int, list[deque[float]]] = defaultdict(
            lambda: [deque(maxlen=REMEMBERED_STEPS) for _ in range(max_drafts + 1)]
        )
        self._choices: dict[int, int] = {}  # by size of the batch, until something new is known
        self._best = self._idle = self._tries = 0
        self._patience = probe_every

    @property
    def acceptance(self) -> list[float]:
        """Running means `a_1 .. a_K`, each with one observation more that is as good as the place before it: later
        places are seldom reached where earlier ones are bad."""
        rates, rate = [], FIRST_GUESS
        for passed, reached in zip(self._passed, self._reached, strict=True):
            rate = (passed + rate) / (reached + 1.0)
            rates.append(rate)
        return rates

    def choose(self, rows: int) -> int:
        """k for the next step of `rows` rows."""
        if not self.adaptive:
            return self.max_drafts
        size = _size(rows)
        if size not in self._choices:
            costs = self._costs(size)
            if costs is None:
                return min((0, self.max_drafts), key=lambda k: len(self._times[size][k]))
            speed = expected_tokens(torch.tensor(self.acceptance, dtype=torch.float64)) / costs
            self._choices[size] = int(speed.argmax())
        return self._with_probes(self._choices[size])

    def _with_probes(self, best: int) -> int:
        """`best`, or now and then another number, whose acceptance or time may have changed since it was last used."""
        if best != self._best:
            self._best, self._idle, self._patience = best, 0, self.probe_every
        self._idle += 1
        if self._idle <= self._patience:
            return best
        self._idle, self._patience = 0, min(2 * self._patience, LONGEST_WAIT)
        # The time of a step without drafts matters only where it is measured.
        others = [k for k in (self.max_drafts, 0) if k != best and (k > 0 or self.cost is None)]
        self._tries += 1
        return others[self._tries % len(others)] if others else best

    def _costs(self, size: int) -> Tensor | None:
        """Time of a step with `k = 0 .. K` drafts, in any unit (K + 1,); `None` while too little is known."""
        drafts = torch.arange(self.max_drafts + 1, dtype=torch.float64)
        if self.cost is not None:
            return 1.0 + self.cost * drafts
        shortest = [min(t) if len(t) >= MEASURED_STEPS else math.nan for t in self._times[size]]
        plain, all_drafts = shortest[0], shortest[-1]
        if math.isnan(plain + all_drafts):
            return None
        known = torch.tensor(shortest, dtype=torch.float64)
        return torch.where(known.isnan(), plain + (all_drafts - plain) * drafts / self.max_drafts, known)

    def record(self, rows: int, passed: Sequence[float], reached: Sequence[float], seconds: float) -> None:
        """Take in a step.

        Args:
            rows: Rows of the batch.
            passed: Sum of the acceptance probabilities of the drafts that were reached, at each of the k places.
            reached: Their numbers.
            seconds: Time of the step.
        """
        if self.cost is None:
            self._times[_size(rows)][len(passed)].append(seconds)
        if passed:
            self._choices.clear()
        for j, (good, all_) in enumerate(zip(passed, reached, strict=True)):
            decay = math.exp(-all_ / self.memory)
            self._passed[j] = self._passed[j] * decay + good
            self._reached[j] = self._reached[j] * decay + all_

    def state_dict(self) -> dict[str, list[float]]:
        """The running means, so that a resumed run goes on with them."""
        probes = [float(x) for x in (self._best, self._idle, self._patience, self._tries)]
        return {"passed": list(self._passed), "reached": list(self._reached), "probes": probes}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take them over."""
        self._passed, self._reached = list(state["passed"]), list(state["reached"])
        self._choices.clear()
        self._best, self._idle, self._patience, self._tries = (int(x) for x in state["probes"])


def _size(rows: int) -> int:
    """Batches whose sizes are within a factor of two of each other cost alike."""
    return rows.bit_length()
