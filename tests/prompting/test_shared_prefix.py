"""A prefix held once gives what a prefix in every row gives."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lecturekit.prompting.icl import read_shots
from lecturekit.prompting.shared_prefix import shared_prefix


@pytest.fixture(params=[(4, 2), (6, 2), (2, 2), (3, 1)], ids=str)
def llama(request):
    heads, shared_by = request.param
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=8 * heads,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=shared_by,
        max_position_embeddings=96,
    )
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def test_rows_behind_a_shared_prefix_are_those_behind_their_own(llama):
    torch.manual_seed(1)
    prefix, own, more = (torch.randint(0, 61, shape) for shape in ((9,), (3, 5), (3, 2)))
    own_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])  # padded on the left
    place = 9 + (own_mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=llama.config)
    with shared_prefix(llama, read_shots(llama, prefix)):
        first = llama(own, attention_mask=own_mask, position_ids=place, past_key_values=cache).logits
        mask = torch.cat([own_mask, torch.ones(3, 2, dtype=torch.long)], dim=1)
        place = place[:, -1:] + torch.tensor([1, 2])
        second = llama(more, attention_mask=mask, position_ids=place, past_key_values=cache).logits
    assert cache.get_seq_length() == 7  # of the prefix nothing is held in the rows
    for row in range(3):
        real = own[row][own_mask[row].bool()]
        whole = llama(torch.cat([prefix, real, more[row]])[None]).logits[0]
        torch.testing.assert_close(first[row][own_mask[row].bool()], whole[9 : 9 + len(real)])
        torch.testing.assert_close(second[row], whole[9 + len(real) :])


@torch.no_grad()
def test_the_model_is_as_before_also_after_an_error(llama):
    ids = torch.randint(0, 61, (1, 6))
    before, how = llama(ids).logits, llama.config._attn_implementation
    front = read_shots(llama, ids[0])
    with pytest.raises(KeyError), shared_prefix(llama, front):
        raise KeyError
    assert llama.config._attn_implementation == how
    assert torch.equal(llama(ids).logits, before)
    with pytest.raises(RuntimeError, match="in use already"), shared_prefix(llama, front), shared_prefix(llama, front):
        pass
    with shared_prefix(llama, front):  # and is free again
        pass
