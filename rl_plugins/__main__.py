"""`python -m rl_plugins`: the `rl-plugins` command, for launchers such as `accelerate launch -m rl_plugins`."""

from rl_plugins.cli import main

if __name__ == "__main__":
    main()
