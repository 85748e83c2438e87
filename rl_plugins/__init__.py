"""Plugin components for TRL and Lightning: an MTP value head as the critic inside the policy.

Import from the layer you need: `rl_plugins.trl`, `rl_plugins.lightning`, `rl_plugins.classic`, `rl_plugins.moe`,
`rl_plugins.nn`, `rl_plugins.functional`.

Time index, the same everywhere:

    y_0 .. y_{T-1}   completion tokens; the state s_t is the prompt followed by y_{<t}
    h_t              hidden state of the trunk that predicts y_t; the action a_t is y_t
    r_t              reward paid after a_t
    V(s_t)           E[ sum_i gamma^i r_{t+i} ], and 0 after the last real token

    head k = 1..K reads h_t alone and returns [logits_k, v_k]
    logits_k[t]      predicts the token y_{t+k} (the main head predicts y_t)
    v_k[t]           predicts the return from r_{t+k-1} on, forecast from s_t, so v_1[t] estimates V(s_t)

Shapes: `B` sequences, `T` completion tokens, `K` heads, `G` group, `E` experts, `D` hidden, `V` vocabulary;
`values (B, T, K)`, `completion_mask (B, T)`.
"""

__version__ = "0.1.0"
