"""Errors name the argument, its value and the allowed values; no tensor is changed."""

from __future__ import annotations

import pytest
import torch

from reft_kernels import RowPlan, explain, loreft, lowrank_edit, lowrank_edit_
from reft_kernels.devtools.testing import same_bits

pytestmark = pytest.mark.host("a refusal comes before anything runs, and names the CPU")
D, R = 8, 2


def good(**changes):
    """Arguments of an edit that works, some replaced; made anew, so a test may spoil them."""
    random = torch.Generator().manual_seed(0)
    made = {
        "hidden": torch.randn(5, D, generator=random),
        "plan": RowPlan.from_rows([1, 3]),
        "encode": torch.randn(R, D, generator=random),
        "bias": torch.randn(R, generator=random),
        "decode": torch.randn(R, D, generator=random),
    }
    return made | changes


TWO = RowPlan.from_rows([1, 3], [0, 1], 2)
META = {"device": "meta"}
REFUSED = {
    # hidden
    "hidden-list": ({"hidden": [[1.0] * D]}, TypeError, "hidden must be a tensor, got list"),
    "hidden-int": (
        {"hidden": torch.ones(5, D, dtype=torch.int64)},
        TypeError,
        "hidden must have a dtype of .*float32.*got torch.int64",
    ),
    "hidden-complex": (
        {"hidden": torch.ones(5, D, dtype=torch.complex64)},
        TypeError,
        "hidden must have a dtype of .*got torch.complex64",
    ),
    "hidden-scalar": ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must be .*got a scalar"),
    "hidden-width": (
        {"hidden": torch.ones(5, D + 1)},
        ValueError,
        r"D = 9 columns.*got shape \(2, 8\)",
    ),
    "hidden-too-short": (
        {"hidden": torch.ones(3, D)},
        ValueError,
        r"plan names row 3, hidden has 3 rows \(shape \(3, 8\)\)",
    ),
    "hidden-empty": (
        {"hidden": torch.ones(0, D), "plan": RowPlan.from_rows([0])},
        ValueError,
        "plan names row 0, hidden has 0 rows",
    ),
    # plan
    "plan-list": ({"plan": [1, 3]}, TypeError, "plan must be a RowPlan, got list"),
    "plan-groups": ({"plan": TWO}, ValueError, r"decode holds 1 group\(s\), the plan has 2"),
    "plan-device": (
        {"plan": RowPlan.from_rows([1]).to("meta")},
        ValueError,
        "plan must be on hidden's device cpu, got meta",
    ),
    # decode
    "decode-none": ({"decode": None}, TypeError, "decode must be a tensor, got NoneType"),
    "decode-vector": ({"decode": torch.ones(D)}, ValueError, r"decode must be .*got shape \(8,\)"),
    "decode-4d": ({"decode": torch.ones(1, 1, R, D)}, ValueError, r"got shape \(1, 1, 2, 8\)"),
    "decode-width": ({"decode": torch.ones(R, D - 1)}, ValueError, r"D = 8 .*got shape \(2, 7\)"),
    "decode-transposed": ({"decode": torch.ones(D, R)}, ValueError, r"D = 8 .*got shape \(8, 2\)"),
    "decode-groups": (
        {"decode": torch.ones(3, R, D), "encode": None, "plan": TWO},
        ValueError,
        r"decode holds 3 group\(s\), the plan has 2",
    ),
    "rank-0": ({"decode": torch.ones(0, D)}, ValueError, "rank must lie in 1 … D = 8, got 0"),
    "rank-above-d": ({"decode": torch.ones(9, D)}, ValueError, "rank must lie in 1 … D = 8, got 9"),
    # encode, bias
    "encode-list": ({"encode": [1.0]}, TypeError, "encode must be a tensor or None, got list"),
    "encode-rank": (
        {"encode": torch.ones(R + 1, D)},
        ValueError,
        r"encode must have shape \(2, 8\) to match decode, got \(3, 8\)",
    ),
    "encode-stacked": ({"encode": torch.ones(1, R, D)}, ValueError, r"encode .*got \(1, 2, 8\)"),
    "bias-length": (
        {"bias": torch.ones(D)},
        ValueError,
        r"bias must have shape \(2,\) to match decode, got \(8,\)",
    ),
    "bias-number": ({"bias": 1.0}, TypeError, "bias must be a tensor or None, got float"),
    "no-edit": ({"encode": None, "bias": None}, ValueError, "encode and bias are both None"),
    # dtypes and devices
    "encode-dtype": (
        {"encode": torch.ones(R, D, dtype=torch.bfloat16)},
        TypeError,
        r"encode must be float32 or hidden's.*got torch.bfloat16 \(decode torch.float32\)",
    ),
    "bias-dtype": (
        {"bias": torch.ones(R, dtype=torch.float64)},
        TypeError,
        "bias must be float32 or hidden's torch.float32.*got torch.float64",
    ),
    "parameters-dtype": (
        {
            "encode": None,
            "decode": torch.ones(R, D, dtype=torch.float16),
            "bias": None,
            "subtract": True,
        },
        TypeError,
        "decode must be float32 or hidden's torch.float32.*got torch.float16",
    ),
    "encode-device": (
        {"encode": torch.ones(R, D, **META)},
        ValueError,
        "encode must be on hidden's device cpu, got meta",
    ),
    "decode-device": ({"decode": torch.ones(R, D, **META)}, ValueError, "decode .*cpu, got meta"),
    # options
    "activation": (
        {"activation": "swoosh"},
        ValueError,
        "activation must be None or one of relu, gelu, .*got 'swoosh'",
    ),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of auto, triton, torch, reference; got 'cuda'",
    ),
}


@pytest.mark.parametrize("function", [lowrank_edit, lowrank_edit_, explain])
@pytest.mark.parametrize("wrong", REFUSED)
def test_refused_and_nothing_changed(wrong, function, ran):
    changes, error, message = REFUSED[wrong]
    arguments = good(**changes)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error, match=message):
        function(**arguments)
    assert not ran, "ran before it refused"
    for name, value in before.items():
        if value.device.type == "cpu" and value.dtype is not torch.complex64:
            assert same_bits(arguments[name], value), f"{name} was changed"


@pytest.mark.parametrize("named", ["auto", "torch", "triton", "reference"])
def test_errors_are_the_same_for_every_backend(named, ran):
    for wrong in ("hidden-width", "rank-0", "hidden-too-short", "bias-length", "encode-device"):
        changes, error, message = REFUSED[wrong]
        with pytest.raises(error, match=message):
            lowrank_edit(**good(**changes), backend=named)
    assert not ran


def test_loreft_checks_its_own_arguments():
    given = good()
    with pytest.raises(ValueError, match=r"encode must have shape \(2, 8\)"):
        loreft(given["hidden"], given["plan"], given["decode"], torch.ones(3, D), given["bias"])


def test_valid_limits_work(device):
    """Rank D, the last row, one column: the valid neighbours of each error."""

    def ones(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device=device)

    hidden = torch.randn(4, D, device=device)
    plan = RowPlan.from_rows([3]).to(device)
    out = lowrank_edit(hidden, plan, None, ones(D), torch.eye(D, device=device), subtract=True)
    torch.testing.assert_close(out[3], ones(D))
    narrow = lowrank_edit(ones(4, 1), plan, None, ones(1), ones(1, 1))
    assert narrow.flatten().tolist() == [1.0, 1.0, 1.0, 2.0]
    low = hidden.to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        out = lowrank_edit(low, plan, None, ones(1, dtype=dtype), ones(1, D, dtype=dtype))
        assert out.dtype is torch.bfloat16 and torch.equal(out[3], low[3] + 1)
