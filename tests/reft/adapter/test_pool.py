"""Adapters that are served: few are on the device, what is replaced is gone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from served_adapters import SETTINGS, equal, loaded, logits, random_adapter, served
from tiny_models import DIM, LAYERS, llama, tokens

from reft import ReftConfig, ReftModel
from reft.adapter.host_adapter import host_adapter, read_host_adapter
from reft.io.adapter_files import read_adapter, write_adapter


class TestResidency:
    def test_hundreds_are_known_and_few_are_on_the_device(self, tmp_path, monkeypatch):
        monkeypatch.setattr("os.fsync", lambda file: None)  # nothing here outlives the test
        model = ReftModel(llama())
        model.pool.capacity = 16
        config, tensors = read_adapter(random_adapter(tmp_path / "first", 0, rank=1))
        for at in range(400):
            changed = {**tensors, "bias": tensors["bias"] + at}
            write_adapter(tmp_path / "now", config, changed)
            model.pool.add(f"user-{at}", tmp_path / "now")
        assert len(model.pool) == 400
        alone = ReftModel(llama())
        random = torch.Generator().manual_seed(0)
        ids, largest = tokens(8, 7), 0
        for _ in range(10):
            users = torch.randint(0, 400, (8,), generator=random).tolist()
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
    def test_invalid_capacities(self, bad):
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

    def test_hooks_are_registered_where_adapters_edit(self, folders):
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
        first = read_host_adapter(folders["plain"], **sizes)
        assert read_host_adapter(folders["plain"], **sizes).content_hash == first.content_hash
        config, tensors = read_adapter(folders["plain"])
        seen = {first.content_hash}
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
            seen.add(host_adapter(other, values, **sizes).content_hash)
        assert len(seen) == 6
        for idle in ({"dropout": 0.1}, {"layers": [0, 1, 2]}, {"init": "identity"}):
            same = ReftConfig.from_dict({**config.to_dict(), **idle})
            assert host_adapter(same, tensors, **sizes).content_hash == first.content_hash

    def test_equal_adapters_share_slots(self, folders):
        model = served(folders, names=("plain",))
        model.pool.add("again", folders["plain"])
        size = model.pool.nbytes
        model.pool.capacity = 1
        logits(model, tokens(2, 6), adapter_names=["plain", "again"])
        model.pool.remove("plain")
        assert model.pool.nbytes == size and model.pool.resident == ["again"]
        model.pool.remove("again")
        assert model.pool.nbytes == 0 and not model.pool.cache.keys


class TestMistakes:
    def test_unknown_names_are_refused_before_anything_runs(self, folders):
        model = served(folders)
        calls = []
        model.base_model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match="'nobody'"):
            model.generate(tokens(2, 5), adapter_names=["plain", "nobody"], **SETTINGS)
        assert not calls
        with pytest.raises(ValueError, match=r"one name per sequence \(2 of them\)"):
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
        refused("load it with load_adapter", heads, {"heads.lm_head.weight": nan})
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
        model, ids = served(folders, names=("plain", "wide")), tokens(2, 5)
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
