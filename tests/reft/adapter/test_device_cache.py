"""What serving rests on: places of a prompt told on the host, tables on the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft import ReftConfig
from reft.adapter.device_cache import AdapterCache, CacheItem, EditKind
from reft.adapter.edit_weights import Effective
from reft.adapter.token_positions import block_places, edited_places
from reft.positions import padded_positions

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
            seq_len=20,
            short_prompts=short,
            prompt_end=end,
        )[0].tolist()
        prompt = [at - 2 for at in window if 0 <= at - 2 < length]
        places = edited_places(config, length)
        assert [at for at, _ in places] == sorted(prompt)
        assert all(0 <= group < config.num_groups for _, group in places)

    def test_which_weights_edit_which_token(self):
        config = ReftConfig(positions="f2+l2", tied=False)
        assert edited_places(config, 9) == ((0, 0), (1, 0), (7, 1), (8, 1))
        apart = ReftConfig(positions="f2+l2", tied=False, untied_by="position")
        assert edited_places(apart, 9) == ((0, 0), (1, 1), (7, 2), (8, 3))
        assert edited_places(apart, 3) == ((0, 0), (2, 3))
        with pytest.raises(ValueError, match="cannot be computed from the lengths"):
            edited_places(ReftConfig(positions="given"), 9)

    def test_those_in_a_block(self):
        places = ((0, 0), (1, 0), (7, 1), (8, 1))
        assert block_places(places, 0, 4) == places[:2]
        assert block_places(places, 1, 8) == places[1:3]
        assert block_places(places, 2, 7) == ()
        assert block_places(places, 8, 16) == places[3:]


def resident(key, *, rank=2, groups=1, sites=((0, "block_output"),), activation=None, dim=5):
    random = torch.Generator().manual_seed(hash(key) % 1000)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    each = range(len(sites))
    form = Effective(
        encode=tuple(normal(groups, rank, dim) for _ in each),
        bias=tuple(normal(groups, rank) for _ in each),
        decode=tuple(normal(groups, rank, dim) for _ in each),
        subtract=False,
        activation=activation,
    )
    return CacheItem((key, None), form, sites)


def holds(tables, one, entries):
    """Whether the entries are the adapter's, padded with zeros."""
    for place, site in enumerate(one.sites):
        table = tables.at(site, one.kind)
        for group, entry in enumerate(entries):
            for name in ("encode", "bias", "decode"):
                value = getattr(one.effective, name)[place][group]
                found = getattr(table, name)[entry]
                rank = value.shape[0]
                assert torch.equal(found[:rank], value), (one.key, name)
                assert not found[rank:].any(), (one.key, name)


class TestTables:
    def test_every_adapter_keeps_its_entries_while_tables_grow(self):
        tables = AdapterCache(40, lambda site: CPU)
        all_of_them, places = [], []
        for at in range(30):
            sites = tuple((layer, "block_output") for layer in range(at % 3 + 1))
            one = resident(
                f"a{at}", rank=1 + at % 4, groups=1 + at % 3, sites=sites,
                activation="gelu" if at % 5 == 0 else None,
            )  # fmt: skip
            all_of_them.append(one)
            places += tables.admit([one])
        assert len({entry for entries in places for entry in entries}) == sum(
            one.groups for one in all_of_them
        )
        for one, entries in zip(all_of_them, places, strict=True):
            holds(tables, one, entries)
        assert tables.admit(all_of_them) == places

    @given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=12))
    def test_what_was_asked_for_is_there_and_no_more_than_the_capacity(self, batches):
        tables = AdapterCache(4, lambda site: CPU)
        known = [resident(f"a{at}", rank=1 + at % 3, groups=1 + at % 2) for at in range(10)]
        for batch in batches:
            entries = tables.admit([known[at] for at in batch])
            assert len(tables.resident) <= 4
            owned = {}
            for at, mine in zip(batch, entries, strict=True):
                holds(tables, known[at], mine)
                owned[at] = mine
            taken = [entry for mine in owned.values() for entry in mine]
            assert len(set(taken)) == len(taken)

    def test_a_new_tenant_leaves_nothing_of_the_old(self):
        """A wide adapter goes, a narrow one without W comes into its entry."""
        tables = AdapterCache(1, lambda site: CPU)
        tables.admit([resident("wide", rank=4)])
        narrow = resident("narrow", rank=1)
        form = narrow.effective
        narrow = CacheItem(
            narrow.key, Effective(None, form.bias, form.decode, False, None), narrow.sites
        )
        (entries,) = tables.admit([narrow])
        table = tables.at(narrow.sites[0], narrow.kind)
        assert not table.encode[entries[0]].any()
        assert not table.decode[entries[0], 1:].any() and not table.bias[entries[0], 1:].any()

    def test_too_many_change_nothing(self):
        tables = AdapterCache(2, lambda site: CPU)
        first = [resident("a"), resident("b")]
        entries = tables.admit(first)
        with pytest.raises(ValueError, match=r"at most 2 different adapters.*uses 3"):
            tables.admit([resident("c"), resident("a"), resident("d")])
        assert tables.resident == [("a", None), ("b", None)]
        assert tables.admit(first) == entries
        assert len(tables.admit([resident("c"), resident("c"), resident("a")])) == 3

    def test_reserved_tables_keep_their_addresses(self):
        tables = AdapterCache(8, lambda site: CPU)
        site = (3, "block_output")
        kind = EditKind(False, None, torch.float32)
        tables.reserve([site], kind, entries=8, rank=4, dim=5)
        before = tables.at(site, kind).decode.data_ptr()
        size = tables.nbytes
        assert size == 8 * (2 * 4 * 5 + 4) * 4
        for at in range(12):
            tables.admit([resident(f"a{at}", rank=1 + at % 4, sites=(site,))])
        assert tables.at(site, kind).decode.data_ptr() == before and tables.nbytes == size
        tables.clear()
        assert tables.nbytes == 0 and not tables.resident and tables.capacity == 8
