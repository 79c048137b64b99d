"""Any mix of adapters in a batch equals each alone, at the cost of one."""

from __future__ import annotations

import pytest
import torch
from served_adapters import LINEAR, MIX, SETTINGS, equal, loaded, logits, random_adapter, served
from tiny_models import LAYERS, gpt2, llama, padded, tokens

from reft import ReftConfig, ReftModel
from reft.io.adapter_files import read_adapter, write_adapter
from reft_kernels.devtools.testing import count_paths


class TestMixedEqualsAlone:
    # GPT-2 counts the positions of a forward from its padding.
    @pytest.mark.parametrize(("make", "side"), [(llama, "left"), (llama, "right"), (gpt2, "right")])
    def test_logits(self, folders, make, side):
        names = ["__base__", *MIX, "untied", "plain", "__base__"]
        lengths = [3 + (5 * at) % 11 for at in range(len(names))]
        ids, mask, singles = padded(lengths, side)
        out = logits(served(folders, make()), ids, attention_mask=mask, adapter_names=names)
        different = set()
        for row, (name, single) in enumerate(zip(names, singles, strict=True)):
            alone = make() if name == "__base__" else loaded(folders, name, make())
            mixed = out[row][mask[row].bool()]
            equal(mixed, logits(alone, single)[0])
            different.add(round(float(mixed.sum()), 4))
        assert len(different) == len(names)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generated_tokens(self, folders, beams):
        names = ["__base__", *MIX]
        ids, mask, singles = padded([3 + (5 * at) % 11 for at in range(len(names))], "left")
        settings = {**SETTINGS, "num_beams": beams}
        out = served(folders).generate(ids, attention_mask=mask, adapter_names=names, **settings)
        for row, (name, single) in enumerate(zip(names, singles, strict=True)):
            alone = llama() if name == "__base__" else loaded(folders, name)
            expected = alone.generate(single, attention_mask=torch.ones_like(single), **settings)
            assert out[row, ids.shape[1] :].tolist() == expected[0, single.shape[1] :].tolist(), (
                name
            )

    def test_a_prompt_in_chunks(self, folders):
        names = [*MIX]
        ids, mask, _ = padded([4 + at for at in range(len(names))], "left")
        model = served(folders)
        whole = model.generate(ids, attention_mask=mask, adapter_names=names, **SETTINGS)
        chunks = model.generate(
            ids, attention_mask=mask, adapter_names=names, prefill_chunk_size=5, **SETTINGS
        )
        assert torch.equal(whole, chunks)

    def test_packed_sequences(self, folders):
        names = ["const", "__base__", "untied", "const", "plain"]
        lengths = [5, 7, 3, 6, 9]
        singles = [tokens(1, length, seed=at) for at, length in enumerate(lengths)]
        places = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        out = logits(
            served(folders),
            torch.cat(singles, 1),
            position_ids=places,
            adapter_names=names,
            use_cache=False,
        )
        for name, single, ours in zip(names, singles, out[0].split(lengths), strict=True):
            alone = llama() if name == "__base__" else loaded(folders, name)
            equal(ours, logits(alone, single)[0])

    def test_beside_adapters_with_parameters(self, folders):
        """Loaded ones and served ones in one batch; the loaded ones may change meanwhile."""
        model = loaded(folders, "plain")
        model.pool.add("untied", folders["untied"])
        model.pool.add("twin", folders["plain"])
        ids = tokens(3, 9)
        names = ["default", "untied", "twin"]
        out = logits(model, ids, adapter_names=names)
        equal(out[0], logits(loaded(folders, "plain"), ids[:1])[0])
        equal(out[1], logits(loaded(folders, "untied"), ids[1:2])[0])
        equal(out[2], logits(loaded(folders, "plain"), ids[2:])[0])
        with torch.no_grad():
            model.reft.adapter("default").bias.add_(1.0)
        after = logits(model, ids, adapter_names=names)
        assert not torch.allclose(after[0], out[0], atol=1e-3)
        assert torch.equal(after[1:], out[1:])
        equal(after[0], logits(model, ids[:1])[0])

    def test_only_the_base(self, folders):
        ids = tokens(2, 6)
        model = served(folders)
        assert torch.equal(logits(model, ids), logits(llama(), ids))
        assert torch.equal(logits(model, ids, adapter_names=["__base__"] * 2), logits(llama(), ids))

    def test_parts_of_an_adapter(self, folders):
        ids = tokens(3, 8)
        out = logits(
            served(folders), ids, adapter_names=["parts"] * 3, subspaces=["one", None, "two"]
        )
        alone = loaded(folders, "parts")
        for row, part in enumerate(["one", None, "two"]):
            equal(out[row], logits(alone, ids[row : row + 1], subspaces=part)[0])

    def test_a_batch_trains_each_as_if_alone(self, folders):
        """Gradients of a mixed batch: the sum of what each sequence gives alone."""
        model = ReftModel(llama())
        chosen = ["plain", "wide", "untied", "steer", "gelu"]
        for name in chosen:
            model.load_adapter(folders[name], name)
            model.reft.adapter(name).requires_grad_(True)
        ids = tokens(len(chosen), 9)
        model(ids, adapter_names=chosen, labels=ids).logits.pow(2).sum().backward()
        for row, name in enumerate(chosen):
            alone = ReftModel.from_pretrained(llama(), folders[name], is_trainable=True).eval()
            single = ids[row : row + 1]
            alone(single, labels=single).logits.pow(2).sum().backward()
            for key, parameter in alone.reft.adapter("default").named_parameters():
                mixed = model.reft.adapter(name).get_parameter(key).grad
                torch.testing.assert_close(mixed, parameter.grad, rtol=2e-4, atol=2e-5)


class TestCost:
    def test_one_call_a_block_and_none_in_decoding(self, folders):
        model = served(folders)
        ids = tokens(len(LINEAR) + 1, 9)
        names = ["__base__", *LINEAR]
        with count_paths() as counts:
            logits(model, ids, adapter_names=names)
        assert counts == {"torch.edit_forward": LAYERS}
        with count_paths() as counts:
            model.generate(ids, adapter_names=names, **SETTINGS)
        assert counts == {"torch.edit_forward": LAYERS}

    def test_a_call_more_for_each_activation(self, folders):
        model = served(folders)
        with count_paths() as counts:
            logits(model, tokens(4, 9), adapter_names=["plain", "gelu", "relu", "wide"])
        assert counts == {"torch.edit_forward": 3 * LAYERS}

    def test_the_number_of_operators_does_not_grow_with_the_adapters(self, tmp_path):
        model = ReftModel(llama())
        for at in range(24):
            model.pool.add(f"a{at}", random_adapter(tmp_path / str(at), at))

        def operators(adapters):
            names = [f"a{at % adapters}" for at in range(24)]
            logits(model, tokens(24, 9), adapter_names=names)  # resident now
            with torch.profiler.profile() as profile:
                logits(model, tokens(24, 9), adapter_names=names)
            return sum(event.count for event in profile.key_averages())

        assert operators(24) <= operators(2) + 4


class TestScale:
    def test_zero_is_the_base_and_one_is_the_adapter(self, folders):
        model, ids = served(folders), tokens(4, 8)
        names = ["plain", "gelu", "plain", "untied"]
        out = logits(model, ids, adapter_names=names, adapter_scales=[0, 0.0, 1, 1.0])
        torch.testing.assert_close(out[:2], logits(llama(), ids[:2]), rtol=0, atol=1e-6)
        equal(out[2:], logits(model, ids[2:], adapter_names=names[2:]))

    @pytest.mark.parametrize("name", ["plain", "untied", "gelu", "steer"])
    @pytest.mark.parametrize("factor", [0.5, -2.0])
    def test_the_edit_times_a_number(self, folders, name, factor, tmp_path):
        """At one block: h + c (h' − h)."""
        single = {**MIX[name], "layers": [LAYERS - 1]}
        config, tensors = read_adapter(folders[name])
        last = {key: value[-1:] for key, value in tensors.items()}
        write_adapter(tmp_path / "last", ReftConfig.from_dict(
            {**config.to_dict(), "layers": single["layers"]}), last)  # fmt: skip
        base = llama()
        model = ReftModel(base)
        model.pool.add("it", tmp_path / "last")
        seen = []
        hook = base.model.norm.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].clone())
        )
        ids = tokens(2, 7)
        for scale in (0, 1, factor):
            logits(model, ids, adapter_names=["it"] * 2, adapter_scales=scale)
        hook.remove()
        plain, whole, part = seen
        assert (whole - plain).abs().max() > 0.1
        torch.testing.assert_close(part, plain + factor * (whole - plain), rtol=1e-4, atol=1e-5)

    def test_in_generation_and_for_loaded_adapters(self, folders):
        model, ids = loaded(folders, "plain"), tokens(2, 8)
        out = model.generate(ids, adapter_scales=0.0, **SETTINGS)
        assert torch.equal(out, llama().generate(ids, **SETTINGS))
        mixed = model.generate(
            ids, adapter_names=["default"] * 2, adapter_scales=[0.0, 1], **SETTINGS
        )
        assert mixed[0].tolist() == out[0].tolist()
        assert mixed[1].tolist() == model.generate(ids[1:], **SETTINGS)[0].tolist()

    def test_gradients_of_a_scaled_adapter(self, folders):
        ids = tokens(2, 8)
        model = ReftModel.from_pretrained(llama(), folders["plain"], is_trainable=True)
        model(ids, adapter_scales=[0.0, 1.0]).logits.pow(2).sum().backward()
        mixed = model.reft.adapter("default").bias.grad.clone()
        model.zero_grad()
        model(ids[1:]).logits.pow(2).sum().backward()
        torch.testing.assert_close(
            mixed, model.reft.adapter("default").bias.grad, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("bad", [[1.0], "half", [1, float("nan")], [True, 1]])
    def test_what_is_no_scale(self, folders, bad):
        model = served(folders)
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="adapter_scales must be"):
                call(tokens(2, 5), adapter_names=["plain", "wide"], adapter_scales=bad)
