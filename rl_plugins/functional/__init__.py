"""The equations of the package: pure functions on tensors, without state, configuration or process groups.

Shapes: `B` sequences, `T` completion tokens, `P` prompt tokens, `L` tokens of a whole row, `K` heads, `D` hidden, `V`
vocabulary. In mixtures of experts: `N` routed tokens (`B T`, flattened), `E` experts, `k` experts per token.

Time index. The completion is `y_0 .. y_{T-1}`. State `s_t` is the prompt and `y_{<t}`; the action in it is `y_t`; the
reward `r_t` is paid after `y_t`; `V(s_t) = E[sum_i gamma^i r_{t+i}]`; `V = 0` after the last real token. At position
`t`, parallel head `k = 1..K` of `values (B, T, K)` forecasts, from `s_t` alone, the return that begins with the reward
`r_{t+k-1}`; every sequential head estimates `V(s_t)`.

Masks are `(B, T)`, bool or 0/1, and may have holes (tool output inside a completion). A masked token is skipped: the
state after a token is that of the next real token. Outputs are 0 at masked positions. Whatever the inputs hold there
(NaN, inf) reaches neither a result nor a gradient.

Arithmetic is float32 or wider: half-precision inputs are upcast; functions that only move entries keep the dtype. No
function uses a matrix product, which autocast would compute in bfloat16, so autocast does not change the results.
Float64 inputs give float64 results. Log-ratios of policies are clamped to [-20, 20] before an exponential (see
`ratios`), and a log-probability of -inf is valid, so that losses and gradients are finite whatever was sampled.
Stop-gradients are up to the caller: a function detaches a tensor only where its equation has `sg[.]`, or its docstring
says that a term is constant in the gradient.
"""

from rl_plugins.functional.acceptance import (
    acceptance_probs,
    count_accepted,
    expected_tokens,
    inverse_cdf,
    residual_probs,
)
from rl_plugins.functional.action_values import (
    double_q_targets,
    expected_sarsa_targets,
    q_learning_targets,
    sarsa_targets,
    stochastic_update,
)
from rl_plugins.functional.advantages.group import (
    batch_normalized,
    gpg_scale,
    group_centered,
    group_centered_batch_normalized,
    group_centered_batch_scaled,
    group_min_max,
    group_normalized,
    informative_groups,
    kalman,
    leave_one_out,
    length_weighted,
    max_likelihood,
    pass_at_k,
)
from rl_plugins.functional.advantages.scaling import value_implied_std, value_scaled
from rl_plugins.functional.advantages.steps import process_normalized, reward_to_go, turn_normalized
from rl_plugins.functional.advantages.traces import lambda_trace, trace_weights
from rl_plugins.functional.advantages.tracked import (
    forget_factor,
    initial_counts,
    policy_distance,
    tracker_update,
    tracker_value,
)
from rl_plugins.functional.alignment import (
    completion_labels,
    completion_states,
    head_targets,
    last_real,
    lookahead_values,
    mtp_labels,
    next_state_values,
    predicted_mask,
    shift_real,
)
from rl_plugins.functional.log_probs import kl_k1, kl_k3, kl_to_sampler, token_entropies, token_log_probs
from rl_plugins.functional.masking import (
    Reduce,
    explained_variance,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_whiten,
    zero_masked,
)
from rl_plugins.functional.natural_gradient import (
    conjugate_gradient,
    flat_gradient,
    hessian_product,
    trust_region_step,
)
from rl_plugins.functional.policy_losses.aggregation import AGGREGATIONS, aggregate, prompt_weights
from rl_plugins.functional.policy_losses.clip import cispo, gmpo, gspo_token, ppo_clip, sapo, vanilla, vespo
from rl_plugins.functional.policy_losses.covariance import clip_cov, kl_cov
from rl_plugins.functional.policy_losses.future_kl import fipo
from rl_plugins.functional.policy_losses.gvpo import gvpo
from rl_plugins.functional.policy_losses.trust_region import bapo, bapo_bounds, cpgd, dppo
from rl_plugins.functional.ratios import log_importance_weights, log_ratios
from rl_plugins.functional.returns import (
    discount_factors,
    discounted_returns,
    gae,
    lambda_returns,
    length_adaptive_lambda,
    n_step_returns,
    td_errors,
    td_targets,
    vtrace,
)
from rl_plugins.functional.rewards import kl_shaped_rewards, overlong_penalty, terminal_rewards
from rl_plugins.functional.routing import (
    BIAS_RULES,
    BiasRule,
    Scoring,
    expert_counts,
    load_entropy,
    load_fractions,
    max_violation,
    router_probabilities,
    router_z_loss,
    selection_bias_quantile,
    selection_bias_update,
    sequence_balance_loss,
    switch_balance_loss,
)
from rl_plugins.functional.target_networks import periodic_update, polyak_update
from rl_plugins.functional.turns import at_turn_ends, in_time_unit, turn_ends, turn_numbers, turn_sums
from rl_plugins.functional.value_losses import clipped_squared_error, huber, squared_error

__all__ = [
    "AGGREGATIONS",
    "BIAS_RULES",
    "BiasRule",
    "Reduce",
    "Scoring",
    "acceptance_probs",
    "aggregate",
    "at_turn_ends",
    "bapo",
    "bapo_bounds",
    "batch_normalized",
    "cispo",
    "clip_cov",
    "clipped_squared_error",
    "completion_labels",
    "completion_states",
    "conjugate_gradient",
    "count_accepted",
    "cpgd",
    "discount_factors",
    "discounted_returns",
    "double_q_targets",
    "dppo",
    "expected_sarsa_targets",
    "expected_tokens",
    "expert_counts",
    "explained_variance",
    "fipo",
    "flat_gradient",
    "forget_factor",
    "gae",
    "gmpo",
    "gpg_scale",
    "group_centered",
    "group_centered_batch_normalized",
    "group_centered_batch_scaled",
    "group_min_max",
    "group_normalized",
    "gspo_token",
    "gvpo",
    "head_targets",
    "hessian_product",
    "huber",
    "in_time_unit",
    "informative_groups",
    "initial_counts",
    "inverse_cdf",
    "kalman",
    "kl_cov",
    "kl_k1",
    "kl_k3",
    "kl_shaped_rewards",
    "kl_to_sampler",
    "lambda_returns",
    "lambda_trace",
    "last_real",
    "leave_one_out",
    "length_adaptive_lambda",
    "length_weighted",
    "load_entropy",
    "load_fractions",
    "log_importance_weights",
    "log_ratios",
    "lookahead_values",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "masked_whiten",
    "max_likelihood",
    "max_violation",
    "mtp_labels",
    "n_step_returns",
    "next_state_values",
    "overlong_penalty",
    "pass_at_k",
    "periodic_update",
    "policy_distance",
    "polyak_update",
    "ppo_clip",
    "predicted_mask",
    "process_normalized",
    "prompt_weights",
    "q_learning_targets",
    "residual_probs",
    "reward_to_go",
    "router_probabilities",
    "router_z_loss",
    "sapo",
    "sarsa_targets",
    "selection_bias_quantile",
    "selection_bias_update",
    "sequence_balance_loss",
    "shift_real",
    "squared_error",
    "stochastic_update",
    "switch_balance_loss",
    "td_errors",
    "td_targets",
    "terminal_rewards",
    "token_entropies",
    "token_log_probs",
    "trace_weights",
    "tracker_update",
    "tracker_value",
    "trust_region_step",
    "turn_ends",
    "turn_normalized",
    "turn_numbers",
    "turn_sums",
    "value_implied_std",
    "value_scaled",
    "vanilla",
    "vespo",
    "vtrace",
    "zero_masked",
]
