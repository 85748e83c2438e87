"""Train with PPO and a separate value model, on the task and small model of `sums.py`.

`--preset vpg` is REINFORCE with a learned baseline. Every option of `PPOConfig` is a command-line argument:

    python recipes/ppo.py --output_dir outputs/ppo

    RECIPE=ppo recipes/launch/single_node.sh --model Qwen/Qwen3-0.6B --output_dir outputs/qwen3-ppo \\
        --learning_rate 1e-6 --max_completion_length 512

The recipe writes the policy, the value model (`value_model/`), `curves.png`, `token_values.html` and `summary.json`.
"""

from dataclasses import dataclass, field

from sums import Defaults, improve, load_policy, load_task, lora, make_reward, read_options

from rl_plugins.trl import PPOConfig, PPOTrainer


@dataclass
class Config(Defaults, PPOConfig):
    """`PPOConfig` with defaults that suit the small model."""

    output_dir: str = field(default="outputs/ppo", metadata={"help": "Where to write."})
    value_learning_rate: float | None = field(default=1e-3, metadata={"help": "Learning rate of the value model."})
    num_iterations: int = field(default=2, metadata={"help": "Epochs over each batch of completions."})
    beta: float = field(default=0.01, metadata={"help": "Coefficient of the KL penalty."})


def main() -> None:
    """Parse, warm-start, train, report."""
    parser, script, args = read_options(Config, __doc__)
    with parser.catching():  # reports mistakes of the user in one line
        tokenizer, items, held_out = load_task(script, args.seed)
        trainer = PPOTrainer(
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
