"""The name under which transformers passes the cache of keys and values to a model."""

import inspect
from functools import cache

from transformers import GenerationMixin


@cache
def cache_name() -> str:
    """Return the keyword of the cache in `forward`, `prepare_inputs_for_generation`, `create_causal_mask` and in what
    `generate` prepares: transformers 5.24 renamed `past_key_values` to `cache`."""
    accepted = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in accepted else "past_key_values"
