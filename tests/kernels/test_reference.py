"""The reference, the oracle of all other tests, against numbers computed by hand and the formula of
each member."""

from __future__ import annotations

import pytest
import torch

from reft_kernels import FAMILY, RowPlan, reference
from reft_kernels.devtools.testing import Case, make_edit

HIDDEN = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [-1.0, 0.0, 2.0]])


@pytest.mark.parametrize(
    ("subtract", "activation", "expected"),
    [
        # u = (1·1 − 1·3 + 1, 2·2 − 1) = (−1, 3); R h = (1 + 2, 3) = (3, 3)
        (False, None, [0.0, 1.0, 6.0]),  # h + Rᵀ(−1, 3)
        (True, None, [-3.0, -2.0, 3.0]),  # h + Rᵀ(−4, 0)
        (False, "relu", [1.0, 2.0, 6.0]),  # h + Rᵀ(0, 3)
        (True, "relu", [-2.0, -1.0, 3.0]),  # h + Rᵀ(−3, 0)
    ],
)
def test_by_hand(subtract, activation, expected, device):
    encode = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], device=device)
    bias = torch.tensor([1.0, -1.0], device=device)
    decode = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], device=device)
    out = reference.lowrank_edit(
        HIDDEN.to(device),
        RowPlan.from_rows([0]).to(device),
        encode,
        bias,
        decode,
        subtract=subtract,
        activation=activation,
    )
    assert out.tolist() == [expected, [4.0, 5.0, 6.0], [-1.0, 0.0, 2.0]]


def test_gradients_by_hand(device):
    """h' = h + r (w·h + b) with one row, D = 2, upstream v: everything in integers."""
    hidden, w, b, r = (
        torch.tensor(values, device=device, requires_grad=True)
        for values in ([[1.0, 2.0], [5.0, 7.0]], [[3.0, -1.0]], [2.0], [[2.0, 1.0]])
    )
    out = reference.lowrank_edit(hidden, RowPlan.from_rows([0]).to(device), w, b, r)
    assert out.tolist() == [[7.0, 5.0], [5.0, 7.0]]  # s = 3 − 2 + 2
    out.backward(torch.tensor([[10.0, 1.0], [1.0, 1.0]], device=device))  # ds = 21
    assert hidden.grad.tolist() == [[73.0, -20.0], [1.0, 1.0]]
    assert w.grad.tolist() == [[21.0, 42.0]] and b.grad.tolist() == [21.0]
    assert r.grad.tolist() == [[30.0, 3.0]]


FORMULAS = {
    "loreft": lambda h, w, b, r: h + (h @ w.T + b - h @ r.T) @ r,
    "direft": lambda h, w, b, r: h + (h @ w.T + b) @ r,
    "noreft": lambda h, w, b, r: h + (h @ w.T + b - h @ r.T) @ r,
    "direft_orthonormal": lambda h, w, b, r: h + (h @ w.T + b) @ r,
    "consreft": lambda h, w, b, r: h + (b - h @ r.T) @ r,
    "lobireft": lambda h, w, b, r: h + b @ r,
}


@pytest.mark.parametrize("member", FAMILY)
def test_each_member_is_its_formula(member, device):
    edit = make_edit(Case(12, 3, (4, 0, 3), member=member, dtype=torch.float64), device)
    out = reference.lowrank_edit(
        edit.hidden, edit.plan, edit.encode, edit.bias, edit.decode, **edit.options
    )
    expected = edit.hidden.clone()
    for group, (start, end) in enumerate(
        zip(edit.plan.offsets, edit.plan.offsets[1:], strict=False)
    ):
        for row in edit.plan.rows[start:end].tolist():
            w = None if edit.encode is None else edit.encode[group]
            expected[row] = FORMULAS[member](
                edit.hidden[row], w, edit.bias[group], edit.decode[group]
            )
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.host("a table of names")
def test_the_family_table_holds_the_six_and_their_crossed_names():
    switches = {n: (s.has_encode, s.subtract, s.orthonormal) for n, s in FAMILY.items()}
    assert switches == {
        "loreft": (True, True, True),
        "direft": (True, False, False),
        "noreft": (True, True, False),
        "direft_orthonormal": (True, False, True),
        "consreft": (False, True, True),
        "lobireft": (False, False, True),
    }
    assert all(name == spec.name for name, spec in FAMILY.items())
    assert FAMILY["direft"].pyreft == "NodireftIntervention"
    assert FAMILY["direft_orthonormal"].pyreft == "DireftIntervention"
    with pytest.raises(TypeError):
        FAMILY["other"] = FAMILY["loreft"]


def test_loreft_orders_its_arguments_as_the_paper_does(device):
    edit = make_edit(Case(12, 3, (4,)), device)
    args = (edit.hidden, edit.plan)
    out = reference.loreft(*args, edit.decode, edit.encode, edit.bias)
    assert torch.equal(
        out, reference.lowrank_edit(*args, edit.encode, edit.bias, edit.decode, subtract=True)
    )
