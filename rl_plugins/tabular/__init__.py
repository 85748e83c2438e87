"""Finite MDPs whose values are exact: the oracle that learned critics are tested against."""

from rl_plugins.tabular.token_mdp import TokenMDP

__all__ = ["TokenMDP"]
