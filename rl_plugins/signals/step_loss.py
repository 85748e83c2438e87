"""The loss of a training step: the policy's, the critic's and the drafting heads', all from one forward pass."""

from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor

from rl_plugins.nn.sharding import announce_loss
from rl_plugins.rollouts.batch import Batch
from rl_plugins.signals.host import Host
from rl_plugins.signals.metrics import Metrics
from rl_plugins.signals.phasic import PhasicSchedule
from rl_plugins.signals.signals import DraftHeads, Signal


def step_loss(
    batch: Batch,
    num_items: Tensor,
    host: Host,
    *,
    objective: Callable[[], tuple[Tensor, Metrics]],
    log_probs: Callable[[], Tensor],
    signal: Signal,
    drafts: DraftHeads | None = None,
    phasic: PhasicSchedule | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute `L = L_policy + lambda_2 L_TD + lambda_1 L_MTP` of one micro-batch.

    Critic and drafting heads read the hidden states of the policy's forward, which `objective` runs. While only the
    critic learns, `L_policy` has the weight 0. In an auxiliary phase (PPG), a KL term that holds the policy replaces
    `L_policy`.

    Args:
        batch: Completions.
        num_items: Real tokens that the losses are averaged over.
        host: The trainer or module.
        objective: Runs the policy's forward with gradient and gives `L_policy` (0-d) and its metrics.
        log_probs: Runs that forward and gives `ln pi(y_t|s_t)` (B, T) alone, for an auxiliary phase.
        signal: Says whether there is a critic, and whether only the critic learns.
        drafts: Heads that only draft.
        phasic: Schedule of the auxiliary phases.

    Returns:
        The loss (0-d), and metrics of all ranks.
    """
    critic, alone = signal.critic, signal.warming_up(host)
    auxiliary = phasic is not None and "held_logps" in batch
    with ExitStack() as stack:
        run = draft = None
        if critic is not None:
            # The auxiliary phase is there for the values, so their whole gradient enters the trunk.
            scale = 1.0 if auxiliary else None
            run = stack.enter_context(critic.learning(batch, num_items, alone=alone, scale=scale))
        if drafts is not None and drafts.learns:
            draft = stack.enter_context(drafts.learning(batch, alone=alone))
        if auxiliary:
            assert phasic is not None
            loss, metrics = phasic.hold_loss(log_probs(), batch, num_items, host)
        else:
            loss, metrics = objective()
    if alone:
        # Multiplied by zero, not dropped: every parameter stays in the graph, which DDP and ZeRO need.
        loss = 0.0 * loss
    terms: list[tuple[Tensor | float, Metrics]] = []
    if critic is not None:
        terms.append(critic.loss(run, batch, num_items, host))
    if drafts is not None and draft is not None:
        terms.append(drafts.loss(draft, num_items, host))
    for term, learnt in terms:
        if isinstance(term, Tensor):
            announce_loss(host.model, term)
        loss = loss + term
        metrics.add(learnt)
    return loss, metrics
