"""Rollouts that use the heads."""

from rl_plugins.generation.value_capture import ValuePass, ValueRecorder, completion_values

__all__ = ["ValuePass", "ValueRecorder", "completion_values"]
