"""Which settings and data go with native MTP layers in place of parallel heads."""


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
