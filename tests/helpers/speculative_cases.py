"""Options, rewards and references of runs that draft, for both hosts."""

from typing import Any


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """In [0, 1), different for nearly any two completions."""
    return [sum((k + 1) * (i + 3) ** 2 for k, i in enumerate(ids)) % 97 / 97 for ids in completion_ids]


def of_heads(name: str) -> bool:
    return "mtp_heads" in name.split(".")


def of_values(name: str) -> bool:
    return of_heads(name) and "value" in name.split(".")


def successors(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of tokens that are the successor of the one before them, in a cycle of four."""
    return [
        sum(b == 2 + (a - 1) % 4 for a, b in zip(ids, ids[1:], strict=False)) / (len(ids) - 1)
        for ids in completion_ids
    ]


SMALL: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


UNSUITABLE: dict[str, tuple[dict[str, Any], str]] = {
    "falcon_mamba": ({"state_size": 4}, "To generate without speculation"),
    "qwen3_next": (
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
        },
        "To generate without speculation",
    ),
}
