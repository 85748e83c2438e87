"""Planning in a known MDP: evaluation, value iteration, policy iteration and what lies between.

Shapes: `S` states, `A` actions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rl_plugins.tabular.bellman import action_values, backup, bellman_expectation, greedy_policy
from rl_plugins.tabular.mdp import MDP

MAX_ITERATIONS = 100_000


class Evaluation(NamedTuple):
    """State values `(S,)` of a policy, and the number of sweeps that they took."""

    values: Tensor
    iterations: int


class Plan(NamedTuple):
    """Optimal state values `(S,)`, a policy greedy in them `(S, A)`, and the number of improvements that they took."""

    values: Tensor
    policy: Tensor
    iterations: int


def policy_evaluation(
    mdp: MDP,
    policy: Tensor,
    *,
    tolerance: float = 1e-10,
    max_iterations: int = MAX_ITERATIONS,
    initial: Tensor | None = None,
) -> Evaluation:
    """Evaluate a policy: repeat `v <- r_pi + gamma P_pi v` (Sutton and Barto 2018, eq. 4.5).

    Args:
        mdp: the process.
        policy: `pi(a|s) (S, A)`.
        tolerance: stop when no value changes by more; the error of the values is then at most `gamma / (1 - gamma)`
            times this.
        max_iterations: sweeps after which to give up.
        initial: values to start from `(S,)`; 0 by default.

    Raises:
        ValueError: `policy` is not a table of probabilities, a shape does not fit, or the tolerance is negative.
        RuntimeError: it has not converged after `max_iterations`.
    """
    policy = mdp.check_policy(policy)
    return _repeat(lambda v: bellman_expectation(mdp, policy, v), _initial(mdp, initial), tolerance, max_iterations)


def value_iteration(
    mdp: MDP, *, tolerance: float = 1e-10, max_iterations: int = MAX_ITERATIONS, initial: Tensor | None = None
) -> Plan:
    """Find optimal values: repeat `v <- max_a (r + gamma P v)` (Sutton and Barto 2018, eq. 4.10).

    This is truncated policy iteration with one sweep.

    Args:
        mdp: the process.
        tolerance: stop when no value would change by more; the error of the values is then at most
            `gamma / (1 - gamma)` times this.
        max_iterations: sweeps after which to give up.
        initial: values to start from `(S,)`; 0 by default.

    Raises:
        ValueError: a shape does not fit, or the tolerance is negative.
        RuntimeError: it has not converged after `max_iterations`.
    """
    return truncated_policy_iteration(mdp, 1, tolerance=tolerance, max_iterations=max_iterations, initial=initial)


def truncated_policy_iteration(
    mdp: MDP,
    sweeps: int,
    *,
    tolerance: float = 1e-10,
    max_iterations: int = MAX_ITERATIONS,
    initial: Tensor | None = None,
) -> Plan:
    """Improve the policy, evaluate it by `j` sweeps, and repeat.

    `pi_k = greedy(v_k)`, `v_{k+1} = (T_{pi_k})^j v_k`. With one sweep it is value iteration, in the limit of many
    sweeps policy iteration.

    Args:
        mdp: the process.
        sweeps: `j`.
        tolerance: stop when no value would change by more in a sweep of value iteration; the error of the values is
            then at most `gamma / (1 - gamma)` times this.
        max_iterations: improvements after which to give up.
        initial: `v_0 (S,)`; 0 by default.

    Raises:
        ValueError: `sweeps` is below 1, a shape does not fit, or the tolerance is negative.
        RuntimeError: it has not converged after `max_iterations`.
    """
    if sweeps < 1:
        raise ValueError(f"sweeps={sweeps}: evaluate by at least 1 sweep, which is value iteration.")

    def evaluate(actions: Tensor, values: Tensor) -> Tensor:
        if sweeps == 1:  # the improvement was the first sweep
            return values
        sweep = _sweep(mdp, actions)
        for _ in range(sweeps - 1):
            values = sweep(values)
        return values

    return _improve(mdp, evaluate, _initial(mdp, initial), tolerance, max_iterations)


def policy_iteration(
    mdp: MDP, *, tolerance: float = 1e-10, max_iterations: int = MAX_ITERATIONS, initial: Tensor | None = None
) -> Plan:
    """Improve the policy, evaluate it until its values have converged, and repeat.

    Sutton and Barto 2018, section 4.3. At `gamma = 1` a policy that never ends may have no values, and evaluation then
    does not converge: use `value_iteration`.

    Args:
        mdp: the process.
        tolerance: that of `policy_evaluation` in each evaluation, and that of `value_iteration` to stop.
        max_iterations: improvements, and sweeps of one evaluation, after which to give up.
        initial: values whose greedy policy is the first policy `(S,)`; 0 by default.

    Raises:
        ValueError: a shape does not fit, or the tolerance is negative.
        RuntimeError: it has not converged after `max_iterations`.
    """

    def evaluate(actions: Tensor, values: Tensor) -> Tensor:
        return _repeat(_sweep(mdp, actions), values, tolerance, max_iterations).values

    return _improve(mdp, evaluate, _initial(mdp, initial), tolerance, max_iterations)


def _improve(
    mdp: MDP,
    evaluate: Callable[[Tensor, Tensor], Tensor],
    values: Tensor,
    tolerance: float,
    max_iterations: int,
) -> Plan:
    """Run policy iteration; `evaluate` takes the greedy actions and the values after the first sweep with them."""
    for iteration in range(1, max_iterations + 1):
        improved, actions = action_values(mdp, values).max(-1)
        if _settled(improved, values, tolerance):
            return Plan(improved, greedy_policy(action_values(mdp, improved)), iteration)
        values = evaluate(actions, improved)
    raise _not_converged(max_iterations)


def _sweep(mdp: MDP, actions: Tensor) -> Callable[[Tensor], Tensor]:
    """Make `T_pi` of the deterministic policy with these actions `(S,)`; it reads only the actions' successors."""
    states = torch.arange(mdp.n_states)
    rewards = mdp.rewards[states, actions]
    probabilities, successors = mdp.probabilities[:, states, actions], mdp.successors[:, states, actions]
    return lambda values: backup(rewards, probabilities, successors, values, mdp.gamma)


def _repeat(sweep: Callable[[Tensor], Tensor], values: Tensor, tolerance: float, max_iterations: int) -> Evaluation:
    for iteration in range(1, max_iterations + 1):
        previous, values = values, sweep(values)
        if _settled(values, previous, tolerance):
            return Evaluation(values, iteration)
    raise _not_converged(max_iterations)


def _initial(mdp: MDP, initial: Tensor | None) -> Tensor:
    """Return values to start from, 0 in terminal states, where no sweep could correct them at `gamma = 1`."""
    if initial is None:
        return torch.zeros(mdp.n_states, dtype=torch.float64)
    if initial.shape != (mdp.n_states,):
        raise ValueError(f"initial {tuple(initial.shape)}: give a value for each of {mdp.n_states} states, (S,).")
    return torch.where(mdp.terminal, 0.0, initial.double())


def _settled(values: Tensor, previous: Tensor, tolerance: float) -> bool:
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: give 0 or a positive number, such as 1e-10.")
    return float((values - previous).abs().amax()) <= tolerance


def _not_converged(max_iterations: int) -> RuntimeError:
    return RuntimeError(
        f"not converged after {max_iterations} iterations: raise tolerance (rounding sets a floor) or max_iterations. "
        "At gamma = 1 a policy that never ends may have no values: give gamma < 1."
    )
