"""Sharding: a student over the ranks of a run by FSDP2, from weights that one rank reads.

    rank 0: the whole model in memory       others: its skeleton on the meta device
    for each decoder layer, then for the rest: rank 0's tensors to every rank -> fully_shard keeps each rank's part

Invariant: what a rank holds is, bit for bit, its part of the model that from_pretrained loads in float32.
Cost: host memory for one whole model on rank 0 and for a layer on the others; a device holds a layer and its shards.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.student.student import Student

CPU = torch.device("cpu")


def load_to_shard(model: ModelFolder, *, rank: int) -> PreTrainedModel:
    """The student in float32, whole on rank 0; the others' has no weights until `shard` gives them theirs."""
    if rank == 0:
        return model.load(torch.float32, CPU)
    skeleton: PreTrainedModel = model.skeleton().float()
    # A tensor that is neither parameter nor buffer cannot be handed out.
    aside = any(
        isinstance(value, torch.Tensor) and value.is_meta
        for module in skeleton.modules()
        for value in vars(module).values()
    )
    return model.load(torch.float32, CPU) if aside else skeleton


def shard(student: Student, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device) -> Student:
    """Shard the student over the mesh in place (FSDP2): each decoder layer by itself, the rest as the root. Collective.

    Gradients are summed over ranks, not averaged: the loss is divided once, by the tokens of all ranks.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = set(student.model._no_split_modules or ())
    for module in student.model.modules():
        # Mamba names its blocks and the mixers inside them: what is part of a sharded layer is sharded already.
        if type(module).__name__ in layers and not any(isinstance(each, DTensor) for each in module.parameters()):
            _hand_out(module, device)
            fully_shard(module, mesh=mesh, mp_policy=policy)
    _hand_out(student, device)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(student, "examined")
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A plain sum: the fused multiply-and-sum that a factor asks for exists on nccl only.
            module.set_force_sum_reduction_for_comms(True)
    return student


def reduce_gradients(student: Student, wanted: bool) -> None:
    """Whether the next backward pass sums gradients over ranks, or keeps them for the next micro-batch."""
    assert isinstance(student, FSDPModule)
    student.set_requires_gradient_sync(wanted)


def _hand_out(module: nn.Module, device: torch.device) -> None:
    """Rank 0's parameters and buffers of the module on every rank's device; what is sharded already is left alone."""
    given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id of the tensor, which is kept alive with it
    for each in module.modules():
        tables: tuple[dict[str, Any], ...] = (each._parameters, each._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in given:
                    given[id(tensor)] = tensor, _from_first_rank(tensor, device)
                table[name] = given[id(tensor)][1]


def _from_first_rank(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    whole = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
    if dist.get_world_size() > 1:
        dist.broadcast(whole, src=0)
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
