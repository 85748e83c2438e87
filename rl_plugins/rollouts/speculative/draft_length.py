"""Chooses how many tokens to draft: as many as bring most tokens per unit of time."""

import math
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from rl_plugins.functional.acceptance import expected_tokens

MEASURED_STEPS = 2
"""Steps with the same number of drafts after which their time is known."""

REMEMBERED_STEPS = 9
"""Newest steps whose shortest time counts, since other work of the machine only adds time."""

FIRST_GUESS = 0.5
"""Acceptance of the first draft before anything is known."""

MEMORY = 64
"""Newest drafts at a place over which the running mean of acceptance is taken."""

PROBE_EVERY = 128
"""Steps with the same number of drafts before another number is tried."""

LONGEST_WAIT = 512
"""Most steps before another number is tried."""


class DraftLength:
    """Chooses k, the number of drafts, that brings most tokens per unit of time:
    `argmax_k (1 + sum_{j <= k} prod_{i <= j} a_i) / (1 + c k)` (Leviathan et al., 2211.17192, theorem 3.8, with a
    rate for each place).

    `a_j`, the share of drafts j that are accepted once they are reached, is a running mean over the newest [`MEMORY`]
    of them. `c` is the time that one more draft costs (by the heads, and in the model's verification), in units of a
    step without drafts. After [`PROBE_EVERY`] steps with the same k another k is tried, all drafts or none. Each try
    that changes nothing doubles the number of steps before the next one.

    Args:
        max_drafts: K.
        cost: c; 0 always drafts K tokens. `None` takes the time of steps with k drafts as it is measured, for each
            size of the batch, in place of `1 + c k`. With a number the same seed gives the same completions; measured
            times differ from run to run.
    """

    def __init__(self, max_drafts: int, cost: float | None = None) -> None:
        self.max_drafts, self.cost = max_drafts, cost
        self._passed, self._reached = [0.0] * max_drafts, [0.0] * max_drafts
        self._times: dict[int, list[deque[float]]] = defaultdict(
            lambda: [deque(maxlen=REMEMBERED_STEPS) for _ in range(max_drafts + 1)]
        )
        self._choices: dict[int, int] = {}  # by size of the batch, until something new is known
        self._best = self._idle = self._tries = 0  # newest choice, steps with it since the last try, tries
        self._patience = PROBE_EVERY  # steps until the next try

    @property
    def acceptance(self) -> list[float]:
        """Running means `a_1 .. a_K`.

        Later places are seldom reached where earlier ones are bad. So each mean counts one observation more than there
        were: the mean of the place before it, and [`FIRST_GUESS`] at the first place.
        """
        rates, prior = [], FIRST_GUESS
        for passed, reached in zip(self._passed, self._reached, strict=True):
            # 3 of 4 at the first place: (3 + 0.5) / 5 = 0.7; no draft at the second: (0 + 0.7) / 1 = 0.7.
            rates.append((passed + prior) / (reached + 1.0))
            prior = rates[-1]
        return rates

    def choose(self, rows: int) -> int:
        """Choose k for the next step of `rows` rows."""
        if self.cost == 0.0:
            return self.max_drafts  # each further draft adds tokens and costs nothing
        size = _size(rows)
        if size not in self._choices:
            costs = self._costs(size)
            if costs is None:  # measure steps without drafts and with all of them first, in turns
                return min((0, self.max_drafts), key=lambda k: len(self._times[size][k]))
            speed = expected_tokens(torch.tensor(self.acceptance, dtype=torch.float64)) / costs
            self._choices[size] = int(speed.argmax())
        return self._with_probes(self._choices[size])

    def _with_probes(self, best: int) -> int:
        """Return `best`, or now and then another number, because acceptance and times change."""
        # The choice has just changed, so the waits start over.
        if best != self._best:
            self._best, self._idle, self._patience = best, 0, PROBE_EVERY
        self._idle += 1
        if self._idle <= self._patience:
            return best
        # Back off: as long as tries change nothing, 128, 256, 512, 512, ... steps lie between them.
        self._idle, self._patience = 0, min(2 * self._patience, LONGEST_WAIT)
        # Take turns: one try of all drafts, the next of none, whose time matters only where it is measured. Numbers
        # between are not tried, since steps with all drafts tell the acceptance of every place.
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
        # Where steps with k drafts were not measured, their time is taken to lie on the line between both ends.
        return torch.where(known.isnan(), plain + (all_drafts - plain) * drafts / self.max_drafts, known)

    def record(self, rows: int, passed: Sequence[float], reached: Sequence[float], seconds: float) -> None:
        """Take in a step with k drafts.

        Args:
            rows: Rows of the batch.
            passed: Sum of the acceptance probabilities of the drafts that were reached, at each of the k places.
            reached: Number of drafts that were reached, at each of the k places.
            seconds: Time of the step.
        """
        if self.cost is None:
            self._times[_size(rows)][len(passed)].append(seconds)
        if passed:
            self._choices.clear()
        for j, (good, all_) in enumerate(zip(passed, reached, strict=True)):
            # Older drafts count less by 1/e for every MEMORY newer ones at the same place, however many a step has.
            decay = math.exp(-all_ / MEMORY)
            self._passed[j] = self._passed[j] * decay + good
            self._reached[j] = self._reached[j] * decay + all_

    def state_dict(self) -> dict[str, list[float]]:
        """Return running means and counters of tries, so that a resumed run drafts as if it were uninterrupted."""
        probes = [float(x) for x in (self._best, self._idle, self._patience, self._tries)]
        return {"passed": list(self._passed), "reached": list(self._reached), "probes": probes}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from a state that `state_dict` gave."""
        self._passed, self._reached = list(state["passed"]), list(state["reached"])
        self._choices.clear()
        self._best, self._idle, self._patience, self._tries = (int(x) for x in state["probes"])


def _size(rows: int) -> int:
    """Class of batch sizes whose times count as one: 1, 2-3, 4-7, 8-15, ... rows."""
    return rows.bit_length()
