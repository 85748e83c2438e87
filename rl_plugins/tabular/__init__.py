"""Finite MDPs: exact values that learned critics and policies are tested against, and tables learned from samples."""

from rl_plugins.tabular.bellman import (
    action_values,
    bellman_expectation,
    bellman_expectation_q,
    bellman_optimality,
    bellman_optimality_q,
    epsilon_greedy_policy,
    greedy_policy,
    state_values,
)
from rl_plugins.tabular.closed_form import solve_values
from rl_plugins.tabular.control import (
    Learned,
    learn_action_values,
    learn_state_values,
    monte_carlo_basic,
    update_table,
)
from rl_plugins.tabular.finite_horizon import FiniteHorizon, finite_horizon_values
from rl_plugins.tabular.mdp import MDP
from rl_plugins.tabular.objectives import (
    average_reward,
    average_reward_gradient,
    differential_values,
    discounted_objective,
    discounted_visitation,
    policy_gradient,
    stationary_distribution,
)
from rl_plugins.tabular.planning import (
    Evaluation,
    Plan,
    policy_evaluation,
    policy_iteration,
    truncated_policy_iteration,
    value_iteration,
)
from rl_plugins.tabular.sampling import ParallelMDP, Rollout
from rl_plugins.tabular.step_sizes import StepSize, constant_step_size, polynomial_step_size
from rl_plugins.tabular.targets import Target, expected_sarsa, monte_carlo, n_step_sarsa, q_learning, sarsa
from rl_plugins.tabular.token_mdp import TokenMDP

__all__ = [
    "MDP",
    "Evaluation",
    "FiniteHorizon",
    "Learned",
    "ParallelMDP",
    "Plan",
    "Rollout",
    "StepSize",
    "Target",
    "TokenMDP",
    "action_values",
    "average_reward",
    "average_reward_gradient",
    "bellman_expectation",
    "bellman_expectation_q",
    "bellman_optimality",
    "bellman_optimality_q",
    "constant_step_size",
    "differential_values",
    "discounted_objective",
    "discounted_visitation",
    "epsilon_greedy_policy",
    "expected_sarsa",
    "finite_horizon_values",
    "greedy_policy",
    "learn_action_values",
    "learn_state_values",
    "monte_carlo",
    "monte_carlo_basic",
    "n_step_sarsa",
    "policy_evaluation",
    "policy_gradient",
    "policy_iteration",
    "polynomial_step_size",
    "q_learning",
    "sarsa",
    "solve_values",
    "state_values",
    "stationary_distribution",
    "truncated_policy_iteration",
    "update_table",
    "value_iteration",
]
