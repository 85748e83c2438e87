"""Pictures: learning curves and per-token value maps."""

from rl_plugins.report.curves import DEFAULT_PANELS, Panel, plot_training_curves, select_panels, smooth
from rl_plugins.report.token_values import TokenTrace, traces_from_rollout, write_token_values_html

__all__ = [
    "DEFAULT_PANELS",
    "Panel",
    "TokenTrace",
    "plot_training_curves",
    "select_panels",
    "smooth",
    "traces_from_rollout",
    "write_token_values_html",
]
