"""LoRA: which layers an adapter is put on, by every name that they go by, and which adapters can be trained on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.families import make_family
from tests.models import make_adapter, make_model, make_tokenizer
from tests.opened import student_in

from kdpipe.manifests.errors import ConfigError, KdpipeError, StudentError
from kdpipe.manifests.specs import StudentSpec
from kdpipe.stages.models.adapter import inject, own_weights
from kdpipe.stages.student import lora_of, trainable

Shapes = dict[str, torch.Size]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(make_model("llama", tmp_path_factory.mktemp("llama"), vocab_size=300))


def ours(folder: Path, **keys: Any) -> Shapes:
    """Names and shapes of what is trained of a student by these keys."""
    model = student_in(folder)
    lora, skeleton = lora_of(model, StudentSpec(**{"lora_rank": 4} | keys)), model.skeleton()
    assert lora is not None
    inject(skeleton, lora.config)
    return {name: parameter.shape for name, parameter in trainable(skeleton)}


def pefts(folder: Path, config: peft.LoraConfig) -> Shapes:
    """Those of peft's own model."""
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config)
    named = ((name.removeprefix("base_model.model."), p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: parameter.shape for name, parameter in named}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_all_linear_trains_what_it_trains_in_peft(family: str, tmp_path: Path) -> None:
    folder = make_family(family, tmp_path)
    found = ours(folder)
    assert found == pefts(folder, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert found


def test_of_a_mixture_of_experts_the_linear_layers_alone_are_adapted(tmp_path: Path) -> None:
    """Its experts are not linear layers but arrays of all of them, [experts, out, in]."""
    found = ours(make_family("qwen3_moe", tmp_path))
    assert {name.split(".")[4] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_trls_settings_train_the_same_weights(llama: Path) -> None:
    trl = pytest.importorskip("trl")
    theirs = trl.get_peft_config(
        trl.ModelConfig(
            use_peft=True, lora_r=8, lora_alpha=32, lora_dropout=0.05, lora_target_modules=["q_proj", "v_proj"]
        )
    )
    keys = {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "lora_targets": ["q_proj", "v_proj"]}
    assert ours(llama, **keys) == pefts(llama, theirs)
    own = lora_of(student_in(llama), StudentSpec(**keys))
    assert own is not None
    for key in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights"):
        assert getattr(own.config, key) == getattr(theirs, key), key


def test_torchtunes_settings_train_the_same_weights(llama: Path) -> None:
    """lora_attn_modules [q_proj, v_proj, output_proj], apply_lora_to_mlp, apply_lora_to_output, rank 8.

    torchtune's layers are attn.q_proj, attn.v_proj, attn.output_proj, mlp.w1, w2, w3 and output; of a layer
    [out, in] it has lora_a [rank, in] and lora_b [out, rank].
    """
    names = {
        "attn.q_proj": "self_attn.q_proj",
        "attn.v_proj": "self_attn.v_proj",
        "attn.output_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.down_proj",
        "mlp.w3": "mlp.up_proj",
    }
    weights = load_file(llama / "model.safetensors")
    layers = {f"model.layers.{at}.{ours}" for at in range(2) for ours in names.values()} | {"lm_head"}
    expected = {}
    for layer in layers:
        out, width = weights[f"{layer}.weight"].shape
        expected[f"{layer}.lora_A.default.weight"] = torch.Size([8, width])
        expected[f"{layer}.lora_B.default.weight"] = torch.Size([out, 8])
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    assert ours(llama, lora_rank=8, lora_alpha=16, lora_targets=targets, lora_head=True) == expected


def test_frozen_weights_keep_their_names(llama: Path) -> None:
    model = student_in(llama)
    lora, skeleton = lora_of(model, StudentSpec(lora_rank=2, lora_head=True)), model.skeleton()
    assert lora is not None
    inject(skeleton, lora.config)
    assert {name for name, _, _ in own_weights(skeleton)} == set(load_file(llama / "model.safetensors"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_rank": 0, "lora_alpha": 8}, r"student\.lora_alpha: .*with student\.lora_rank"),
        ({"lora_rank": 0, "lora_base_bits": 4}, r"student\.lora_base_bits: .*with student\.lora_rank"),
        ({"lora_targets": ["q_porj"]}, r"'q_porj': no linear layer .*; did you mean 'q_proj'\?.*down_proj"),
        ({"lora_targets": ["output_proj"]}, r"did you mean 'o_proj'\?"),
        ({"lora_targets": ["embed_tokens"]}, "no linear layer"),
    ],
)
def test_keys_that_name_nothing_are_refused(keys: dict[str, Any], words: str, llama: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        ours(llama, **keys)


@pytest.mark.parametrize("keys", [{"lora_head": True}, {"lora_targets": ["q_proj", "lm_head"]}])
def test_an_adapter_on_a_head_that_is_the_embedding_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its output head is its embedding"):
        ours(make_model("qwen2", tmp_path), **keys)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all'"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_not_trained_on(
    settings: dict[str, Any], words: str, llama: Path, tmp_path: Path
) -> None:
    folder = make_adapter(llama, tmp_path, **settings)
    with pytest.raises(StudentError, match=f"an adapter with {words}.* merge it") as caught:
        lora_of(student_in(folder), StudentSpec())
    assert "\n" not in str(caught.value)


def test_settings_beside_an_adapters_own_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student\.lora_dropout: .* is an adapter, which is trained on as it is"):
        lora_of(student_in(make_adapter(llama, tmp_path)), StudentSpec(lora_dropout=0.1))


def _moved(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/away"}))


def _other_base(folder: Path) -> None:
    (folder / "base.json").write_text(json.dumps({"digest": "0" * 64}))


def _short(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors")


def _more(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        weights | {"base_model.model.other.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors"
    )


def _wide(folder: Path) -> None:
    weights = {name: tensor.repeat(2, 2) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors")


def _no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{nope")


def _no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_moved, "base_model_name_or_path is 'gone/away', which is no folder here"),
        (_other_base, "was trained on a base model of the digest 000000000000"),
        (_short, "missing adapter keys"),
        (_more, r"holds .*other\.lora_A.*, which no layer of the base takes"),
        (_wide, "size mismatch"),
        (_no_json, "adapter_config.json cannot be read"),
        (_no_weights, "the adapter does not load"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_adapter_is_one_line(harm: Any, words: str, llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "adapter")
    harm(folder)
    with pytest.raises(KdpipeError, match=words) as caught:
        student_in(folder).examine()
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_an_adapter_is_its_base_with_the_adapter_merged_in(llama: Path, tmp_path: Path) -> None:
    folder, ids = make_adapter(llama, tmp_path), torch.arange(3, 60)[None]
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    theirs = peft.PeftModel.from_pretrained(base, str(folder))(ids).logits
    found = student_in(folder)
    torch.testing.assert_close(found.load(torch.float32, torch.device("cpu"))(ids).logits, theirs, rtol=1e-5, atol=1e-5)
    assert found.tokenizer.get_vocab() == student_in(llama).tokenizer.get_vocab()
    again = shutil.copytree(folder, tmp_path / "copy")
    assert found.digest() == student_in(again).digest()
    assert found.digest() not in (student_in(llama).digest(), student_in(make_adapter(llama, again, seed=1)).digest())


def test_bitsandbytes_is_imported_without_a_word_and_without_asking_a_hub() -> None:
    """Defect: on a CPU with AVX512-BF16 it said that a kernel could not be fetched, with or without 4 bits."""
    pytest.importorskip("bitsandbytes")
    code = (
        "import sys; from pathlib import Path; from kdpipe.manifests.errors import StudentError; "
        "from kdpipe.stages.models.adapter import require_peft; require_peft(StudentError, Path()); "
        "assert 'bitsandbytes' in sys.modules; assert 'kernels' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
