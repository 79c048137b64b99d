"""Blocks are found in architectures of every shape, and an error tells why if they are not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_models import tokens
from torch import nn

from reft import ReftConfig, ReftModel, get_reft_model
from reft.model.blocks import block_device, find_blocks

COMMON = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OLD = {"vocab_size": 40, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64}
KV = {"num_key_value_heads": 2, "head_dim": 6}

#: model class -> (configuration class, its arguments, path of the blocks)
MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", {**COMMON, **KV}, "model.layers"),
    "LlamaModel": ("LlamaConfig", {**COMMON, **KV}, "layers"),
    "LlamaForSequenceClassification": ("LlamaConfig", {**COMMON, **KV}, "model.layers"),
    "MistralForCausalLM": ("MistralConfig", {**COMMON, **KV}, "model.layers"),
    "Qwen3ForCausalLM": ("Qwen3Config", {**COMMON, **KV}, "model.layers"),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**COMMON, **KV}, "model.layers"),
    "MixtralForCausalLM": ("MixtralConfig", {**COMMON, **KV}, "model.layers"),
    "GPT2LMHeadModel": ("GPT2Config", OLD, "transformer.h"),
    "GPTJForCausalLM": ("GPTJConfig", {**OLD, "rotary_dim": 2}, "transformer.h"),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", COMMON, "gpt_neox.layers"),
    "OPTForCausalLM": (
        "OPTConfig",
        {**COMMON, "ffn_dim": 32, "word_embed_proj_dim": 24},
        "model.decoder.layers",
    ),
    "BloomForCausalLM": (
        "BloomConfig",
        {"vocab_size": 40, "hidden_size": 24, "n_layer": 3, "n_head": 4},
        "transformer.h",
    ),
    "FalconForCausalLM": ("FalconConfig", COMMON, "transformer.h"),
    "BertForSequenceClassification": ("BertConfig", COMMON, "bert.encoder.layer"),
    "RobertaForSequenceClassification": ("RobertaConfig", COMMON, "roberta.encoder.layer"),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 24, "hidden_dim": 32, "n_layers": 3, "n_heads": 4},
        "distilbert.transformer.layer",
    ),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", COMMON, "deberta.encoder.layer"),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, arguments, _ = MODELS[name]
    config = getattr(transformers, config)(**arguments)
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_edited_and_trained(name):
    base = build(name)
    blocks = find_blocks(base)
    assert (blocks.path, len(blocks.layers), blocks.dim) == (MODELS[name][2], 3, 24)
    # One sequence: the score head of a Llama classifier reads its last token only.
    ids = tokens(1, 7)
    with torch.no_grad():
        expected = base(ids)[0]
    model = get_reft_model(base, ReftConfig(rank=2, positions="f2+l2"))
    seen = []
    blocks.layers[2].register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    out = model(ids)[0]
    assert (out - expected).abs().max() > 1e-4
    seen[0].float().pow(2).sum().backward()
    grads = model.base_model.reft.adapter("default").bias.grad
    assert (grads.flatten(1).abs().amax(1) > 0).tolist() == [True, True, True]


def test_a_composite_model_is_edited_in_its_text_part():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **vision, num_attention_heads=2, image_size=8, patch_size=4
        ),
        text_config=transformers.LlamaConfig(**COMMON, **KV),
        image_token_index=39,
    )
    blocks = find_blocks(transformers.LlavaForConditionalGeneration(config))
    assert blocks.path.endswith("language_model.layers")
    assert blocks.dim == 24


class TestUnknownLayouts:
    class Odd(nn.Module):
        def __init__(self, **config):
            super().__init__()
            self.config = SimpleNamespace(hidden_size=4, num_hidden_layers=2, **config)
            self.left = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.right = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.short = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, input_ids):
            return input_ids

    def test_candidates_are_listed(self):
        with pytest.raises(ValueError) as caught:
            find_blocks(self.Odd())
        text = str(caught.value)
        for words in ("left (2)", "right (2)", "short (1)", "block_path=", "2 have"):
            assert words in text

    def test_a_path_decides(self):
        odd = self.Odd()
        assert find_blocks(odd, "right").layers == tuple(odd.right)
        assert find_blocks(odd, "short").layers == tuple(odd.short)
        model = get_reft_model(odd, ReftConfig(rank=2, block_path="right"))
        assert model.base_model.reft.blocks.path == "right"
        with pytest.raises(ValueError, match=r"block_path must be 'right'.*got 'left'"):
            model.add_adapter("other", ReftConfig(rank=2, block_path="left"))
        model.add_adapter("other", ReftConfig(rank=2))

    def test_a_wrong_path(self):
        says = r"block_path must name a list of modules.*'middle'.*left"
        with pytest.raises(ValueError, match=says):
            find_blocks(self.Odd(), "middle")
        with pytest.raises(ValueError, match="block_path must name a list of modules"):
            find_blocks(self.Odd(), "left.0")

    def test_no_list_fits(self):
        odd = self.Odd()
        odd.config.num_hidden_layers = 7
        with pytest.raises(ValueError, match=r"0 have config\.num_hidden_layers = 7"):
            find_blocks(odd)

    def test_no_width(self):
        odd = self.Odd()
        del odd.config.hidden_size
        with pytest.raises(ValueError, match="hidden_size"):
            find_blocks(odd, "left")

    def test_encoder_decoder(self):
        config = transformers.T5Config(
            vocab_size=40, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=2
        )
        with pytest.raises(ValueError, match="encoder–decoder"):
            find_blocks(transformers.T5ForConditionalGeneration(config))


class Mixer(nn.Module):
    """A block of an unusual build."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)})

    def forward(self, hidden):
        return hidden + self.inner["down"](self.inner["up"](hidden).tanh())


class CustomModel(nn.Module):
    """A model unknown to transformers: it has a config and takes input_ids."""

    def __init__(self, listing=nn.Sequential):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=6)
        self.embed = nn.Embedding(40, 6)
        blocks = [Mixer() for _ in range(3)]
        self.tower = listing(*blocks) if listing is nn.Sequential else listing(blocks)
        self.head = nn.Linear(6, 5)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for block in self.tower:
            hidden = block(hidden)
        return self.head(hidden)


class TestCustomModels:
    @pytest.mark.parametrize("listing", [nn.Sequential, nn.ModuleList])
    @pytest.mark.parametrize("component", ["block_output", "module:inner.down"])
    def test_a_path_of_blocks_and_one_in_them(self, listing, component, tmp_path):
        torch.manual_seed(0)
        base = CustomModel(listing)
        config = ReftConfig(rank=2, positions="l1", component=component, block_path="tower")
        ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
        mask[1, 3:] = 0
        with torch.no_grad():
            expected = base(ids)
            model = get_reft_model(base, config)
            got = model(ids, attention_mask=mask)
            changed = (got != expected).any(-1)
            assert changed.tolist() == [[False] * 4 + [True], [False] * 2 + [True] + [False] * 2]
            with model.disable_adapter():
                assert torch.equal(model(ids), expected)
            model.save_pretrained(tmp_path)
            base = model.unload()
            assert torch.equal(base(ids), expected)
            again = ReftModel.from_pretrained(base, tmp_path)
            torch.testing.assert_close(again(ids, attention_mask=mask), got)
        again.train()
        again.set_adapter("default")
        again(ids).pow(2).sum().backward()
        grads = again.base_model.reft.adapter("default").bias.grad
        assert (grads.flatten(1).abs().amax(1) > 0).all()

    def test_without_a_path(self):
        with pytest.raises(ValueError, match=r'Name the list: ReftConfig\(block_path="…"\)'):
            get_reft_model(CustomModel(), ReftConfig())

    def test_a_list_inside_a_block_is_not_called(self):
        says = (
            r"'module:inner' is no part of block 0, a Mixer.*: module:inner.up, module:inner.down"
        )
        with pytest.raises(ValueError, match=says):
            find_blocks(CustomModel(), "tower").module(0, "module:inner")


class TestSides:
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            # The name of the list does not tell the side.
            self.decoder_layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, inputs_embeds):
            return self.decoder_layers[0](inputs_embeds)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(hidden_size=4, is_encoder_decoder=True)
            self.text_encoder, self.text_decoder = TestSides.Side(), TestSides.Side()
            self.loose = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, input_ids, decoder_input_ids):
            return input_ids

    @pytest.mark.parametrize("side", ["encoder", "decoder"])
    def test_are_told_by_the_module_that_takes_tokens(self, side):
        model = self.Both()
        blocks = find_blocks(model, f"text_{side}.decoder_layers")
        assert (blocks.side, blocks.stack) == (side, getattr(model, f"text_{side}"))

    def test_blocks_outside_both(self):
        with pytest.raises(ValueError, match="'loose', which lie in no module"):
            find_blocks(self.Both(), "loose")

    def test_one_side_alone_is_one_stack(self):
        """Its configuration still has is_encoder_decoder=True."""
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        config = transformers.BartConfig(vocab_size=40, d_model=24, encoder_layers=3, **heads)
        encoder = transformers.BartModel(config).get_encoder()
        assert encoder.config.is_encoder_decoder
        blocks = find_blocks(encoder)
        assert (blocks.path, blocks.side, blocks.stack) == ("layers", "model", encoder)

    @pytest.mark.parametrize("side", ["encoder", "decoder"])
    def test_two_models_as_one(self, side):
        """The list is nested in an encoder inside each model."""
        bert = transformers.BertConfig(**COMMON)
        decoder = transformers.BertConfig(**COMMON, is_decoder=True, add_cross_attention=True)
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, decoder)
        model = transformers.EncoderDecoderModel(config)
        path = {"encoder": "encoder.encoder.layer", "decoder": "decoder.bert.encoder.layer"}[side]
        blocks = find_blocks(model, path)
        assert (blocks.side, blocks.dim, len(blocks.layers)) == (side, 24, 3)
        assert type(blocks.stack) is transformers.BertModel


class TestWrappedByPeft:
    """Paths are those in the model inside PEFT's wrapper."""

    @pytest.mark.parametrize("path", [None, "model.layers"])
    def test_blocks(self, path):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            build("LlamaForCausalLM"), peft.LoraConfig(target_modules=["q_proj"])
        )
        blocks = find_blocks(model, path)
        assert blocks.path == "model.layers" and blocks.stack is model
        assert blocks.layers == tuple(model.get_base_model().model.layers)

    def test_sides(self, tmp_path):
        """An adapter fits the model with and without the wrapper."""
        peft = pytest.importorskip("peft")

        def t5():
            torch.manual_seed(0)
            config = {"vocab_size": 40, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2}
            config = transformers.T5Config(**config, num_heads=4, decoder_start_token_id=0)
            return transformers.T5ForConditionalGeneration(config).eval()

        lora = peft.LoraConfig(target_modules=["q"])
        with pytest.raises(ValueError, match=r'edited: "encoder\.block" or "decoder\.block"'):
            find_blocks(peft.get_peft_model(t5(), lora))
        config = ReftConfig(rank=2, block_path="encoder.block")
        ids = tokens(2, 6)
        call = {"input_ids": ids, "decoder_input_ids": ids}
        with torch.no_grad():
            model = get_reft_model(peft.get_peft_model(t5(), lora), config)
            got = model(**call).logits
            model.save_pretrained(tmp_path)
            again = ReftModel.from_pretrained(t5(), tmp_path)
            # A new LoRA changes nothing.
            torch.testing.assert_close(again(**call).logits, got, rtol=1e-4, atol=1e-5)
            with again.disable_adapter():
                assert (again(**call).logits - got).abs().max() > 1e-4


def test_an_output_of_another_layout_is_refused():
    config = transformers.XLNetConfig(vocab_size=40, d_model=24, n_layer=2, n_head=2, d_inner=32)
    model = get_reft_model(transformers.XLNetLMHeadModel(config), ReftConfig(rank=2))
    with pytest.raises(ValueError, match=r"block 0 must return .* got shape \(9, 2, 24\)"):
        model(tokens(2, 9))


def test_the_device_of_a_blocks_output():
    block = nn.Linear(2, 2, device="meta")
    assert block_device(block) == torch.device("meta")
    block._hf_hook = SimpleNamespace(execution_device="cpu")
    assert block_device(block) == torch.device("cpu")
    assert block_device(nn.Identity()) == torch.device("cpu")
