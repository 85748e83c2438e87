"""Train with any variant of GRPO: a paper's settings in one word, or your own choice of advantage, loss and sampling.

The task, the small model and its warm start are those of `recipes/mtp_critic.py`, and so are all options beside
`GRPOVariantConfig`'s:

    python recipes/grpo_variants.py --preset dapo --output_dir outputs/dapo
    python recipes/grpo_variants.py --advantage max_likelihood --policy_loss gmpo --reject_uniform True

    RECIPE=grpo_variants recipes/launch/single_node.sh --preset gspo --model Qwen/Qwen3-0.6B \\
        --output_dir outputs/qwen3-gspo --learning_rate 1e-6 --max_completion_length 512

Writes the policy, `curves.png` and `summary.json`.
"""

from dataclasses import dataclass, field

from mtp_critic import Defaults, run

from rl_plugins.signals.presets import GRPO_PRESETS
from rl_plugins.trl import GRPOVariantConfig, GRPOVariantTrainer


@dataclass
class Config(Defaults, GRPOVariantConfig):
    """`GRPOVariantConfig` with defaults that suit the small model."""

    output_dir: str = field(default="outputs/grpo_variants", metadata={"help": "Where to write."})
    preset: str | None = field(
        default="dapo", metadata={"help": "The settings of a paper in one word.", "choices": [*GRPO_PRESETS]}
    )
    num_generations_eval: int | None = field(default=1, metadata={"help": "Completions per held-out item."})


if __name__ == "__main__":
    run(Config, GRPOVariantTrainer)
