"""The part of the vLLM plugin that needs no vLLM: settings, tickets, what the front end refuses."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
from served_adapters import random_adapter
from tiny_models import DIM, LAYERS

from reft import ReftConfig
from reft.adapter.host_adapter import read_host_adapter
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from reft.serving.vllm.request_adapter import Ticket, asked_for
from reft.serving.vllm.resolver import Admission
from reft.serving.vllm.settings import Settings

SIZES = {"num_layers": LAYERS, "dim": DIM}


@pytest.fixture
def admission(tmp_path):
    random_adapter(tmp_path / "adapters" / "good", 0)
    settings = Settings(str(tmp_path / "adapters"), max_rank=8, cache=str(tmp_path / "cache"))
    return Admission(settings, LAYERS, DIM)


def folder(admission, name="good"):
    return admission.settings.cache_folder.parent / "adapters" / name


class TestSettings:
    def test_they_are_read_from_additional_config(self, tmp_path):
        given = {"reft": {"folder": str(tmp_path), "resident": 8, "prefix_keys": "salt"}}
        found = Settings.of(given)
        assert (found.folder, found.resident, found.prefix_keys) == (str(tmp_path), 8, "salt")
        assert found.hosted == 1024 and found.cache_folder.parts[-2:] == ("reft", "serving")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"folder": "/nothing/here"}, "reft.folder must be a directory"),
            ({"folder": 3}, "reft.folder must be a directory"),
            ({"slots": 3}, "no field 'slots'"),
            ({"resident": 0}, "reft.resident must be an integer of at least 1, got 0"),
            ({"hosted": True}, "reft.hosted must be an integer"),
            ({"max_rank": "8"}, "reft.max_rank must be an integer"),
            ({"max_scale": float("inf")}, "reft.max_scale must be a number"),
            ({"max_scale": 0}, "reft.max_scale must be a number"),
            ({"prefix_keys": "none"}, 'reft.prefix_keys must be "blocks" or "salt"'),
            ({"cache": 1}, "reft.cache must be"),
        ],
    )
    def test_mistakes(self, tmp_path, changes, words):
        with pytest.raises(ValueError, match=words):
            Settings.of({"reft": {"folder": str(tmp_path), **changes}})

    @pytest.mark.parametrize("given", [None, {}, {"reft": "adapters"}, "reft"])
    def test_none_at_all(self, given):
        with pytest.raises(ValueError, match="needs additional_config="):
            Settings.of(given)


class TestTickets:
    def test_what_a_client_may_write(self):
        assert asked_for({}) is None and asked_for({"reft": "__base__"}) is None
        assert asked_for({"reft": "a", "other": 1}) == ("a", 1.0)
        assert asked_for({"reft": "a", "reft_scale": -2}) == ("a", -2.0)
        for extra, words in (
            ({"reft": 3}, "must be an adapter's name, got 3"),
            ({"reft": {"name": "a"}}, "must be an adapter's name"),
            ({"reft": "a", "reft_scale": "2"}, "must be a finite number"),
            ({"reft": "a", "reft_scale": True}, "must be a finite number"),
            ({"reft": "a", "reft_scale": float("nan")}, "must be a finite number"),
            ({"reft_scale": 2.0}, "needs an adapter's name"),
            ({"reft": "__base__", "reft_scale": 2.0}, "needs an adapter's name"),
        ):
            with pytest.raises(ValueError, match=words):
                asked_for(extra)

    def test_it_travels_as_json(self):
        config = ReftConfig(positions="f2+l3", tied=False, short_prompts="paper")
        ticket = Ticket.of(config, "ab" * 32, 0.5)
        again = Ticket.from_plain(json.loads(json.dumps(ticket.to_plain())))
        assert again == ticket
        assert list(again.request(9).edited(0, 9)) == [(0, 0), (1, 0), (6, 1), (7, 1), (8, 1)]

    def test_keys_of_blocks(self):
        """A block is told by the adapter and the edited tokens in it, and not at all without."""
        last = Ticket.of(ReftConfig(positions="l2"), "a" * 64, 1.0)
        assert last.block_key(100, 0, 32) is None
        assert last.block_key(100, 96, 128) == ("a" * 64, 1.0, ((98, 0), (99, 0)))
        assert last.block_key(98, 96, 128) == ("a" * 64, 1.0, ((96, 0), (97, 0)))
        everything = Ticket.of(ReftConfig(positions="all"), "b" * 64, 2.0)
        assert len(everything.block_key(10, 32, 64)[2]) == 32
        assert last.salt(98) != last.salt(99)


class TestAdmission:
    def test_a_name_becomes_a_content_and_a_copy(self, admission):
        ticket = admission.ticket("good", 2)
        own = read_host_adapter(folder(admission), **SIZES)
        assert ticket.content == own.content and ticket.scale == 2
        copy = read_host_adapter(admission.settings.cache_folder / ticket.content, **SIZES)
        assert copy.content == own.content
        assert admission.ticket("good") == Ticket.of(own.config, own.content, 1.0)
        assert len(list(admission.settings.cache_folder.iterdir())) == 1, "nothing is left beside"

    def test_a_replaced_folder_is_another_content(self, admission, tmp_path):
        first = admission.ticket("good").content
        shutil.rmtree(folder(admission))
        random_adapter(folder(admission), 1)
        second = admission.ticket("good").content
        assert first != second
        cache = admission.settings.cache_folder
        assert {one.name for one in cache.iterdir()} == {first, second}

    @pytest.mark.parametrize("harm", ["gone", "short"])
    def test_a_copy_that_was_cleaned_away_is_made_again(self, admission, harm):
        content = admission.ticket("good").content
        copy = admission.settings.cache_folder / content / WEIGHTS_FILE
        if harm == "gone":
            shutil.rmtree(copy.parent)
        else:
            copy.write_bytes(copy.read_bytes()[:-10])
        assert admission.ticket("good").content == content
        assert read_host_adapter(copy.parent, **SIZES).content == content

    def test_front_ends_may_race(self, admission):
        seen, errors = [], []

        def admit():
            try:
                other = Admission(admission.settings, LAYERS, DIM)
                seen.append(other.ticket("good").content)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=admit) for _ in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert not errors and len(set(seen)) == 1
        copy = admission.settings.cache_folder / seen[0]
        assert read_host_adapter(copy, **SIZES).content == seen[0]
        assert len(list(admission.settings.cache_folder.iterdir())) == 1

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "../adapters/good", "a/b", "a\\b", ".hidden", "a\0b", "x" * 300]
    )
    def test_names_that_are_none(self, admission, name):
        with pytest.raises(ValueError, match="a folder's plain name"):
            admission.ticket(name)
        assert not admission.settings.cache_folder.exists()

    @pytest.mark.parametrize("scale", [4.5, -1e20])
    def test_scales_beyond_the_bound(self, admission, scale):
        with pytest.raises(ValueError, match="reft_scale must lie within ±4, the max_scale"):
            admission.ticket("good", scale)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"rank": 9}, "rank must be at most max_rank = 8, got 9"),
            ({"component": "mlp_output"}, 'component must be "block_output"'),
            ({"positions": "given"}, 'positions must not be "given"'),
            ({"positions": "image"}, 'positions must not be "given"'),
            ({"dtype": "float64"}, 'dtype must not be "float64"'),
            ({"dim": DIM + 1}, "must have shape"),
            ({"layers": [9], "blocks": 10}, "layers"),
        ],
    )
    def test_adapters_that_cannot_be_served(self, admission, changes, words):
        random_adapter(folder(admission, "bad"), 1, **changes)
        with pytest.raises(ValueError, match=f"adapter 'bad' cannot be served: .*{words}"):
            admission.ticket("bad")
        assert not list(admission.settings.cache_folder.iterdir())

    def test_folders_that_are_none(self, admission):
        with pytest.raises(ValueError, match="there is no adapter 'nobody'"):
            admission.ticket("nobody")
        folder(admission, "empty").mkdir()
        with pytest.raises(ValueError, match="'empty' cannot be read: No such file"):
            admission.ticket("empty")
        torn = folder(admission, "torn")
        shutil.copytree(folder(admission), torn)
        whole = (torn / WEIGHTS_FILE).read_bytes()
        (torn / WEIGHTS_FILE).write_bytes(whole[:-9])
        with pytest.raises(ValueError, match=r"'torn' cannot be served: 'torn'.*truncated"):
            admission.ticket("torn")
        (torn / WEIGHTS_FILE).write_bytes(whole)
        (torn / CONFIG_FILE).write_text("[" * 100_000)
        with pytest.raises(ValueError, match="'torn' cannot be served"):
            admission.ticket("torn")
        (torn / CONFIG_FILE).unlink()
        assert admission.ticket("torn").content == admission.ticket("good").content
