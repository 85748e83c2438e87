"""A selection bias for routers that have none, without forking their code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ATTRIBUTE = "selection_bias"

_TOPK: tuple[Callable[..., Any], ...] = (torch.topk, torch.Tensor.topk)
_MAX: tuple[Callable[..., Any], ...] = (torch.max, torch.Tensor.max)
_MASKED_FILL: tuple[Callable[..., Any], ...] = (torch.masked_fill, torch.Tensor.masked_fill)


class _BiasedTopK(TorchFunctionMode):
    """Rewrites the `topk` by which a router selects experts: indices from scores plus bias, values from the scores.

    Most routers, here mixtral's, select in one line; it becomes `(p + b).topk(k).indices` and `p` at those indices:

    ```python
    router_top_value, router_indices = torch.topk(router_probs, self.top_k, dim=-1)
    ```

    Group-limited routers (DeepSeek-V2) first keep the groups with the best experts:

    ```python
    group_scores = scores.view(-1, self.num_group, self.num_experts // self.num_group).max(dim=-1).values
    scores = scores.masked_fill(~score_mask.bool(), 0.0)  # the groups that were not kept
    topk_weights, topk_indices = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
    ```

    There the bias is also added before `max` compares groups. `masked_fill` tells which experts are out, whatever
    their bias.
    """

    def __init__(self, bias: Tensor, top_k: int) -> None:
        super().__init__()
        self.bias, self.top_k = bias, top_k
        self.scores: Tensor | None = None  # (N, E), once the router has selected
        self._dropped: Tensor | None = None  # (N, E), experts of the groups that were not kept

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch turns the mode off in here, so that our own calls are not rewritten in turn.
        if func in _TOPK and self._selects(*args, **kwargs):
            return self._topk(*args, **kwargs)
        # Scores by group, (N, groups, E / groups): no other maximum in a router has this shape.
        if func in _MAX and args[0].ndim == 3 and args[0].shape[1:].numel() == len(self.bias):
            grouped = args[0] + self.bias.view(args[0].shape[1:])
            return func(grouped, *args[1:], **kwargs)
        if func in _MASKED_FILL and args[0].shape[1:] == self.bias.shape:
            self._dropped = args[1] if len(args) > 1 else kwargs["mask"]
        return func(*args, **kwargs)

    def _selects(self, x: Tensor, k: int, dim: int = -1, **kwargs: Any) -> bool:
        # Not the topk over groups, of which there are fewer than experts.
        return k == self.top_k and x.ndim == 2 and x.shape[-1] == len(self.bias) and dim in (-1, 1)

    def _topk(self, x: Tensor, k: int, dim: int = -1, **kwargs: Any) -> Any:
        self.scores = x.detach()
        biased = self.scores + self.bias
        if self._dropped is not None:
            # The router has given these experts a score of zero, and a large bias would let them win.
            biased = biased.masked_fill(self._dropped, -torch.inf)
        indices = biased.topk(k, dim=dim, **kwargs).indices
        # From `x` and not from the detached scores: the weights of the experts carry the router's gradient.
        return torch.return_types.topk((x.gather(dim, indices), indices))


class SelectionBias:
    """The bias of one router: the k experts with the largest `s_i + b_i` are selected, and weighted by `s_i` alone
    (2408.15664, equation 3).

    The bias is a plain float32 tensor: no engine casts, broadcasts or partitions it, and the stock checkpoint does not
    hold it. A copied router has a copied bias.
    """

    def __init__(self, router: nn.Module, num_experts: int, top_k: int) -> None:
        device = next((p.device for p in router.parameters()), None)
        self.bias = torch.zeros(num_experts, device=device)
        self.top_k = top_k
        self.keep_scores = False  # the quantile rule reads them
        self.scores: Tensor | None = None
        # Three forwards: `_forward` takes the place of the router's, and calls `_unbiased`. This is the method of the
        # router's class, or a function that was put in its place before, as accelerate does to hook a module.
        # `_replaced` is that function, or None, and is put back when the bias is taken off.
        self._unbiased = router.forward
        self._replaced = vars(router).get("forward")

    @classmethod
    def add_to(cls, router: nn.Module, num_experts: int, top_k: int) -> "SelectionBias":
        """Give a router a bias of zero and route with it from now on; a bias that is there already is kept."""
        present = get_selection_bias(router)
        if present is not None:
            return present
        ours = cls(router, num_experts, top_k)
        setattr(router, ATTRIBUTE, ours)
        router.forward = ours._forward
        return ours

    def remove_from(self, router: nn.Module) -> None:
        """Take the bias off, and route as before it was added."""
        delattr(router, ATTRIBUTE)
        del router.forward  # the forward of the class shows again
        if self._replaced is not None:
            router.forward = self._replaced

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next((x.device for x in args if isinstance(x, Tensor)), self.bias.device)
        if self.bias.device != device:
            self.bias = self.bias.to(device)  # `model.to` does not see it, since it is no buffer
        mode = _BiasedTopK(self.bias, self.top_k)
        with mode:
            output = self._unbiased(*args, **kwargs)
        if mode.scores is None:
            raise RuntimeError(
                "This router did not select its experts with the topk that a selection bias is added to. Take the "
                "bias off with remove_selection_bias(model), and balance with an auxiliary loss."
            )
        self.scores = mode.scores if self.keep_scores else None
        return output


def get_selection_bias(router: nn.Module) -> SelectionBias | None:
    """Return the bias that was added to a router, or `None`."""
    ours = vars(router).get(ATTRIBUTE)
    return ours if isinstance(ours, SelectionBias) else None


def remove_selection_bias(model: nn.Module) -> None:
    """Take every added bias off; the routers then work as before."""
    for module in model.modules():
        ours = get_selection_bias(module)
        if ours is not None:
            ours.remove_from(module)
