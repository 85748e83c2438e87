"""Model-free learning of tables: all methods share one loop and one update, and differ in the target.

Shapes: `B` copies, `T` steps of a rollout, `S` states, `A` actions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rl_plugins import functional
from rl_plugins.tabular.bellman import epsilon_greedy_policy, greedy_policy
from rl_plugins.tabular.mdp import MDP
from rl_plugins.tabular.sampling import ParallelMDP
from rl_plugins.tabular.step_sizes import StepSize
from rl_plugins.tabular.targets import Target, monte_carlo


class Learned(NamedTuple):
    """A learned table, `(S, A)` or `(S,)`, and how often each entry was updated, of the same shape."""

    values: Tensor
    updates: Tensor


def learn_action_values(
    copies: ParallelMDP,
    target: Target,
    *,
    updates: int,
    step_size: StepSize,
    steps: int = 1,
    policy: Tensor | None = None,
    epsilon: float = 0.1,
    fresh_episodes: bool = False,
    initial: Tensor | None = None,
) -> Learned:
    """Learn `q` from samples: `q(s, a) <- q(s, a) - alpha_n (q(s, a) - Y)`.

    A pair that occurs several times in a rollout is updated once, towards the mean of its targets. With long rollouts,
    use many copies: if a pair has few visits in an update, the number of visits and their targets depend on each
    other.

    | method | target | steps | other |
    |---|---|---|---|
    | Sarsa, expected Sarsa, Q-learning | `sarsa`, `expected_sarsa`, `q_learning` | 1 | |
    | n-step Sarsa | `n_step_sarsa(n)` | n or more | |
    | every-visit Monte Carlo, epsilon-greedy | `monte_carlo` | those of an episode | `fresh_episodes=True` |
    | Monte Carlo, exploring starts | `monte_carlo` | those of an episode | also `epsilon=0`, and copies that explore |

    Args:
        copies: where the samples come from.
        target: the target of the method, from the table.
        updates: rollouts, each followed by an update.
        step_size: gives `alpha_n` for the n-th update of a pair.
        steps: `T`, at most.
        policy: the policy that acts `(S, A)`; by default it is epsilon-greedy in the current `q`.
        epsilon: share of random actions of the epsilon-greedy policy.
        fresh_episodes: start all episodes anew before each rollout, instead of going on.
        initial: `q` to start from `(S, A)`; 0 by default.

    Returns:
        `q` and the number of updates of each pair.

    Raises:
        ValueError: a shape or a number is out of range.
    """
    mdp = copies.mdp
    table = _table(initial, (mdp.n_states, mdp.n_actions))
    for _ in range(updates):
        acting = epsilon_greedy_policy(table.values, epsilon) if policy is None else policy
        if fresh_episodes:
            copies.reset()
        rollout = copies.rollout(acting, steps)
        targets = target(table.values, acting, rollout, mdp.gamma)
        pairs = rollout.states * mdp.n_actions + rollout.actions
        table = update_table(table, pairs[rollout.mask], targets[rollout.mask], step_size)
    return table


def learn_state_values(
    copies: ParallelMDP,
    policy: Tensor,
    *,
    updates: int,
    step_size: StepSize,
    steps: int = 1,
    initial: Tensor | None = None,
) -> Learned:
    """Learn `v` of a policy by TD(0): `v(s) <- v(s) - alpha_n (v(s) - (r + gamma v(s')))`.

    Args:
        copies: where the samples come from.
        policy: the policy that acts `(S, A)`.
        updates: rollouts, each followed by an update.
        step_size: gives `alpha_n` for the n-th update of a state.
        steps: steps of a rollout at most.
        initial: `v` to start from `(S,)`; 0 by default.

    Returns:
        `v` and the number of updates of each state.

    Raises:
        ValueError: a shape or a number is out of range.
    """
    table = _table(initial, (copies.mdp.n_states,))
    for _ in range(updates):
        rollout = copies.rollout(policy, steps)
        values, following = table.values[rollout.states], table.values[rollout.next_states]
        following = torch.where(rollout.terminated, 0.0, following)
        targets = functional.td_targets(
            rollout.rewards, values, rollout.mask, gamma=copies.mdp.gamma, next_values=following
        )
        table = update_table(table, rollout.states[rollout.mask], targets[rollout.mask], step_size)
    return table


def update_table(table: Learned, index: Tensor, targets: Tensor, step_size: StepSize) -> Learned:
    """Update the entries that have targets by one step, each towards the mean of its targets.

    Args:
        table: values and counts of any shape.
        index: entries of the flattened table `(N,)`.
        targets: `(N,)`.
        step_size: gives `alpha_n` for the n-th update of an entry.

    Returns:
        The new table.
    """
    values, updates = table.values.flatten(), table.updates.flatten()
    hits = torch.bincount(index, minlength=len(values))
    means = torch.zeros_like(values).index_add(0, index, targets) / hits
    updates = updates + (hits > 0)
    # Entries without a target stay as they are: the mean of nothing is NaN.
    alpha = torch.where(hits > 0, step_size(updates.clamp(min=1)), 0.0)
    values = functional.stochastic_update(values, torch.where(hits > 0, means, values), alpha)
    return Learned(values.view_as(table.values), updates.view_as(table.updates))


def monte_carlo_basic(
    mdp: MDP,
    *,
    improvements: int,
    episodes: int,
    max_steps: int,
    policy: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Learned:
    """Run policy iteration that evaluates a policy by the mean return of episodes from each pair.

    An episode counts only for the pair that it starts from. The new mean replaces the estimate, `alpha = 1`, and the
    greedy policy replaces the policy.

    Args:
        mdp: the process.
        improvements: number of evaluations; the policy is improved in between.
        episodes: episodes from each pair; all `episodes * S * A` run in parallel.
        max_steps: steps after which an episode is cut off; later rewards count as 0.
        policy: the first policy to be evaluated `(S, A)`; uniform by default.
        generator: source of random numbers.

    Returns:
        `q` of the last policy that was evaluated, 0 in terminal states, and the number of updates of each pair.

    Raises:
        ValueError: a number is below 1, or `policy` is not a table of probabilities.
    """
    if improvements < 1 or episodes < 1:
        raise ValueError(f"improvements={improvements}, episodes={episodes}: give at least 1.")
    table = _table(None, (mdp.n_states, mdp.n_actions))
    policy = torch.full_like(table.values, 1 / mdp.n_actions) if policy is None else policy
    pairs = torch.arange(table.values.numel()).repeat(episodes)
    copies = ParallelMDP(mdp, len(pairs), generator=generator)
    for _ in range(improvements):
        copies.set(pairs // mdp.n_actions, pairs % mdp.n_actions)
        rollout = copies.rollout(policy, max_steps)
        returns = monte_carlo(table.values, policy, rollout, mdp.gamma)[:, 0]
        table = update_table(table, pairs, returns, lambda counts: torch.ones_like(counts))
        policy = greedy_policy(table.values)
    return table


def _table(initial: Tensor | None, shape: tuple[int, ...]) -> Learned:
    if initial is None:
        initial = torch.zeros(shape, dtype=torch.float64)
    if initial.shape != shape:
        raise ValueError(f"initial {tuple(initial.shape)}: expected {shape}.")
    return Learned(initial.double(), torch.zeros(shape, dtype=torch.long))
