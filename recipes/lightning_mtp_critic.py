"""Train a policy whose own multi-token-prediction heads are its critic, in Lightning, on the task of `sums.py`.

The small model and the settings are those of `recipes/mtp_critic.py`. A Qwen3-style model with a character tokenizer
is warm-started on a reasoning-gym task with `MTPSFTModule`. Then `MTPCriticModule` improves it by the rewards of the
task's verifier. The recipe runs on a laptop's CPU in minutes:

    python recipes/lightning_mtp_critic.py fit

A model from a path or the hub skips the warm start. The recipe trains it on one or many GPUs:

    python recipes/lightning_mtp_critic.py fit --config recipes/launch/lightning_zero2.yaml \
        --model.model Qwen/Qwen3-0.6B --trainer.devices 8

Every option of Lightning's `Trainer`, `MTPCriticModule` and the data is a command-line argument; `fit --help` lists
them, `--config file.yaml` reads them from a file. The recipe writes the policy and its heads (`policy/`, which
`MTPCriticTrainer` and `AutoModelForCausalLM` load), `curves.png`, `token_values.html`, `summary.json` and
`config.yaml` to `--trainer.default_root_dir`, which is outputs/lightning_mtp_critic by default.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from sums import Script, build_datasets, character_tokenizer, make_reward, small_model
from transformers import AutoTokenizer

from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.lightning import MTPCriticModule, MTPSFTModule, PromptDataModule, RolloutProgressBar, TokenValueReport
from rl_plugins.lightning.cli import OneLineCLI
from rl_plugins.process_group import end_process_group
from rl_plugins.report import DEFAULT_PANELS, Panel, plot_training_curves
from rl_plugins.signals import OnlineValueOptions, ValueHeadOptions

ACCURACY = "eval_rewards/accuracy/mean"
VARIANCE = "eval_critic/explained_variance"
DEFAULTS = {
    "seed_everything": 42,
    "trainer.max_steps": 1200,
    "trainer.gradient_clip_val": 1.0,
    "trainer.val_check_interval": 200,
    "trainer.check_val_every_n_epoch": None,
    "trainer.num_sanity_val_steps": -1,  # evaluates before training
    "trainer.log_every_n_steps": 50,
    "trainer.enable_checkpointing": False,
    "trainer.enable_model_summary": False,
    "trainer.logger": False,
    "trainer.default_root_dir": "outputs/lightning_mtp_critic",
    "model.learning_rate": 5e-4,
    "model.heads": ValueHeadOptions(head_learning_rate=1e-3),
    "model.values": OnlineValueOptions(value_loss_coef=0.5),
    "model.steps_per_generation": 4,
    "model.temperature": 0.7,
    "model.max_completion_length": 24,
    "data.batch_size": 512,
    "data.eval_batch_size": 512,
}


class TaskData(PromptDataModule):
    """Items of a reasoning-gym task: prompts, what their verifier reads, and demonstrations.

    Args:
        task: Name of the task.
        task_config: Its options, as JSON.
        train_items: Items to train on.
        eval_items: Held-out items, none of which is trained on.
        guesses: Share of the demonstrations that guess the answer instead of working it out.
        chat: Whether prompts are conversations.
        batch_size: Prompts of one rollout on each rank.
        eval_batch_size: Prompts of one batch on each rank in validation.
        seed: Seed of the items and of their order.
    """

    def __init__(
        self,
        task: str = Script.task,
        task_config: str = Script.task_config,
        train_items: int = 20_000,
        eval_items: int = 512,
        guesses: float = 0.6,
        chat: bool = False,
        batch_size: int = 512,
        eval_batch_size: int = 512,
        seed: int = 42,
    ) -> None:
        script = Script(
            task=task, task_config=task_config, train_items=train_items, eval_items=eval_items, guesses=guesses
        )
        train, held_out = build_datasets(script, chat, seed)
        super().__init__(train, held_out, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)


class TaskCritic(MTPCriticModule):
    """[`MTPCriticModule`] that learns a reasoning-gym task from its verifier.

    Args:
        model: Path or hub id; by default a small new model, which is warm-started.
        task: Name of the task.
        task_config: Its options, as JSON.
        warm_start_steps: Supervised steps of the small model.
        hidden_size: Width of the small model.
        layers: Depth of the small model.
        kwargs: For [`MTPCriticModule`].
    """

    def __init__(
        self,
        model: str | None = None,
        task: str = Script.task,
        task_config: str = Script.task_config,
        warm_start_steps: int = 4000,
        hidden_size: int = 64,
        layers: int = 2,
        **kwargs: Any,
    ) -> None:
        script = Script(task=task, task_config=task_config, hidden_size=hidden_size, layers=layers)
        policy: Any = model
        if model is None:
            tokenizer = character_tokenizer()
            policy, kwargs["tokenizer"] = small_model(script, tokenizer), tokenizer
        super().__init__(policy, reward_funcs=make_reward(script), **kwargs)
        self.warm_start_steps = 0 if model is not None else warm_start_steps


class History(Callback):
    """Callback that keeps the logged metrics, as `plot_training_curves` reads them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def _take(self, trainer: Trainer, evaluation: bool) -> None:
        found = {
            name: x.item() for name, x in trainer.callback_metrics.items() if name.startswith("eval_") == evaluation
        }
        if found:
            self.rows.append({"step": trainer.global_step, **found})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Record a training step, as often as loggers do."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._take(trainer, False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record an evaluation, including the one before training."""
        self._take(trainer, True)


class CLI(OneLineCLI):
    """Lightning's command line, with a warm start before and a report after training."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set defaults that suit the small model, and link options, so that the user names the task only once."""
        parser.set_defaults(DEFAULTS)
        parser.link_arguments("data.task", "model.task")
        parser.link_arguments("data.task_config", "model.task_config")
        parser.link_arguments(
            "seed_everything", "data.seed", compute_fn=lambda seed: seed if type(seed) is int else 42
        )
        parser.link_arguments("model.model", "data.chat", compute_fn=has_chat_template)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with our progress bar, unless bars are turned off, and with the callbacks of the report."""
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.progress_bar_callback is not None:
            trainer.callbacks.remove(trainer.progress_bar_callback)
            trainer.callbacks.append(RolloutProgressBar())
        self.history = History()
        page = TokenValueReport(
            Path(trainer.default_root_dir) / "token_values.html",
            title=f"What the critic thinks of each token: {self.config[self.subcommand].data.task}",
        )
        trainer.callbacks.extend([self.history, page])
        return trainer

    def before_fit(self) -> None:
        """Warm-start the small model on demonstrations, unless there is a checkpoint, which has newer weights."""
        if self.model.warm_start_steps and self.config_init[self.subcommand].ckpt_path is None:
            self._warm_start(self.model.warm_start_steps)

    def _warm_start(self, steps: int) -> None:
        config, bars = self.config_init[self.subcommand].trainer, self.trainer.progress_bar_callback is not None
        trainer = Trainer(
            max_steps=steps,
            gradient_clip_val=1.0,
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            # DeepSpeed cannot take a model that another engine has sharded.
            strategy="ddp" if self.trainer.world_size > 1 else "auto",
            precision=config.precision,
            enable_progress_bar=bars,
            callbacks=[RolloutProgressBar()] if bars else [],
            enable_checkpointing=False,
            enable_model_summary=False,
            logger=False,
            default_root_dir=config.default_root_dir,
        )
        module = MTPSFTModule(
            self.model.model,
            self.model.tokenizer,
            learning_rate=4e-3,
            head_learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            num_mtp_heads=self.model.mtp_heads.config.num_heads,
        )
        data = self.datamodule
        trainer.fit(module, PromptDataModule(data.train_dataset, batch_size=64, seed=data.seed))

    def after_fit(self) -> None:
        """Evaluate and save the policy, and write the report."""
        if self.trainer.interrupted:
            return
        steps, folder = self.trainer.global_step, Path(self.trainer.default_root_dir)
        evaluated = [row["step"] for row in self.history.rows if ACCURACY in row]
        if evaluated[-1:] != [steps]:
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        self.model.save_pretrained(folder / "policy")
        if self.trainer.is_global_zero:
            report(self.history.rows, folder, self.config[self.subcommand].data.task, steps)


def has_chat_template(model: str | None) -> bool:
    """Return whether prompts for a model are conversations."""
    return model is not None and AutoTokenizer.from_pretrained(model).chat_template is not None


def report(rows: list[dict[str, Any]], folder: Path, task: str, steps: int) -> None:
    """Write pictures and a summary of the results."""
    accuracy = [row[ACCURACY] for row in rows if ACCURACY in row]
    variance = [row.get(VARIANCE) for row in rows if ACCURACY in row]  # undefined where all are right or all wrong
    summary = {
        "accuracy_before": accuracy[0],
        "accuracy_after": accuracy[-1],
        "explained_variance_after": variance[-1],
        "steps": steps,
    }
    held_out = Panel("Accuracy on held-out items", "share right", ACCURACY, floor=0.0)
    plot_training_curves(
        rows, folder / "curves.png", title=f"{task}: MTPCriticModule in Lightning", panels=(held_out, *DEFAULT_PANELS)
    )
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    shown = "undefined" if variance[-1] is None else format(variance[-1], ".2f")
    print(f"\nAccuracy on held-out items: {accuracy[0]:.1%} -> {accuracy[-1]:.1%}.")
    print(f"Explained variance of the critic: {shown}.")
    print(f"The policy and all pictures are in {folder}.")


def main(args: ArgsType = None) -> None:
    """Parse, warm-start, train, report."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # rows are in memory
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")  # the warm start has none
    ignore_known_warnings()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    CLI(TaskCritic, TaskData, args=args, save_config_kwargs={"overwrite": True})
    end_process_group()


if __name__ == "__main__":
    main()
