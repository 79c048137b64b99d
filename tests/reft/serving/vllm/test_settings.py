"""The plugin's settings; nothing here needs vLLM."""

from __future__ import annotations

import pytest

from reft.serving.vllm.settings import Settings


def test_they_are_read_from_additional_config(tmp_path):
    given = {"reft": {"folder": str(tmp_path), "max_adapters": 8, "prefix_keys": "salt"}}
    settings = Settings.of(given)
    assert (settings.folder, settings.max_adapters, settings.prefix_keys) == (
        str(tmp_path),
        8,
        "salt",
    )
    assert settings.max_cpu_adapters == 1024 and settings.cache_folder.parts[-2:] == (
        "reft",
        "serving",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"folder": "/nothing/here"}, "reft.folder must be a directory"),
        ({"folder": 3}, "reft.folder must be a directory"),
        ({"slots": 3}, "no field 'slots'"),
        ({"max_adapters": 0}, "reft.max_adapters must be an integer of at least 1, got 0"),
        ({"max_cpu_adapters": True}, "reft.max_cpu_adapters must be an integer"),
        ({"resident": 8}, "reft.resident is called reft.max_adapters now"),
        ({"hosted": 8}, "reft.hosted is called reft.max_cpu_adapters now"),
        ({"max_rank": "8"}, "reft.max_rank must be an integer"),
        ({"max_scale": float("inf")}, "reft.max_scale must be a number"),
        ({"max_scale": 0}, "reft.max_scale must be a number"),
        ({"prefix_keys": "none"}, 'reft.prefix_keys must be "blocks" or "salt"'),
        ({"cache": 1}, "reft.cache must be"),
    ],
)
def test_mistakes(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        Settings.of({"reft": {"folder": str(tmp_path), **changes}})


@pytest.mark.parametrize("given", [None, {}, {"reft": "adapters"}, "reft"])
def test_none_at_all(given):
    with pytest.raises(ValueError, match="needs additional_config="):
        Settings.of(given)
