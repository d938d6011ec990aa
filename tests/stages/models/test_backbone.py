"""The module whose last hidden state enters the lm_head is found in any model, whatever wraps it."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from kdpipe.stages.models.backbone import backbone, hidden_states

SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = [
    transformers.LlamaConfig(**SIZES),
    transformers.Llama4TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2),
    transformers.OPTConfig(vocab_size=97, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2),
    transformers.GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@torch.no_grad()
def test_its_hidden_states_times_the_head_are_the_logits(config: transformers.PretrainedConfig) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(1, 10)[None]
    hidden = backbone(model)(ids).last_hidden_state
    assert torch.allclose(model.get_output_embeddings()(hidden), model(ids).logits, atol=1e-6)
    wrapped = SimpleNamespace(get_base_model=lambda: model)  # what peft's wrapper offers
    assert backbone(wrapped) is backbone(model)


@torch.no_grad()
def test_hidden_states_are_collected_and_few_rows_become_logits() -> None:
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[0]).eval()
    ids = torch.arange(1, 10)[None]
    whole = model(ids).logits
    with hidden_states(model, keep=3) as found:
        logits = model(ids).logits
    assert torch.equal(found[0], backbone(model)(ids).last_hidden_state)
    torch.testing.assert_close(logits, whole[:, -3:], rtol=1e-5, atol=1e-6)  # a product of fewer rows may sum otherwise
    assert torch.equal(model(ids).logits, whole)
