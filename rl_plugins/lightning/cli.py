"""Lightning's command line with errors of one line, for scripts that train with `rl_plugins`."""

import sys
from pathlib import Path
from typing import Any, NoReturn

from rl_plugins.extras import require

require("lightning", "lightning.pytorch", "jsonargparse")

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from rl_plugins.usage import exit_with, one_line_errors

CHECKPOINT_WORDS = ("best", "last", "hpc")
"""Values of `--ckpt_path` that Lightning looks up itself."""


class OneLineParser(LightningArgumentParser):
    """Parser whose errors are one line on stderr, with exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write the message and leave with status 2."""
        started = Path(sys.argv[0]).name  # the parser of a class's options may have kept an earlier program's name
        exit_with(self.prog if self.prog.startswith(started) else started, message)


class OneLineCLI(LightningCLI):
    """`LightningCLI` that reports a mistake in the command line, the config file or a setting in one line.

    It takes the arguments of [`~lightning.pytorch.cli.LightningCLI`]. Errors from the training keep their traceback.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, with the options that Lightning gives it, such as `--config`."""
        parser = super().init_parser(**kwargs)
        parser.__class__ = OneLineParser  # Lightning always makes a parser of its own class
        return parser

    def instantiate_classes(self) -> None:
        """Make model, data and trainer, each of which checks its settings.

        Raises:
            SystemExit: With status 2 and one line on stderr, if one of them refuses its settings.
        """
        with one_line_errors(self.parser.prog):
            super().instantiate_classes()
            self._check_checkpoint()

    def _check_checkpoint(self) -> None:
        """Refuse a checkpoint that does not exist, before the data are prepared."""
        given = self.config if self.subcommand is None else self.config[self.subcommand]
        path = given.get("ckpt_path")
        if path is not None and path not in CHECKPOINT_WORDS and not Path(path).exists():
            raise FileNotFoundError(f"--ckpt_path {path}: there is no such file. Check the path.")
