"""Trains tiny policies with speculative rollouts in either host: `python speculative_worker.py runs.json`, which
forks the ranks itself, so that what is imported is imported once.

A run is a dictionary as `lightning_worker.py` takes it or, with `host: trl`, as `critic_worker.py` does, with a
`backend` of `one` (process) or anything else for two ranks. It leaves what those leave, and for every rank
`drafts_<rank>.json`: of every call of `generate` the steps that it took, then `DraftStatistics.counts`.
"""

import json
from pathlib import Path
from typing import Any

import common  # isort: skip  sets the environment
import critic_worker
import lightning_worker
from common import Run, main

from rl_plugins.rollouts import SpeculativeDecoder

drafts: list[list[float]] = []


class NotingDecoder(SpeculativeDecoder):
    """Notes what became of the drafts of every call."""

    def __call__(self, model: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        steps: list[int] = []
        self.listener = steps.append
        result = super().__call__(model, input_ids, *args, **kwargs)
        assert self.last is not None and self.last.statistics is not None
        drafts.append([float(len(steps)), *self.last.statistics.counts])
        return result


def train_rank(run: Run) -> None:
    """One run, on this rank."""
    if run.get("host") == "trl":
        critic_worker.RANK = common.RANK
        common.WORLD = 1 if run["backend"] == "one" else lightning_worker.WORLD
        critic_worker.train(run)
    else:
        train_in_lightning(run)
    (Path(run["out"]) / f"drafts_{common.RANK}.json").write_text(json.dumps(drafts))


if __name__ == "__main__":
    import rl_plugins.rollouts.speculative.decoder

    rl_plugins.rollouts.speculative.decoder.SpeculativeDecoder = NotingDecoder  # type: ignore[misc]
    train_in_lightning, lightning_worker.train_rank = lightning_worker.train_rank, train_rank
    main(lightning_worker.train, lightning_worker.load)
