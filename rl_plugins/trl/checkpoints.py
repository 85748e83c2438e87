"""Checkpoints of the trainers: which of them can be resumed, and weights that transformers saves under other names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed import is_initialized
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from rl_plugins.nn.attachment import Attachment, base_model_of

STATE_NAME = "rl_plugins.pt"
"""File in a checkpoint with our state that is equal on all ranks: target heads, the counts of tracked prompts."""
FIRST_ROLLOUT = "rollout_0.pt"
"""File in a checkpoint with the state of the first rank in online training."""


def rollout_file(directory: Path, rank: int) -> Path:
    """Return the path of the file with the state of one rank in online training."""
    return directory / f"rollout_{rank}.pt"


def checkpoint_folder(trainer: Any, trial: Any) -> Path:
    """Make the folder of the checkpoint that a trainer is about to write.

    Our files are written before the host's. So a checkpoint with the host's files is complete, even if the job dies in
    between.
    """
    folder = Path(trainer._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_start(trainer: Any, resume_from_checkpoint: str | Path | bool | None, own: Mapping[str, bool]) -> None:
    """Check the launcher and the checkpoint to resume from, before training starts.

    Args:
        trainer: The trainer.
        resume_from_checkpoint: The argument of `train`.
        own: Files that this trainer writes into a checkpoint beside those of the host, and whether they have to be
            there.

    Raises:
        FileNotFoundError: If the checkpoint is not there, or was written by another trainer.
        ValueError: If DeepSpeed is asked for in a process that no launcher has started.
    """
    launched = is_initialized() or "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ
    if trainer.is_deepspeed_enabled and not launched:
        raise ValueError(
            "DeepSpeed needs a launcher, even for one process, and this one was started without. Run the script "
            "with `accelerate launch`, `torchrun` or `deepspeed`, or leave out the DeepSpeed config."
        )
    found, written = resume_from_checkpoint, Path(trainer.args.output_dir)
    if found is True:
        found = get_last_checkpoint(written) if written.is_dir() else None
    if found:
        _check_checkpoint(trainer, Path(found), own)


def _check_checkpoint(trainer: Any, directory: Path, own: Mapping[str, bool]) -> None:
    given = f"resume_from_checkpoint={str(directory)!r}"
    if not directory.is_dir():
        raise FileNotFoundError(f"{given}: there is no such folder. Check the path.")
    ours = rollout_file(directory, trainer.accelerator.process_index)
    if ours.name in own and not ours.is_file() and any(directory.glob("rollout_*.pt")):
        raise FileNotFoundError(
            f"{directory} has no {ours.name}. Resume with as many processes as wrote the checkpoint, from storage "
            "that all of them see."
        )
    instead = f"Start from it with model={str(directory)!r} instead of resume_from_checkpoint."
    if not (directory / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(
            f"{given} is a model, or was written by another trainer: it has no {TRAINER_STATE_NAME}. {instead}"
        )
    missing = [name for name, needed in own.items() if needed and not (directory / name).is_file()]
    marks = [*Attachment.marks(), STATE_NAME, FIRST_ROLLOUT]
    foreign = [name for name in marks if name not in own and (directory / name).is_file()]
    if missing or foreign:
        signs = [f"it has no {', '.join(missing)}"] if missing else []
        signs += [f"it has {', '.join(foreign)}"] if foreign else []
        raise FileNotFoundError(
            f"{given} was written by another trainer than this {type(trainer).__name__}, or with other settings: "
            f"{' and '.join(signs)}. {instead}"
        )


class RenamedWeights:
    """Reads checkpoints in which `save_pretrained` has written experts one by one, under other names.

    transformers' `Trainer` reads such a file with `load_state_dict(strict=False)`: the experts would silently keep
    their old weights.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self._found = trainer, False

    def found(self, load_result: Any) -> bool:
        """Return whether the file that the host has just loaded has other names, and remember it for [`load`]."""
        self._found = bool(load_result.missing_keys and load_result.unexpected_keys)
        return self._found

    def load(self, directory: str) -> None:
        """Load the weights with `from_pretrained`, if their names were found to differ."""
        if self._found:
            base = base_model_of(self.trainer.model)
            saved = type(base).from_pretrained(directory, dtype=base.dtype)
            base.load_state_dict(saved.state_dict(), strict=False)
            self._found = False
