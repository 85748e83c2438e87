"""Networks of the agents: perceptrons, and policies that give distributions."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from gymnasium.spaces import Discrete, Space
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from rl_plugins.classic.environments import action_size


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.Tanh, *, output_gain: float | None = None) -> nn.Module:
    """Make a multi-layer perceptron, without an activation after the last layer.

    Args:
        sizes: Widths from input to output, at least two.
        activation: Class of the activations between the layers.
        output_gain: Gain of the last layer in an orthogonal initialisation, in which hidden layers have gain sqrt(2).
            It is among the details that make PPO work (Engstrom et al., arXiv 2005.12729). By default PyTorch's own
            initialisation.

    Returns:
        A module from `(..., sizes[0])` to `(..., sizes[-1])`.

    Raises:
        ValueError: If there are fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes={list(sizes)}: give at least an input and an output.")
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), activation()]
    layers.pop()
    if output_gain is not None:
        linears = layers[::2]
        for linear in linears:
            assert isinstance(linear, nn.Linear)
            nn.init.orthogonal_(linear.weight, output_gain if linear is linears[-1] else 2**0.5)
            nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers)


class HasModules(Protocol):
    """Anything with submodules: a network, or an agent with all of its networks."""

    def modules(self) -> Iterator[nn.Module]:
        """Yield all submodules, the module itself included."""


@contextmanager
def evaluation_mode(module: HasModules) -> Iterator[None]:
    """Hold a module in evaluation mode: dropout does nothing, and batch statistics are neither used nor recorded.

    Submodules that were in evaluation mode before stay in it afterwards.

    Args:
        module: A network, or an agent with all of its networks.
    """
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class Policy(nn.Module, ABC):
    """A distribution over the actions in each state, given by a network."""

    @abstractmethod
    def forward(self, observations: Tensor) -> Distribution:
        """Return `pi(. | s)` for observations `(..., D)`."""

    @abstractmethod
    def act(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample actions with a generator on the CPU, or take the most likely ones where it is None.

        This method does not use `forward`: objects of torch.distributions cost more time than a small network, and
        take no generators.
        """


class CategoricalPolicy(Policy):
    """A policy that chooses among Discrete actions: `pi(a | s) = softmax(logits(s))_a`.

    Args:
        network: From observations `(..., D)` to logits `(..., A)`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observations: Tensor) -> Categorical:
        """Return `pi(. | s)`, over the indices of the actions."""
        return Categorical(logits=self.network(observations), validate_args=False)

    def act(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return indices `(N,)` for observations `(N, D)`."""
        logits = self.network(observations)
        if generator is not None:
            # argmax(ln p - ln E), with E exponential, is a sample of p: the Gumbel-max trick.
            logits = logits - torch.empty(logits.shape).exponential_(generator=generator).log_().to(logits)
        return logits.argmax(-1)


class GaussianPolicy(Policy):
    """A policy that draws Box actions: `pi(a | s) = N(mean(s), sigma^2)`, diagonal.

    `ln sigma` is a parameter of its own, equal in all states.

    Args:
        network: From observations `(..., D)` to means `(..., A)`.
        size: `A`.
        log_std: Initial value of `ln sigma`.
    """

    def __init__(self, network: nn.Module, size: int, *, log_std: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.log_std = nn.Parameter(torch.full((size,), float(log_std)))

    def forward(self, observations: Tensor) -> Independent:
        """Return `pi(. | s)`, over action vectors."""
        normal = Normal(self.network(observations), self.log_std.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False)

    def act(self, observations: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return vectors `(N, A)` for observations `(N, D)`, not clipped to the bounds of the space."""
        mean = self.network(observations)
        if generator is None:
            return mean
        return mean + self.log_std.exp() * torch.randn(mean.shape, generator=generator).to(mean)


def make_policy(network: nn.Module, action_space: Space) -> Policy:
    """Make the policy that fits a space of actions: categorical for Discrete, Gaussian for a Box.

    Args:
        network: From observations `(..., D)` to as many numbers as `action_size` counts in the space.
        action_space: Discrete or Box.

    Returns:
        The policy.
    """
    return (
        CategoricalPolicy(network)
        if isinstance(action_space, Discrete)
        else GaussianPolicy(network, action_size(action_space))
    )


class ObservationNorm(nn.Module):
    """Scales observations to zero mean and unit variance, by the statistics of those given to `update`.

    `clamp((x - mean) / sqrt(var + eps), -limit, limit)`; before the first update, this is the identity inside the
    limits.

    Args:
        size: `D`.
        limit: Bound of the result.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, size: int, *, limit: float = 10.0) -> None:
        super().__init__()
        self.limit = limit
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, observations: Tensor) -> Tensor:
        """Return normalised observations, `(..., D)`."""
        return ((observations - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-self.limit, self.limit)

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Update by observations `(..., D)` (Chan et al. 1979, the pairwise update of mean and variance)."""
        batch = observations.reshape(-1, observations.shape[-1])
        total = self.count + len(batch)
        share = len(batch) / total
        delta = batch.mean(0) - self.mean
        self.mean += delta * share
        self.var += (batch.var(0, correction=0) - self.var) * share + delta**2 * share * (1 - share)
        self.count.copy_(total)


def make_normalizer(size: int, *, normalize: bool) -> nn.Module:
    """Make the module before the networks of an agent: an `ObservationNorm`, or the identity.

    Args:
        size: `D`.
        normalize: Whether observations are scaled.

    Returns:
        A module from `(..., D)` to `(..., D)`.
    """
    return ObservationNorm(size) if normalize else nn.Identity()
