"""Operations on the weights of an adapter: masked ranks, scales, concatenated groups."""

from __future__ import annotations

import pytest
import torch

from reft.adapter.edit_weights import concatenate, map_tensors, mask_ranks, num_bytes, scale
from reft_kernels.spec import EditWeights

DIM = 5


def weights_of(rank, groups=1, *, encode=True, dtype=torch.float32, **switches):
    def normal(*shape):
        return torch.randn(groups, *shape, dtype=dtype)

    first = normal(rank, DIM) if encode else None
    return EditWeights(first, normal(rank), normal(rank, DIM), **switches)


def edit(weights, hidden):
    """Compute the edit of each group, in float64."""
    encode, bias, decode = (None if t is None else t.double() for t in weights[:3])
    code = bias.unsqueeze(1)
    if encode is not None:
        code = code + hidden.double() @ encode.mT
    return code @ decode


def test_masked_ranks_do_not_edit():
    weights = tuple(weights_of(4, 2) for _ in range(3))
    active, hidden = torch.tensor([True, False, True, False]), torch.randn(7, DIM)
    for layer, masked in zip(weights, mask_ranks(weights, active), strict=True):
        kept = map_tensors(lambda tensor: tensor[:, active], layer)
        torch.testing.assert_close(edit(masked, hidden), edit(kept, hidden))
        assert all(not tensor[:, ~active].any() for tensor in masked[:3])
    assert mask_ranks(weights, None) is weights


def test_a_scale_multiplies_the_edit():
    weights = tuple(weights_of(3) for _ in range(2))
    hidden = torch.randn(4, DIM)
    for layer, scaled in zip(weights, scale(weights, -0.5), strict=True):
        torch.testing.assert_close(edit(scaled, hidden), -0.5 * edit(layer, hidden))
    assert scale(weights, 1.0) is weights
    subtracting = (weights_of(3, subtract=True, activation="relu"),)
    assert scale(subtracting, 1.0) is subtracting
    with pytest.raises(ValueError, match=r"with activation .relu.*got 2\.0"):
        scale(subtracting, 2.0)


def test_concatenated_groups_edit_as_each_adapter():
    adapters = [weights_of(2), weights_of(4, 2, dtype=torch.float64), weights_of(1, encode=False)]
    joined, hidden = concatenate(adapters), torch.randn(6, DIM)
    assert {tensor.dtype for tensor in joined[:3]} == {torch.float64}
    assert joined.decode.shape == (4, 4, DIM) and joined.bias.shape == (4, 4)
    expected = torch.cat([edit(adapter, hidden).expand(-1, 6, -1) for adapter in adapters])
    torch.testing.assert_close(edit(joined, hidden), expected)
    assert concatenate(adapters[:1]) is adapters[0]
    without_encode = [weights_of(2, encode=False), weights_of(1, encode=False)]
    assert concatenate(without_encode).encode is None


def test_bytes():
    assert num_bytes(weights_of(2, 3)) == 3 * (2 * 2 * DIM + 2) * 4
    assert num_bytes(weights_of(2, 3, encode=False)) == 3 * (2 * DIM + 2) * 4
