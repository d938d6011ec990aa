"""A model folder: the one way by which kdpipe reads what from_pretrained reads, teacher or student.

    path, --trust-remote-code -> own code allowed? -> config, tokenizer, weights' files, digest -> the model

Invariant: whatever transformers, tokenizers, safetensors, torch or the folder's own code raise is one line of the
folder's error class, with the folder and the cause; errors of kdpipe, an interrupt and lack of memory pass through.
Each part is read when it is first asked for and kept: two questions about a folder have one answer.
A folder that is an adapter is read as its base model with the adapter merged in (adapter.py).
"""

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdpipe.manifests.adapter import BASE_RECORD, base_of, is_adapter, with_tokenizer
from kdpipe.manifests.errors import InputError, is_of_others
from kdpipe.manifests.provenance import digest_file, digest_model
from kdpipe.manifests.run import read_run
from kdpipe.stages.models.adapter import import_bitsandbytes, loaded, merged, require_peft
from kdpipe.stages.models.own_code import OwnCode, allowed_code, place_of
from kdpipe.stages.models.tokenizer import read_tokenizer, tokenizer_files
from kdpipe.stages.models.weights import require_all, require_fitting, stored_dtype, weight_files

GENERATION = "generation_config.json"
READ = frozenset((".json", ".jinja", ".model", ".py", ".safetensors", ".tiktoken", ".txt"))
"""Endings of the files that a model is read from."""
CAUSE_LENGTH = 300
"""Characters of a library's own words in an error message."""


class ModelFolder:
    """What a folder that from_pretrained loads holds.

    error: TeacherError or StudentError, raised for all that is wrong with the folder
    trust: digest of the folder's own code that may run, or its start; None where it brings none
    notes: what the user should know of how its parts were read, one line each
    """

    def __init__(self, path: Path, error: type[InputError], trust: str | None = None) -> None:
        self.path, self.error, self.trust = path, error, trust
        self.notes: list[str] = []
        self._examined = False

    def at(self, path: Path) -> "ModelFolder":
        """Another folder, read in the same way and with the same trust."""
        return ModelFolder(path, self.error, self.trust)

    @cached_property
    def base(self) -> "ModelFolder":
        """The folder of the model that an adapter is for; itself where it is no adapter."""
        if not is_adapter(self.path):
            return self
        with self.answering("its adapter_config.json cannot be read"):
            return self.at(base_of(self.path, self.error))

    @property
    def is_adapter(self) -> bool:
        return self.base is not self

    def file(self, name: str) -> Path:
        """Where a file of the model lies: in the folder, else with its base."""
        return self.path / name if os.path.lexists(self.path / name) else self.base.path / name

    @cached_property
    def code(self) -> OwnCode:
        """The folder's own code, allowed by its digest; empty where none is run."""
        if self.is_adapter:
            return self.base.code
        with self.answering("its own code cannot be read"):
            return allowed_code(self.path, self.trust, self.error)

    @cached_property
    def place(self) -> Path:
        """Where transformers loads from: the folder, or a private copy where code of its own is run."""
        if self.is_adapter:
            return self.base.place
        return place_of(self.path, self.code)

    @cached_property
    def config(self) -> Any:
        """The config of a causal LM: one that transformers knows, or that the folder's own code makes."""
        if self.is_adapter:
            return self.base.config
        self._require_config()
        with self.answering("config.json cannot be used"):
            config = self._from_pretrained(AutoConfig)
            if self.trust is None or AutoModelForCausalLM.__name__ not in (getattr(config, "auto_map", None) or {}):
                self._require_causal(config)
            return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer, with the ids of its own tokenizer.json; see tokenizer.py."""
        self._require_folder()
        with self.answering("its tokenizer does not load"):
            place = self.place if self._tokens == self.base.path else self._tokens
            made_by_auto = partial(self._from_pretrained, AutoTokenizer, place)
            read = read_tokenizer(place, made_by_auto, self.error, self._tokens)
        self.notes += [read.note] if read.note else []
        return read.tokenizer

    @cached_property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the files that the tokenizer is read from: what goes with a copy of the model, byte for byte."""
        with self.answering("its tokenizer does not load"):
            return tokenizer_files(self._tokens)

    @cached_property
    def _tokens(self) -> Path:
        """Where the tokenizer lies."""
        return with_tokenizer(self.path) if self.is_adapter else self.path

    @cached_property
    def weights(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it; each file is whole. Of an adapter those of its base."""
        if self.is_adapter:
            return self.base.weights
        with self.answering("the weight files cannot be read; copy them again"):
            return weight_files(self.path, self.error)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which generation ends, as `generate` takes them: from the generation config, else the config."""
        for name in (GENERATION, "config.json"):
            given = self.read_json(name).get("eos_token_id")
            ids = given if isinstance(given, list) else [given]
            if found := frozenset(number for number in ids if isinstance(number, int)):
                return found
        return frozenset()

    @property
    def untrained_stop_ids(self) -> frozenset[int]:
        """Less those that training has added: a student's samples are made by the same ones before and after it."""
        record = read_run(self.path)
        return self.stop_ids - set(record.added_stops if record is not None else ())

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; empty where the file is missing."""
        path = self.file(name)
        if not os.path.lexists(path):
            return {}
        with self.answering(f"{name} cannot be read"):
            value = json.loads(path.read_bytes()) if path.is_file() else None
            if not isinstance(value, dict):
                raise self.error(f"{name} is not a file with one JSON object; copy it again", where=self.path)
            return value

    def digest(self, of_file: Callable[[Path], str] = digest_file) -> str:
        """sha256 over config, weights and the code that runs; reads every byte of the weights.

        of_file: for a caller that knows the digests of some files
        """
        self._require_config()
        with self.answering("it cannot be read"):
            return digest_model(self.path, self.code.digest, of_file)

    def examine(self) -> None:
        """All that is wrong with the folder, short of the values of its weights.

        In the dtype of its files a model maps its weights: the trial takes a fraction of a second and no memory, but
        for what transformers puts together while it loads (experts of a mixture).
        """
        if self._examined:
            return
        if self.is_adapter:
            self.base.examine()
            require_peft(self.error, self.path)
            self.require_base()
            with self.answering("the adapter does not load"):
                loaded(self.skeleton(), self.path)
        else:
            self._whole(stored_dtype(self.weights))
        self._examined = True

    def skeleton(self, dtype: torch.dtype | None = None) -> Any:
        """The model on the meta device, in `dtype` or the config's: modules and the shapes of weights, no memory."""
        if self.is_adapter:
            return self.base.skeleton(dtype)
        config = copy.deepcopy(self.config)
        with (
            self.answering("transformers cannot build the model of config.json"),
            torch.device("meta"),
            warnings.catch_warnings(action="ignore"),  # sizes of 0: what is wrong with them is said of the weights
        ):
            num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
            if num_layers > len(self.weights):  # modules take memory on the meta device too
                raise self.error(
                    f"config.json says {num_layers} layers, the weight files hold {len(self.weights)} weights; "
                    "is it the config of another model?",
                    where=self.path,
                )
            # With own code, config.name_or_path is the private copy that the config was read from.
            chosen = {} if dtype is None else {"dtype": dtype}
            return AutoModelForCausalLM.from_config(config, trust_remote_code=bool(self.code), **chosen)

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The whole model on `device`; a weight that is missing, left over or of another shape is an error."""
        model = self._whole(dtype)
        with self.answering("the model does not load"):
            loaded: PreTrainedModel = model.to(device)
            return loaded

    def load_in_4_bits(self, dtype: torch.dtype, computed: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model with its linear layers but the head in nf4, quantised twice; dtype: of the rest.

        computed: what these layers' products are taken in
        """
        self.examine()
        import_bitsandbytes()
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computed,
        )
        with self.answering("the model does not load in 4 bits"):
            model: PreTrainedModel = self._from_pretrained(
                AutoModelForCausalLM,
                config=copy.deepcopy(self.config),
                dtype=dtype,
                quantization_config=settings,
                device_map={"": device},
            )
            for module in model.modules():
                # Where a CPU has AVX512-BF16, bitsandbytes packs a weight anew in a pass of evaluation, for a product
                # that has no gradient and that it takes in training too from then on.
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
            return model

    def _whole(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model on the CPU with every one of its weights."""
        if self.is_adapter:
            self.examine()
            with self.answering("the adapter does not load"):
                return merged(self.base._whole(dtype), self.path)
        built = self.skeleton()
        self.read_json(GENERATION)  # transformers takes one that it cannot read for none
        with self.answering("the model does not load"):
            if (
                getattr(self.config, "quantization_config", None) is None
            ):  # packed weights have sizes and types of their own
                require_fitting(built, self.weights, self.error, self.path)
            model, loading = self._from_pretrained(
                AutoModelForCausalLM,
                config=copy.deepcopy(self.config),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # require_all names them
            )
            require_all(loading, self.weights, self.error, self.path)
            if model.get_output_embeddings() is None:
                raise self.error(f"{type(model).__name__} has no lm_head; not a causal LM", where=self.path)
            whole: PreTrainedModel = model
            return whole

    def require_base(self) -> None:
        """The base of an adapter of ours is the one that it was trained on; reads every byte of it."""
        trained_on = self.read_json(BASE_RECORD).get("digest") if self.is_adapter else None
        if trained_on is not None and trained_on != (found := self.base.digest()):
            raise self.error(
                f"the adapter was trained on a base model of the digest {trained_on[:12]}, {self.base.path} has "
                f"{found[:12]}; put the path of the right one into adapter_config.json",
                where=self.path,
            )

    def require_no_adapter(self, who: str) -> None:
        """For programs that read the folder themselves."""
        if self.is_adapter:
            raise self.error(
                f"{who} is given a whole model, this is an adapter: merge it into its base model (peft: "
                "merge_and_unload, then save_pretrained; kdpipe train: train.export=merged), or take the engine "
                "transformers",
                where=self.path,
            )

    def _from_pretrained(self, auto: Any, place: Path | None = None, **arguments: Any) -> Any:
        """auto.from_pretrained(folder); `auto` is an Auto class."""
        return auto.from_pretrained(
            str(place or self.place), local_files_only=True, trust_remote_code=bool(self.code), **arguments
        )

    def _require_folder(self) -> None:
        if not self.path.is_dir():
            raise self.error("this is not a folder" if self.path.exists() else "no such folder", where=self.path)

    def _require_config(self) -> None:
        if self.is_adapter:
            return self.base._require_config()
        self._require_folder()
        if not (self.path / "config.json").is_file():
            raise self.error("no config.json here; a model folder is one that save_pretrained wrote", where=self.path)
        for path in (*self.path.iterdir(), *self.path.glob("additional_chat_templates/*")):
            if path.is_symlink() and path.suffix in READ and not path.exists():  # transformers takes it for none
                name = path.relative_to(self.path)
                raise self.error(
                    f"{name} is a link to {os.readlink(path)}, which is missing; copy the folder again, or remove it",
                    where=self.path,
                )

    def _require_causal(self, config: Any) -> None:
        """BERT is in transformers' mapping of causal LMs, BertForMaskedLM is not one."""
        mapping, names = AutoModelForCausalLM._model_mapping, tuple(config.architectures or ())
        if type(config) not in mapping or (names and not _is_causal(names, mapping[type(config)].__name__)):
            kind = ", ".join(names) or "no name"
            raise self.error(f"'{config.model_type}' ({kind}) is not a causal LM", where=self.path)

    @contextmanager
    def answering(self, what: str) -> Iterator[None]:
        """Whatever a library raises in the block becomes one line of the folder's error.

        Not a list of types: they change with each version, and a folder's own code may raise anything. BaseException,
        because a panic in tokenizers' Rust code is none of Exception.
        """
        try:
            yield
        except BaseException as err:
            if is_of_others(err):
                raise
            raise self.error(f"{what}: {in_one_line(err)}", where=self.path) from err


def _is_causal(names: tuple[str, ...], mapped: str) -> bool:
    return mapped in names or names[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def in_one_line(err: BaseException) -> str:
    """Class and text of an exception on one line, cut."""
    text = " ".join(f"{type(err).__name__}: {err}".split())
    return text if len(text) <= CAUSE_LENGTH else text[:CAUSE_LENGTH] + " ..."
