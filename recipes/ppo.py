"""Train with PPO and a separate value model, or (`--preset vpg`) with REINFORCE and a learned baseline.

The task, the small model and its warm start are those of `recipes/mtp_critic.py`, and so are all options beside
`PPOConfig`'s:

    python recipes/ppo.py --output_dir outputs/ppo

    RECIPE=ppo recipes/launch/single_node.sh --model Qwen/Qwen3-0.6B --output_dir outputs/qwen3-ppo \\
        --learning_rate 1e-6 --max_completion_length 512

Writes the policy, the value model (`value_model/`), `curves.png`, `token_values.html` and `summary.json`.
"""

from dataclasses import dataclass, field

from mtp_critic import Defaults, run

from rl_plugins.trl import PPOConfig, PPOTrainer


@dataclass
class Config(Defaults, PPOConfig):
    """`PPOConfig` with defaults that suit the small model."""

    output_dir: str = field(default="outputs/ppo", metadata={"help": "Where to write."})
    value_learning_rate: float | None = field(default=1e-3, metadata={"help": "Learning rate of the value model."})
    num_iterations: int = field(default=2, metadata={"help": "Epochs over each batch of completions."})
    beta: float = field(default=0.01, metadata={"help": "Coefficient of the KL penalty."})


if __name__ == "__main__":
    run(Config, PPOTrainer)
