"""transformers' continuous batching: an adapter for each request, whatever the chunks."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from batching import (
    ADAPTERS,
    LENGTHS,
    NAMES,
    check,
    config,
    generation,
    make_model,
    one_by_one,
    prompts,
    settings,
    version,
)
from tiny_models import DIM, LAYERS, VOCAB, bert, gpt2, llama
from transformers import CompileConfig, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.generation.continuous_batching import RequestState

from reft import ReftModel, get_reft_model
from reft.model import edit_hook


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def wanted(model):
    return one_by_one(model, prompts(), NAMES)


def calls():
    """Count calls of the operator."""
    return mock.patch.object(edit_hook, "apply_edit", wraps=edit_hook.apply_edit)


def sliding():
    """Blocks that see 16 tokens back beside one that sees all."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"hidden_size": DIM, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    how = {"vocab_size": VOCAB, "sliding_window": 16, "layer_types": kinds, "pad_token_id": 0}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, **how)).eval()


def with_lora():
    """A base in PEFT's wrapper."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(llama(max_position_embeddings=256), lora)


class TestSameAsAlone:
    def test_every_adapter_matters(self, model, wanted):
        bare = one_by_one(model, prompts(), ["__base__"] * len(NAMES))
        for name, ours, theirs in zip(NAMES, wanted, bare, strict=True):
            assert (ours == theirs) == (name == "__base__")

    @pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "apart"])
    @pytest.mark.parametrize("page", [256, 8])
    def test_chunks_of_mixed_requests(self, model, wanted, sharing, page):
        how = settings(page=page, allow_block_sharing=sharing)
        check(model.generate_batch(prompts(), generation(), how, adapter_names=NAMES), wanted)

    def test_whole_prompts_in_one_step(self, model, wanted):
        how = settings(max_batch_tokens=sum(LENGTHS) + 8)
        check(model.generate_batch(prompts(), generation(), how, adapter_names=NAMES), wanted)

    def test_blocks_run_out(self, model):
        # 20 requests of up to 48 tokens in 128 tokens of cache.
        lengths = [40 - at for at in range(20)]
        names = [NAMES[at % len(NAMES)] for at in range(20)]
        how = settings(page=8, num_blocks=16, allow_block_sharing=False, safety_margin=0.0)
        restart = RequestState.create_equivalent_initial_request
        with mock.patch.object(
            RequestState, "create_equivalent_initial_request", autospec=True, side_effect=restart
        ) as evicted:
            got = model.generate_batch(prompts(lengths), generation(), how, adapter_names=names)
        assert evicted.call_count, "no request had to start again"
        check(got, one_by_one(model, prompts(lengths), names))

    def test_scales(self, model):
        names, scales = ["ends", "relu", "ends", "__base__"], [0.5, 2.0, 1.0, 3.0]
        inputs = prompts([30, 12, 40, 9])
        wanted = one_by_one(model, inputs, names, scales=scales)
        how = {"adapter_names": names, "adapter_scales": scales}
        check(model.generate_batch(inputs, generation(), settings(), **how), wanted)

    def test_adapters_of_the_pool(self, model, tmp_path):
        served = ReftModel(make_model(["early"]).unload())
        pooled = [name for name in ADAPTERS if name != "relu"]
        for name in pooled:
            model.save_pretrained(tmp_path / name, adapter_name=name)
            served.pool.add(name, tmp_path / name)
        names = [*pooled, "__base__"]
        inputs = prompts([30 + at for at in range(len(names))])
        for capacity in (64, 2):  # more adapters in a step than the pool holds at once
            served.pool.capacity = capacity
            got = served.generate_batch(
                inputs, generation(), settings(max_batch_tokens=300), adapter_names=names
            )
            check(got, one_by_one(model, inputs, names))
            assert len(served.pool.resident) <= capacity

    def test_without_names_the_active_adapter(self, model):
        inputs = prompts([30, 12])
        got = model.generate_batch(inputs, generation(), settings())
        check(got, one_by_one(model, inputs, ["ends"] * 2))
        with model.disable_adapter():
            got = model.generate_batch(inputs, generation(), settings())
            check(got, one_by_one(model, inputs, ["__base__"] * 2))
        check(
            ReftModel(make_model(["ends"]).unload()).generate_batch(
                inputs, generation(), settings()
            ),
            one_by_one(model, inputs, ["__base__"] * 2),
        )

    def test_several_continuations_of_a_prompt(self, model):
        inputs, names = prompts([40, 30]), ["ends", "untied"]
        how = generation(num_return_sequences=3, do_sample=True, top_k=1)
        got = model.generate_batch(inputs, how, settings(page=8), adapter_names=names)
        wanted = {
            f"req_{at}": tokens for at, (tokens, _) in enumerate(one_by_one(model, inputs, names))
        }
        assert len(got) == (2 if version() < (5, 17) else 6)  # 5.16 returns the first of each
        for request, output in got.items():
            assert output.generated_tokens == wanted[request.partition("__")[0]]

    @pytest.mark.parametrize("make", [gpt2, sliding, with_lora])
    def test_other_bases(self, make):
        model = make_model(["ends", "prompt", "all"], make())
        names = ["ends", "prompt", "all", "__base__"]
        inputs = prompts([30, 20, 40, 25])
        wanted = one_by_one(model, inputs, names)
        for page in (8, 256):
            how = settings(page=page)
            check(model.generate_batch(inputs, generation(), how, adapter_names=names), wanted)


class TestWork:
    def test_decoding_calls_nothing(self, model):
        for steps in (2, 12):
            with calls() as counted:
                how = {"adapter_names": ["ends", "ends"]}
                model.generate_batch(prompts([9, 8]), generation(steps), settings(), **how)
            assert counted.call_count == LAYERS

    def test_one_call_a_block_for_any_mix(self, model):
        names = ["ends", "untied", "prompt", "early", "each", "ends", "__base__"]
        with calls() as counted:
            how = settings(max_batch_tokens=200)
            model.generate_batch(prompts([20] * 7), generation(4), how, adapter_names=names)
        assert counted.call_count == LAYERS

    def test_generated_tokens_only_where_asked(self, model):
        with calls() as counted:
            model.generate_batch(prompts([9]), generation(6), settings(), adapter_names=["some"])
        assert counted.call_count == (1 + 2) * LAYERS


class TestRefused:
    def refused(self, model, message, *args, **named):
        with mock.patch.object(model.get_base_model(), "forward") as forward:
            with pytest.raises(ValueError, match=message):
                model.generate_batch(prompts([5, 6]), generation(), *args, **named)
            assert not forward.called and not model.reft.engines()

    def test_names_and_scales(self, model):
        self.refused(model, "'nobody'", adapter_names=["ends", "nobody"])
        self.refused(model, r"one name per sequence \(2", adapter_names=["ends"])
        self.refused(model, r"one name per sequence \(2", adapter_names="ends")
        self.refused(model, r"one per sequence \(2", adapter_scales=[1.0])
        self.refused(model, "finite", adapter_scales=[1.0, float("nan")])

    def test_positions_that_do_not_follow_from_a_length(self):
        model = make_model(["ends"])
        model.add_adapter("told", config(positions="given"))
        self.refused(model, "'told' has positions \"given\"", adapter_names=["ends", "told"])

    @pytest.mark.parametrize(
        "wrong",
        [
            {"use_cuda_graph": True},
            {"use_cuda_graph": (False, True)},
            {"use_async_batching": True},
            {"varlen_compile_config": CompileConfig()},
            {"decode_compile_config": CompileConfig()},
            {"default_compile_level": 1},
        ],
        ids=lambda wrong: next(iter(wrong)),
    )
    def test_steps_without_the_host(self, model, wrong):
        self.refused(model, f"{next(iter(wrong))} must be left unset", settings(**wrong))

    def test_modules_to_save(self, model):
        both = make_model(["ends", "prompt"])
        both.add_adapter("head", config(modules_to_save=["lm_head"]))
        self.refused(both, "cannot mix adapters", adapter_names=["head", "ends"])

    def test_the_managers_of_the_base(self, model):
        got = model.get_base_model().generate_batch(prompts([5]), generation(), settings())
        assert all("ReftModel.generate_batch" in output.error for output in got.values())

    def test_a_model_that_cannot_generate(self):
        model = get_reft_model(bert(), config(positions="f1"))
        with pytest.raises((TypeError, AttributeError)):
            model.generate_batch([[3, 4]])


class TestAfterwards:
    def test_the_model_is_as_before(self):
        model = make_model()
        base = model.get_base_model()
        model.train()
        base.model.layers[1].eval()
        names = {name for name, module in model.named_modules() if module.training}

        def state():
            hooked = [
                (len(module._forward_hooks), len(module._forward_pre_hooks))
                for module in base.modules()
            ]
            return hooked, base.config._attn_implementation, base.generation_config.to_dict()

        before = state()
        for mistake in ({}, {"adapter_names": ["nobody"] * 2}, {"adapter_names": ["ends", "all"]}):
            try:
                model.generate_batch(prompts([5, 6]), None, settings(), max_new_tokens=3, **mistake)
            except ValueError:
                assert mistake
            assert state() == before
            assert {name for name, module in model.named_modules() if module.training} == names
        assert not model.reft.engines()
        model.eval()
        check(
            model.generate_batch(prompts(), generation(), settings(), adapter_names=NAMES),
            one_by_one(make_model(), prompts(), NAMES),
        )

    def test_the_base_is_free_after_unload(self):
        model = make_model(["ends"])
        model.generate_batch(prompts([9]), generation(), settings(), persistent_manager=True)
        base = model.unload()
        with (
            base.continuous_batching_context_manager(generation()) as manager,
            pytest.raises(RuntimeError, match="detached"),
        ):
            manager.add_request(prompts([9])[0])
        base.destroy_cached_continuous_batching_manager()
        bare = make_model(["ends"])
        wanted = one_by_one(bare, prompts([9]), ["__base__"])
        check(base.generate_batch(prompts([9]), generation(), settings()), wanted)

    def test_a_copy_has_no_engine(self, model):
        with model.continuous_batching_context_manager(generation(), True, None, settings()):
            assert model.reft.engines()
            assert not copy.deepcopy(model).reft.engine_refs


def test_no_requests(model):
    assert model.generate_batch([], generation(), settings(), adapter_names=[]) == {}
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
