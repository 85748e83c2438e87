"""Train a classic agent (DQN, REINFORCE, QAC, A2C, off-policy actor-critic, TRPO or PPO) on a Gymnasium environment.

    python recipes/lightning_classic.py fit --config recipes/classic/ppo.yaml

This command solves CartPole-v1 in half a minute on one core. It writes the agent (`last.ckpt`), `curves.png`,
`summary.json` and all settings (`config.yaml`) to `outputs/classic/ppo`. `recipes/classic/` has settings of every
agent for CartPole-v1. The command line can replace any setting, and any option of Lightning's Trainer:

    python recipes/lightning_classic.py fit --config recipes/classic/ppo.yaml --model.env Acrobot-v1 --model.seed 1
    python recipes/lightning_classic.py fit --model DQNAgent --model.env MountainCar-v0 --model.total_steps 120000

`--ckpt_path outputs/classic/ppo/last.ckpt` continues an interrupted training. With `validate` in place of `fit`, it
evaluates the agent. `fit --help` and `fit --model.help PPOAgent` list the options.
"""

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from rl_plugins.classic import Agent
from rl_plugins.hooks import require_hooks
from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.lightning.cli import OneLineCLI
from rl_plugins.process_group import end_process_group
from rl_plugins.report import Panel, plot_training_curves

require_hooks("recipes/lightning_classic.py")

POINTS = 200  # of a learning curve
PANELS = (
    Panel("Return in training", "mean of the last 100 episodes", "rollout/return_mean"),
    Panel("Return in evaluation", "mean", "eval/return_mean", band="eval/return_std"),
    Panel("Loss of q", "Huber loss", "train/loss"),
    Panel("Policy loss", "loss", "train/policy_loss"),
    Panel("Value loss", "squared error", "train/value_loss", log_scale=True),
    Panel("Entropy of the policy", "nats", "train/entropy"),
    Panel("Random actions", "share", "train/epsilon"),
    Panel("KL from the old policy", "nats", "train/kl"),
)


class History(Callback):
    """Callback that keeps the logged metrics by environment steps, as `plot_training_curves` reads them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self.logged = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: Agent) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the metrics of an iteration, if it has logged any."""
        if pl_module.runner.steps - self.logged < pl_module.settings.total_steps / POINTS:
            return  # reading the metrics takes longer than a step of an environment
        logged = trainer.callback_metrics.get("time/env_steps", torch.tensor(0.0)).item()
        if logged > self.logged:
            self.logged = logged
            self._take(trainer, pl_module, ("rollout/", "train/"))

    def on_validation_end(self, trainer: Trainer, pl_module: Agent) -> None:
        """Record an evaluation."""
        self._take(trainer, pl_module, ("eval/",))

    def on_fit_end(self, trainer: Trainer, pl_module: Agent) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self.start

    def _take(self, trainer: Trainer, module: Agent, kinds: tuple[str, ...]) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(kinds)}
        self.rows.append({"step": module.runner.steps, **metrics})


class ClassicCLI(OneLineCLI):
    """Lightning's command line, with a report after training."""

    model: Agent

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer `fit` and `validate` only, since agents have no test set and nothing to predict."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a checkpoint, which every evaluation overwrites, with the options `--checkpoint.*`."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.filename": "last", "checkpoint.enable_version_counter": False})
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath")

    def _parse_ckpt_path(self) -> None:
        """Keep the settings of the command line, which Lightning would overwrite by those of the checkpoint.

        Lightning would then ignore another environment, for example. An agent refuses a checkpoint that does not fit.
        """

    def before_instantiate_classes(self) -> None:
        """Show progress in one line: Lightning's default, a bar of rich, is wrapped at 80 columns."""
        if self.config[self.subcommand].trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"] = [TQDMProgressBar()]

    def before_fit(self) -> None:
        """Add the callback that records the learning curve."""
        self.history = History()
        self.trainer.callbacks.append(self.history)

    def after_fit(self) -> None:
        """Save and evaluate the agent, print a summary, and draw the learning curve."""
        module, folder = self.model, Path(self.trainer.default_root_dir)
        returns, _, cut_off = module.evaluate(20)
        summary = {
            "agent": type(module).__name__,
            "environment": module.env_name,
            "seed": module.seed,
            "env_steps": module.runner.steps,
            "seconds": self.history.seconds,
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
            "episodes": len(returns),
            "episodes_cut_off": int(cut_off.sum()),
        }
        # The last evaluation, and the checkpoint after it, may be some iterations old.
        self.trainer.save_checkpoint(folder / "last.ckpt")
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        title = f"{summary['agent']} on {summary['environment']}"
        plot_training_curves(
            self.history.rows, folder / "curves.png", title=title, panels=PANELS, xlabel="environment steps"
        )
        print(
            f"\n{title}: return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes, after "
            f"{module.runner.steps:,} environment steps in {self.history.seconds:.0f} s\n"
            f"{folder} has last.ckpt, curves.png, summary.json and config.yaml."
        )


def main(args: list[str] | None = None) -> ClassicCLI:
    """Parse and run."""
    ignore_known_warnings()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # a loader of iterations needs no workers
    warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advertisements
    from jsonargparse import set_parsing_settings  # the import of OneLineCLI has checked that it is installed

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the settings are documented field by field
    cli = ClassicCLI(
        Agent,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # checkpoints like those of a script
        seed_everything_default=False,  # an agent has its own seed
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "val_check_interval": 0.1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "default_root_dir": "outputs/classic",
        },
        args=args,
    )
    end_process_group()
    return cli


if __name__ == "__main__":
    main()
