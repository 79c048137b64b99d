"""Models that docs/models.md lists as unsupported, or as in need of a path."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import BERT
from tiny_models import tokens

from reft import ReftConfig, get_reft_model


class TestRefusals:
    """The rows of the table at the end of the page."""

    def test_an_input_that_is_padded_inside(self):
        config = transformers.LongformerConfig(
            **{**BERT, "attention_window": 8, "max_position_embeddings": 66}
        )
        model = get_reft_model(transformers.LongformerModel(config), ReftConfig(rank=2))
        model(tokens(2, 8))
        with pytest.raises(ValueError, match=r"block 0 must return .* got shape \(2, 8, 24\)"):
            model(tokens(2, 7))

    def test_parts_that_are_narrower(self):
        config = transformers.MobileBertConfig(
            **{**BERT, "embedding_size": 24, "intra_bottleneck_size": 16}
        )
        base = transformers.MobileBertModel(config)
        model = get_reft_model(base, ReftConfig(rank=2, component="mlp_output"))
        with pytest.raises(ValueError, match=r"mlp_output of block 0 must return .*\(2, 9, 16\)"):
            model(tokens(2, 9))
        get_reft_model(model.unload(), ReftConfig(rank=2))(tokens(2, 9))

    def test_no_list_of_blocks(self):
        config = transformers.XLMConfig(vocab_size=40, emb_dim=24, n_layers=3, n_heads=4)
        with pytest.raises(ValueError, match=r"cannot tell the blocks of XLMModel.*ffns \(3\)"):
            get_reft_model(transformers.XLMModel(config), ReftConfig(rank=2))

    def test_a_block_that_layers_share(self):
        base = transformers.AlbertModel(transformers.AlbertConfig(**{**BERT, "embedding_size": 8}))
        with pytest.raises(ValueError, match=r"albert_layer_groups \(1\).*block_path="):
            get_reft_model(base, ReftConfig(rank=2))
        config = ReftConfig(rank=2, positions="f1", block_path="encoder.albert_layer_groups")
        model = get_reft_model(base.eval(), config)
        seen: list[torch.Tensor] = []
        model.reft.blocks.layers[0].register_forward_hook(
            lambda module, args, output: seen.append(output.detach().clone())
        )
        ids = tokens(2, 6)
        model(ids)
        edited, seen[:] = list(seen), []
        with model.disable_adapter():
            model(ids)
        assert len(edited) == len(seen) == 3
        changed = (edited[0] != seen[0]).any(-1)
        assert changed.tolist() == [[True] + [False] * 5] * 2

    def test_images_alone(self):
        config = transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
            image_size=8, patch_size=4,
        )  # fmt: skip
        model = get_reft_model(transformers.ViTModel(config), ReftConfig(rank=2))
        with pytest.raises(ValueError, match="must get input_ids or inputs_embeds"):
            model(torch.randn(1, 3, 8, 8))

    @pytest.mark.parametrize("side", ["encoder", "decoder"])
    def test_sound(self, side):
        config = transformers.WhisperConfig(
            vocab_size=40, d_model=24, encoder_layers=2, decoder_layers=2, num_mel_bins=8,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
            decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, max_source_positions=16, max_target_positions=32,
        )  # fmt: skip
        base = transformers.WhisperForConditionalGeneration(config).eval()
        config = ReftConfig(rank=2, positions="prompt", block_path=f"model.{side}.layers")
        if side == "encoder":
            with pytest.raises(ValueError, match=r"lie in no module .* that takes tokens"):
                get_reft_model(base, config)
            return
        model = get_reft_model(base, config)
        call = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens(2, 3)}
        with torch.no_grad():
            edited = model(**call).logits
            with model.disable_adapter():
                assert (model(**call).logits - edited).abs().max() > 1e-4
