"""Adapters that are served: any mix in a batch equals each alone, few are on the device, what is
replaced is gone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import DIM, LAYERS, gpt2, llama, padded, tokens

from reft import ReftConfig, ReftModel
from reft.model.checkpoint import read_adapter, write_adapter
from reft.nn.bank import Bank
from reft.serving.stored import read_stored, stored
from reft_kernels.testing import count_paths

MIX = {
    "plain": {"rank": 3},
    "wide": {"rank": 8, "layers": [0, 2]},
    "untied": {"rank": 2, "tied": False},
    "apart": {"rank": 2, "tied": False, "untied_by": "position", "layers": [1]},
    "paper": {"rank": 2, "positions": "f3+l4", "short_prompts": "paper"},
    "early": {"rank": 1, "positions": "l2", "prompt_end": "second_to_last"},
    "steer": {"intervention": "lobireft", "rank": 1, "positions": "l1"},
    "const": {"intervention": "consreft", "rank": 2, "positions": "prompt"},
    "free": {"intervention": "noreft", "rank": 5, "positions": "f3", "layers": [2]},
    "gelu": {"rank": 4, "activation": "gelu"},
    "relu": {"intervention": "direft", "activation": "relu", "rank": 2, "positions": "f2"},
    "bf16": {"rank": 2, "positions": "l1", "dtype": "bfloat16"},
    "parts": {"rank": 4, "subspaces": {"one": [0, 1], "two": [2, 3]}},
    "mlp": {"rank": 2, "component": "mlp_output"},
}
#: Those without an activation, at the output of blocks.
LINEAR = [name for name in MIX if name not in ("gelu", "relu", "mlp")]
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def random_adapter(path, seed, *, dim=DIM, blocks=LAYERS, **changes):
    """A folder with an adapter whose every term shows in the output."""
    config = ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})
    random = torch.Generator().manual_seed(seed)
    bank = Bank(config, config.resolve_layers(blocks), dim, generator=random)
    with torch.no_grad():
        for name, parameter in bank.named_parameters():
            step = torch.randn(parameter.shape, generator=random)
            parameter.add_(step, alpha=0.5 if name == "bias" else 0.1)
    write_adapter(path, config, bank.published_state())
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: random_adapter(root / name, seed, **changes)
        for seed, (name, changes) in enumerate(MIX.items())
    }


def served(folders, base=None, names=tuple(MIX)):
    model = ReftModel(llama() if base is None else base)
    for name in names:
        model.pool.add(name, folders[name])
    return model


def loaded(folders, name, base=None):
    """The adapter alone, on a base of its own."""
    return ReftModel.from_pretrained(llama() if base is None else base, folders[name])


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits


def equal(ours, alone):
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


class TestMixedEqualsAlone:
    # GPT-2 counts the positions of a forward from its padding.
    @pytest.mark.parametrize(("make", "side"), [(llama, "left"), (llama, "right"), (gpt2, "right")])
    def test_logits(self, folders, make, side):
        names = ["__base__", *MIX, "untied", "plain", "__base__"]
        lengths = [3 + (5 * at) % 11 for at in range(len(names))]
        ids, mask, singles = padded(lengths, side)
        out = logits(served(folders, make()), ids, attention_mask=mask, adapter_names=names)
        different = set()
        for row, (name, one) in enumerate(zip(names, singles, strict=True)):
            alone = make() if name == "__base__" else loaded(folders, name, make())
            mine = out[row][mask[row].bool()]
            equal(mine, logits(alone, one)[0])
            different.add(round(float(mine.sum()), 4))
        assert len(different) == len(names)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generated_tokens(self, folders, beams):
        names = ["__base__", *MIX]
        ids, mask, singles = padded([3 + (5 * at) % 11 for at in range(len(names))], "left")
        settings = {**SETTINGS, "num_beams": beams}
        out = served(folders).generate(ids, attention_mask=mask, adapter_names=names, **settings)
        for row, (name, one) in enumerate(zip(names, singles, strict=True)):
            alone = llama() if name == "__base__" else loaded(folders, name)
            expected = alone.generate(one, attention_mask=torch.ones_like(one), **settings)
            assert out[row, ids.shape[1] :].tolist() == expected[0, one.shape[1] :].tolist(), name

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
        for name, one, ours in zip(names, singles, out[0].split(lengths), strict=True):
            alone = llama() if name == "__base__" else loaded(folders, name)
            equal(ours, logits(alone, one)[0])

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
            model.reft.bank("default").bias.add_(1.0)
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
            model.reft.bank(name).requires_grad_(True)
        ids = tokens(len(chosen), 9)
        model(ids, adapter_names=chosen, labels=ids).logits.pow(2).sum().backward()
        for row, name in enumerate(chosen):
            alone = ReftModel.from_pretrained(llama(), folders[name], is_trainable=True).eval()
            one = ids[row : row + 1]
            alone(one, labels=one).logits.pow(2).sum().backward()
            for key, parameter in alone.reft.bank("default").named_parameters():
                mine = model.reft.bank(name).get_parameter(key).grad
                torch.testing.assert_close(mine, parameter.grad, rtol=2e-4, atol=2e-5)


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
    def test_the_edit_times_a_number(self, folders, name, factor):
        """At one block: h + c (h' − h)."""
        one = {**MIX[name], "layers": [LAYERS - 1]}
        config, tensors = read_adapter(folders[name])
        last = {key: value[-1:] for key, value in tensors.items()}
        write_adapter(folders[name].parent / f"last-{name}", ReftConfig.from_dict(
            {**config.to_dict(), "layers": one["layers"]}), last)  # fmt: skip
        base = llama()
        model = ReftModel(base)
        model.pool.add("it", folders[name].parent / f"last-{name}")
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
        mine = model.reft.bank("default").bias.grad.clone()
        model.zero_grad()
        model(ids[1:]).logits.pow(2).sum().backward()
        torch.testing.assert_close(mine, model.reft.bank("default").bias.grad, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("bad", [[1.0], "half", [1, float("nan")], [True, 1]])
    def test_what_is_no_scale(self, folders, bad):
        model = served(folders)
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="adapter_scales must be"):
                call(tokens(2, 5), adapter_names=["plain", "wide"], adapter_scales=bad)


class TestResidency:
    def test_thousands_are_known_and_few_are_on_the_device(self, tmp_path):
        model = ReftModel(llama())
        model.pool.capacity = 16
        config, tensors = read_adapter(random_adapter(tmp_path / "first", 0, rank=1))
        for at in range(2000):
            changed = {**tensors, "bias": tensors["bias"] + at}
            write_adapter(tmp_path / "now", config, changed)
            model.pool.add(f"user-{at}", tmp_path / "now")
        assert len(model.pool) == 2000
        alone = ReftModel(llama())
        random = torch.Generator().manual_seed(0)
        ids, largest = tokens(8, 7), 0
        for _ in range(20):
            users = torch.randint(0, 2000, (8,), generator=random).tolist()
            out = logits(model, ids, adapter_names=[f"user-{at}" for at in users])
            for row in (0, 7):
                write_adapter(
                    tmp_path / "now", config, {**tensors, "bias": tensors["bias"] + users[row]}
                )
                alone.load_adapter(tmp_path / "now", "it")
                alone.set_adapter("it")
                equal(out[row], logits(alone, ids[row : row + 1])[0])
                alone.delete_adapter("it")
            assert len(model.pool.resident) <= 16
            largest = max(largest, model.pool.resident_nbytes)
        entry = LAYERS * (2 * DIM + 1) * 4
        assert largest == 16 * entry

    def test_the_least_recently_used_goes(self, folders):
        model = served(folders, names=("plain", "wide", "untied", "steer"))
        model.pool.capacity = 2

        def use(*names):
            logits(model, tokens(len(names), 6), adapter_names=list(names))
            return set(model.pool.resident)

        assert use("plain", "wide") == {"plain", "wide"}
        assert use("plain") == {"plain", "wide"}
        assert use("untied") == {"plain", "untied"}
        assert use("steer", "plain") == {"steer", "plain"}

    def test_more_than_the_capacity_in_one_batch(self, folders):
        model = served(folders)
        model.pool.capacity = 2
        before = model.pool.resident
        blocks = []
        model.base_model.model.layers[0].register_forward_hook(lambda *_: blocks.append(1))
        with pytest.raises(ValueError, match=r"at most 2 different adapters.*uses 3"):
            logits(model, tokens(4, 6), adapter_names=["plain", "wide", "plain", "untied"])
        assert model.pool.resident == before and not blocks
        logits(model, tokens(4, 6), adapter_names=["plain", "wide", "plain", "__base__"])

    @pytest.mark.parametrize("bad", [0, -1, 2.0, True, "8"])
    def test_what_is_no_capacity(self, bad):
        with pytest.raises(ValueError, match="capacity must be an integer of at least 1"):
            ReftModel(llama()).pool.capacity = bad


class TestChangesWhileInUse:
    def test_a_replaced_adapter_is_gone(self, folders):
        model, ids = served(folders), tokens(2, 8)
        names = ["plain", "untied"]
        before = logits(model, ids, adapter_names=names)
        model.pool.add("plain", folders["wide"], replace=True)
        after = logits(model, ids, adapter_names=names)
        equal(after[0], logits(loaded(folders, "wide"), ids[:1])[0])
        assert torch.equal(after[1], before[1])
        model.pool.add("plain", folders["plain"], replace=True)
        equal(logits(model, ids, adapter_names=names), before)

    def test_a_generation_ends_with_the_adapter_it_began_with(self, folders):
        model, ids = served(folders), tokens(2, 12)
        names, settings = ["const", "plain"], {**SETTINGS, "prefill_chunk_size": 4}
        expected = model.generate(ids, adapter_names=names, **settings)
        runs = []

        def meanwhile(*_):
            runs.append(1)
            if len(runs) == 2:
                model.pool.add("const", folders["free"], replace=True)
                model.pool.remove("plain")

        hook = model.base_model.model.layers[0].register_forward_hook(meanwhile)
        assert torch.equal(model.generate(ids, adapter_names=names, **settings), expected)
        hook.remove()
        assert len(runs) > 3
        with pytest.raises(ValueError, match="'plain'"):
            model.generate(ids, adapter_names=names, **settings)
        model.pool.add("plain", folders["plain"])
        changed = model.generate(ids, adapter_names=names, **settings)
        assert changed[1].tolist() == expected[1].tolist()
        assert changed[0].tolist() != expected[0].tolist()

    def test_hooks_stand_where_adapters_edit(self, folders):
        model = ReftModel(llama())
        blocks = model.base_model.model.layers

        def hooked():
            return [len(block._forward_hooks) for block in blocks]

        assert hooked() == [0, 0, 0]
        model.pool.add("wide", folders["wide"])
        assert hooked() == [1, 0, 1]
        model.pool.add("apart", folders["apart"])
        model.pool.add("wide", folders["apart"], replace=True)
        assert hooked() == [0, 1, 0]
        model.pool.remove("wide")
        model.pool.remove("apart")
        assert hooked() == [0, 0, 0]
        model.pool.add("plain", folders["plain"])
        base = model.unload()
        assert hooked() == [0, 0, 0] and not hasattr(base, "reft")

    def test_names_are_one_space(self, folders):
        model = loaded(folders, "plain")
        model.pool.add("served", folders["wide"])
        for taken in ("default", "served"):
            with pytest.raises(ValueError, match=f"'{taken}', which is"):
                model.pool.add(taken, folders["wide"])
            with pytest.raises(ValueError, match=f"'{taken}', which is"):
                model.load_adapter(folders["wide"], taken)
        with pytest.raises(ValueError, match="'default', which is taken"):
            model.pool.add("default", folders["wide"], replace=True)
        with pytest.raises(ValueError, match="'served' is in its pool"):
            model.set_adapter("served")
        with pytest.raises(ValueError, match="one of the pool's 1 adapters, got 'default'"):
            model.pool.remove("default")


class TestContent:
    def test_names_do_not_matter_and_bits_do(self, folders, tmp_path):
        sizes = {"num_layers": LAYERS, "dim": DIM}
        first = read_stored(folders["plain"], **sizes)
        assert read_stored(folders["plain"], **sizes).content == first.content
        config, tensors = read_adapter(folders["plain"])
        seen = {first.content}
        bias = tensors["bias"].clone()
        bias.view(-1)[0] = torch.nextafter(bias.view(-1)[0], torch.tensor(9.0))
        for changed, values in (
            ({}, {**tensors, "bias": bias}),
            ({"positions": "f2+l3"}, tensors),
            ({"layers": [0, 1, 2], "tied": True, "prompt_end": "second_to_last"}, tensors),
            ({"activation": "gelu"}, tensors),
            ({"short_prompts": "paper"}, tensors),
        ):
            other = ReftConfig.from_dict({**config.to_dict(), **changed})
            seen.add(stored(other, values, **sizes).content)
        assert len(seen) == 6
        for idle in ({"dropout": 0.1}, {"layers": [0, 1, 2]}, {"init": "identity"}):
            same = ReftConfig.from_dict({**config.to_dict(), **idle})
            assert stored(same, tensors, **sizes).content == first.content

    def test_equal_adapters_share_their_place(self, folders):
        model = served(folders, names=("plain",))
        model.pool.add("again", folders["plain"])
        one = model.pool.nbytes
        model.pool.capacity = 1
        logits(model, tokens(2, 6), adapter_names=["plain", "again"])
        model.pool.remove("plain")
        assert model.pool.nbytes == one and model.pool.resident == ["again"]
        model.pool.remove("again")
        assert model.pool.nbytes == 0 and not model.pool.tables.resident


class TestMistakes:
    def test_unknown_names_are_refused_before_anything_runs(self, folders):
        model = served(folders)
        calls = []
        model.base_model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match="'nobody'"):
            model.generate(tokens(2, 5), adapter_names=["plain", "nobody"], **SETTINGS)
        assert not calls
        with pytest.raises(ValueError, match=r"one name a sequence \(2 of them\)"):
            model.generate(tokens(2, 5), adapter_names="plain", **SETTINGS)
        assert not calls
        with pytest.raises(ValueError, match="or of the pool's 14, got 'nobody'"):
            logits(model, tokens(2, 5), adapter_names=["plain", "nobody"])

    def test_folders_that_cannot_be_served(self, folders, tmp_path):
        model = served(folders, names=("plain",))
        config, tensors = read_adapter(folders["plain"])

        def refused(words, changes=None, values=None, error=ValueError):
            changed = ReftConfig.from_dict({**config.to_dict(), **(changes or {})})
            write_adapter(tmp_path / "bad", changed, {**tensors, **(values or {})})
            with pytest.raises(error, match=words):
                model.pool.add("bad", tmp_path / "bad")
            with pytest.raises(error, match=words):
                model.pool.add("plain", tmp_path / "bad", replace=True)

        nan = torch.full_like(tensors["bias"], float("nan"))
        refused("bias must be finite", values={"bias": nan})
        refused("must have orthonormal rows", values={"rotation": tensors["weight"]})
        refused("layers", {"layers": [0, 7, 1]})
        refused("shape", {"rank": 4})
        refused("block_path must be 'model.layers'", {"block_path": "h"})
        refused("no part of block", {"component": "module:mlp.x"})
        refused("image_token_id", {"positions": "image"})
        heads = {"modules_to_save": ["lm_head"]}
        refused("load it with load_adapter", heads, {"modules_to_save.lm_head.weight": nan})
        other = random_adapter(tmp_path / "other", 0, dim=DIM + 1)
        with pytest.raises(ValueError, match=f"{DIM}"):
            model.pool.add("bad", other)
        with pytest.raises(FileNotFoundError):
            model.pool.add("bad", tmp_path / "nothing")
        for name in ("", "a.b", "a/b", "__base__", 3):
            with pytest.raises(ValueError, match="a new name without dots"):
                model.pool.add(name, folders["plain"])
        assert model.pool.names == ["plain"]
        equal(
            logits(model, tokens(1, 6), adapter_names=["plain"]),
            logits(loaded(folders, "plain"), tokens(1, 6)),
        )

    def test_they_are_not_trained(self, folders):
        model = ReftModel.from_pretrained(llama(), folders["plain"], is_trainable=True)
        model.pool.add("served", folders["wide"])
        ids = tokens(2, 6)
        with pytest.raises(ValueError, match="for inference, and 'default' is trained"):
            model(ids, adapter_names=["default", "served"])
        # Alone they may be used with gradients recorded, and have none.
        assert not model(ids, adapter_names=["served", "__base__"]).logits.requires_grad

    def test_in_a_compiled_model_the_plan_is_made_outside_the_graph(self, folders):
        model, ids = served(folders), tokens(2, 5)
        expected = logits(model, ids, adapter_names=["plain", "wide"])
        compiled = torch.compile(model.base_model, backend="eager")
        assert torch.equal(logits(compiled, ids, adapter_names=["plain", "wide"]), expected)
        torch._dynamo.reset()
        whole = torch.compile(model.base_model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported) as refused:
            logits(whole, ids, adapter_names=["plain", "wide"])
        assert "ValueError" in str(refused.value)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_serve_on_their_own(folders, clone):
    model, ids = served(folders, names=("plain", "wide")), tokens(2, 7)
    expected = logits(model, ids, adapter_names=["plain", "wide"])
    other = clone(model)
    model.pool.remove("plain")
    assert other.pool.names == ["plain", "wide"]
    assert torch.equal(logits(other, ids, adapter_names=["plain", "wide"]), expected)
    other.pool.add("wide", folders["steer"], replace=True)
    assert torch.equal(logits(model, ids, adapter_names=["__base__", "wide"])[1], expected[1])
