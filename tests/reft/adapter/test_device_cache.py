"""What serving rests on: places of a prompt told on the host, tables on the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft import ReftConfig
from reft.adapter.device_cache import AdapterCache, CacheItem
from reft.adapter.token_positions import positions_between, token_positions
from reft.positions import padded_positions
from reft_kernels.spec import EditWeights

CPU = torch.device("cpu")


class TestPlaces:
    @given(
        positions=st.sampled_from(["f3+l2", "f2", "l4", "prompt", "all", "prompt+g2"]),
        tied=st.booleans(),
        by=st.sampled_from(["side", "position"]),
        short=st.sampled_from(["pyreft", "paper"]),
        end=st.sampled_from(["last", "second_to_last"]),
        length=st.integers(0, 12),
    )
    def test_they_are_those_of_a_forward(self, positions, tied, by, short, end, length):
        tied = tied or positions[0] in "pa"
        by = "side" if tied or "+" not in positions else by
        config = ReftConfig(
            positions=positions, tied=tied, untied_by=by, short_prompts=short, prompt_end=end
        )
        window = padded_positions(
            config.parsed_positions,
            torch.tensor([2]),
            torch.tensor([length]),
            window=20,
            short_prompts=short,
            prompt_end=end,
        )[0].tolist()
        prompt = [at - 2 for at in window if 0 <= at - 2 < length]
        places = token_positions(config, length)
        assert [at for at, _ in places] == sorted(prompt)
        assert all(0 <= group < config.num_groups for _, group in places)

    def test_which_weights_edit_which_token(self):
        config = ReftConfig(positions="f2+l2", tied=False)
        assert token_positions(config, 9) == ((0, 0), (1, 0), (7, 1), (8, 1))
        apart = ReftConfig(positions="f2+l2", tied=False, untied_by="position")
        assert token_positions(apart, 9) == ((0, 0), (1, 1), (7, 2), (8, 3))
        assert token_positions(apart, 3) == ((0, 0), (2, 3))
        with pytest.raises(ValueError, match="not told by the length"):
            token_positions(ReftConfig(positions="given"), 9)

    def test_those_in_a_block(self):
        places = ((0, 0), (1, 0), (7, 1), (8, 1))
        assert positions_between(places, 0, 4) == places[:2]
        assert positions_between(places, 1, 8) == places[1:3]
        assert positions_between(places, 2, 7) == ()
        assert positions_between(places, 8, 16) == places[3:]


def make_item(key, *, rank=2, groups=1, sites=((0, "block_output"),), activation=None, dim=5):
    random = torch.Generator().manual_seed(hash(key) % 1000)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    wide, narrow = (groups, rank, dim), (groups, rank)
    weights = tuple(
        EditWeights(normal(*wide), normal(*narrow), normal(*wide), activation=activation)
        for _ in sites
    )
    return CacheItem((key, None), weights, sites)


def holds(cache, item, entries):
    """Whether the entries are the adapter's, padded with zeros."""
    for weights, site in zip(item.weights, item.sites, strict=True):
        layer = cache.weights_at(site, item.kind)
        for group, entry in enumerate(entries):
            for name in ("encode", "bias", "decode"):
                value = getattr(weights, name)[group]
                slots = getattr(layer, name)[entry]
                rank = value.shape[0]
                assert torch.equal(slots[:rank], value), (item.key, name)
                assert not slots[rank:].any(), (item.key, name)


class TestTables:
    def test_every_adapter_keeps_its_entries_while_tables_grow(self):
        cache = AdapterCache(40, lambda site: CPU)
        items, places = [], []
        for at in range(30):
            sites = tuple((layer, "block_output") for layer in range(at % 3 + 1))
            item = make_item(
                f"a{at}", rank=1 + at % 4, groups=1 + at % 3, sites=sites,
                activation="gelu" if at % 5 == 0 else None,
            )  # fmt: skip
            items.append(item)
            places += cache.insert([item])
        assert len({entry for entries in places for entry in entries}) == sum(
            item.groups for item in items
        )
        for item, entries in zip(items, places, strict=True):
            holds(cache, item, entries)
        assert cache.insert(items) == places

    @given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=12))
    def test_what_was_asked_for_is_there_and_no_more_than_the_capacity(self, batches):
        cache = AdapterCache(4, lambda site: CPU)
        known = [make_item(f"a{at}", rank=1 + at % 3, groups=1 + at % 2) for at in range(10)]
        for batch in batches:
            entries = cache.insert([known[at] for at in batch])
            assert len(cache.keys) <= 4
            owned = {}
            for at, slots in zip(batch, entries, strict=True):
                holds(cache, known[at], slots)
                owned[at] = slots
            taken = [entry for slots in owned.values() for entry in slots]
            assert len(set(taken)) == len(taken)

    def test_a_new_tenant_leaves_nothing_of_the_old(self):
        """A wide adapter goes, a narrow one without W comes into its entry."""
        cache = AdapterCache(1, lambda site: CPU)
        cache.insert([make_item("wide", rank=4)])
        narrow = make_item("narrow", rank=1)
        (weights,) = narrow.weights
        narrow = CacheItem(narrow.key, (weights._replace(encode=None),), narrow.sites)
        (entries,) = cache.insert([narrow])
        table = cache.weights_at(narrow.sites[0], narrow.kind)
        assert not table.encode[entries[0]].any()
        assert not table.decode[entries[0], 1:].any() and not table.bias[entries[0], 1:].any()

    def test_too_many_change_nothing(self):
        cache = AdapterCache(2, lambda site: CPU)
        first = [make_item("a"), make_item("b")]
        entries = cache.insert(first)
        with pytest.raises(ValueError, match=r"at most 2 different adapters.*uses 3"):
            cache.insert([make_item("c"), make_item("a"), make_item("d")])
        assert cache.keys == [("a", None), ("b", None)]
        assert cache.insert(first) == entries
        assert len(cache.insert([make_item("c"), make_item("c"), make_item("a")])) == 3
