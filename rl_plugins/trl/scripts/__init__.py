"""Training scripts, one for each command of `rl-plugins`."""
