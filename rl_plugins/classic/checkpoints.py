"""Whether a checkpoint fits an agent."""

from typing import Any

from lightning.pytorch import LightningModule

_SPACES = ("observation space", "action space")


def check_checkpoint(
    checkpoint: dict[str, Any],
    theirs: dict[str, str],
    module: LightningModule,
    ours: dict[str, str],
    *,
    resuming: bool,
) -> None:
    """Raise where a checkpoint does not fit a module, before torch does for the first tensor of another size.

    Args:
        checkpoint: As Lightning loads it.
        theirs: Agent, environment and spaces of the checkpoint.
        module: The module that is to take it over.
        ours: Agent, environment and spaces of the module.
        resuming: Whether training goes on. If not, only the spaces and the networks have to fit.

    Raises:
        ValueError: If it does not fit.
    """
    for key in ours if resuming else _SPACES:
        if theirs[key] != ours[key]:
            raise ValueError(
                f"The checkpoint's {key} is {theirs[key]}, this module's is {ours[key]}: use the checkpoint's, or "
                "train without it."
            )
    _check_shapes(checkpoint, module)


def _check_shapes(checkpoint: dict[str, Any], module: LightningModule) -> None:
    theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if theirs == ours:
        return
    name = next(name for name in theirs | ours if theirs.get(name) != ours.get(name))
    saved = checkpoint.get("hyper_parameters", {})
    differing = {
        key: (value, module.hparams[key])
        for key, value in saved.items()
        if key in module.hparams and value != module.hparams[key]
    }
    settings = "; ".join(f"{key}={old}, here {new}" for key, (old, new) in differing.items())
    raise ValueError(
        f"The checkpoint has another architecture: {name} is {theirs.get(name, 'missing')}, here "
        f"{ours.get(name, 'missing')}. Build the module with the settings of the checkpoint"
        + (f" ({settings})." if settings else ".")
    )
