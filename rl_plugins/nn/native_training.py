"""What a training of native MTP layers starts from, for both hosts."""

from torch import nn

from rl_plugins.nn.attach import base_model_of
from rl_plugins.nn.native_mtp import NativeMTP, attach_native_mtp, check_can_attach, get_native_mtp
from rl_plugins.nn.native_mtp_files import load_native_mtp, native_layers_in


def check_native_settings(mtp_loss_coef: float, mtp_heads_path: object) -> None:
    """See that options of parallel heads go with `native_mtp=True`.

    Raises:
        ValueError: If the layers would not learn, or saved parallel heads are asked for.
    """
    if not mtp_loss_coef:
        raise ValueError(
            "native_mtp=True with mtp_loss_coef=0 trains nothing: native layers have a token loss only. Set "
            "mtp_loss_coef > 0 (DeepSeek-V3: 0.3, later 0.1)."
        )
    if mtp_heads_path is not None:
        raise ValueError(
            "mtp_heads_path is for parallel heads. Native layers are read from the model's own checkpoint: drop it, "
            "or set native_mtp=False."
        )


def check_no_rewards(has_rewards: bool) -> None:
    """Refuse scored rows, which teach values.

    Raises:
        ValueError: If there are any.
    """
    if has_rewards:
        raise ValueError(
            "The data has a `reward` column, but native MTP layers have no values to learn from it: a depth module "
            "has seen the very tokens that a value would judge. Drop the column, or set native_mtp=False."
        )


def prepare_native_mtp(model: nn.Module, num_layers: int, *, seed: int = 0) -> NativeMTP:
    """The native MTP layers that a training starts from: those attached, those of the model's checkpoint, or new ones.

    Args:
        model: Causal LM.
        num_layers: K.
        seed: Of new layers.

    Raises:
        ValueError: If the model is a PEFT model, its architecture has no native layers, or it has another number of
            them.
    """
    base, native = base_model_of(model), get_native_mtp(model)
    if model is not base:
        raise ValueError(
            "native_mtp=True writes the layers into the model's checkpoint, which an adapter's folder has not. "
            "merge_and_unload() the adapter first, or train parallel heads (native_mtp=False)."
        )
    if native is None:
        check_can_attach(base)
    found = native_layers_in(base) if native is None else native.num_layers
    if found not in (0, num_layers):
        raise ValueError(
            f"The model comes with {found} native MTP layers, not {num_layers}. Set num_mtp_heads={found}."
        )
    if native is not None:
        return native.requires_grad_(True)
    return load_native_mtp(base) if found else attach_native_mtp(base, num_layers, seed=seed)
