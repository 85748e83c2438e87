"""The card of a model that a trainer has made: method, papers, and code that loads the files beside the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl_plugins.trl.balancing import MoEBalancingCallback
from rl_plugins.trl.card_text import CARD, Method, complete_card, host_paper


def write_model_card(
    trainer: Any, method: Method, write: Callable[..., None], model_name: str | None, *args: Any, **kwargs: Any
) -> None:
    """Write README.md into the output directory as the host does, then add the parts that its template lacks.

    Args:
        trainer: Trainer that has trained the model.
        method: Method of the training; a callback that balances experts adds itself to it.
        write: The host's own `create_model_card`.
        model_name: Name of the model; that of the output directory by default.
        args: Further arguments of `write`.
        kwargs: Further arguments of `write`.
    """
    path = Path(str(trainer.args.output_dir)) / CARD
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, MoEBalancingCallback):
            method = callback.describe(method)
    trainer._name, trainer._paper = method.name, host_paper(method)
    write(model_name or path.parent.name, *args, **kwargs)
    if trainer.is_world_process_zero():
        complete_card(path, method, trained_by=type(trainer).__name__, hub_id=trainer.hub_model_id)
