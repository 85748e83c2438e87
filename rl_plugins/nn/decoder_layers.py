"""The stack of decoder layers of a language model: builds one more layer, and the arguments of its call."""

import copy
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rl_plugins.hooks import SEQUENTIAL_HEADS, require_hooks
from rl_plugins.nn.attachment import trunk_of
from rl_plugins.nn.cache_name import cache_name
from rl_plugins.nn.released_layers import is_released_with_layers
from rl_plugins.nn.sharding import whole_parameters

PARALLEL = "Use parallel heads (mtp_head_type='parallel'), which read the trunk's last hidden state alone."
"""Advice at the end of every message about a model that sequential heads do not fit."""

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm", "layer_norm")
"""Names of the norm after the last layer."""

CACHE_NAMES = ("past_key_values", "cache", "layer_past", "past_key_value")
"""Names under which decoder layers take a cache."""

ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""Types of layers that attend to the keys of earlier tokens, and so need no state of their own."""

KNOWN_ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings", *CACHE_NAMES)

IDLE_ARGUMENTS = (
    "use_cache",
    "output_attentions",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "conv_mask",
    "mamba_attention_mask",
)
"""Arguments of layers that heads do not need: for attention weights as output, encoders, layers of other types."""

SWITCHED_ARGUMENTS = {
    "alibi": "alibi",
    "per_layer_input": "hidden_size_per_layer_input",
    "shared_kv_states": "num_kv_shared_layers",
}
"""Arguments of layers that an option of the config turns on, with the option's name."""

OTHER_LOGITS = ("modernbert-decoder",)
"""Model types with more than a projection between the trunk's last hidden state and the logits."""

WHOLE_MASKS = ("doge",)
"""Model types whose attention adds terms to its mask, and so needs a mask where others let the kernel be causal."""


_OTHERS = inspect.Parameter.VAR_KEYWORD


@cache
def _parameters_of(layer: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """Parameters of the forward of a class of decoder layers, without `self` and the hidden states."""
    return dict(list(inspect.signature(layer.forward).parameters.items())[2:])


class DecoderStack:
    """The decoder layers of a causal language model.

    Args:
        base: The model.

    Raises:
        ImportError: If this release of transformers makes attention masks in another way.
        ValueError: If the model is an encoder-decoder, or its trunk is no single stack of decoder layers.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        require_hooks(SEQUENTIAL_HEADS)
        self.name = type(base).__name__
        if getattr(base.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.name} is an encoder-decoder model; sequential heads continue a decoder alone. Use a causal "
                "(decoder-only) language model."
            )
        decoder = base.get_decoder()  # some models do not know it, and return themselves or their LM head
        known = isinstance(decoder, PreTrainedModel) and decoder is not base
        self.decoder: Any = decoder if known else trunk_of(base)
        self.config: Any = self.decoder.config.get_text_config()
        count = getattr(self.config, "num_hidden_layers", None)
        lists = [child for child in self.decoder.children() if isinstance(child, nn.ModuleList)]
        stacks = [child for child in lists if len(child) == count]
        if len(stacks) != 1 or not count:
            raise ValueError(
                f"The trunk of {self.name} ({type(self.decoder).__name__}) is no single stack of decoder layers. "
                f"Sequential heads need one such stack, whose layers they copy. {PARALLEL}"
            )
        self.last: nn.Module = stacks[0][-1]
        self.hidden_size: int = self.config.hidden_size
        types = getattr(self.config, "layer_types", None)
        self.layer_type: str | None = types[count - 1] if types else None
        self.pattern = count - 1  # number of the layer that a new one is built as
        if is_released_with_layers(base):  # depth modules have experts, also if the last layer has none
            self.pattern = max(self.pattern, self.config.first_k_dense_replace)
        self._parameters = _parameters_of(type(self.last))  # type: ignore[arg-type]

    @property
    def norm(self) -> nn.Module:
        """The norm after the last layer.

        Raises:
            ValueError: If there is none, or its name is none of `FINAL_NORMS`.
        """
        for name in FINAL_NORMS:
            if isinstance(getattr(self.decoder, name, None), nn.Module):
                return getattr(self.decoder, name)
        raise ValueError(
            f"{type(self.decoder).__name__} of {self.name} has no norm behind its last layer, or a norm of an "
            f"unknown name. Sequential heads need this norm. Known names are {', '.join(FINAL_NORMS)}. {PARALLEL}"
        )

    def check(self, base: PreTrainedModel) -> None:
        """Refuse a model whose last layer cannot be called outside of its trunk.

        Args:
            base: The model.

        Raises:
            ValueError: If it cannot; the message says why.
        """
        layer = type(self.last).__name__
        if getattr(trunk_of(base), "decoder", None) is self.decoder:
            raise ValueError(
                f"{self.name} does not run its trunk ({type(trunk_of(base)).__name__}) as a whole, so heads would not "
                "see hidden states. Use a model of another family."
            )
        if self.layer_type not in (None, *ATTENTION_TYPES):
            raise ValueError(
                f"The last layer of {self.name} is of type {self.layer_type!r}, and not one that attends to earlier "
                f"tokens. {PARALLEL}"
            )
        open_ended = any(p.kind is _OTHERS for p in self._parameters.values())
        takes_cache = any(name in self._parameters for name in CACHE_NAMES) or open_ended
        if not (takes_cache and ("attention_mask" in self._parameters or open_ended)):
            raise ValueError(
                f"{layer} of {self.name} takes no attention mask and no cache of keys and values. {PARALLEL}"
            )
        if hasattr(self.last, "encoder_attn") or hasattr(self.last, "crossattention"):
            raise ValueError(
                f"{layer} of {self.name} attends to an encoder, too. Sequential heads have no encoder, so that "
                f"these weights would never learn. {PARALLEL}"
            )
        foreign = [name for name in self._parameters if self._is_foreign(name)]
        if foreign:
            raise ValueError(
                f"{layer} of {self.name} takes {' and '.join(foreign)} besides hidden states, which only its trunk "
                f"makes. {PARALLEL}"
            )
        if "position_embeddings" in self._parameters and not hasattr(self.decoder, "rotary_emb"):
            raise ValueError(
                f"{layer} of {self.name} needs position embeddings, but {type(self.decoder).__name__} has no "
                f"`rotary_emb` to make them. {PARALLEL}"
            )
        multimodal = trunk_of(base) is not self.decoder
        if multimodal and "mrope_section" in (getattr(self.config, "rope_parameters", None) or {}):
            raise ValueError(
                f"{self.name} gives every token three positions, of time, height and width, which only its trunk "
                f"knows. {PARALLEL}"
            )
        if self.config.model_type in OTHER_LOGITS:
            raise ValueError(
                f"{self.name} has layers between its trunk and its output embedding. MTP heads cannot use these "
                "layers. Use a model of another family."
            )
        width = cast(nn.Embedding, base.get_input_embeddings()).weight.shape[-1]
        if width not in (self.hidden_size, 0):  # of a part that ZeRO-3 has left here
            raise ValueError(
                f"Embeddings of {self.name} are {width} wide and hidden states {self.hidden_size}, so that a "
                f"sequential head could not read them as its trunk does. {PARALLEL}"
            )

    def _is_foreign(self, name: str) -> bool:
        """Tell whether a layer takes an argument that we cannot provide."""
        if name in KNOWN_ARGUMENTS or name in IDLE_ARGUMENTS or self._parameters[name].kind is _OTHERS:
            return False
        return name not in SWITCHED_ARGUMENTS or bool(getattr(self.config, SWITCHED_ARGUMENTS[name], True))

    # Building

    def new_norm(self) -> nn.Module:
        """Copy the norm after the model's last layer."""
        with whole_parameters(list(self.norm.parameters())):
            twin = copy.deepcopy(self.norm)
        return _without_engine(twin)

    def new_layer(self, index: int) -> nn.Module:
        """Build a decoder layer of the class and with the settings of the last one.

        Args:
            index: Place of its keys and values in a cache.

        Raises:
            ValueError: If the class cannot be built from the model's config.
        """
        try:
            layer = type(self.last)(self.config, self.pattern)
        except Exception as error:
            raise ValueError(
                f"{type(self.last).__name__} of {self.name} cannot be built from the model's config: {error} "
                f"{PARALLEL}"
            ) from error
        for module in layer.modules():
            for name in ("layer_idx", "layer_id"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, index)
        return layer

    # Calling

    def context(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        index: int,
        mask_positions: Tensor | None = None,
    ) -> dict[str, Any]:
        """Make the keyword arguments of a decoder layer: attention mask, positions, cache.

        Args:
            embeds: Embeddings of the tokens (B, S, D), for their shape and dtype.
            position_ids: Positions (B, S).
            attention_mask: Slots to attend to (B, L); `None` for all.
            cache: Keys and values of earlier slots.
            index: Number of the layer in the cache.
            mask_positions: Positions that tell packed documents apart, without `attention_mask`.
        """
        mask = self._mask_function()(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=mask_positions,
            layer_idx=index,
            **{cache_name(): cache},
            **({"allow_is_causal_skip": False} if self.config.model_type in WHOLE_MASKS else {}),
        )
        given: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids}
        given |= dict.fromkeys(SWITCHED_ARGUMENTS)  # all of them off
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is not None:
            of_type = {}
            if "layer_type" in inspect.signature(type(rotary).forward).parameters and self.layer_type is not None:
                of_type["layer_type"] = self.layer_type
            given["position_embeddings"] = rotary(embeds, position_ids=position_ids, **of_type)
        given |= dict.fromkeys(CACHE_NAMES, cache)
        names = set(self._parameters)
        if names.isdisjoint(CACHE_NAMES):  # the layer passes on what it does not name
            names.add(cache_name())
        return {name: x for name, x in given.items() if name in names}

    def _mask_function(self) -> Any:
        from transformers import masking_utils

        functions = {
            "full_attention": masking_utils.create_causal_mask,
            "sliding_attention": masking_utils.create_sliding_window_causal_mask,
            "chunked_attention": masking_utils.create_chunked_causal_mask,
        }
        if self.layer_type is not None:
            return functions[self.layer_type]
        windowed = getattr(self.config, "sliding_window", None) is not None
        return functions["sliding_attention" if windowed else "full_attention"]


def _without_engine(module: nn.Module) -> nn.Module:
    """Give a copied module plain parameters and no hooks, although an engine owns the original."""
    for owner in module.modules():
        owner._forward_hooks.clear()
        owner._forward_pre_hooks.clear()
        for name, param in owner._parameters.items():
            if param is not None:
                owner._parameters[name] = nn.Parameter(param.detach().clone())
    return module
