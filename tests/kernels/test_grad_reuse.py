"""An upstream gradient is overwritten if nobody else holds it, and never otherwise."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.utils.checkpoint import checkpoint

from reft_kernels import RowPlan, grad_reuse, lowrank_edit_, torch_backend
from reft_kernels._triton import launch
from reft_kernels.devtools.testing import same_bits

DIM, RANK, ROWS = 24, 3, 10


@pytest.fixture(autouse=True, params=["plain", "hooked"])
def frames(request):
    """Run each test normally and while a hook evaluates frames, which adds a reference to the
    arguments of every call. torch.compile leaves such a hook after a failed compilation."""
    if request.param == "plain":
        yield
        return
    before = set_eval_frame(False)
    grad_reuse.uncalibrated = True  # as after the first backward under the hook
    yield
    set_eval_frame(before)


def random_leaf(shape, seed, device):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device).requires_grad_()


@pytest.fixture
def parameters(device):
    return [
        random_leaf(shape, seed, device)
        for seed, shape in enumerate(((RANK, DIM), (RANK,), (RANK, DIM)))
    ]


@pytest.fixture
def source(device):
    return random_leaf((ROWS, DIM), 9, device)


def edit(hidden, parameters, backend="torch"):
    plan = RowPlan.from_rows([1, 4, 7]).to(hidden.device)
    return lowrank_edit_(hidden, plan, *parameters, backend=backend)


@pytest.fixture
def overwritten(monkeypatch):
    """Record whether each backward overwrote its gradient."""
    overwrites = []

    def noted(real):
        def edit_backward(*args, **kwargs):
            overwrites.append(kwargs["overwrite"])
            return real(*args, **kwargs)

        return edit_backward

    for module in (torch_backend, launch):
        monkeypatch.setattr(module, "edit_backward", noted(module.edit_backward))
    return overwrites


@pytest.fixture
def never(monkeypatch):
    """Compute gradients with every upstream gradient copied."""

    def of(build, *leaves):
        with monkeypatch.context() as patch:
            patch.setattr(grad_reuse, "exclusive", lambda grad: False)
            return torch.autograd.grad(build(), leaves)

    return of


def check(build, leaves, never):
    """Compare the gradients with those from copies, bit for bit."""
    for got, wanted in zip(
        torch.autograd.grad(build(), leaves), never(build, *leaves), strict=True
    ):
        assert same_bits(got, wanted)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_residual_stream_is_never_copied(source, parameters, backend, overwritten, never, device):
    weight = random_leaf((DIM, DIM), 2, device).detach()

    def build():
        hidden = source * 1.0
        for _ in range(3):
            hidden = hidden + torch.nn.functional.layer_norm(hidden, (DIM,)) @ weight
            hidden = edit(hidden, parameters, backend)
        return torch.nn.functional.layer_norm(hidden, (DIM,)).square().sum()

    check(build, [source, *parameters], never)
    assert overwritten == [True, True, True, False, False, False]


def test_gradient_given_by_the_caller_is_left_alone(source, parameters, overwritten):
    given = torch.randn(ROWS, DIM, device=source.device)
    before = given.clone()
    out = edit(source * 1.0, parameters)
    torch.autograd.grad(out, [source, *parameters], given)
    assert overwritten == [False] and same_bits(given, before)


def test_a_new_way_of_calling_copies_once(source, parameters, overwritten):
    """The first backward under an unmeasured way of calling copies; the next forward measures."""
    measured = dict(grad_reuse._unshared)
    grad_reuse._unshared.clear()
    grad_reuse.uncalibrated = False
    try:
        for _ in range(2):
            (edit(source * 1.0, parameters) * 2.0).sum().backward()
    finally:
        grad_reuse._unshared.update(measured)
    assert overwritten == [False, True]


def test_hook_that_keeps_the_gradient_keeps_its_values(source, parameters, overwritten, never):
    kept = []

    def build(hooked=True):
        out = edit(source * 1.0, parameters)
        if hooked:
            out.register_hook(kept.append)
        return (out * 2.0 + out * out).sum()

    torch.autograd.grad(build(), source)
    assert overwritten == [False]
    out = edit(source * 1.0, parameters)
    torch.testing.assert_close(kept[0], 2.0 + 2.0 * out.detach(), rtol=0, atol=1e-6)
    check(lambda: build(False), [source, *parameters], never)


def test_retained_gradient_keeps_its_values(source, parameters):
    out = edit(source * 1.0, parameters)
    out.retain_grad()
    (out * 2.0 + out * 3.0).sum().backward()
    assert torch.equal(out.grad, torch.full_like(out, 5.0))


def test_hook_on_the_node_sees_the_gradient_that_came(source, parameters, overwritten):
    seen = []
    out = edit(source * 1.0, parameters)
    out.grad_fn.register_hook(lambda grads_in, grads_out: seen.append(grads_out[0].clone()))
    (out * 2.0 + out * 3.0).sum().backward()
    assert overwritten == [False]
    assert torch.equal(seen[0], torch.full_like(out, 5.0))


def test_two_edits_that_get_one_gradient(source, parameters, overwritten, never):
    def build():
        first, second = edit(source * 1.0, parameters), edit(source * 2.0, parameters)
        both = first + second
        return (both * 3.0 + both * 4.0).sum()

    check(build, [source, *parameters], never)
    assert not overwritten[0]


def test_gradient_of_the_edited_hidden_is_the_upstream_gradient(source, parameters):
    out = edit(source * 1.0, parameters)
    got, below = torch.autograd.grad((out * 2.0 + out * 3.0).sum(), [out, source])
    assert torch.equal(got, torch.full_like(out, 5.0))
    assert not torch.equal(below, got)


def test_graph_that_is_kept_gives_the_same_gradients_twice(source, parameters):
    out = edit(source * 1.0, parameters)
    loss = torch.nn.functional.layer_norm(out, (DIM,)).square().sum()
    first = torch.autograd.grad(loss, [source, *parameters], retain_graph=True)
    second = torch.autograd.grad(loss, [source, *parameters])
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda out: out.sum(), id="stretched"),
        pytest.param(lambda out: (out.T.contiguous() * 2.0).sum(), id="transposed"),
        pytest.param(lambda out: sum(p.sum() for p in out.split(5)), id="parts"),
    ],
)
def test_gradients_that_are_views(source, parameters, loss, never):
    check(lambda: loss(edit(source * 1.0, parameters)), [source, *parameters], never)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(source, parameters, reentrant, never):
    def block(hidden):
        return edit(hidden + torch.tanh(hidden), parameters)

    def build():
        hidden = source * 1.0
        for _ in range(2):
            hidden = checkpoint(block, hidden, use_reentrant=reentrant)
        return hidden.square().sum()

    leaves = [source, *parameters]

    def gradients():
        for leaf in leaves:
            leaf.grad = None
        build().backward()  # reentrant checkpoints know no autograd.grad
        return [leaf.grad.clone() for leaf in leaves]

    got = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad_reuse, "exclusive", lambda grad: False)
        wanted = gradients()
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


def test_two_threads(parameters, device):
    def gradient(seed):
        leaf = random_leaf((ROWS, DIM), seed, device)
        frozen = [parameter.detach() for parameter in parameters]
        for _ in range(20):
            out = edit(leaf * 1.0, frozen)
            (grad,) = torch.autograd.grad((out * out + out).sum(), leaf)
        return grad

    alone = [gradient(seed) for seed in (1, 2)]
    grads = {}
    threads = [
        threading.Thread(target=lambda s=seed: grads.update({s: gradient(s)})) for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(grads[seed], alone[seed - 1]) for seed in (1, 2))


def test_gradients_are_copied_without_reference_counts(
    source, parameters, monkeypatch, overwritten
):
    monkeypatch.setattr(grad_reuse, "_unshared", dict.fromkeys(range(10)))
    assert not grad_reuse.exclusive(torch.ones(2))
    monkeypatch.setattr(grad_reuse, "_facts", lambda grad: None)
    assert not grad_reuse.exclusive(torch.ones(2))
    loss = edit(source * 1.0, parameters).square().sum()
    assert torch.autograd.grad(loss, source)[0].shape == source.shape


@pytest.mark.host("fake tensors of the CPU")
def test_calibration_waits_for_plain_tensors(monkeypatch):
    from torch._subclasses import FakeTensorMode

    monkeypatch.setattr(grad_reuse, "_unshared", {})
    with FakeTensorMode():
        grad_reuse.calibrate()
    assert grad_reuse._unshared == {}
    with torch.no_grad():
        grad_reuse.calibrate()
    (facts,) = grad_reuse._unshared.values()
    assert facts is not None


AFTER_A_FAILURE = """
import torch
from reft_kernels import RowPlan, lowrank_edit_, torch_backend

def refused(x):
    raise ValueError

try:
    torch.compile(refused, fullgraph=True)(torch.ones(1))
except Exception as error:
    print(type(error).__name__)

real = torch_backend.edit_backward
def noted(*args, **kwargs):
    print(kwargs["overwrite"])
    return real(*args, **kwargs)
torch_backend.edit_backward = noted

leaf = torch.ones(4, 8).requires_grad_()
parameters = [torch.ones(shape).requires_grad_() for shape in ((2, 8), (2,), (2, 8))]
for keeps in (False, True):
    out = lowrank_edit_(leaf * 1.0, RowPlan.from_rows([1]), *parameters, backend="torch")
    seen = []
    if keeps:
        out.register_hook(seen.append)
    (out * 2.0 + out * out).sum().backward()
"""


@pytest.mark.host("a separate process; gradients of a GPU are handed over by the same code")
@pytest.mark.parametrize("frames", ["plain"], indirect=True)
def test_a_compilation_that_failed_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", AFTER_A_FAILURE], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Unsupported", "True", "False"]
