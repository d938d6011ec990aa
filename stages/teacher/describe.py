"""What a teacher folder holds, read from its config, its tokenizer and the headers of its weight files.

Invariant: no weight is loaded. The model is built on the meta device, so the names and sizes of its head come from
the model's own code and not from a list of architectures kept here.
Cost: well under a second, whatever the teacher's size.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kdpipe.manifests.errors import TeacherError
from kdpipe.manifests.specs import Dtype, DtypeChoice
from kdpipe.stages.models.adapter import changes
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.formula import logit_formula

FILE_DTYPES: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherInfo:
    """A teacher as described by its folder.

    folder: the folder itself, whose parts are read once
    architecture: class name of the model
    head_key, bias_key: names of lm_head's tensors in the checkpoint; a tied head has the input embedding's
    hidden_size: width of the head's input, that is of a row
    head_rows: rows of the head, padding included
    softcap, scale: as in HeadRecord
    dtype: what the engine computes in and the rows are stored in
    max_positions: longest input the config allows, None where it names none
    num_params: parameters of the whole model, tied ones counted once
    """

    folder: ModelFolder = field(compare=False)
    architecture: str
    head_key: str
    bias_key: str | None
    hidden_size: int
    head_rows: int
    softcap: float | None
    scale: float
    tied: bool
    dtype: Dtype
    max_positions: int | None
    num_params: int

    @property
    def has_bias(self) -> bool:
        return self.bias_key is not None


def describe_teacher(
    folder: ModelFolder, dtype: DtypeChoice | Dtype = "auto", *, head_is_read: bool = True
) -> TeacherInfo:
    """What the teacher in a folder is. "auto" is the config's dtype, else that of the head in the files.

    head_is_read: its head is taken from the files, where an adapter's part of it is not; false for a model that writes
    Raises TeacherError for a folder, a config or weight files that cannot be a teacher.
    """
    path, config, files, model = folder.path, folder.config, folder.weights, folder.skeleton()
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), torch.nn.Parameter):
        raise TeacherError(f"{type(model).__name__} has no lm_head with a weight; not a causal LM", where=path)
    with folder.answering("the adapter cannot be read"):
        if head_is_read and folder.is_adapter and changes(path, _module_name(model, head)):
            raise TeacherError(
                "its adapter changes the output head, which a teacher has in its files: merge it into its base model "
                "(peft: merge_and_unload, then save_pretrained; kdpipe train: train.export=merged)",
                where=path,
            )
    head_rows, hidden_size = head.weight.shape
    text, formula = config.get_text_config(), logit_formula(config)
    tied = head.weight is model.get_input_embeddings().weight
    head_key = _head_key(path, model, files, tied=tied, shape=[head_rows, hidden_size])
    bias = getattr(head, "bias", None)
    return TeacherInfo(
        folder=folder,
        architecture=type(model).__name__,
        head_key=head_key,
        bias_key=None if bias is None else _bias_key(path, model, files, shape=list(bias.shape)),
        hidden_size=hidden_size,
        head_rows=head_rows,
        softcap=formula.softcap,
        scale=formula.scale,
        tied=tied,
        dtype=_dtype(path, config, files, head_key) if dtype == "auto" else dtype,
        max_positions=getattr(text, "max_position_embeddings", None),
        num_params=sum(parameter.numel() for parameter in model.parameters()),
    )


def _head_key(path: Path, model: Any, files: dict[str, Path], *, tied: bool, shape: list[int]) -> str:
    """The head's own key, or the input embedding's where they are tied and the file has only that."""
    key = _module_name(model, model.get_output_embeddings()) + ".weight"
    embedding = _module_name(model, model.get_input_embeddings()) + ".weight"
    # The head's own key first: where a file has both and they differ, transformers does not tie them either.
    found = _find(model, files, key, shape) or (_find(model, files, embedding, shape) if tied else None)
    if found is None:
        found = _only_of_shape(files, shape, other_than=_find(model, files, embedding, shape))
    if found is None:
        name = embedding if tied else key
        raise TeacherError(f"no '{name}' of shape {shape} in the weight files; is this the whole model?", where=path)
    return found


def _bias_key(path: Path, model: Any, files: dict[str, Path], *, shape: list[int]) -> str:
    key = _module_name(model, model.get_output_embeddings()) + ".bias"
    found = _find(model, files, key, shape)
    if found is None:
        raise TeacherError(f"no '{key}' of shape {shape} in the weight files; is this the whole model?", where=path)
    return found


def _find(model: Any, files: dict[str, Path], key: str, shape: list[int]) -> str | None:
    """The file's name for the model's tensor `key`: equal, without the base model's prefix, or the only one alike.

    GPT-2's files say wte.weight for transformer.wte.weight; multimodal ones put language_model. in another place.
    """
    end = "." + ".".join(key.split(".")[-2:])
    alike = [name for name in files if name.endswith(end)]
    candidates = [key, key.removeprefix(model.base_model_prefix + "."), *(alike if len(alike) == 1 else [])]
    for name in candidates:
        if name in files and _slice(files[name], name).get_shape() == shape:
            return name
    return None


def _only_of_shape(files: dict[str, Path], shape: list[int], *, other_than: str | None) -> str | None:
    """The only tensor of the head's shape beside the input embedding; canary.check_head proves that it is the head.

    Old checkpoints have old names (GPT-NeoX: embed_out.weight), which transformers translates while it loads.
    """
    found = [key for key in files if key != other_than and _slice(files[key], key).get_shape() == shape]
    return found[0] if len(found) == 1 else None


def _slice(file: Path, key: str) -> Any:
    """Shape and dtype of a tensor from the header of its file."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_slice(key)
    except SafetensorError as err:
        raise TeacherError(f"'{key}' cannot be read: {err}; copy the file again", where=file) from None


def _module_name(model: Any, module: Any) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _dtype(path: Path, config: Any, files: dict[str, Path], head_key: str) -> Dtype:
    declared = config.dtype or config.get_text_config().dtype
    if declared is not None:
        name = str(declared).removeprefix("torch.")
    else:
        stored = _slice(files[head_key], head_key).get_dtype()
        name = FILE_DTYPES.get(stored, stored)
    known = {str(dtype): dtype for dtype in FILE_DTYPES.values()}
    if name not in known:
        raise TeacherError(f"dtype {name} is none of {', '.join(known)}; give --dtype", where=path)
    return known[name]
