"""Generation that runs other prompts than the one it was given: a negative prompt, a prompt whose
beginning is in a cache, the prompts that Whisper makes. Compared with plain forwards of whole
sequences."""

from __future__ import annotations

import copy

import pytest
import torch
from test_generate import strong
from tiny_models import gpt2, llama, padded, tokens
from transformers import (
    DynamicCache,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from reft import ReftConfig

POSITIONS = ["f2+l2", "l1", "f3", "prompt", "prompt+g2", "all"]
GREEDY = {"do_sample": False, "eos_token_id": None, "output_scores": True}
STEPS = 4


def model_of(positions="f2+l2", base=None, **changes):
    return strong(
        llama() if base is None else base, ReftConfig(rank=3, positions=positions, **changes)
    ).eval()


def scores_of(model, ids, **more):
    settings = {**GREEDY, "max_new_tokens": STEPS, "return_dict_in_generate": True, **more}
    return model.generate(ids, **settings)


def close(got, expected):
    torch.testing.assert_close(torch.stack(list(got)), expected, rtol=1e-3, atol=1e-3)


class TestGuidance:
    SCALE = 1.6

    def by_hand(self, model, ids, negative, call=None, mask=None):
        """Scores of both prompts, each a whole forward that says how long it is."""
        call = {} if call is None else call
        lengths, mask = [ids.shape[1]] * len(ids), mask
        mask = torch.ones_like(negative) if mask is None else mask
        others = mask.sum(1)
        steps = []
        for _ in range(STEPS):
            with torch.no_grad():
                place = (mask.cumsum(1) - 1).clamp(min=0)
                a = model(ids, prompt_lengths=lengths, use_cache=False, **call).logits[:, -1]
                b = model(
                    negative, attention_mask=mask, position_ids=place, prompt_lengths=others,
                    use_cache=False, **call,
                ).logits[:, -1]  # fmt: skip
            a, b = a.log_softmax(-1), b.log_softmax(-1)
            steps.append(self.SCALE * (a - b) + b)
            new = steps[-1].argmax(-1, keepdim=True)
            ids, negative = torch.cat([ids, new], 1), torch.cat([negative, new], 1)
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        return torch.stack(steps)

    @pytest.mark.parametrize("positions", POSITIONS)
    @pytest.mark.parametrize("length", [3, 9, None])
    def test_the_negative_prompt_is_a_prompt(self, positions, length):
        model, ids = model_of(positions), tokens(2, 6)
        negative = ids[:, -1:] if length is None else tokens(2, length, 5)
        more = {} if length is None else {"negative_prompt_ids": negative}
        got = scores_of(model, ids, guidance_scale=self.SCALE, **more)
        close(got.scores, self.by_hand(model, ids, negative))

    @pytest.mark.parametrize("make", [llama, gpt2])
    def test_a_padded_negative_prompt_without_a_cache(self, make):
        model, ids = model_of("f2+l2", make()), tokens(2, 6)
        negative, mask, _ = padded([7, 4], "left", 11)
        got = scores_of(
            model, ids, guidance_scale=self.SCALE, negative_prompt_ids=negative,
            negative_prompt_attention_mask=mask, use_cache=False,
        )  # fmt: skip
        # transformers gives the negative prompt no positions: compare what it ran, step by step.
        with torch.no_grad():
            a = model(ids, use_cache=False).logits[:, -1].log_softmax(-1)
            b = model(negative, attention_mask=mask, use_cache=False).logits[:, -1].log_softmax(-1)
        close(got.scores[:1], (self.SCALE * (a - b) + b)[None])

    def test_adapters_and_scales_are_those_of_the_generation(self):
        model, ids, negative = model_of(), tokens(2, 6), tokens(2, 8, 5)
        model.add_adapter("other", ReftConfig(rank=2, positions="l1", intervention="noreft"))
        call = {"adapter_names": ["other", "default"], "adapter_scales": [2.0, 0.5]}
        got = scores_of(model, ids, guidance_scale=self.SCALE, negative_prompt_ids=negative, **call)
        close(got.scores, self.by_hand(model, ids, negative, call))

    def test_the_setting_of_the_configuration_and_a_processor_of_the_user(self):
        model, ids, negative = model_of(), tokens(1, 6), tokens(1, 8, 5)
        expected = self.by_hand(model, ids, negative)
        settings = copy.deepcopy(model.generation_config)
        settings.update(guidance_scale=self.SCALE, max_new_tokens=STEPS, do_sample=False)
        settings.update(eos_token_id=None, output_scores=True, return_dict_in_generate=True)
        got = model.generate(ids, generation_config=settings, negative_prompt_ids=negative)
        close(got.scores, expected)
        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(
            self.SCALE, model.get_base_model(), unconditional_ids=negative
        )
        close(scores_of(model, ids, logits_processor=[guidance]).scores, expected)
        assert guidance.model is model.get_base_model()  # the user's own is as it was

    def test_the_processor_keeps_its_place_among_others(self):
        """Guidance comes before the penalty on repetition, as in the base."""
        model, ids, negative = model_of(), tokens(1, 6), tokens(1, 8, 5)
        with model.disable_adapter():
            more = {"guidance_scale": 1.6, "negative_prompt_ids": negative}
            got = scores_of(model, ids, repetition_penalty=1.8, **more)
            base = model.get_base_model()
            expected = scores_of(base, ids, repetition_penalty=1.8, **more)
        close(got.scores, torch.stack(list(expected.scores)))

    def test_one_list_of_tokens_cannot_name_those_of_two_prompts(self):
        model, ids = model_of("given"), tokens(1, 6)
        call = {"guidance_scale": 1.5, "negative_prompt_ids": tokens(1, 3, 5)}
        with pytest.raises(ValueError, match="must be a function of"):
            scores_of(model, ids, edit_positions=[[0]], **call)

        def ends(ids, mask):
            return [[0, -1]] * len(ids)

        got = scores_of(model, ids, edit_positions=ends, **call)
        same = model_of("f1+l1")
        same.reft.adapter("default").load_state_dict(model.reft.adapter("default").state_dict())
        close(got.scores, torch.stack(list(scores_of(same, ids, **call).scores)))

    def test_nothing_is_left_behind(self):
        model, ids = model_of(), tokens(1, 6)
        before = scores_of(model, ids).sequences.tolist()
        scores_of(model, ids, guidance_scale=1.5)
        assert model.reft.call.generation is None
        assert scores_of(model, ids).sequences.tolist() == before


def fill(model, ids, way):
    with torch.no_grad():
        if way == "the base":
            with model.disable_adapter():
                return model(ids, use_cache=True).past_key_values
        if way == "a static cache":
            cache = StaticCache(config=model.config, max_cache_len=40)
            return model(ids, past_key_values=cache, use_cache=True).past_key_values
        if way == "two forwards":
            cache = model(ids[:, :2], use_cache=True).past_key_values
            more = {"past_key_values": cache, "prompt_lengths": [ids.shape[1]] * len(ids)}
            return model(ids[:, 2:], **more, use_cache=True).past_key_values
        if way == "another adapter":
            names = ["other"] * len(ids)
            return model(ids, adapter_names=names, use_cache=True).past_key_values
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True)
        return copy.deepcopy(cache) if way == "a copy" else cache


FILLED = ["the model", "the base", "a copy", "two forwards", "another adapter", "a static cache"]


class TestFilledCache:
    @pytest.mark.parametrize("positions", POSITIONS)
    @pytest.mark.parametrize("way", FILLED)
    def test_the_whole_prompt_is_edited_as_without_it(self, positions, way):
        model, ids = model_of(positions), tokens(2, 11)
        model.add_adapter("other", ReftConfig(rank=2, positions="f1+l1"))
        expected = scores_of(model, ids)
        for prefix in (3, 7, 10):
            cache = fill(model, ids[:, :prefix], way)
            try:
                got = scores_of(model, ids, past_key_values=cache)
            except ValueError as error:  # 5.17 of transformers cannot, 5.24 can
                assert way == "a static cache" and "cannot be shortened" in str(error)
                assert not hasattr(cache.layers[0], "crop")
                continue
            assert got.sequences.tolist() == expected.sequences.tolist()
            close(got.scores, torch.stack(list(expected.scores)))

    def test_what_agrees_is_not_read_again(self):
        """Only the columns from the last edited tokens of a cached beginning are read again."""
        read = []
        for positions, columns in (("f2", 4), ("f2+l2", 6), ("prompt", 4), ("l3", 7)):
            model, ids = model_of(positions), tokens(1, 11)
            cache = fill(model, ids[:, :7], "the model")
            handle = model.base_model.model.layers[0].register_forward_pre_hook(
                lambda module, args: read.append(args[0].shape[1])
            )
            read.clear()
            scores_of(model, ids, past_key_values=cache)
            handle.remove()
            assert read[0] == columns

    @pytest.mark.parametrize("positions", POSITIONS)
    def test_a_chat_goes_on(self, positions):
        """The second turn, on the cache that the first has left."""
        model, ids = model_of(positions), tokens(1, 7)
        first = scores_of(model, ids)
        turn = torch.cat([first.sequences, tokens(1, 5, 9)], dim=1)
        got = scores_of(model, turn, past_key_values=first.past_key_values)
        close(got.scores, torch.stack(list(scores_of(model, turn).scores)))

    def test_one_beginning_for_several_prompts(self):
        model, start = model_of("f2+l2"), tokens(1, 6)
        ids = torch.cat([start.expand(3, -1), tokens(3, 4, 8)], dim=1)
        expected = scores_of(model, ids)
        cache = fill(model, start, "the model")
        cache.batch_repeat_interleave(3)
        got = scores_of(model, ids, past_key_values=cache)
        close(got.scores, torch.stack(list(expected.scores)))
        # And again, cut back to the beginning by hand.
        cache.crop(6 - cache.get_seq_length())
        got = scores_of(model, ids.flip(0), past_key_values=cache)
        close(got.scores, torch.stack(list(expected.scores)).flip(1))

    def test_the_base_on_an_edited_cache(self):
        model, ids = model_of("f2+l2"), tokens(1, 11)
        cache = fill(model, ids[:, :7], "the model")
        with model.disable_adapter():
            expected = scores_of(model, ids)
            got = scores_of(model, ids, past_key_values=cache)
        close(got.scores, torch.stack(list(expected.scores)))

    def test_new_tokens_alone_where_they_must_be_read_again(self):
        model, ids = model_of("l2"), tokens(1, 11)
        cache = fill(model, ids[:, :7], "the model")
        with pytest.raises(ValueError, match=r"from column 5 on, this cache .*: give all tokens"):
            scores_of(model, ids[:, 7:], attention_mask=torch.ones_like(ids), past_key_values=cache)
        assert cache.get_seq_length() == 7
        usable = fill(model, ids[:, :7], "the base")
        got = scores_of(
            model, ids[:, 7:], attention_mask=torch.ones_like(ids), past_key_values=usable
        )
        close(got.scores, torch.stack(list(scores_of(model, ids).scores)))

    def test_a_full_sliding_window_cannot_be_shortened(self):
        config = MistralConfig(
            vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=4, pad_token_id=0,
            initializer_range=0.2,
        )  # fmt: skip
        torch.manual_seed(0)
        model, ids = model_of("l2", MistralForCausalLM(config).eval()), tokens(1, 9)
        cache = fill(model, ids[:, :6], "the model")
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(ValueError, match=r"from column 4 on, .* cannot be shortened"):
            scores_of(model, ids, past_key_values=cache)
        assert all(map(torch.equal, before, (layer.keys for layer in cache.layers)))
        short = fill(model, ids[:, :3], "the model")
        got = scores_of(model, ids, past_key_values=short)
        close(got.scores, torch.stack(list(scores_of(model, ids).scores)))


def whisper(positions):
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=60, d_model=24, encoder_layers=1, decoder_layers=2, num_mel_bins=8,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_source_positions=16, max_target_positions=32, init_std=0.3,
    )  # fmt: skip
    base = WhisperForConditionalGeneration(config).eval()
    settings = GenerationConfig(
        decoder_start_token_id=1, pad_token_id=0, eos_token_id=2, bos_token_id=1, max_length=14
    )
    settings.is_multilingual, settings.lang_to_id = True, {"<|en|>": 3}
    settings.task_to_id, settings.no_timestamps_token_id = {"transcribe": 5}, 40
    settings.alignment_heads = settings.suppress_tokens = settings.begin_suppress_tokens = None
    settings.forced_decoder_ids = None
    base.generation_config = settings
    torch.manual_seed(5)
    changes = {"block_path": "model.decoder.layers", "rank": 4}
    return strong(base, ReftConfig(positions=positions, **changes)).eval()


SPEECH = {"language": "en", "task": "transcribe", "return_timestamps": True}


class TestWhisper:
    def transcribe(self, model, sound, lengths, **more):
        mask = (torch.arange(sound.shape[2]) < torch.tensor(lengths)[:, None]).long()
        with torch.no_grad():
            out = model.generate(sound, attention_mask=mask, **SPEECH, **more)
        return [[token for token in row if token] for row in out.tolist()]

    @pytest.mark.parametrize("positions", ["prompt", "l2", "prompt+g2", "all"])
    def test_recordings_that_leave_the_batch(self, positions):
        model = whisper(positions)
        torch.manual_seed(1)
        sound, lengths = torch.randn(3, 8, 64), [64, 48, 32]
        batch = self.transcribe(model, sound, lengths)
        assert len({len(row) for row in batch}) > 1
        for row, length in enumerate(lengths):
            with model.disable_adapter():
                whole = self.transcribe(model, sound, lengths)[row]
                alone = self.transcribe(model, sound[row : row + 1], [length])[0]
            if whole == alone:  # the base itself depends on what is beside a recording
                alone_text = self.transcribe(model, sound[row : row + 1], [length])[0]
                assert alone_text == batch[row]

    def test_the_decoder_prompt_is_the_one_that_is_run(self):
        """Start, language, task: three tokens, of which "l1" edits the last, in a plain forward."""
        model = whisper("l1")
        torch.manual_seed(2)
        sound = torch.randn(1, 8, 32)
        rows = []
        layer = model.get_base_model().model.decoder.layers[0]
        handle = layer.register_forward_hook(lambda module, args, output: rows.append(output[0]))
        self.transcribe(model, sound, [32])
        with model.disable_adapter():
            edited = rows[0].clone()
            rows.clear()
            self.transcribe(model, sound, [32])
        handle.remove()
        changed = (edited - rows[0]).abs().amax(-1).reshape(-1) > 1e-4
        assert changed.tolist() == [False] * (len(changed) - 1) + [True]
        assert len(changed) == 3

    def test_what_differs_from_recording_to_recording(self):
        model = whisper("prompt")
        model.add_adapter("other", ReftConfig(rank=2, block_path="model.decoder.layers"))
        sound = torch.randn(2, 8, 32)
        with pytest.raises(ValueError, match="adapter_names must be the same"):
            self.transcribe(model, sound, [32, 32], adapter_names=["other", "default"])
        with pytest.raises(ValueError, match="prompt_lengths cannot be given"):
            self.transcribe(model, sound, [32, 32], prompt_lengths=[1, 1])
        named = self.transcribe(model, sound, [32, 32], adapter_names=["other", "other"])
        model.set_adapter("other")
        assert self.transcribe(model, sound, [32, 32]) == named
