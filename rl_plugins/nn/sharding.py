"""Parameters of which each rank holds only a part: under DeepSpeed's ZeRO-3 and PyTorch's FSDP2, with any host."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from rl_plugins.hooks import FSDP2, require_hooks


def is_partitioned(param: Tensor) -> bool:
    """Tell whether ZeRO-3 owns `param`, so that this rank may hold only a part of it."""
    return "ds_id" in vars(param)


def is_sharded(param: Tensor) -> bool:
    """Tell whether an engine owns `param`, so that this rank may hold only a part of it."""
    return is_partitioned(param) or isinstance(param, DTensor)


def is_in_use(param: Tensor) -> bool:
    """Tell whether a module whose forward runs now has gathered a partitioned `param`, and will release it."""
    return bool(vars(param).get("ds_active_sub_modules"))


def is_fsdp2(model: nn.Module) -> bool:
    """Tell whether FSDP2 has sharded a model, or parts of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def gathers_in_forward(model: nn.Module) -> bool:
    """Tell whether forward passes of `model` exchange parameters, so that all ranks must run equally many of them."""
    return is_fsdp2(model) or any(is_sharded(param) for param in model.parameters())


def whole_size(param: Tensor) -> int:
    """Count the entries of the whole parameter."""
    return int(vars(param)["ds_numel"]) if is_partitioned(param) else param.numel()


@contextmanager
def whole_parameters(params: Sequence[Tensor], *, writing: bool = False) -> Iterator[list[Tensor]]:
    """Make sharded parameters whole inside the block, a collective operation; do nothing for other parameters.

    Args:
        params: Parameters to read or write.
        writing: Keep what is written into the whole tensors. It is taken from rank 0 under ZeRO-3 and from each rank's
            own tensor under FSDP2. Without `writing` it is lost.

    Yields:
        One whole tensor per parameter: the parameter itself, or a copy without gradient in place of a `DTensor`.
    """
    with torch.no_grad():
        whole = [_full(param) if isinstance(param, DTensor) else param for param in params]
    with _gathered([param for param in params if is_partitioned(param)], writing=writing):
        yield whole
    if writing:
        with torch.no_grad():
            for param, tensor in zip(params, whole, strict=True):
                if isinstance(param, DTensor):
                    new = distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)
                    param.copy_(new)


def _full(param: DTensor) -> Tensor:
    # With parameters offloaded to the CPU the ranks still exchange them on their own devices.
    return cast(DTensor, param.detach().to(param.device_mesh.device_type)).full_tensor()


def _gathered(params: list[Tensor], *, writing: bool) -> AbstractContextManager[None]:
    """DeepSpeed's context manager around parameters of ZeRO-3."""
    if not writing:
        # DeepSpeed refuses to release what it gathered for a module that still runs: tied weights in the trunk's hook.
        params = [param for param in params if not is_in_use(param)]
    if not params:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(params, modifier_rank=0 if writing else None)


@contextmanager
def whole_module(module: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run a module outside the forward pass of the model that shards it, without gradient.

    This is a collective operation under FSDP2, which gathers parameters only in the forward of modules that it was
    told to wrap. ZeRO-3 gathers in the forward of every module, so this function does nothing there.

    Args:
        module: Part of a sharded model.
        dtype: Dtype of the parameters inside the block, where FSDP2's mixed precision computes in another one
            than it stores.
    """
    owners = [(owner, name) for owner in module.modules() for name in owner._parameters]
    places = [(owner, name) for owner, name in owners if isinstance(owner._parameters[name], DTensor)]
    params = [cast(nn.Parameter, owner._parameters[name]) for owner, name in places]
    with whole_parameters(params) as whole:
        for (owner, name), tensor in zip(places, whole, strict=True):
            owner._parameters[name] = nn.Parameter(tensor.to(dtype), requires_grad=False)
        try:
            yield
        finally:
            for (owner, name), param in zip(places, params, strict=True):
                owner._parameters[name] = param


def show_trained(model: nn.Module) -> None:
    """Put the parameters that are trained back into the modules.

    FSDP2 leaves whole copies in their place after some passes, and what is written into the copies is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def announce_loss(model: nn.Module, loss: Tensor) -> None:
    """Tell FSDP2 of a loss that may not come from an output of the model.

    FSDP2 reduces gradients over ranks in a backward pass that goes through an output of the model. Where only
    modules inside the model learn (a frozen trunk), no output has a gradient. The gradients of these modules would
    then stay on each rank, and no optimizer would see them.

    Args:
        model: Model as the engine returned it.
        loss: Loss, 0-d; one term of it is enough.
    """
    if isinstance(model, FSDPModule):
        require_hooks(FSDP2)
        model._get_fsdp_state()._register_pre_backward_hook(loss)
