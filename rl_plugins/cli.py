"""The `rl-plugins` command: `rl-plugins mtp-critic --model_name_or_path ... --dataset_name ... --reward_funcs ...`.

On several processes, launch the module: `accelerate launch -m rl_plugins mtp-critic ...`.
"""

import sys

from rl_plugins import __version__
from rl_plugins.known_warnings import ignore_known_warnings
from rl_plugins.usage import OneLineErrors, one_line_errors

# The names are here, without imports of the trainers, so that `rl-plugins --help` does not wait for torch.
COMMANDS = {
    "mtp-critic": "train a policy with a critic inside it (the arguments of `trl grpo`, and those of the critic)",
    "grpo-variant": "train with a variant of GRPO, such as --preset dapo (those of `trl grpo`, and the variants')",
    "ppo": "train with PPO and a separate value model (those of `trl grpo`, and PPO's)",
    "plot": "draw the learning curves of finished or running runs",
}


def main(argv: list[str] | None = None) -> None:
    """Run a command: the first argument is its name, the rest are its arguments.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        SystemExit: With status 2 and one line on stderr, if an argument is wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineErrors(
        prog="rl-plugins",
        description="Plugin components for TRL: training from the command line.",
        epilog="`rl-plugins COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    # The command parses the arguments after its name.
    command = parser.parse_args(argv[:1]).command
    prog = f"rl-plugins {command}"
    if command == "plot":
        from rl_plugins import plot_command

        return plot_command.main(argv[1:], prog=prog)
    ignore_known_warnings()
    with one_line_errors(prog):  # an extra may be missing
        from rl_plugins.trl.scripts import online
    online.main(command, argv[1:], prog=prog)


if __name__ == "__main__":
    main()
