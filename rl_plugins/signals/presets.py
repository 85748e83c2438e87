"""Presets: the options that reproduce the method of a paper, by short name.

A preset has only the options that define the method. Learning rate, batch size and the size of groups depend on the
model and the machine; docs/variants.md lists the papers' values.
"""

from typing import Any

Preset = dict[str, Any]

# A preset whose method has a KL term to the reference sets beta: TRL's default is 0.
GRPO_PRESETS: dict[str, Preset] = {
    "grpo": {"advantage": "group_normalized", "policy_loss": "grpo", "beta": 0.04},
    "dr_grpo": {"advantage": "group_centered", "policy_loss": "dr_grpo"},
    "dapo": {
        "advantage": "group_normalized",
        "policy_loss": "dapo",
        "epsilon_high": 0.28,
        "dynamic_sampling": True,
        "overlong_shaping": True,
    },
    "gspo": {
        "advantage": "group_normalized",
        "policy_loss": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "gspo_token": {
        "advantage": "group_normalized",
        "policy_loss": "gspo_token",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "luspo": {
        "advantage": "group_normalized",
        "policy_loss": "luspo",
        "importance_sampling_level": "sequence",
        "epsilon": 2e-3,
        "epsilon_high": 2.5e-3,
    },
    "gmpo": {"advantage": "group_normalized", "policy_loss": "gmpo", "epsilon": 0.4, "epsilon_high": 0.4},
    "cispo": {
        "advantage": "group_normalized",
        "policy_loss": "cispo",
        "aggregation": "prompt",
        "epsilon_high": 5.0,  # ScaleRL's value: MiniMax gives none
        "dynamic_sampling": True,
        "overlong_shaping": True,
    },
    "scale_rl": {
        "advantage": "group_centered_batch_normalized",
        "policy_loss": "cispo",
        "aggregation": "prompt",
        "epsilon_high": 5.0,
        "reject_uniform": True,
    },
    "sapo": {"advantage": "group_normalized", "policy_loss": "sapo"},
    "vespo": {"advantage": "group_normalized", "policy_loss": "vespo"},
    "gpg": {"advantage": "group_centered_rescaled", "policy_loss": "gpg"},
    "gvpo": {"advantage": "group_centered", "policy_loss": "gvpo"},
    "dppo": {
        "advantage": "group_centered",
        "policy_loss": "dppo",
        "vllm_importance_sampling_correction": False,  # its trust region is around the sampler itself
    },
    "fipo": {"advantage": "group_normalized", "policy_loss": "fipo", "epsilon_high": 0.28},
    "bapo": {"advantage": "group_normalized", "policy_loss": "bapo"},
    "cpgd": {"advantage": "group_normalized", "policy_loss": "cpgd", "aggregation": "prompt"},
    "clip_cov": {
        "advantage": "group_normalized",
        "policy_loss": "clip_cov",
        "epsilon": 1.0,
        "epsilon_high": 1.0,
    },
    "kl_cov": {"advantage": "group_normalized", "policy_loss": "kl_cov", "policy_loss_kwargs": {"ratio": 2e-3}},
    "rloo": {"advantage": "leave_one_out", "policy_loss": "vanilla", "aggregation": "sequence_sum", "beta": 0.03},
    "opo": {"advantage": "length_weighted", "policy_loss": "vanilla"},
    "maxrl": {"advantage": "max_likelihood", "policy_loss": "dapo"},
    "reinforce++": {
        "advantage": "batch_normalized",
        "policy_loss": "dapo",
        "num_generations": 1,
        "beta": 1e-3,
        "kl_in_reward": True,
    },
    "reinforce++_baseline": {"advantage": "group_centered_batch_normalized", "policy_loss": "dapo", "beta": 1e-5},
    # Not advantage='reward': with rewards of 0 and 1 that would be RAFT++, which learns from right answers only.
    "reinforce_rej": {"advantage": "group_min_max", "policy_loss": "dapo", "reject_uniform": True},
    "lite_ppo": {"advantage": "group_centered_batch_scaled", "policy_loss": "dapo"},
    "pass_at_k": {
        "advantage": "pass_at_k",
        "advantage_kwargs": {"k": 4, "normalize": True},
        "policy_loss": "dapo",
        "epsilon_high": 0.28,
    },
    "krpo": {"advantage": "kalman", "policy_loss": "grpo", "beta": 0.01},
    "spo": {
        "advantage": "value_tracker",
        "policy_loss": "dapo",
        "epsilon_high": 0.28,
        "num_generations": 1,
    },
    "grpo_lambda": {
        "advantage": "lambda_trace",
        "advantage_kwargs": {"lam": 0.99, "style": "both", "min_advantage": -0.1},
        "policy_loss": "grpo",
    },
    "process_supervision": {"advantage": "process_normalized", "policy_loss": "grpo", "beta": 0.04},
    "mt_grpo": {"advantage": "turn_normalized", "policy_loss": "bnpo"},
}

PPO_PRESETS: dict[str, Preset] = {
    "vpg": {
        "policy_loss": "vanilla",
        "advantage_estimator": "mc",
        "num_iterations": 1,
        "value_loss_type": "squared",
    },
}


def find_preset(name: str, presets: dict[str, Preset], elsewhere: str = "") -> Preset:
    """Look up a preset.

    Args:
        name: Name of the preset.
        presets: Presets to choose from.
        elsewhere: Sentence for the error message that says where the other presets are.

    Raises:
        ValueError: If no preset has this name; the message lists the valid ones.
    """
    if name not in presets:
        hint = f" {elsewhere}" if elsewhere and name in {**GRPO_PRESETS, **PPO_PRESETS} else ""
        raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(presets)}.{hint}")
    return presets[name]
