"""The adapter of a request: a client's arguments, transport, keys of cached blocks."""

from __future__ import annotations

import json

import pytest

from reft import ReftConfig
from reft.serving.vllm.request_adapter import RequestAdapter, requested_adapter


def test_what_a_client_may_write():
    assert requested_adapter({}) is None and requested_adapter({"reft": "__base__"}) is None
    assert requested_adapter({"reft": "a", "other": 1}) == ("a", 1.0)
    assert requested_adapter({"reft": "a", "reft_scale": -2}) == ("a", -2.0)
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
            requested_adapter(extra)


def test_it_travels_as_json():
    config = ReftConfig(positions="f2+l3", tied=False, short_prompts="paper")
    adapter = RequestAdapter.from_config(config, "ab" * 32, 0.5)
    again = RequestAdapter.from_dict(json.loads(json.dumps(adapter.to_dict())))
    assert again == adapter
    assert list(again.request(9).edited(0, 9)) == [(0, 0), (1, 0), (6, 1), (7, 1), (8, 1)]


def test_keys_of_blocks():
    """The key of a block has the adapter and its edited tokens; without any there is no key."""
    last = RequestAdapter.from_config(ReftConfig(positions="l2"), "a" * 64, 1.0)
    assert last.block_key(100, 0, 32) is None
    assert last.block_key(100, 96, 128) == ("a" * 64, 1.0, ((98, 0), (99, 0)))
    assert last.block_key(98, 96, 128) == ("a" * 64, 1.0, ((96, 0), (97, 0)))
    everything = RequestAdapter.from_config(ReftConfig(positions="all"), "b" * 64, 2.0)
    assert len(everything.block_key(10, 32, 64)[2]) == 32
    assert last.salt(98) != last.salt(99)
