"""Weights that one rank reads are on every rank what from_pretrained gives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.models import make_model
from tests.opened import load_student, student_in
from tests.stages.student.sharded import CPU, save_what_each_rank_has

from kdpipe.pipeline.launch import launch
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.student import load_to_shard

KINDS = ("llama", "qwen2", "gemma2")
"""A head of its own, a tied one, and buffers that no file holds."""


def test_shards_of_two_ranks_are_the_loaded_model_bit_for_bit(tmp_path: Path) -> None:
    folders = [make_model(kind, tmp_path / kind, dtype="bfloat16", vocab_size=253) for kind in KINDS]
    launch(save_what_each_rank_has, folders, tmp_path, nproc=2)
    for folder in folders:
        model = load_student(folder, torch.float32, CPU)
        found = load_file(tmp_path / f"{folder.name}-0.safetensors")
        for name, tensor in model.state_dict().items():
            assert torch.equal(found[f"model.{name}"], tensor), name
        buffers = {f"buffer.model.{name}": tensor for name, tensor in model.named_buffers()}
        assert buffers
        others = load_file(tmp_path / f"{folder.name}-1.safetensors")
        assert others.keys() == buffers.keys()
        for name, tensor in buffers.items():
            assert torch.equal(others[name], tensor), name


def test_only_the_first_rank_reads_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("llama", tmp_path)
    monkeypatch.setattr(ModelFolder, "load", lambda *_: pytest.fail("the weights were read"))
    assert all(tensor.is_meta for tensor in load_to_shard(student_in(folder), rank=1).parameters())
    with pytest.raises(pytest.fail.Exception):
        load_to_shard(student_in(folder), rank=0)
