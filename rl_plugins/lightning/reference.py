"""The policy as it was given, which the KL term holds the policy close to."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers import PreTrainedModel

from rl_plugins.nn.attachment import attachments_of


class Reference:
    """A frozen copy of the policy, or the policy itself without its adapters where it is a PEFT model.

    No module, so that it is in no checkpoint and no engine partitions it: every rank holds all of it. A resumed run
    makes it from the model that it is given, as the first run did.

    Args:
        policy: As it is before training.
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
