"""Requests of engines: token ids that distinguish edits, positions that need more than a length."""

from __future__ import annotations

import pytest
import torch

from reft import ReftConfig
from reft.adapter.device_cache import CacheItem
from reft.adapter.requests import UNEDITED, Request, TokenKeys, make_request
from reft_kernels.spec import EditWeights


class TestKeys:
    def request(self, name, positions, scale=1.0, all_from=None):
        wide = torch.zeros(1, 1, 2)
        weights = (EditWeights(wide, torch.zeros(1, 1), wide),)
        return Request(
            CacheItem((name, None), weights, ((0, "block_output"),)), scale, positions, all_from
        )

    def test_equal_if_and_only_if_the_edits_are(self):
        keys, tokens = TokenKeys(10), [1, 2, 3, 4]
        requests = [
            UNEDITED,
            self.request("a", ((0, 0),)),
            self.request("a", ((1, 0),)),
            self.request("a", ((1, 1),)),
            self.request("b", ((1, 0),)),
            self.request("a", ((1, 0),), scale=2.0),
            self.request("a", ((1, 0),), all_from=3),
        ]
        ids = [tuple(keys.replace_edited(request, tokens)) for request in requests]
        assert ids[0] == (1, 2, 3, 4) and len(set(ids)) == len(requests)
        again = self.request("a", ((1, 0), (9, 0)))
        assert tuple(keys.replace_edited(again, tokens)) == ids[2]
        assert keys.replace_edited(again, [1, 3, 3, 4])[1] not in (3, ids[2][1])
        assert all(-(2**31) <= token < 10 and token != -1 for row in ids for token in row)

    def test_no_numbers_left(self):
        keys, tokens = TokenKeys(2**29), [1, 2**29 - 1]
        ids = [keys.replace_edited(self.request(f"{at}", ((1, 0),)), tokens) for at in range(6)]
        assert ids[0] and ids[2] and ids[3:] == [None] * 3
        assert keys.replace_edited(self.request("0", ((1, 0),)), [1, 2**29]) is None


@pytest.mark.parametrize("positions", ["image", "given"])
def test_positions_that_do_not_follow_from_token_ids(positions):
    with pytest.raises(ValueError, match=f"adapter 'seeing' has positions \"{positions}\""):
        make_request(ReftConfig(positions=positions), None, 1.0, 9, "seeing")
