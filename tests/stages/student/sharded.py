"""What ranks run in tests of sharding; a module of its own because ranks import it by name."""

import resource
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.opened import student_in
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from kdpipe.stages.ranks import joined
from kdpipe.stages.student import Student, load_to_shard, shard

CPU = torch.device("cpu")


def save_what_each_rank_has(folders: list[Path], out: Path) -> int:
    """The whole weights gathered by rank 0 and every rank's buffers, into `out`; peak memory of this rank in KiB."""
    with joined(CPU) as ranks:
        mesh = init_device_mesh("cpu", (ranks.world_size,))
        for folder in folders:
            student = shard(Student(load_to_shard(student_in(folder), rank=ranks.rank)), mesh, torch.float32, CPU)
            weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            buffers = {f"buffer.{name}": tensor.clone() for name, tensor in student.named_buffers()}
            kept = {name: tensor.clone() for name, tensor in weights.items() if ranks.rank == 0}
            save_file(buffers | kept, out / f"{folder.name}-{ranks.rank}.safetensors")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
