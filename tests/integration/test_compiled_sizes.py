"""Compilation over batches of other sizes, export with a dynamic batch, and the error of
a trace."""

from __future__ import annotations

import pytest
import torch
from tiny_models import bert, llama, tokens

from reft import ReftConfig, get_reft_model
from reft.positions import IGNORED

SIZES = (2, 3, 5)


def padded(batch):
    ids = tokens(batch, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 4] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def labelled(batch):
    call = padded(batch)
    labels = call["input_ids"].clone()
    labels[:, :5] = IGNORED
    return {**call, "labels": labels}


def unmasked(batch):
    return {"input_ids": tokens(batch, 8), "use_cache": False}


def packed(batch):
    lengths = torch.tensor([3 + i % 3 for i in range(batch)])
    ends = lengths.cumsum(0)
    place = torch.cat([torch.arange(n) for n in lengths.tolist()])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32)
    return {
        "input_ids": tokens(1, int(ends[-1])), "position_ids": place[None], "use_cache": False,
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": 5, "max_length_k": 5,
    }  # fmt: skip


def compilations(model, make, grad):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in SIZES:
        call = make(batch)
        with torch.set_grad_enabled(grad):
            got, expected = compiled(**call).logits, model(**call).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    return len(graphs)


def small():
    return llama(num_hidden_layers=1)


@pytest.mark.parametrize(
    ("make", "grad"), [(padded, False), (labelled, True), (unmasked, False), (packed, True)]
)
def test_batches_of_other_sizes(make, grad):
    base = small().train(grad)
    alone = compilations(base, make, grad)
    model = get_reft_model(base, ReftConfig(rank=3, positions="f2+l2")).train(grad)
    assert compilations(model, make, grad) <= alone


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "f2+l1", "tied": False},
        {"positions": "prompt", "intervention": "noreft", "activation": "relu"},
        {"positions": "all", "intervention": "direft"},
    ],
)
def test_other_adapters(changes):
    model = get_reft_model(small(), ReftConfig(rank=3, **changes)).eval()
    assert compilations(model, padded, False) <= 2


def test_one_scale_and_one_part_for_all():
    config = ReftConfig(rank=4, positions="l2", subspaces={"a": [0, 1]})
    model = get_reft_model(small(), config).eval()

    def make(batch):
        return {**padded(batch), "adapter_scales": 0.5, "subspaces": "a"}

    assert compilations(model, make, False) <= 2


@pytest.mark.parametrize(("build", "strict"), [(small, False), (small, True), (bert, False)])
def test_export_with_a_dynamic_batch(build, strict):
    model = get_reft_model(build(), ReftConfig(rank=3, positions="f2+l2")).eval()
    call, other = padded(3), padded(6)
    if build is bert:
        del call["use_cache"], other["use_cache"]
    axes = {0: torch.export.Dim("batch", min=2, max=64)}
    shapes = {
        name: axes if isinstance(value, torch.Tensor) else None for name, value in call.items()
    }
    exported = torch.export.export(model, (), call, dynamic_shapes=shapes, strict=strict)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(**other).logits, model(**other).logits)


def test_a_trace_is_refused_in_words():
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    model = get_reft_model(llama(), ReftConfig(rank=3, positions="f2+l2")).eval()
    ids = tokens(2, 6)
    with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot record .* torch.export"):
        torch.jit.trace(Logits(model), (ids,))
    with model.disable_adapter():
        traced = torch.jit.trace(Logits(model), (ids,))
        torch.testing.assert_close(traced(ids), model(ids).logits)
    model(ids)  # the refused trace has left no state behind
