"""Connection of a trainer with its balancing callbacks and its router loss."""

from typing import Any

from rl_plugins.trl.balancing import MoEBalancingCallback


def connect_balancing(trainer: Any) -> None:
    """Connect balancing callbacks with trackers and vLLM, and compute the router loss where TRL cannot.

    Args:
        trainer: Trainer, after the `__init__` of its host.

    Raises:
        TypeError: If the model's routers cannot be balanced.
        ValueError: If two router losses are asked for.
    """
    given = [c for c in trainer.callback_handler.callbacks if isinstance(c, MoEBalancingCallback)]
    for callback in given:
        callback.add_to(trainer)
    config = trainer.model.config.get_text_config()
    # TRL's fused forward reads `num_experts`, which deepseek_v3, glm4_moe, llama4, granitemoe and others do not have.
    if not trainer.aux_loss_enabled or hasattr(config, "num_experts"):
        return
    trainer.aux_loss_enabled = config.output_router_logits = False
    if any(callback.config.aux_loss_coef > 0.0 for callback in given):
        raise ValueError(
            f"Two router losses are on: router_aux_loss_coef={trainer.router_aux_loss_coef}, which is the model "
            "config's unless it was set, and aux_loss_coef of MoEBalancingCallback. Set router_aux_loss_coef=0, or "
            "leave out aux_loss_coef."
        )
    coef = trainer.router_aux_loss_coef
    try:
        if given:
            given[0].add_loss(coef).add_to(trainer)
        else:
            MoEBalancingCallback(rate=0.0, aux_loss_coef=coef, record_load=False).add_to(trainer)
    except (TypeError, ValueError) as error:
        error.add_note("Or set router_aux_loss_coef=0.0 to train without a router loss.")
        raise
