"""What a test needs to run vLLM beside a trainer: sizes that its kernels take, an engine that can be given weights
more than once on a CPU, and figures of a run. Importing this module needs vllm."""

import os
from functools import partial
from typing import Any

# In this process, so that a test can read the engine's weights.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # compile nothing
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import trl.generation.vllm_generation as generation
from torch import Tensor
from vllm import LLM
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.distributed.parallel_state import destroy_model_parallel  # noqa: F401  (tests reach it here)
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "initializer_range": 0.2}
VLLM: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
packed_apply = CPUUnquantizedExperts.apply


def keep_weight(layer: Any, remove_weight: bool) -> None:
    """Multiply with the layer's weight as it is."""
    layer.cpu_linear = torch.nn.functional.linear


def apply_unpacked(self: Any, *args: Any, **kwargs: Any) -> None:
    """Pack the experts' weights at every call."""
    given = dict(zip(("output", "hidden_states", "w1", "w2"), args, strict=False)) | kwargs
    packed = {name: cpu_prepack_moe_weight(given[name], self.isa) for name in ("w1", "w2")}
    packed_apply(self, *args[4:], **given | packed)


def prepare_engine(dtype: str) -> None:
    """Make TRL's engines compute in `dtype`, and keep their weights loadable.

    TRL leaves the precision to vLLM, which halves float32. On a CPU vLLM packs weights and drops the originals once
    they are loaded, so that the second load of a training run fails.
    """
    generation.LLM = partial(LLM, dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=2**25)
    utils.dispatch_cpu_unquantized_gemm = keep_weight
    CPUUnquantizedExperts.process_weights_after_loading = lambda self, layer: None
    CPUUnquantizedExperts.apply = apply_unpacked


def engine_weights(trainer: Any) -> dict[str, Tensor]:
    """Parameters and buffers of the engine's model."""
    model = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def record_names(trainer: Any) -> set[str]:
    """The set that fills with the names of what is streamed to the engine."""
    stream, names = trainer.vllm_generation._iter_named_params, set()

    def recorded() -> Any:
        for name, tensor in stream():
            names.add(name)
            yield name, tensor

    trainer.vllm_generation._iter_named_params = recorded
    return names


def gaps(trainer: Any) -> list[float]:
    """Of every step, the largest gap between the engine's and the policy's log-probabilities of a sampled token."""
    name = "sampling/sampling_logp_difference/max"
    return [row[name] for row in trainer.state.log_history if name in row]
