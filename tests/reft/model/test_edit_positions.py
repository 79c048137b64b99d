"""Positions that each call names, those of images, and the first generated tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PAD, edited_rows_of, llama, padded, tokens
from transformers import LlavaConfig, LlavaForConditionalGeneration

from reft import ReftConfig, ReftModel, get_reft_model
from reft.model.edit_positions import given_columns
from reft.model.prompts import PromptSpans, find_prompt

LENGTHS = [8, 5, 3]
STEPS = 4


def model_of(positions="given", base=llama, **changes):
    torch.manual_seed(3)
    model = get_reft_model(base(), ReftConfig(rank=3, positions=positions, **changes))
    adapter = model.reft.adapter("default")
    with torch.no_grad():
        adapter.bias.add_(torch.randn_like(adapter.bias) * 2)
    return model


def edited(model, **call):
    """(row, column) of every hidden vector that the first block's edit changes."""
    seen = []

    def look(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handle = model.base_model.model.layers[0].register_forward_hook(look)
    with torch.no_grad():
        model(**call)
        with model.disable_adapter():
            model(**{name: value for name, value in call.items() if name != "edit_positions"})
    handle.remove()
    changed = (seen[0] != seen[1]).any(-1)
    return {(row, column) for row, column in changed.nonzero().tolist()}


@pytest.mark.parametrize("side", ["left", "right"])
class TestForms:
    """Each form of the argument names the same tokens, with padding on either side."""

    wanted = ((0, 1, 7), (4,), ())

    def places(self, side):
        width = max(LENGTHS)
        starts = [width - n if side == "left" else 0 for n in LENGTHS]
        return {(row, starts[row] + t) for row, these in enumerate(self.wanted) for t in these}

    def check(self, side, said):
        ids, mask, _ = padded(LENGTHS, side)
        call = {"input_ids": ids, "attention_mask": mask, "edit_positions": said}
        assert edited(model_of(), **call) == self.places(side)

    def test_lists(self, side):
        self.check(side, [[0, 1, 7], [4], []])
        self.check(side, [[0, 1, -1], [-1], []])
        self.check(side, [[1, 0, 7, 0], [4, -1], []])  # each token once

    def test_numbers_in_a_tensor(self, side):
        self.check(side, torch.tensor([[7, 1, 0], [-1, 4, -1], [-1, -1, -1]]))

    def test_a_mask(self, side):
        mask = torch.zeros(3, 8, dtype=torch.bool)
        for place in self.places(side):
            mask[place] = True
        self.check(side, mask)

    def test_a_function(self, side):
        def first_and_last(ids, mask):
            assert ids.shape == mask.shape == (3, 8)
            return [[0, 1, -1], [-1], []]

        self.check(side, first_and_last)


def test_it_goes_before_the_configuration():
    model = model_of("f1")
    call = {"input_ids": tokens(1, 6)}
    assert edited(model, **call) == {(0, 0)}
    assert edited(model, **call, edit_positions=[[2, 3]]) == {(0, 2), (0, 3)}


def test_packed_sequences():
    ids, position = tokens(1, 7), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    call = {"input_ids": ids, "position_ids": position}
    assert edited(model_of(), **call, edit_positions=[[1, -1], [0]]) == {(0, 1), (0, 3), (0, 4)}
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[0, 2:5] = True
    assert edited(model_of(), **call, edit_positions=mask) == {(0, 2), (0, 3), (0, 4)}


def test_a_mask_and_several_adapters():
    model = model_of("f1")
    model.add_adapter("other", ReftConfig(rank=2, positions="l1"))
    call = {"input_ids": tokens(3, 4), "adapter_names": ["other", "__base__", "default"]}
    assert edited(model, **call) == {(0, 3), (2, 0)}
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 1] = True
    assert edited(model, **call, edit_positions=mask) == {(0, 1), (2, 1)}
    assert edited(model, **call, edit_positions=[[2], [2], [2]]) == {(0, 2), (2, 2)}


BAD = {
    "missing": (None, "every call has to name"),
    "one list": ([1, 2], "a list of token numbers for each sequence"),
    "text": ("f1", "a list of token numbers for each sequence"),
    "too few lists": ([[1]], r"one list a sequence \(2 of them\), got 1"),
    "fractions": ([[0.5], []], "must be integers, got 0.5"),
    "truth": ([[True], []], "must be integers, got True"),
    "too large": ([[0], [6]], "sequence 1 has 6 tokens, 6 of them prompt, got 6"),
    "too far back": ([[-7], [0]], "sequence 0 has 6 tokens, 6 of them prompt, got -7"),
    "a negative in a tensor": (torch.tensor([[-2], [0]]), "at least 0, got -2"),
    "a vector": (torch.tensor([1, 2]), r"\(sequences, tokens\), 2 sequences; got shape \(2,\)"),
    "floats": (torch.ones(2, 1), "integers or booleans, got torch.float32"),
    "a short mask": (torch.ones(2, 5, dtype=torch.bool), r"\(2, 6\); got \(2, 5\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    value, says = BAD[case]
    with pytest.raises((ValueError, TypeError), match=says):
        model_of()(tokens(2, 6), edit_positions=value)


def test_two_sets_of_weights_are_refused():
    model = model_of("f1+l1", tied=False)
    with pytest.raises(ValueError, match="edit_positions need one set of weights"):
        model(tokens(1, 6), edit_positions=[[1]])


def slow(model, ids, given, steps, beyond=0):
    """Greedy tokens, a whole forward each, with the prompt's edits where they were."""
    n = ids.shape[1]
    for step in range(steps):
        numbers = [*given, *range(n, n + min(step, beyond))]
        with torch.no_grad():
            logits = model(ids, edit_positions=[numbers], use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, n:].tolist()


WAYS = {
    "plain": {},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 3},
    "static cache": {"cache_implementation": "static"},
    "static chunks": {"cache_implementation": "static", "prefill_chunk_size": 3},
}


def greedy(model, ids, mask, **how):
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
        disable_compile=True, **how,
    )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["lists", "mask", "function"])
def test_generate(way, form):
    model = model_of()
    ids, mask, singles = padded(LENGTHS, "left")
    given = [[0, 3, -2], [-1], [1, 2]]
    numbers = [[0, 3, 6], [4], [1, 2]]
    said = given
    if form == "mask":
        said = torch.zeros_like(mask, dtype=torch.bool)
        for row, (n, these) in enumerate(zip(LENGTHS, numbers, strict=True)):
            said[row, [8 - n + t for t in these]] = True
    elif form == "function":
        said = lambda ids, mask: given  # noqa: E731
    expected = [slow(model, single, t, STEPS) for single, t in zip(singles, numbers, strict=True)]
    assert greedy(model, ids, mask, edit_positions=said, **WAYS[way]) == expected
    assert greedy(model, ids, mask, edit_positions=[[], [], []]) != expected


def test_beams_repeat_them():
    model = model_of()
    ids, mask, singles = padded(LENGTHS, "left")
    given = [[0, -1], [2], [1]]
    how = {"num_beams": 2, "num_return_sequences": 2}
    together = greedy(model, ids, mask, edit_positions=given, **how)
    for row, single in enumerate(singles):
        alone = greedy(model, single, None, edit_positions=[given[row]], **how)
        assert together[2 * row : 2 * row + 2] == alone


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("more", [1, 2, 9])
def test_the_first_generated_tokens(way, more):
    model = model_of(f"prompt+g{more}")
    ids, mask, singles = padded(LENGTHS, "left")
    plain = model_of("given")
    expected = [slow(plain, single, range(single.shape[1]), STEPS, more) for single in singles]
    assert greedy(model, ids, mask, **WAYS[way]) == expected
    assert greedy(model_of("prompt"), ids, mask) != expected


def test_generated_tokens_in_training():
    """Tokens behind the prompt count as generated."""
    ids = tokens(2, 7)
    call = {"input_ids": ids, "prompt_lengths": [3, 5]}
    assert edited(model_of("prompt+g1"), **call) == {(0, t) for t in range(4)} | {
        (1, t) for t in range(6)
    }
    config = ReftConfig(positions="prompt+g2", prompt_end="second_to_last")
    prompt = PromptSpans(torch.tensor([1]), torch.tensor([3]))
    (rows,) = edited_rows_of(config, prompt, 8)
    assert rows.tolist() == [-1, 1, 2, -1, 4, 5, -1, -1]


def test_a_cache_does_not_tell_what_was_generated():
    model = model_of("prompt+g2")
    ids = tokens(1, 6)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="prompt_lengths must be given"):
            model(ids[:, 4:], past_key_values=cache)
        model(ids[:, 4:], past_key_values=cache, prompt_lengths=[4])


IMAGE = 39


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=PAD, initializer_range=0.2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


class TestImages:
    def batch(self):
        ids = tokens(2, 9).clamp(max=IMAGE - 1)
        ids[0, 2:6] = ids[1, 4:8] = IMAGE
        torch.manual_seed(1)
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}

    def test_their_tokens_are_edited(self):
        model = model_of("image", llava)
        batch = self.batch()
        with torch.no_grad():
            got = model(**batch).logits
            explicit = model(**batch, edit_positions=batch["input_ids"] == IMAGE).logits
            with model.disable_adapter():
                base = model(**batch).logits
        assert torch.equal(got, explicit)
        assert torch.equal(got[0, :2], base[0, :2]) and torch.equal(got[1, :4], base[1, :4])
        assert (got[0, 2:] - base[0, 2:]).abs().max() > 1e-3

    def test_generate(self):
        model = model_of("image", llava)
        batch = self.batch()
        how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        got = model.generate(**batch, **how)
        ids = batch["input_ids"]
        for _ in range(4):
            with torch.no_grad():
                call = {**batch, "input_ids": ids}
                logits = model(**call, edit_positions=ids == IMAGE, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        assert got.tolist() == ids.tolist()
        with model.disable_adapter():
            assert model.generate(**batch, **how).tolist() != ids.tolist()

    def test_save_and_load(self, tmp_path):
        model = model_of("image", llava)
        model.save_pretrained(tmp_path)
        again = ReftModel.from_pretrained(llava(), tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(again(**self.batch()).logits, model(**self.batch()).logits)

    def test_a_model_without_images(self):
        with pytest.raises(ValueError, match="no image_token_id"):
            model_of("image")

    def test_embeddings_do_not_tell(self):
        model = model_of("image", llava)
        with pytest.raises(ValueError, match="got inputs_embeds only"):
            model(inputs_embeds=torch.randn(1, 5, 24))


def test_numbers_on_a_device_are_not_read(monkeypatch):
    """Numbers outside a sequence edit nothing where the host does not read them, as on a device."""
    for module in ("prompts", "edit_positions"):
        monkeypatch.setattr(f"reft.model.{module}.visible", lambda tensor: False)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    prompt = find_prompt(2, 5, torch.device("cpu"), attention_mask=mask, prompt_lengths=[2, 4])
    columns = given_columns([[0, 3, -1, 1], [4, -5, 3]], prompt, (2, 5))
    assert [sorted(row) for row in columns.tolist()] == [[-1, -1, 2, 3], [-1, -1, -1, 3]]
