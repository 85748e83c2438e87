"""A name for models that were made in memory, by which TRL can load the reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel
from trl.trainer.utils import get_config_model_id

from rl_plugins.nn.sharding import whole_parameters


@contextmanager
def lent_name(model: Any, processing_class: Any, *, loads_reference: bool) -> Iterator[None]:
    """Give a model without a name a temporary one inside the block: the path of a folder with its weights.

    TRL loads the reference by the name of the policy, and a model made from a config has no name. With the folder, the
    reference is the policy as it was given.

    Args:
        model: The policy as the user gave it.
        processing_class: Its tokenizer or processor, which the folder does not have.
        loads_reference: Whether the host will load a reference at all.

    Raises:
        ValueError: If the model has no name and there is no `processing_class`.
    """
    if not isinstance(model, PreTrainedModel) or get_config_model_id(model.config):
        yield
        return
    if processing_class is None:
        raise ValueError(
            f"This {type(model).__name__} was made in memory and has no name to load a tokenizer by. Give "
            "processing_class=..., or load the model with from_pretrained."
        )
    if not loads_reference:
        yield
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with whole_parameters(list(model.parameters())):
            model.save_pretrained(folder)
        model.config._name_or_path = folder
        try:
            yield
        finally:
            model.config._name_or_path = ""
