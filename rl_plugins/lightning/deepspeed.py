"""DeepSpeed without a GPU, in Lightning."""

from typing import Any

from rl_plugins.extras import require

require("deepspeed", "deepspeed")

import deepspeed.ops
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy

from rl_plugins.hooks import DEEPSPEED_ON_CPU, require_hooks


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy on CPUs with gloo. It lets you try and test code for GPUs without a GPU: stages 1
    to 3, checkpoints, several processes.

    ```python
    Trainer(accelerator="cpu", devices=2, strategy=CPUDeepSpeedStrategy(stage=3))  # in place of "deepspeed_stage_3"
    ```

    Lightning's own strategy refuses CPUs in `setup_environment`. On a machine with GPUs use the names of Lightning's
    strategies; nothing else changes.

    Args:
        process_group_backend: Backend of `torch.distributed` by which the processes communicate.
        kwargs: For [`~lightning.pytorch.strategies.DeepSpeedStrategy`].
    """

    def __init__(self, *, process_group_backend: str = "gloo", **kwargs: Any) -> None:
        require_hooks(DEEPSPEED_ON_CPU)
        super().__init__(process_group_backend=process_group_backend, **kwargs)

    @property
    def root_device(self) -> torch.device:
        """The CPU, always with the index 0."""
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        """Set up precision and accelerator, without a compiled communication kernel."""
        # DeepSpeed compiles this kernel at its first use, for a minute, and crashes where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Set up the process group, without choosing a CUDA device."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
