"""What ranks run in tests of sharding; a module of its own because ranks import it by name."""

import dataclasses
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.opened import student_in
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from kdpipe.manifests.errors import KdpipeError
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.parts import Stored
from kdpipe.stages.ranks import Ranks, joined
from kdpipe.stages.student import load_sharded

T = TypeVar("T")
CPU = torch.device("cpu")


def load_and_keep(folders: list[Path], short: Path, out: Path) -> tuple[list[list[str]], list[str]]:
    """Buffers of every rank and weights gathered by rank 0, into `out`; each rank's notes, and its error for `short`.

    No rank but the first may load a folder, and that one none of another name than "mixture".
    """
    whole, notes, load = torch.float32, [], ModelFolder.load
    with joined(CPU) as ranks:

        def guarded(folder: ModelFolder, *args: object) -> object:
            assert (ranks.rank, folder.path.name) == (0, "mixture"), f"rank {ranks.rank} loads {folder.path.name} whole"
            return load(folder, *args)  # type: ignore[arg-type]

        ModelFolder.load = guarded  # type: ignore[method-assign, assignment]
        for path in folders:
            folder = student_in(path)
            student = load_sharded(folder, ranks, stored=whole, computed=whole)
            for tied, source in student.model.all_tied_weights_keys.items():
                assert student.model.get_parameter(tied) is student.model.get_parameter(source)
            notes += folder.notes
            weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            buffers = {f"buffer.{name}": tensor.clone() for name, tensor in student.named_buffers()}
            kept = {name: tensor.clone() for name, tensor in weights.items() if ranks.rank == 0}
            save_file(buffers | kept, out / f"{path.name}-{ranks.rank}.safetensors")
        return of_all(notes, ranks), of_all(_problem_of_one(short, ranks), ranks)


def _problem_of_one(path: Path, ranks: Ranks) -> str:
    """What this rank says where the second one's file is shorter than its header says."""
    folder, real = student_in(path), Stored.read

    def shortened(stored: Stored, out: torch.Tensor, first: int = 0) -> None:
        short = path.parent / stored.file.name
        short.write_bytes(stored.file.read_bytes()[: stored.begin])
        real(dataclasses.replace(stored, file=short), out, first)

    if ranks.rank == 1:
        Stored.read = shortened  # type: ignore[method-assign]
    try:
        load_sharded(folder, ranks, stored=torch.float32, computed=torch.float32)
    except KdpipeError as err:
        return f"{type(err).__name__}: {err}"
    return "loaded"


def of_all(mine: T, ranks: Ranks) -> list[T]:
    found = [mine] * ranks.world_size
    dist.all_gather_object(found, mine)
    return found
