"""The cache of adapters on the device: slots, eviction, capacity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft.adapter.device_cache import AdapterCache, CacheItem
from reft_kernels.spec import EditWeights

CPU = torch.device("cpu")


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


def check_slots(cache, item, slots):
    """Check that the slots hold the weights of the item, padded with zeros."""
    for weights, site in zip(item.weights, item.sites, strict=True):
        layer = cache.weights_at(site, item.kind)
        for group, slot in enumerate(slots):
            for name in ("encode", "bias", "decode"):
                value = getattr(weights, name)[group]
                cached = getattr(layer, name)[slot]
                rank = value.shape[0]
                assert torch.equal(cached[:rank], value), (item.key, name)
                assert not cached[rank:].any(), (item.key, name)


class TestCache:
    def test_every_adapter_keeps_its_slots_while_the_cache_grows(self):
        cache = AdapterCache(40, lambda site: CPU)
        items, slots = [], []
        for at in range(30):
            sites = tuple((layer, "block_output") for layer in range(at % 3 + 1))
            item = make_item(
                f"a{at}", rank=1 + at % 4, groups=1 + at % 3, sites=sites,
                activation="gelu" if at % 5 == 0 else None,
            )  # fmt: skip
            items.append(item)
            slots += cache.insert([item])
        assert len({slot for item_slots in slots for slot in item_slots}) == sum(
            item.groups for item in items
        )
        for item, item_slots in zip(items, slots, strict=True):
            check_slots(cache, item, item_slots)
        assert cache.insert(items) == slots

    @given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=12))
    def test_what_was_asked_for_is_there_and_no_more_than_the_capacity(self, batches):
        cache = AdapterCache(4, lambda site: CPU)
        known = [make_item(f"a{at}", rank=1 + at % 3, groups=1 + at % 2) for at in range(10)]
        for batch in batches:
            entries = cache.insert([known[at] for at in batch])
            assert len(cache.keys) <= 4
            owned = {}
            for at, slots in zip(batch, entries, strict=True):
                check_slots(cache, known[at], slots)
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
