"""Generation: the prompt is edited once, wherever it comes from, and decoding is left alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PAD, VOCAB, gpt2, llama, padded, tokens
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from reft import ReftConfig, get_reft_model
from reft.model import edit_hook
from reft.model.forward_inputs import cache_of, past_length


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", "tied": False, **changes})


def strong(base, cfg):
    """A model whose edits are large enough to change which tokens are chosen."""
    torch.manual_seed(3)
    model = get_reft_model(base, cfg)
    adapter = model.base_model.reft.adapter("default")
    with torch.no_grad():
        adapter.bias.add_(torch.randn_like(adapter.bias) * 2)
    return model


def slow_greedy(model, ids, steps):
    """Token by token, a whole forward each, with the edits where the prompt was. One prompt."""
    n = ids.shape[1]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids, prompt_lengths=[n], use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, n:].tolist()


@pytest.fixture
def edits(monkeypatch):
    """Shapes of the hidden states that were handed to the operator."""
    calls = []
    apply_edit = edit_hook.apply_edit

    def counted(hidden, *args, **kwargs):
        calls.append(tuple(hidden.shape))
        return apply_edit(hidden, *args, **kwargs)

    monkeypatch.setattr(edit_hook, "apply_edit", counted)
    return calls


STEPS = 6
LENGTHS = [7, 4, 1]
WAYS = {
    "plain": {},
    "no cache": {"use_cache": False},
    "chunks of 3": {"prefill_chunk_size": 3},
    "static cache": {"cache_implementation": "static"},
    "static chunks": {"cache_implementation": "static", "prefill_chunk_size": 2},
}


@pytest.mark.parametrize("positions", ["f2+l2", "prompt", "l1"])
@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_equal_the_slow_loop(way, positions):
    model = strong(llama(), config(positions=positions))
    ids, mask, singles = padded(LENGTHS, "left")
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        disable_compile=True,
        **WAYS[way],
    )[:, ids.shape[1] :].tolist()
    expected = [slow_greedy(_no_end(model), prompt, STEPS) for prompt in singles]
    assert out == expected
    with model.disable_adapter():
        plain = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False
        )[:, ids.shape[1] :].tolist()
    assert plain != expected


def _no_end(model):
    """``min_new_tokens`` forbids the end token; so does this."""

    def call(*args, **kwargs):
        out = model(*args, **kwargs)
        out.logits[..., 2] = -torch.inf
        return out

    return call


def test_every_token_can_be_edited():
    model = strong(llama(), config(positions="all", tied=True))
    ids = tokens(1, 5)
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    fast = model.generate(ids, **settings)
    slow = ids
    for _ in range(STEPS):
        logits = _no_end(model)(slow, use_cache=False).logits[:, -1]
        slow = torch.cat([slow, logits.argmax(-1, keepdim=True)], dim=1)
    assert fast.tolist() == slow.tolist()


@pytest.mark.parametrize("way", ["plain", "static cache", "chunks of 3", "static chunks"])
def test_decoding_edits_nothing(way, edits):
    model = get_reft_model(llama(), config())
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **WAYS[way]}
    model.generate(tokens(2, 6), disable_compile=True, **settings)
    chunk = settings.get("prefill_chunk_size", 6)
    assert edits == [(2, chunk, 24)] * 3 * (6 // chunk)


def test_editing_everything_edits_while_decoding(edits):
    model = get_reft_model(llama(), config(positions="all", tied=True))
    model.generate(tokens(2, 6), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert edits == [(2, 6, 24)] * 3 + [(2, 1, 24)] * 6


@pytest.mark.parametrize("make", [llama, gpt2])
def test_beams_equal_single_prompts(make):
    model = strong(make(), config())
    ids, mask, singles = padded(LENGTHS, "left")
    settings = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    alone = [model.generate(prompt, **settings)[:, prompt.shape[1] :] for prompt in singles]
    for row, single in enumerate(alone):
        ours = together[2 * row : 2 * row + 2, : single.shape[1]]
        assert ours.tolist() == single.tolist()
    with model.disable_adapter():
        plain = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    assert plain.tolist() != together.tolist()


def test_padding_is_seen_without_a_mask():
    model = strong(llama(), config())
    ids, mask, _ = padded(LENGTHS, "left")
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(ids, **settings), model.generate(ids, attention_mask=mask, **settings)
    )


def test_prompt_lengths_limit_the_prompt():
    model = strong(llama(), config())
    ids = tokens(2, 8)
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True}
    settings["return_dict_in_generate"] = True
    out = model.generate(ids, prompt_lengths=[5, 3], **settings).logits[0]
    with torch.no_grad():
        expected = model(ids, prompt_lengths=[5, 3]).logits[:, -1]
    torch.testing.assert_close(out, expected)
    other = model.generate(ids, **settings).logits[0]
    assert (other - out).abs().max() > 1e-3


def test_embeddings_are_a_prompt_too():
    model = strong(llama(), config())
    ids = tokens(2, 6)
    settings = {"max_new_tokens": 4, "do_sample": False}
    from_ids = model.generate(ids, **settings)[:, 6:]
    embedded = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embedded, **settings).tolist() == from_ids.tolist()


def test_a_conversation_goes_on_from_its_cache():
    model = strong(llama(), config(positions="l2", tied=True))
    ids = tokens(1, 9)
    with torch.no_grad():
        # The first five tokens went through unedited; the prompt's last two are still to come.
        with model.disable_adapter():
            cache = model(ids[:, :5], use_cache=True).past_key_values
        resumed = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        whole = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert resumed.tolist() == whole.tolist()


@pytest.mark.parametrize("name", ["cache", "past_key_values", "what_it_will_be_called"])
def test_a_cache_is_known_whatever_its_name(name):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    assert past_length(cache_of({"input_ids": tokens(1, 1), name: cache})) == 5
    assert past_length(cache_of({"input_ids": tokens(1, 1), name: None})) == 0


def test_a_forward_with_a_cache_is_taken_for_decoding(edits):
    model = get_reft_model(llama(), config(positions="l2", tied=True))
    ids = tokens(1, 8)
    with torch.no_grad():
        first = model(ids[:, :6], use_cache=True)
        edits.clear()
        model(ids[:, 6:], past_key_values=first.past_key_values)
        assert edits == []
        # Unless the caller says where the prompt ends.
        whole = model(ids, use_cache=True).logits
        with model.disable_adapter():
            cache = model(ids[:, :6], use_cache=True).past_key_values
        rest = model(ids[:, 6:], past_key_values=cache, prompt_lengths=[8]).logits
        torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="prompt_lengths must be given"):
        model(ids[:, 6:], past_key_values=first.past_key_values, labels=ids[:, 6:])


def test_a_state_space_model_counts_by_itself():
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}
    base = MambaForCausalLM(
        MambaConfig(**shape, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
    ).eval()
    model = strong(base, config())
    ids = tokens(1, 6)
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 6:].tolist()
    assert out == slow_greedy(_no_end(model), ids, 4)


def test_the_prompt_is_forgotten_afterwards():
    model = get_reft_model(llama(), config())
    ids = tokens(1, 6)
    with torch.no_grad():
        expected = model(tokens(2, 9)).logits
        model.generate(ids, max_new_tokens=2, do_sample=False)
        assert torch.equal(model(tokens(2, 9)).logits, expected)
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(ids, max_new_tokens=0, do_sample=False)
        assert torch.equal(model(tokens(2, 9)).logits, expected)
    assert model.base_model.reft.call.generation is None
