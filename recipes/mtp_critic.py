"""Train a policy whose own multi-token-prediction heads are its critic, on the task and small model of `sums.py`.

By default the recipe builds a small Qwen3-style model with a character tokenizer, and warm-starts it on a
reasoning-gym task with `MTPSFTTrainer`. Then `MTPCriticTrainer` improves it by the rewards of the task's verifier. The
recipe runs on a laptop's CPU in minutes:

    python recipes/mtp_critic.py --output_dir outputs/demo

A model from a path or the hub skips the warm start:

    accelerate launch recipes/mtp_critic.py --model Qwen/Qwen3-0.6B --output_dir outputs/qwen3 \
        --learning_rate 1e-6 --max_completion_length 512 --deepspeed recipes/launch/ds_zero2.json

Every option of `MTPCriticConfig` (and so of TRL's `GRPOConfig`) is a command-line argument; `--config file.yaml` reads
them from a file. The recipe writes the policy, the heads, `curves.png`, `token_values.html` and `summary.json`.
"""

from dataclasses import dataclass, field

from sums import Defaults, announce, improve, load_policy, load_task, lora, make_reward, read_options

from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer


@dataclass
class Config(Defaults, MTPCriticConfig):
    """`MTPCriticConfig` with defaults that suit the small model."""

    output_dir: str = field(default="outputs/mtp_critic", metadata={"help": "Where to write."})
    head_learning_rate: float | None = field(default=1e-3, metadata={"help": "Learning rate of the heads."})
    value_loss_coef: float = field(default=0.5, metadata={"help": "lambda_2, weight of the value loss."})


def main() -> None:
    """Parse, warm-start, train, report."""
    parser, script, args = read_options(Config, __doc__)
    if script.model is None:
        announce(
            args,
            "A small language model learns sums, first from demonstrations, then by reinforcement learning with a "
            "critic inside it. With the default options both phases took 14 minutes on one slow processor core.",
        )
    with parser.catching():  # reports mistakes of the user in one line
        tokenizer, items, held_out = load_task(script, args.seed)
        # One completion per prompt is enough: the heads' values take the place of the group of completions in GRPO.
        trainer = MTPCriticTrainer(
            load_policy(script, args, items),  # the small model learns demonstrations first, together with its heads
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
