"""The natural gradient: the length of a step is how far it moves a distribution, not the distribution's parameters.

Arguments that functions here share, and do not list again:
    parameters: `theta`, tensors with `n` entries in all.
    product: `v -> A v` for a positive definite `A`, both `(n,)`.
    steps: most steps of conjugate gradient, at least 1.

Vectors are `(n,)`. `conjugate_gradient` and `trust_region_step` raise `ValueError` where a shape does not fit or a
number is out of range. Dot products are sums of products, which stay in float32 under autocast; autocast would compute
`@` in bfloat16.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_positive
from rl_plugins.functional.masking import upcast


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, *, steps: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """Solve `A x = b` for a matrix that is too large to build and is known only by its products with vectors.

    Hestenes and Stiefel 1952. In exact arithmetic, `n` steps solve a system of size `n`; few steps give the best `x`
    in a Krylov space (Nocedal and Wright 2006, algorithm 5.2).

    Args:
        b: `(n,)`.
        tolerance: stop where `|b - A x|^2 <= tolerance |b|^2`.
    """
    if steps < 1 or b.ndim != 1:
        raise ValueError(f"steps={steps}, b {tuple(b.shape)}: give at least 1 step and a vector.")
    b = upcast(b)
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    squared = _dot(residual, residual)
    target = tolerance * squared
    for _ in range(steps):
        if squared <= target:  # also where b = 0
            break
        image = product(direction)
        length = squared / _dot(direction, image)
        x, residual = x + length * direction, residual - length * image
        previous, squared = squared, _dot(residual, residual)
        direction = residual + squared / previous * direction
    return x


def hessian_product(gradient: Tensor, parameters: Sequence[Tensor], vector: Tensor, *, damping: float = 0.0) -> Tensor:
    """Multiply a vector by a Hessian that is not built: `(H + damping I) v`, `H v = d(grad f . v)/dtheta`.

    Pearlmutter 1994. With `f = KL(pi_old || pi_theta)` at `theta = theta_old`, `H` is the Fisher information (Schulman
    et al., arXiv 1502.05477, appendix C).

    Args:
        gradient: `grad f (n,)`, from `flat_gradient(..., create_graph=True)`.
        vector: `v (n,)`.
        damping: added to the diagonal.

    Returns:
        `(n,)`, float32 or wider.
    """
    return flat_gradient(_dot(gradient, vector), parameters, retain_graph=True) + damping * upcast(vector)


def flat_gradient(
    scalar: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool | None = None
) -> Tensor:
    """Take the gradient with respect to all parameters as one vector, 0 for those that `scalar` does not depend on.

    Args:
        scalar: 0-d.
        create_graph: whether the gradient is to be differentiated again.
        retain_graph: whether the graph of `scalar` is needed again; by default the value of `create_graph`.
    """
    gradients = torch.autograd.grad(
        scalar,
        parameters,
        create_graph=create_graph,
        retain_graph=create_graph if retain_graph is None else retain_graph,
        materialize_grads=True,
    )
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def trust_region_step(
    product: Callable[[Tensor], Tensor], gradient: Tensor, *, max_kl: float, steps: int = 10
) -> Tensor:
    """Compute the best step that a trust region allows: the `x` with `1/2 x^T H x <= max_kl` that gains the most.

    `x = sqrt(2 max_kl / (s^T H s)) s` with `H s = gradient` (Schulman et al., arXiv 1502.05477, appendix C); `product`
    multiplies by `H`.

    Args:
        gradient: of the objective, `(n,)`.
        max_kl: size of the region, above 0.

    Returns:
        `(n,)`; 0 if the gradient is 0.
    """
    check_positive("give a positive bound, such as 0.01", max_kl=max_kl)
    direction = conjugate_gradient(product, gradient, steps=steps)
    curvature = _dot(direction, product(direction))
    return torch.where(curvature > 0, torch.sqrt(2 * max_kl / curvature.clamp(min=1e-30)), 0.0) * direction


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (upcast(x) * upcast(y)).sum()
