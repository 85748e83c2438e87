"""Train with any variant of GRPO, a preset or your own choice of parts, on the task and small model of `sums.py`.

A preset has the settings of a paper. The parts are an advantage, a policy loss and a way of sampling. Every option of
`GRPOVariantConfig` is a command-line argument:

    python recipes/grpo_variants.py --preset dapo --output_dir outputs/dapo
    python recipes/grpo_variants.py --advantage max_likelihood --policy_loss gmpo --reject_uniform True

    RECIPE=grpo_variants recipes/launch/single_node.sh --preset gspo --model Qwen/Qwen3-0.6B \\
        --output_dir outputs/qwen3-gspo --learning_rate 1e-6 --max_completion_length 512

The recipe writes the policy, `curves.png` and `summary.json`.
"""

from dataclasses import dataclass, field

from sums import Defaults, improve, load_policy, load_task, lora, make_reward, read_options

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


def main() -> None:
    """Parse, warm-start, train, report."""
    parser, script, args = read_options(Config, __doc__)
    with parser.catching():  # reports mistakes of the user in one line
        tokenizer, items, held_out = load_task(script, args.seed)
        trainer = GRPOVariantTrainer(
            load_policy(script, args, items),
            make_reward(script),
            args,
            train_dataset=items,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=lora(script),
        )
    improve(trainer, parser, script, args)


if __name__ == "__main__":
    main()
