"""Policy losses per token: the clips, their successors, and the aggregations that reduce a loss to a number.

Arguments that all losses share, and do not list again:
    logps: `ln pi(y_t|s_t) (B, T)` under the policy that learns.
    old_logps: `ln pi_old(y_t|s_t) (B, T)` under the policy that sampled (`vanilla` has none).
    advantages: `A (B,)`, one per sequence, or `A_t (B, T)`, one per token.
    mask: real tokens `(B, T)`; `None` means all.

Losses are `(B, T)`, float32 or wider, 0 at masked positions: reduce them with `aggregate`. A masked position may hold
anything (NaN, inf), which reaches neither a value nor a gradient. All losses raise `ValueError` where shapes do not
fit or a number is out of range.

`rho_t = pi(y_t|s_t) / pi_old(y_t|s_t)`, with `ln rho_t` clamped to [-20, 20] (see `ratios`): every loss and its
gradient are finite, whatever the ratio, and also for log-probabilities of -inf. A loss stops gradients only at the
clamp and where its equation has `sg`: pass `old_logps` and `advantages` detached. Masks and bounds that a loss derives
from the data are constants in its gradient.
"""
