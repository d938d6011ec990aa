"""LoRA: a student of which low-rank adapters alone are trained, on new layers or those of a folder that is an adapter.

    StudentSpec, ModelFolder -> lora_of -> Lora -> load_sharded -> adapter beside frozen weights -> write_adapter

Invariant: what is trained, kept in a checkpoint and written is `trainable`, whatever the student; frozen weights are
read from their files at every start. First values are a function of the seed and the name, on any number of ranks.
Cost: frozen weights in the precision of their files, or 4 bits; 16 bytes for each number of an adapter (weight,
gradient, AdamW's two moments), 12 of them in a checkpoint.
Hu et al., "LoRA", arXiv 2106.09685; Dettmers et al., "QLoRA", arXiv 2305.14314.
"""

# Shapes: r rank of an adapter, out and in widths of a layer.

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from kdpipe.manifests.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD
from kdpipe.manifests.durable import canonical
from kdpipe.manifests.errors import ConfigError, StudentError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.specs import StudentSpec
from kdpipe.manifests.specs.student import ALL_LINEAR, OF_LORA
from kdpipe.stages.draws import mixed_seed
from kdpipe.stages.models import adapter
from kdpipe.stages.models.folder import ModelFolder

TORCHTUNE = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Layers by the names that torchtune has for them."""
PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False}
"""What an adapter that is gone on with has of these settings of peft; the others of them empty."""
EMPTY = ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication", "megatron_config")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lora:
    """An adapter that is to be trained.

    config: peft.LoraConfig
    folder: the adapter that it goes on from; None draws its first values
    bits: of the layers under it; None: as they are stored
    """

    config: Any
    folder: ModelFolder | None
    bits: int | None

    def first_values(self, model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
        """What the adapter begins with, float32 on the CPU, by the model's names; A as peft draws it, B zero."""
        named = {name: parameter.shape for name, parameter in model.named_parameters() if ".lora_" in name}
        if self.folder is None:
            return {name: _drawn(name, shape, seed) for name, shape in named.items()}
        from peft import load_peft_weights

        stored = load_peft_weights(str(self.folder.path), device="cpu")
        found = {name: stored.pop(adapter.file_name(name)).float() for name in named}
        for name, tensor in stored.items():
            self._require_bases(name, tensor)
        return found

    def _require_bases(self, name: str, tensor: torch.Tensor) -> None:
        """peft writes the head under an adapter too: a weight that is the base's. Raises StudentError for another."""
        assert self.folder is not None
        own = adapter.own_name(name.removeprefix(adapter.PREFIX))
        if own in self.folder.weights:
            with safe_open(self.folder.weights[own], "pt") as file:
                if torch.equal(file.get_tensor(own).to(tensor.dtype), tensor):
                    return
        raise StudentError(
            f"beside the adapter it holds '{own}', which is not that of its base and would be left out: merge it into "
            "its base, or give student.lora_rank for a new adapter on top of it",
            where=self.folder.path,
        )


def lora_of(model: ModelFolder, spec: StudentSpec) -> Lora | None:
    """The adapter that a student is trained by; None where all its weights are.

    Raises ConfigError for keys that do not go together or name no layer, StudentError for an adapter that cannot be
    trained on.
    """
    given = sorted(spec.model_fields_set & {*OF_LORA})
    if not spec.lora_rank and not model.is_adapter:
        if given or spec.lora_base_bits:
            key = (given or ["lora_base_bits"])[0]
            raise ConfigError("it is of use with student.lora_rank alone; give both or none", where=f"student.{key}")
        return None
    adapter.require_peft(StudentError, model.path)
    if spec.lora_base_bits and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "4 bits need bitsandbytes, which is not installed: pip install bitsandbytes, or leave the key out",
            where="student.lora_base_bits",
        )
    if not spec.lora_rank:
        if given:
            raise ConfigError(
                f"{model.path} is an adapter, which is trained on as it is: leave the key out, or give "
                "student.lora_rank for a new adapter on top of it",
                where=f"student.{given[0]}",
            )
        return Lora(config=_config_in(model), folder=model, bits=spec.lora_base_bits)
    if model.is_adapter and spec.lora_base_bits:
        raise ConfigError(
            "a new adapter goes on top of another once that is merged, and 4 bits cannot be merged into; merge it into "
            "its base first, or leave the key out",
            where="student.lora_base_bits",
        )
    return Lora(config=_new_config(model, spec), folder=None, bits=spec.lora_base_bits)


def check_export(lora: Lora | None, model: ModelFolder, export: str | None) -> None:
    """Raises ConfigError for an export that this student does not have."""
    if lora is None and export is not None:
        raise ConfigError("it is for students that are trained by adapters (student.lora_rank)", where="train.export")
    if lora is not None and lora.folder is None and model.is_adapter and export != "merged":
        raise ConfigError(
            f"an adapter on top of the adapter {model.path} has no base that can be loaded without kdpipe: set it to "
            "merged, or leave student.lora_rank out to train that adapter itself on",
            where="train.export",
        )


def check_own_teacher(lora: Lora | None, spec: StudentSpec, *, taught: bool) -> None:
    """Raises ConfigError where the student's base cannot be its teacher."""
    if spec.lora_teacher and lora is None:
        raise ConfigError(
            "its base is what an adapter is put on: give student.lora_rank too", where="student.lora_teacher"
        )
    if spec.lora_teacher and taught:
        raise ConfigError(
            "the rows of another teacher are given; leave it out, or train on data alone (--data)",
            where="student.lora_teacher",
        )


def attach(model: Any, lora: Lora, seed: int) -> dict[str, torch.Tensor]:
    """Put the adapter on a model, its values still on the meta device, and freeze the rest; the values by name."""
    adapter.inject(model, lora.config)
    return lora.first_values(model, seed)


def trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that are trained, by name: all of them, or those of its adapter."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def num_trainable(model: ModelFolder, lora: Lora | None) -> int:
    """How many numbers are trained."""
    skeleton = model.skeleton()
    if lora is not None:
        adapter.inject(skeleton, lora.config)
    return sum(parameter.numel() for _, parameter in trainable(skeleton))


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter without gradient, from all ranks. Collective where it is sharded."""
    part = parameter.detach()
    return part.full_tensor() if isinstance(part, DTensor) else part


def merged_weights(model: nn.Module, *, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, its adapter merged in, by the model's own name. Collective where it is sharded.

    keep: on this rank; the others only send their parts. A sum is taken, and given, in float32.
    """
    for name, parameter, layer in adapter.own_weights(model):
        own = parameter if adapter.in_4_bits(parameter) else whole(parameter)
        low = None if layer is None else [whole(each) for each in adapter.low_of(layer)]
        if not keep:
            continue
        if low is None:
            yield name, adapter.widened(own) if adapter.in_4_bits(own) else own
        else:
            yield name, adapter.widened(own) + adapter.product(layer, *low)


def write_adapter(model: nn.Module, lora: Lora, base: Path, digest: str, folder: Path, *, rank: int) -> None:
    """Write what peft loads: the adapter in float32, its config, and the digest of its base. Collective; rank 0 writes.

    Raises OSError.
    """
    state = {}
    for name, parameter in trainable(model):
        value = whole(parameter)
        if rank == 0 and ".lora_" in name:
            state[adapter.file_name(name)] = value.to("cpu", torch.float32).contiguous()
    if rank != 0:
        return
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    settings = lora.config.to_dict() | {"base_model_name_or_path": str(base), "inference_mode": True}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(_plain(settings), indent=2, sort_keys=True) + "\n")
    (folder / BASE_RECORD).write_bytes(canonical({"digest": digest}))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same as JSON values, sets in order."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def _drawn(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """A [r, in] uniform in +-1/sqrt(in), which is peft's kaiming_uniform(sqrt(5)); B [out, r] zero."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(mixed_seed(seed, key)))


def _config_in(model: ModelFolder) -> Any:
    """That of an adapter that can be trained on. Raises StudentError for one that is more than plain LoRA."""
    from peft import PeftConfig

    with model.answering("its adapter_config.json cannot be used"):
        config = PeftConfig.from_pretrained(str(model.path))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    odd = [f"peft_type {kind}"] if kind != "LORA" else []
    odd += [f"{key} {getattr(config, key)!r}" for key in PLAIN if getattr(config, key, PLAIN[key]) != PLAIN[key]]
    odd += [f"{key} {getattr(config, key)!r}" for key in EMPTY if getattr(config, key, None)]
    if odd:
        raise StudentError(
            f"an adapter with {', '.join(odd)} cannot be trained on here: merge it into its base, or give "
            "student.lora_rank for a new adapter on top of it",
            where=model.path,
        )
    config.inference_mode = False
    return config


def _new_config(model: ModelFolder, spec: StudentSpec) -> Any:
    """Raises ConfigError for a target that no layer has."""
    from peft import LoraConfig, TaskType

    skeleton = model.skeleton()
    names, head = _linear_names(skeleton)
    targets: dict[str, None] = {}
    for wanted in spec.lora_targets:
        if wanted.lower() == ALL_LINEAR:
            targets |= dict.fromkeys(_short(name) for name in names)
        elif any(name == wanted or name.endswith(f".{wanted}") for name in (*names, head)):
            targets[wanted] = None
        else:
            known = sorted({_short(name) for name in names})
            meant = TORCHTUNE.get(wanted)
            hint = f"; did you mean '{meant}'?" if meant in known else nearest(wanted, known)
            raise ConfigError(
                f"'{wanted}': no linear layer of {model.path} has that name{hint} (known here: {', '.join(known)})",
                where="student.lora_targets",
            )
    if spec.lora_head:
        targets[head] = None
    on_head = any(head == name or head.endswith(f".{name}") for name in targets)
    if on_head and skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight:
        raise ConfigError(
            "its output head is its embedding (tie_word_embeddings), which an adapter on the one would leave as it is "
            "on the other; leave the key out",
            where="student.lora_head" if spec.lora_head else "student.lora_targets",
        )
    return LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha if spec.lora_alpha % 1 else int(spec.lora_alpha),
        lora_dropout=spec.lora_dropout,
        target_modules=sorted(targets),
        task_type=TaskType.CAUSAL_LM,
    )


def _linear_names(skeleton: Any) -> tuple[list[str], str]:
    """Names of the linear layers but the head, and of the head."""
    from transformers.pytorch_utils import Conv1D

    head = skeleton.get_output_embeddings()
    found = {name: each for name, each in skeleton.named_modules() if isinstance(each, nn.Linear | Conv1D)}
    return [name for name, each in found.items() if each is not head], next(
        name for name, each in skeleton.named_modules() if each is head
    )


def _short(name: str) -> str:
    """The last part of a layer's name, or the whole where that is a number."""
    last = name.rpartition(".")[2]
    return name if last.isdecimal() else last
