"""Pictures: learning curves, per-token value maps and the load of experts."""

from rl_plugins.report.curves import DEFAULT_PANELS, Panel, plot_training_curves, select_panels, smooth
from rl_plugins.report.expert_plots import plot_expert_load, plot_max_violation
from rl_plugins.report.grid_values import CLIFF_WALKING_ARROWS, FROZEN_LAKE_ARROWS, plot_grid_values
from rl_plugins.report.token_values import write_token_values_html
from rl_plugins.report.traces import TokenTrace, traces_from_rollout
from rl_plugins.run_logs import group_runs, read_run

__all__ = [
    "CLIFF_WALKING_ARROWS",
    "DEFAULT_PANELS",
    "FROZEN_LAKE_ARROWS",
    "Panel",
    "TokenTrace",
    "group_runs",
    "plot_expert_load",
    "plot_grid_values",
    "plot_max_violation",
    "plot_training_curves",
    "read_run",
    "select_panels",
    "smooth",
    "traces_from_rollout",
    "write_token_values_html",
]
