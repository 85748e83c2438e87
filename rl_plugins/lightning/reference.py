"""The reference policy: the policy before training, to which the KL term keeps the trained policy close."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers import PreTrainedModel

from rl_plugins.nn.attachment import attachments_of


class Reference:
    """Frozen copy of the policy; where the policy is a PEFT model, the policy itself without its adapters.

    The reference is not a `nn.Module`. So no checkpoint contains it, no engine partitions it, and every rank holds all
    of it. A resumed run makes it from the model that it is given, as the first run did.

    Args:
        policy: The policy before training.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.model = policy
        self.is_copy = isinstance(policy, PreTrainedModel)
        if self.is_copy:
            self.model = copy.deepcopy(policy).eval().requires_grad_(False)
            for attached in attachments_of(self.model):
                attached.detach(self.model)

    @contextmanager
    def active(self, module: LightningModule) -> Iterator[None]:
        """Make `model` the reference inside the block, on the module's device."""
        if self.is_copy:
            self.model.to(module.device)
            yield
        else:
            with torch.no_grad(), self.model.disable_adapter():  # type: ignore[operator]
                yield
