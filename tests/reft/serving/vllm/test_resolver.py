"""The part of the vLLM plugin that needs no vLLM: settings, adapters of requests, resolution."""

from __future__ import annotations

import shutil
import threading

import pytest
from served_adapters import random_adapter
from tiny_models import DIM, LAYERS

from reft.adapter.host_adapter import read_host_adapter
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from reft.serving.vllm.request_adapter import RequestAdapter
from reft.serving.vllm.resolver import Resolver
from reft.serving.vllm.settings import Settings

SIZES = {"num_layers": LAYERS, "dim": DIM}


@pytest.fixture
def resolver(tmp_path):
    random_adapter(tmp_path / "adapters" / "good", 0)
    settings = Settings(str(tmp_path / "adapters"), max_rank=8, cache=str(tmp_path / "cache"))
    return Resolver(settings, LAYERS, DIM)


def folder(resolver, name="good"):
    return resolver.settings.cache_folder.parent / "adapters" / name


class TestResolver:
    def test_a_name_becomes_a_hash_and_a_copy(self, resolver):
        adapter = resolver.resolve("good", 2)
        original = read_host_adapter(folder(resolver), **SIZES)
        assert adapter.content_hash == original.content_hash and adapter.scale == 2
        copy = read_host_adapter(resolver.settings.cache_folder / adapter.content_hash, **SIZES)
        assert copy.content_hash == original.content_hash
        assert resolver.resolve("good") == RequestAdapter.from_config(
            original.config, original.content_hash, 1.0
        )
        assert len(list(resolver.settings.cache_folder.iterdir())) == 1, "nothing is left beside"

    def test_a_replaced_folder_has_another_hash(self, resolver, tmp_path):
        first = resolver.resolve("good").content_hash
        shutil.rmtree(folder(resolver))
        random_adapter(folder(resolver), 1)
        second = resolver.resolve("good").content_hash
        assert first != second
        cache = resolver.settings.cache_folder
        assert {path.name for path in cache.iterdir()} == {first, second}

    @pytest.mark.parametrize("harm", ["gone", "short"])
    def test_a_copy_that_was_cleaned_away_is_made_again(self, resolver, harm):
        content = resolver.resolve("good").content_hash
        copy = resolver.settings.cache_folder / content / WEIGHTS_FILE
        if harm == "gone":
            shutil.rmtree(copy.parent)
        else:
            copy.write_bytes(copy.read_bytes()[:-10])
        assert resolver.resolve("good").content_hash == content
        assert read_host_adapter(copy.parent, **SIZES).content_hash == content

    def test_front_ends_may_race(self, resolver):
        seen, errors = [], []

        def resolve():
            try:
                other = Resolver(resolver.settings, LAYERS, DIM)
                seen.append(other.resolve("good").content_hash)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=resolve) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and len(set(seen)) == 1
        copy = resolver.settings.cache_folder / seen[0]
        assert read_host_adapter(copy, **SIZES).content_hash == seen[0]
        assert len(list(resolver.settings.cache_folder.iterdir())) == 1

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "../adapters/good", "a/b", "a\\b", ".hidden", "a\0b", "x" * 300]
    )
    def test_invalid_names(self, resolver, name):
        with pytest.raises(ValueError, match="a folder's plain name"):
            resolver.resolve(name)
        assert not resolver.settings.cache_folder.exists()

    @pytest.mark.parametrize("scale", [4.5, -1e20])
    def test_scales_beyond_the_bound(self, resolver, scale):
        with pytest.raises(ValueError, match="reft_scale must lie within ±4, the max_scale"):
            resolver.resolve("good", scale)

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
    def test_adapters_that_cannot_be_served(self, resolver, changes, words):
        random_adapter(folder(resolver, "bad"), 1, **changes)
        with pytest.raises(ValueError, match=f"adapter 'bad' cannot be served: .*{words}"):
            resolver.resolve("bad")
        assert not list(resolver.settings.cache_folder.iterdir())

    def test_invalid_folders(self, resolver):
        with pytest.raises(ValueError, match="there is no adapter 'nobody'"):
            resolver.resolve("nobody")
        folder(resolver, "empty").mkdir()
        with pytest.raises(ValueError, match="'empty' cannot be read: No such file"):
            resolver.resolve("empty")
        torn = folder(resolver, "torn")
        shutil.copytree(folder(resolver), torn)
        whole = (torn / WEIGHTS_FILE).read_bytes()
        (torn / WEIGHTS_FILE).write_bytes(whole[:-9])
        with pytest.raises(ValueError, match=r"'torn' cannot be served: 'torn'.*truncated"):
            resolver.resolve("torn")
        (torn / WEIGHTS_FILE).write_bytes(whole)
        (torn / CONFIG_FILE).write_text("[" * 100_000)
        with pytest.raises(ValueError, match="'torn' cannot be served"):
            resolver.resolve("torn")
        (torn / CONFIG_FILE).unlink()
        assert resolver.resolve("torn").content_hash == resolver.resolve("good").content_hash
