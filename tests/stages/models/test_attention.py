"""Packed attention: each sample attends to itself, within its window, exactly as transformers' own attention would."""

from itertools import accumulate

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

from kdpipe.stages.feed.packing import PackedBatch
from kdpipe.stages.models.attention import PACKED, packed_attention, use_packed_attention
from kdpipe.stages.models.backbone import packed_hidden

LENGTHS = (5, 23, 1, 37)


def mistral(window: int | None) -> transformers.PreTrainedModel:
    config = transformers.MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def packed(lengths: tuple[int, ...]) -> PackedBatch:
    """Random samples, nothing to learn from them."""
    return PackedBatch(
        input_ids=torch.randint(0, 97, (1, sum(lengths))),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        bounds=(0, *accumulate(lengths)),
        attention_mask=None,
        **dict.fromkeys(("row_positions", "labels", "keys"), torch.zeros(0, dtype=torch.int64)),
        teacher_rows=(),
    )


@pytest.mark.parametrize("window", [None, 8])
@torch.no_grad()
def test_a_window_is_kept_within_each_sample(window: int | None) -> None:
    model = mistral(window)
    samples = [torch.randint(0, 97, (1, length)) for length in LENGTHS]
    alone = torch.cat([model.base_model(ids).last_hidden_state for ids in samples], dim=1)
    use_packed_attention(model, torch.device("cpu"))
    assert model.config._attn_implementation == PACKED
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = model.base_model(torch.cat(samples, dim=1), position_ids=positions, cu_seq_lens_q=bounds).last_hidden_state
    assert (packed - alone).abs().max() <= 2e-6 * alone.abs().max()


def test_no_bound_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for a GPU in every layer."""
    model = mistral(8)
    use_packed_attention(model, torch.device("cpu"))
    batch = packed(LENGTHS)
    for name in ("tolist", "item", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a value was read back"))
    with torch.no_grad():
        packed_hidden(model, batch)


def test_without_bounds_everything_is_one_sample() -> None:
    query, key, value = (torch.randn(1, heads, 9, 8) for heads in (4, 2, 2))
    found, _ = packed_attention(torch.nn.Identity(), query, key, value, None)
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    truth = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(found, truth.transpose(1, 2), atol=1e-6)


def test_a_model_off_sdpa_keeps_its_own_attention() -> None:
    model = mistral(None)
    model.set_attn_implementation("eager")
    use_packed_attention(model, torch.device("cpu"))
    assert model.config._attn_implementation == "eager"


def test_a_compiled_layer_is_compiled_anew_for_no_number_of_samples() -> None:
    """Each compilation takes seconds, and after eight of them torch gives up: two, for one size and for any size."""
    model, found = mistral(None), []
    use_packed_attention(model, torch.device("cpu"))
    for layer in model.model.layers:
        layer.compile(backend="eager")
    counters.clear()
    for lengths in ((9,), (5, 8), (3, 4, 7), (6, 2, 5, 3), (9, 9), (2, 3, 4, 5, 6), (11,)):
        packed_hidden(model, packed(lengths))
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] > 0
    assert found[1:] == [found[1]] * 6
