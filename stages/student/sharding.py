"""Sharding: a student over the ranks of a run by FSDP2, whole on none of them.

    every rank: skeleton (meta) -> fully_shard -> its part of each tensor, read from the files     [filled in parts]
    else:       rank 0: the whole model, others: a skeleton -> tensors to every rank -> fully_shard

The second way is for folders that can only be loaded whole (models/parts.py), as mixtures whose experts transformers
puts together; all ranks take the same way.

Invariant: what a rank holds is, bit for bit, its part of the model that from_pretrained loads.
Cost: a rank's part and nothing to speak of beside it. The second way: host memory for one whole model on rank 0, for a
layer on the others.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from kdpipe.manifests.specs import FsdpSpec
from kdpipe.stages.models.adapter import in_4_bits, own_name
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.parts import (
    Readable,
    Stored,
    Value,
    WholeOnlyError,
    files_of,
    make_buffers,
    replace_tensors,
    tensors_aside,
)
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.student.lora import Lora, attach
from kdpipe.stages.student.student import Student

CPU = torch.device("cpu")
WHOLE_ROW = FsdpSpec()
"""One copy of the student over all ranks, on their devices."""
ON_DEVICE = OffloadPolicy()


def load_sharded(
    folder: ModelFolder,
    ranks: Ranks,
    *,
    stored: torch.dtype,
    computed: torch.dtype,
    grad_checkpointing: bool = False,
    fsdp: FsdpSpec = WHOLE_ROW,
    vocab_size: int | None = None,
    lora: Lora | None = None,
    seed: int = 0,
) -> Student:
    """The student of a folder, its weights `stored` over the ranks, its forward pass in another dtype. Collective.

    fsdp: how it lies on them; its layers are compiled later, by `compile_layers`
    vocab_size: as in Student
    lora: the adapter that it is trained by, beside frozen weights; seed: of the adapter's first values
    folder.notes has a line more where rank 0 had to read it whole.
    Raises what ModelFolder raises; PeerError where another rank could not read its part.
    """
    # An adapter that is gone on with stays beside its base; another one is merged into it.
    source = folder.base if lora is not None and lora.folder is not None else folder
    files: Mapping[str, Readable] = {}
    if lora is not None and lora.bits is not None:
        model, whole_only = ranks.together(lambda: source.load_in_4_bits(stored, computed, ranks.device)), 1.0
    else:
        model, files = ranks.together(lambda: _in_parts(source, stored, ranks.world_size))
        (whole_only,) = ranks.largest([float(not files)])  # two clients of a network file system may not see the same
        if whole_only:
            model = ranks.together(lambda: _whole_on_first(source, model, stored, rank=ranks.rank))
    if lora is not None:
        values = ranks.together(lambda: attach(model, lora, seed))
        if whole_only:
            replace_tensors(model, lambda name, old: nn.Parameter(values[name]) if name in values else old)
        else:
            files = {name: files.get(own_name(name)) or Value(values[name]) for name in model.state_dict()}
    if grad_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student = Student(model, vocab_size)
    mesh, offload = ranks.mesh(fsdp.shard_size), _offload(fsdp, ranks.device)
    if whole_only:
        return shard(student, mesh, computed, ranks.device, offload)
    _fully_shard(student, mesh, computed, offload)
    ranks.together(lambda: _fill(source, model, files, ranks.device, CPU if fsdp.optimizer_on_cpu else ranks.device))
    return student


def shard(
    student: Student,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
    offload: OffloadPolicy = ON_DEVICE,
) -> Student:
    """Shard a student that is whole on rank 0 over the mesh, in place; dtype: of the forward pass. Collective."""
    return _fully_shard(student, mesh, dtype, offload, lambda module: _hand_out(module, device))


def own_part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that is whole here, as it has of another one of the same shape, on its device."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    shape, (row, *_) = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[row : row + shape[0]].to(like.device)


def compile_layers(student: Student) -> None:
    """Compile each layer in place, at its first forward pass: after the exam, whose passes are like no step's."""
    for module in student.modules():
        if isinstance(module, FSDPModule) and module is not student:
            module.compile()


def shard_beside(beside: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device) -> None:
    """Shard the linear layers of a module beside the student's model, which learn with it. Collective.

    Rank 0's weights. Before the student's first forward pass, which makes them part of it.
    """
    policy = _precision(dtype)
    for module in beside.modules():
        if isinstance(module, nn.Linear):
            _hand_out(module, device)
            fully_shard(module, mesh=mesh, mp_policy=policy)
            _sum_gradients(module)


def reduce_gradients(student: Student, wanted: bool) -> None:
    """Whether the next backward pass sums gradients over ranks, or keeps them for the next micro-batch."""
    assert isinstance(student, FSDPModule)
    student.set_requires_gradient_sync(wanted)


def _in_parts(folder: ModelFolder, dtype: torch.dtype, num_ranks: int) -> tuple[PreTrainedModel, dict[str, Stored]]:
    """The skeleton, its buffers made, and where its weights lie; nowhere if it can only be loaded whole."""
    model = folder.skeleton(dtype)
    with folder.answering("its weights cannot be found in the files"):
        try:
            if folder.is_adapter:
                raise WholeOnlyError("it is an adapter, merged into its base")
            files = files_of(model, folder.weights)
            make_buffers(model)
        except WholeOnlyError as err:
            if num_ranks > 1:
                folder.notes.append(f"rank 0 reads the whole student, and sends each rank its part: {err}")
            return folder.skeleton(dtype), {}
    folder.examine()  # what can only be loaded whole is examined by that, on one rank
    return model, files


def _whole_on_first(
    folder: ModelFolder, skeleton: PreTrainedModel, dtype: torch.dtype, *, rank: int
) -> PreTrainedModel:
    """The model, whole on rank 0; the others' has no weights until it is sharded."""
    # A tensor that is neither parameter nor buffer cannot be handed out.
    return folder.load(dtype, CPU) if rank == 0 or tensors_aside(skeleton) else skeleton


def _fully_shard(
    student: Student,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    offload: OffloadPolicy,
    before: Callable[[nn.Module], None] = lambda module: None,
) -> Student:
    """Shard the student in place: each decoder layer by itself, the rest as the root; `before` is called with each.

    Gradients are summed over ranks, not averaged: the loss is divided once, by the tokens of all ranks.
    """
    policy = _precision(dtype)
    layers = set(student.model._no_split_modules or ())
    apart = {parameter for parameter in student.parameters() if in_4_bits(parameter)}  # whole on every rank
    for module in student.model.modules():
        # Mamba names its blocks and the mixers inside them: what is part of a sharded layer is sharded already.
        if type(module).__name__ in layers and not any(isinstance(each, DTensor) for each in module.parameters()):
            before(module)
            fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=apart)
    before(student)
    fully_shard(student, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=apart)
    for inside in ("examined", "written", "scored"):
        register_fsdp_forward_method(student, inside)
    for module in student.modules():
        _sum_gradients(module)
    return student


def _precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def _sum_gradients(module: nn.Module) -> None:
    if isinstance(module, FSDPModule):
        module.set_gradient_divide_factor(1.0)
        # A plain sum: the fused multiply-and-sum that a factor asks for exists on nccl only.
        module.set_force_sum_reduction_for_comms(True)


def _offload(fsdp: FsdpSpec, device: torch.device) -> OffloadPolicy:
    """Where parts, gradients and moments are between passes; a CPU has no memory that is pinned for another device."""
    return CPUOffloadPolicy(pin_memory=device.type != "cpu") if fsdp.optimizer_on_cpu else ON_DEVICE


def _fill(
    folder: ModelFolder,
    model: PreTrainedModel,
    files: Mapping[str, Readable],
    device: torch.device,
    of_parts: torch.device,
) -> None:
    """Give a sharded skeleton every buffer on its device, and this rank's part of every weight on that of the parts."""

    def filled(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            whole = torch.empty_like(tensor, device=device) if name in files else tensor.to(device)
            if name in files:
                files[name].read(whole)
            return whole
        mesh, placements = tensor.device_mesh, tensor.placements
        shape, (row, *_) = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        part = torch.empty(shape, dtype=tensor.dtype, device=of_parts)
        files[name].read(part, first=row * math.prod(shape[1:]))
        sharded = DTensor.from_local(part, mesh, placements, shape=tensor.shape, stride=tensor.stride())
        return nn.Parameter(sharded, tensor.requires_grad)

    with folder.answering("the weight files cannot be read; copy them again"):
        replace_tensors(model, filled)


def _hand_out(module: nn.Module, device: torch.device) -> None:
    """Rank 0's parameters and buffers of the module on every rank's device; what is sharded already is left alone."""

    def given(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor) or in_4_bits(tensor):
            return tensor
        whole = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
        if dist.get_world_size() > 1:
            dist.broadcast(whole, src=0)
        return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole

    replace_tensors(module, given)
