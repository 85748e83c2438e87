"""The routers of a Hugging Face mixture of experts: where they are, what they return, and their selection bias."""

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_plugins.functional.routing import Scoring
from rl_plugins.hooks import BALANCING, require_hooks
from rl_plugins.moe.float32_bias import Float32Bias, get_float32_bias, stored
from rl_plugins.moe.selection_bias import SelectionBias, get_selection_bias
from rl_plugins.nn.attachment import Attachment, base_model_of
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.nn.sharding import whole_size

BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""Names of the selection bias in architectures that have one of their own."""

EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
SELECTED_COUNTS = ("top_k", "num_experts_per_tok")


@dataclass
class Router:
    """One router of a model.

    Args:
        name: Dotted name in the model.
        module: The router; its forward returns logits, weights and indices of the selected experts.
        num_experts: E.
        top_k: k, experts per token.
        scoring: Whether the router scores experts by softmax or sigmoid; `None` if this cannot be read from its code.
        bias_owner: The module that holds a selection bias of the architecture's own; `None` without one.
        bias_key: Dotted name of that bias in the model, which ends in its attribute of `bias_owner`.
    """

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    scoring: Scoring | None
    bias_owner: nn.Module | None = None
    bias_key: str = ""

    @property
    def has_bias(self) -> bool:
        """Whether the router has a selection bias: the architecture's own, or an added [`SelectionBias`]."""
        return self.bias_owner is not None or self.injected is not None

    @property
    def injected(self) -> SelectionBias | None:
        """The bias that was added to a router without one, or `None`."""
        return get_selection_bias(self.module)

    @property
    def bias(self) -> Tensor:
        """The bias with E entries that the router adds to its scores; float32 while the model is being balanced."""
        if self.bias_owner is not None:
            behind = get_float32_bias(self.bias_owner)
            return self.stored_bias if behind is None else behind.show(self.bias_owner)
        assert self.injected is not None
        return self.injected.bias

    @property
    def stored_bias(self) -> Tensor:
        """The bias in the module tree: a rounded copy of [`bias`] where the model has been cast."""
        if self.bias_owner is not None:
            return stored(self.bias_owner, self._bias_name)
        assert self.injected is not None
        return self.injected.bias

    @property
    def is_rounded(self) -> bool:
        """Whether the module tree holds only a rounded copy of the bias."""
        return self.has_bias and self.bias is not self.stored_bias

    @property
    def _bias_name(self) -> str:
        return self.bias_key.rpartition(".")[2]

    def keep_float32(self) -> None:
        """Keep a bias of the architecture's own in float32 for the router, whatever the model is cast to."""
        if self.bias_owner is not None:
            Float32Bias.of(self.bias_owner, self._bias_name)

    def release_float32(self) -> None:
        """Undo [`keep_float32`] where the module tree holds the bias in float32 anyway."""
        behind = None if self.bias_owner is None else get_float32_bias(self.bias_owner)
        if self.bias_owner is not None and behind is not None:
            behind.release(self.bias_owner)

    @torch.no_grad()
    def set_bias(self, bias: Tensor, live: Tensor | None = None) -> None:
        """Replace the bias that the router adds, and the copy of it in the module tree.

        Args:
            bias: (E,).
            live: [`stored_bias`]; where an engine shards it, the tensor of `whole_parameters(writing=True)`.
        """
        if self.bias_owner is not None:
            live = self.stored_bias if live is None else live
            Float32Bias.of(self.bias_owner, self._bias_name).set(self.bias_owner, bias, live)
        else:
            self.bias.copy_(bias)

    def check_can_add_bias(self) -> None:
        """Check that a selection bias can be added to a router that has none.

        Raises:
            TypeError: If its forward does not select experts with `topk`.
        """
        if "topk" not in _names_in_forward(self.module):
            raise TypeError(
                f"{self.name} ({type(self.module).__name__}) does not select its experts with torch.topk, so no "
                "selection bias can be added to it. Balance this model with aux_loss_coef > 0 and rate=0."
            )

    def add_bias(self) -> None:
        """Give a router without a selection bias one, at zero.

        Raises:
            TypeError: If its forward does not select experts with `topk`.
        """
        if not self.has_bias:
            self.check_can_add_bias()
            SelectionBias.add_to(self.module, self.num_experts, self.top_k)

    def read(self, output: object) -> tuple[Tensor, Tensor]:
        """Find logits (N, E) and indices of the selected experts (N, k) in the output of the router's forward.

        Raises:
            TypeError: If the output is neither `(logits, weights, indices)`, nor Llama 4's `(scores, logits)`, nor
                JetMoe's `(slots, tokens, weights, counts, logits)`, whose N k slots are sorted by expert.
        """
        match output:
            case (Tensor() as logits, Tensor(), Tensor() as indices) if not indices.is_floating_point():
                return logits, indices
            case (Tensor() as scores, Tensor() as logits) if scores.shape == logits.shape:
                # Scores are zero for all experts but the selected ones.
                return logits, scores.detach().topk(self.top_k, dim=-1).indices
            # Slots are sorted by expert: `counts[e]` of them go to expert e. `slots` says which of the tokens' N k
            # choices each one is. Written to these places, the experts are sorted by token.
            case (Tensor() as slots, Tensor(), Tensor(), list() as counts, Tensor() as logits):
                experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(slots.device)
                return logits, torch.empty_like(slots).scatter_(0, slots, experts).view(-1, self.top_k)
        raise TypeError(
            f"{self.name} ({type(self.module).__name__}) returns neither (logits, weights, indices), nor "
            "(scores, logits), nor what JetMoe's routers return, so its load cannot be counted."
        )


def find_routers(model: nn.Module, extra_modules: Sequence[nn.Module] = ()) -> list[Router]:
    """Find all routers of a model, in the order of its modules.

    They are the modules that transformers records `router_logits` from; in a model that names none, every `gate` or
    `router` beside `experts`. Routers of sequential MTP heads, which are decoder layers of the model's own kind,
    come last.

    Args:
        model: Causal LM, or a PEFT model around one.
        extra_modules: More modules to search, such as MTP layers that transformers keeps outside the model.

    Raises:
        TypeError: If the model has no router, or one whose numbers of experts cannot be read.
    """
    require_hooks(BALANCING)
    base = base_model_of(model)
    recorded = _recorded_classes(base)
    routers: list[Router] = []
    for prefix, root in [("", base), *((f"extra.{i}.", module) for i, module in enumerate(extra_modules))]:
        # A value model beside the policy has a trunk of its own, whose experts are not the policy's.
        foreign = Attachment.names()
        modules = {
            name: x
            for name, x in root.named_modules()
            if foreign.isdisjoint(name.removeprefix(f"{MTPHeads.name}.").split("."))
        }
        for name, module in _candidates(modules, recorded):
            # The block around the router, past the module that PEFT has put between them.
            parent = modules[re.sub(r"\.modules_to_save\.[^.]+$", "", name).rpartition(".")[0]]
            routers.append(_describe(prefix + _without_peft(name), module, parent))
    if not routers:
        raise TypeError(
            f"{type(base).__name__} has no routers: it is a dense model, or its experts are not reached through a "
            "`gate` or `router` beside `experts`. There is no load to balance."
        )
    return routers


def is_attached(router_name: str) -> bool:
    """Tell whether a router is a part of sequential heads, and not of the model as it was loaded."""
    return router_name.startswith(f"{MTPHeads.name}.")


def _recorded_classes(base: PreTrainedModel) -> tuple[type, ...]:
    """Classes that transformers' own `OutputRecorder`s take router logits from."""
    classes: list[type] = []
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            recorders = (module._can_record_outputs or {}).get("router_logits", ())
            # One class, an `OutputRecorder` around a class, or a list of either.
            for recorder in recorders if isinstance(recorders, list | tuple) else [recorders]:
                classes.append(recorder if isinstance(recorder, type) else recorder.target_class)
    return tuple(classes)


def _candidates(modules: dict[str, nn.Module], recorded: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    found = [(name, module) for name, module in modules.items() if isinstance(module, recorded)]
    # JetMoe's logits are recorded from its attention, too, which passes on those of the router inside it.
    names = [name for name, _ in found]
    found = [(name, module) for name, module in found if not any(x.startswith(f"{name}.") for x in names)]
    if not found:
        # Architectures that record no router logits have routers all the same.
        found = [
            (name, module)
            for name, module in modules.items()
            if name.rpartition(".")[2] in ("gate", "router") and "experts" in modules[name.rpartition(".")[0]]._modules
        ]
    # PEFT keeps idle copies of a module that it saves whole: the original, and those of other adapters.
    return ((name, module) for name, module in found if not _is_idle(name, modules))


def _is_idle(name: str, modules: dict[str, nn.Module]) -> bool:
    # PEFT wraps `gate` into `gate.original_module`, which is frozen and idle, and one `gate.modules_to_save.<adapter>`
    # for each adapter, of which the active ones run.
    path = name.split(".")
    if "modules_to_save" not in path:
        return "original_module" in path
    level = path.index("modules_to_save")
    adapters: Any = getattr(modules[".".join(path[:level])], "active_adapters", ())
    return path[level + 1] not in adapters


def _without_peft(name: str) -> str:
    """Give the name that a module had before PEFT wrapped it, or a module around it, to save it whole."""
    return re.sub(r"\.modules_to_save\.[^.]+", "", name)


def _describe(name: str, module: nn.Module, parent: nn.Module) -> Router:
    num_experts, top_k = _integer(module, EXPERT_COUNTS), _integer(module, SELECTED_COUNTS)
    if num_experts is None or top_k is None:
        raise TypeError(
            f"{name} ({type(module).__name__}) does not say how many experts it has and selects (num_experts, top_k), "
            "as transformers' routers do. This architecture cannot be balanced."
        )
    owner, bias_key = _own_bias(name, module, parent, num_experts)
    return Router(name, module, num_experts, top_k, _scoring(module), owner, bias_key)


def _integer(module: nn.Module, names: tuple[str, ...]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _own_bias(path: str, module: nn.Module, parent: nn.Module, num_experts: int) -> tuple[nn.Module | None, str]:
    """Module and dotted name of the architecture's own selection bias."""
    # In the router or a module inside it (deepseek_v3, ernie4_5_moe), or in the block around it (minimax_m2).
    inside = [(f"{path}.{name}" if name else path, child) for name, child in module.named_modules()]
    for prefix, owner in [*inside, (path.rpartition(".")[0], parent)]:
        for name in BIAS_NAMES:
            tensor = owner._parameters.get(name, owner._buffers.get(name))
            # The size tells a bias of the experts from others of that name. Under ZeRO-3 only a part of it is here.
            if tensor is not None and whole_size(tensor) == num_experts:
                return owner, f"{prefix}.{name}"
    return None, ""


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    # Names of the compiled code, not of its source, which need not be there; decorators of transformers are unwrapped.
    return inspect.unwrap(type(module).forward).__code__.co_names


def _scoring(module: nn.Module) -> Scoring | None:
    """Find out whether the router's code calls softmax or sigmoid; `None` for both or neither."""
    names = _names_in_forward(module)
    match "softmax" in names, "sigmoid" in names:
        case True, False:
            return "softmax"
        case False, True:
            return "sigmoid"
    return None
