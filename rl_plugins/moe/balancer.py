"""Counts the load of every expert during training, moves selection biases, and adds auxiliary losses."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rl_plugins.functional.masking import Reduce
from rl_plugins.functional.routing import (
    expert_counts,
    load_entropy,
    max_violation,
    router_probabilities,
    selection_bias_quantile,
    selection_bias_update,
)
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.moe.files import check_biases_fit, save_beside
from rl_plugins.moe.losses import RouterLosses, RoutingCounts
from rl_plugins.moe.routers import Router, find_routers
from rl_plugins.nn.attachment import base_model_of, trunk_of
from rl_plugins.nn.sharding import is_fsdp2, show_trained, whole_parameters
from rl_plugins.process_group import sum_over_ranks

ATTRIBUTE = "router_balancer"


def get_router_balancer(model: nn.Module) -> "RouterBalancer | None":
    """Return the balancer at work on a model, or `None`."""
    balancer = vars(trunk_of(base_model_of(model))).get(ATTRIBUTE)
    return balancer if isinstance(balancer, RouterBalancer) and balancer.is_active else None


class RouterBalancer:
    """Balances the experts of one model during its training.

    It works by hooks: one around the trunk, which says when a training forward runs, and one on every router. Each
    real token counts once, in a forward with gradient of a model in training mode. Evaluation, no-grad passes, layers
    that checkpointing runs again, and padding do not count. In the backward pass the gradient of an auxiliary loss is
    added to that of the router's logits. So the model need not return this loss, any kind of checkpointing works, and
    the forward stays as it was, bit for bit.

    Call [`update`] after every optimizer step, and tell [`scale_losses`] by which factor the loss of a micro-batch is
    multiplied (1 / accumulation steps). Nothing here is a parameter or buffer: engines neither see nor save it.

    Args:
        model: Causal LM, or a PEFT model around one; before or after an engine has wrapped it.
        config: Settings.
        reduce: Sums a tensor over ranks.
        extra_modules: More modules with routers, outside the model. Run those inside [`counting`].

    Attributes:
        routers: The routers of the model.
        float32_biases: The bias (E,) of each router; zeros for a router without one. Updates are made to these, since
            a bias that is stored in half precision would round most of them away.
        last_counts: Tokens per expert (E,) of each router in the last optimizer step, over all ranks; empty before
            the first.
        driver: The object that calls [`update`], so that another driver can take over from it.

    Raises:
        TypeError: If the model has no routers, or one that cannot be counted or biased.
        ValueError: If the model is being balanced already, the code of a router does not show whether it uses softmax
            or sigmoid, or the layers cannot be pooled.
    """

    def __init__(
        self,
        model: nn.Module,
        config: BalancingConfig | None = None,
        *,
        reduce: Reduce = sum_over_ranks,
        extra_modules: Sequence[nn.Module] = (),
    ) -> None:
        self.config = config or BalancingConfig()
        self.reduce = reduce
        self.routers = find_routers(model, extra_modules)
        self.losses = RouterLosses(self.config, self.routers, reduce)
        self._model, self._trunk = model, trunk_of(base_model_of(model))
        if get_router_balancer(model) is not None:
            raise ValueError("This model is being balanced already; call detach() of its balancer first.")
        # From here on the model changes: all checks but those of `_add_biases` have been made.
        if self.config.rate > 0.0:
            self._add_biases()
        for router in self.routers:
            router.keep_float32()
        if any(router.has_bias for router in self.routers):
            save_beside(model)
        self.float32_biases = self._read_biases()
        self.last_counts: list[Tensor] = []
        # Sums over the micro-batches since the last optimizer step, by router; a router that has not run is missing.
        self._counts: dict[int, Tensor] = {}
        self._targets: dict[int, Tensor] = {}
        self._current: RoutingCounts | None = None  # while a training forward runs
        self._has_counted = False
        self.is_active = True  # False in a copy that came with a copied model
        self.driver: Any = None
        self._attach_hooks()

    # Set-up

    def lacks_routers(self) -> bool:
        """Tell whether the model has got routers after this balancer was made, such as those of sequential heads."""
        known = {id(router.module) for router in self.routers}
        return any(id(router.module) not in known for router in find_routers(self._model))

    def _attach_hooks(self) -> None:
        trunk = self._trunk
        setattr(trunk, ATTRIBUTE, self)
        self._handles = [
            trunk.register_forward_pre_hook(self._on_trunk_start, with_kwargs=True),
            # Also after a forward that failed: else the next forward outside training would count as a part of it.
            trunk.register_forward_hook(self._on_trunk_end, always_call=True),
            # Before an engine's hooks, which replace the outputs by other tensors, on which the graph goes on.
            *(
                router.module.register_forward_hook(partial(self._on_router, i), prepend=True)
                for i, router in enumerate(self.routers)
            ),
        ]

    def _add_biases(self) -> None:
        # All routers are checked before the first is changed, so that a refusal leaves the model as it was.
        for router in self.routers:
            if not router.has_bias:
                router.check_can_add_bias()
            elif self.config.rule == "quantile" and router.injected is None:
                self.losses.scoring(router)  # raises where the scores cannot be told from the logits
        for router in self.routers:
            router.add_bias()
            if router.injected is not None:
                router.injected.keep_scores = self.config.rule == "quantile"
            # `from_pretrained` makes every parameter trainable, also biases that their architecture freezes.
            router.stored_bias.requires_grad_(False)

    def detach(self) -> None:
        """Stop counting. Added biases stay, since the model was trained with them (`remove_selection_bias` takes them
        off). Float32 biases stay where the model has only rounded copies of them."""
        for handle in self._handles:
            handle.remove()
        for router in self.routers:
            router.release_float32()
        delattr(self._trunk, ATTRIBUTE)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouterBalancer":
        # A copy of the model (a reference model) carries copies of the hooks; they must not count for the original.
        idle = copy.copy(self)
        idle.is_active = False
        return idle

    def scale_losses(self, by_tokens: Tensor | float, by_rows: Tensor | float | None = None) -> None:
        """Weigh the auxiliary losses of the micro-batches that follow as the host weighs its own loss.

        Args:
            by_tokens: Factor for losses that are means over tokens.
            by_rows: Factor for the loss per sequence, a mean over rows; `by_tokens` by default.
        """
        self.losses.token_scale = by_tokens
        self.losses.row_scale = by_tokens if by_rows is None else by_rows

    # Forward

    def _on_trunk_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.is_active and module.training and torch.is_grad_enabled()):
            return
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given: dict[str, Any] = {**bound, **bound.get("kwargs", {})}
        # Soft prompts and images come as embeddings; their first two dimensions are those of tokens, too.
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        mask = given.get("attention_mask")
        # With a cache the mask covers tokens of earlier forwards, too, before those of this one.
        # Masks of other shapes (block-diagonal, per layer type) belong to packed rows, which have no padding.
        mask = mask[:, -tokens.shape[1] :] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._current = RoutingCounts(mask, (tokens.shape[0], tokens.shape[1]))

    def _on_trunk_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current, self._current = self._current, None
        # A forward that failed has no output: it counts nothing, and must not wait for other ranks.
        if current is not None and output is not None:
            self._finish(current)

    @contextmanager
    def counting(self, mask: Tensor) -> Iterator[None]:
        """Count the routers that run in this context although the trunk does not: those of extra modules.

        Args:
            mask: Real tokens (B, S) of what the routers see.
        """
        self._current = RoutingCounts(mask, (mask.shape[0], mask.shape[1])) if torch.is_grad_enabled() else None
        try:
            yield
            if self._current is not None:
                self._finish(self._current)
        finally:
            self._current = None

    def _finish(self, current: RoutingCounts) -> None:
        for total, new in ((self._counts, current.counts), (self._targets, current.targets)):
            total.update({i: total[i] + x if i in total else x for i, x in new.items()})
        self.losses.finish(current, self._counts)

    def _on_router(self, i: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self._current
        if not self.is_active:
            return
        if current is not None:
            logits, indices = self.routers[i].read(output)
            self._count(i, current, logits.detach(), indices)
            self.losses.on_router(i, current, logits, indices)
        elif torch.is_grad_enabled():
            # Outside every forward of the trunk, and with gradient: backward recomputes a checkpointed layer, whose
            # tokens have been counted.
            self.losses.on_router_again(i, output)

    @torch.no_grad()
    def _count(self, i: int, current: RoutingCounts, logits: Tensor, indices: Tensor) -> None:
        router = self.routers[i]
        mask = current.token_mask(len(indices), indices.device)
        counts = expert_counts(indices, router.num_experts, mask)
        # A router that several layers share runs more than once in a forward.
        current.counts[i] = current.counts[i] + counts if i in current.counts else counts
        if self.config.rule == "quantile" and self.config.rate > 0.0:
            targets = selection_bias_quantile(
                self._scores(router, logits), self.float32_biases[i].to(indices.device), router.top_k, mask
            )
            # Weighed by tokens, so that micro-batches of different sizes average rightly.
            weighted = targets * counts.sum()
            current.targets[i] = current.targets[i] + weighted if i in current.targets else weighted

    def _scores(self, router: Router, logits: Tensor) -> Tensor:
        """Scores by which the router selects experts (N, E), without the bias."""
        if router.injected is not None:
            assert router.injected.scores is not None
            return router.injected.scores.float()
        return logits.float().sigmoid() if self.losses.scoring(router) == "sigmoid" else router_probabilities(logits)

    # Update

    @torch.no_grad()
    def update(self, progress: float = 0.0) -> dict[str, Tensor]:
        """Move the biases by the counts of all ranks; call this once after every optimizer step, on all ranks.

        A call takes one all-reduce. The quantile rule adds another, and so do auxiliary losses, for their values.

        Args:
            progress: Share of the training that was over before this step, in [0, 1).

        Returns:
            Metrics as 0-d tensors: `moe/max_violation` (mean over layers) and `moe/max_violation_worst`,
            `moe/load_entropy`, `moe/unused_experts` (share of experts without a token), `moe/bias_range` (largest
            difference between two experts of a layer) where routers have biases, `moe/aux_loss` and `moe/z_loss` where
            these losses are on.

        Raises:
            RuntimeError: At the first step, if the model is in evaluation mode, no router has run, or the gradient of
                an auxiliary loss has reached no router.
        """
        self._check_first_step()
        self.last_counts = self._reduced_counts()
        rate = self.config.rate_at(progress)
        if rate > 0.0:
            self._move_biases(rate)
        elif self.config.rate > 0.0:
            # Before `start` and after `stop`. An engine that took the parameters over after they were frozen may have
            # put old values back.
            self._write_biases()
        self._counts, self._targets = {}, {}
        losses = self.losses.flush(self.last_counts[0].device)
        return self._metrics() | {f"moe/{name}": value for name, value in losses.items()}

    def _check_first_step(self) -> None:
        if not (self._counts or self._has_counted):
            name = type(self._trunk).__name__
            if not self._trunk.training:
                raise RuntimeError(
                    f"{name} is in evaluation mode, as from_pretrained leaves it, and only training forwards are "
                    "counted. Call model.train() where the model is loaded."
                )
            raise RuntimeError(
                f"No router of {name} ran in a training forward. Fused kernels bypass the routers (load the model "
                "with use_kernels=False), and so does a forward that calls the layers alone."
            )
        self._has_counted = True

    def _reduced_counts(self) -> list[Tensor]:
        device = next(iter(self._counts.values())).device if self._counts else self.float32_biases[0].device
        # Zeros for routers that have not run: every rank must bring equally many numbers to the all-reduce.
        counts = [
            self._counts[i].to(device)
            if i in self._counts
            else torch.zeros(r.num_experts, dtype=torch.int64, device=device)
            for i, r in enumerate(self.routers)
        ]
        return list(self.reduce(torch.cat(counts)).split([r.num_experts for r in self.routers]))

    def _move_biases(self, rate: float) -> None:
        targets = None
        if self.config.rule == "quantile":
            # The mean target of all tokens of all ranks, from sums that were weighed by tokens.
            device = self.last_counts[0].device
            sums = [self._targets.get(i, torch.zeros_like(m)).to(device) for i, m in enumerate(self.float32_biases)]
            sums = list(self.reduce(torch.cat(sums)).split([len(m) for m in self.float32_biases]))
            targets = [x / c.sum().clamp(min=1) for x, c in zip(sums, self.last_counts, strict=True)]
        # Layers with equally many experts move in one call, since each call is a handful of small kernels.
        for num_experts in {router.num_experts for router in self.routers}:
            layers = [i for i, router in enumerate(self.routers) if router.num_experts == num_experts]
            counts = torch.stack([self.last_counts[i] for i in layers])
            moved = selection_bias_update(
                torch.stack([self.float32_biases[i].to(counts.device) for i in layers]),
                counts,
                rate=rate,
                rule=self.config.rule,
                targets=None if targets is None else torch.stack([targets[i] for i in layers]),
            )
            for i, bias in zip(layers, moved.unbind(), strict=True):
                self.float32_biases[i] = bias
        self._write_biases()

    def _metrics(self) -> dict[str, Tensor]:
        violations = torch.stack([max_violation(counts) for counts in self.last_counts])
        metrics = {
            "max_violation": violations.mean(),
            "max_violation_worst": violations.max(),
            "load_entropy": torch.stack([load_entropy(counts) for counts in self.last_counts]).mean(),
            "unused_experts": (torch.cat(self.last_counts) == 0).float().mean(),
        }
        if any(router.has_bias for router in self.routers):
            metrics["bias_range"] = torch.stack([bias.max() - bias.min() for bias in self.float32_biases]).max()
        return {f"moe/{name}": value for name, value in metrics.items()}

    # Biases and checkpoints

    def _read_biases(self) -> list[Tensor]:
        """Float32 copies of the live biases; zeros for a router without one."""
        live = [router.bias if router.has_bias else torch.zeros(router.num_experts) for router in self.routers]
        with whole_parameters(live) as whole:
            return [bias.detach().reshape(-1).float().clone() for bias in whole]

    def read_again(self) -> None:
        """Read the model's biases again before the first step, once an engine has the model.

        Where FSDP2 saves memory while loading (`cpu_ram_efficient_loading`), one rank reads the checkpoint, and the
        others get its values when the model is sharded.
        """
        if not self._has_counted and is_fsdp2(self._model):
            self.float32_biases = self._read_biases()

    @torch.no_grad()
    def _write_biases(self) -> None:
        show_trained(self._model)
        with whole_parameters([router.stored_bias for router in self.routers], writing=True) as whole:
            for router, bias, live in zip(self.routers, self.float32_biases, whole, strict=True):
                router.set_bias(bias, live)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the float32 biases by router, on the CPU."""
        return {router.name: bias.cpu() for router, bias in zip(self.routers, self.float32_biases, strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with saved biases.

        Raises:
            ValueError: If they belong to other routers, or to another number of experts; nothing is changed then.
        """
        check_biases_fit(state, self.routers, whose="the checkpoint")
        self.float32_biases = [
            state[router.name].to(bias) for router, bias in zip(self.routers, self.float32_biases, strict=True)
        ]
        # With rate=0 none were added at the start, but a model that was trained with biases needs them.
        if any(bias.any() for bias in self.float32_biases):
            self._add_biases()
            save_beside(self._model)
        if all(router.has_bias for router in self.routers):
            self._write_biases()
