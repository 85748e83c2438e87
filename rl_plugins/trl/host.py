"""Small functions that connect TRL's trainers with ours: metrics, router losses, streams of weights to vLLM."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rl_plugins.hooks import VLLM, require_hooks
from rl_plugins.moe.routers import Router
from rl_plugins.nn.attachment import Attachment, base_model_of

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration


def log_metrics(trainer: Any, metrics: Mapping[str, Tensor]) -> None:
    """Append numbers of all ranks to those that TRL's trainers average until the next log."""
    mode = "train" if trainer.model.training else "eval"
    for name, value in metrics.items():
        # Explained variance of a constant return is undefined: NaN is left out, since it would make the mean NaN.
        if not value.isnan():
            trainer._metrics[mode][name].append(value.item())


def without_attachments(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Drop heads, value model and the like from a stream of named parameters; every parameter is
    still consumed, since gathering it is collective."""
    names = Attachment.names()
    for name, tensor in stream:
        if names.isdisjoint(name.split(".")):
            yield name, tensor


def hide_attachments_from_vllm(generation: "VLLMGeneration") -> None:
    """Keep attached modules out of the weights that TRL streams to vLLM, which does not know these modules."""
    require_hooks(VLLM)
    stream = generation._iter_named_params
    generation._iter_named_params = lambda: without_attachments(stream())


def own_router_loss(host: Any, model: nn.Module) -> float:
    """Return the coefficient of the router loss that the host itself adds to a model's loss; 0 if it adds none.

    transformers adds it if the model's config asks for router logits, TRL if the config has a field to ask for them.

    Args:
        host: The trainer, or its arguments if the caller has no trainer.
        model: Its model.
    """
    config = base_model_of(model).config.get_text_config()
    coef = getattr(config, "router_aux_loss_coef", 0.0)
    if "aux_loss_enabled" in vars(host):
        return host.router_aux_loss_coef if host.aux_loss_enabled else 0.0
    if "router_aux_loss_coef" in vars(host):
        coef = coef if host.router_aux_loss_coef is None else host.router_aux_loss_coef
        return coef if hasattr(config, "output_router_logits") else 0.0
    return coef if getattr(config, "output_router_logits", False) else 0.0


def stream_biases_to_vllm(generation: "VLLMGeneration", routers: Sequence[Router]) -> None:
    """Add selection biases to the weights that TRL streams to vLLM.

    TRL streams parameters, but no buffers. So biases that are buffers would be missing, and biases that are stored as
    rounded parameters would be inexact.

    Raises:
        ValueError: If a bias was added to an architecture without one, which vLLM cannot hold.
    """
    require_hooks(VLLM)
    added = [router.name for router in routers if router.injected is not None]
    if added:
        raise ValueError(
            f"vLLM's model has no place for the selection biases of {added[0]} and the others, so it would route "
            "otherwise than the policy. Balance with an auxiliary loss (rate=0, aux_loss_coef=0.01), or generate "
            "without vLLM."
        )
    stream = generation._iter_named_params

    def with_biases() -> Iterator[tuple[str, Tensor]]:
        yield from stream()
        for router in routers:
            if router.is_rounded or not isinstance(router.stored_bias, nn.Parameter):
                yield router.bias_key, router.bias

    generation._iter_named_params = with_biases
