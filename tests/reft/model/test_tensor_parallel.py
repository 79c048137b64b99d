"""Bases under tensor parallelism: which outputs are replicated according to a plan, and which bases
are refused. Tests with several processes are in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import llama, tokens

from reft import ReftConfig, get_reft_model
from reft.model.tensor_parallel import TensorParallelPlan, find_plan

LLAMA = {
    "lm_head": "colwise_gather_output",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


def distributed(base, plan=LLAMA, **sizes):
    """A base with the attributes that transformers sets when it splits one."""
    base._device_mesh = object()
    base._tp_plan = plan
    plain = {"tp_size": 1, "ep_size": 1, "enable_expert_parallel": False}
    base.config.distributed_config = SimpleNamespace(**{**plain, **sizes})
    return base


def test_only_a_base_that_was_loaded_with_a_plan_is_split():
    base = llama()
    assert base.tp_plan and find_plan(base) is None
    assert find_plan(distributed(base, tp_size=4)) == TensorParallelPlan(4, LLAMA)
    assert find_plan(distributed(base, fsdp_size=4)) is None


def test_a_plan_says_which_outputs_are_replicated():
    plan = {
        **LLAMA,
        "model.layers.*.self_attn": "local_params",
        "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.experts.down_proj": "rowwise",
        "model.layers.*.mlp.experts": "moe_tp_experts",
        "model.layers.*.mlp.shared.up_proj": "colwise",
    }
    replicated = ["self_attn", "self_attn.o_proj", "mlp", "mlp.experts", "input_layernorm"]
    parts = ["self_attn.q_proj", "self_attn.q_norm", "mlp.experts.down_proj", "mlp.shared"]
    split = TensorParallelPlan(2, plan)
    assert split.replicated("model.layers", [*replicated, *parts, "mlp.router"]) == replicated


def test_projections_of_the_block_itself():
    """A norm that stands between them may see a slice."""
    plan = {"layers.*.fc1": "colwise", "layers.*.fc2": "rowwise"}
    paths = ["fc1", "fc2", "activation"]
    assert TensorParallelPlan(2, plan).replicated("layers", paths) == ["fc2"]


@pytest.mark.parametrize(
    ("component", "reason"),
    {
        "module:self_attn.q_proj": "a slice of it (style 'colwise')",
        "module:mlp.act_fn": "it works on a slice inside mlp",
    }.items(),
)
def test_a_slice_is_refused_with_the_reason(component, reason):
    base = distributed(llama(), tp_size=2)
    with pytest.raises(ValueError) as refused:
        get_reft_model(base, ReftConfig(rank=2, component=component))
    assert repr(component) in str(refused.value) and reason in str(refused.value)
    assert "reft" not in base._modules
    for allowed in ("block_output", "attention_output", "mlp_output", "module:mlp.down_proj"):
        get_reft_model(base, ReftConfig(rank=2, component=allowed)).unload()


@pytest.mark.parametrize(
    ("sizes", "plan", "message"),
    [
        ({"pp_size": 2}, LLAMA, "pipeline parallelism"),
        ({"tp_size": 2, "enable_sequence_parallel": True}, LLAMA, "sequence parallelism:"),
        ({"tp_size": 2}, {"model.norm": "sequence_parallel"}, "parallelism of model.norm:"),
    ],
)
def test_parts_of_a_prompt_are_refused(sizes, plan, message):
    base = distributed(llama(), plan, **sizes)
    with pytest.raises(ValueError, match=f"^base_model must not be under .*{message}"):
        get_reft_model(base, ReftConfig(rank=2))
    assert "reft" not in base._modules


def test_context_parallel_is_refused_while_it_is_on(monkeypatch):
    """torch replaces its attention function while context parallelism is on."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def replaced(*args, **kwargs):
        return attention(*args, **kwargs)

    replaced.__module__ = "torch.distributed.tensor.experimental._context_parallel._attention"
    model, ids = get_reft_model(llama(), ReftConfig(rank=2)), tokens(1, 5)
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", replaced)
        with pytest.raises(RuntimeError, match="inside torch's context_parallel"):
            model(ids)
        with model.disable_adapter():
            model(ids)
        monkeypatch.undo()
        assert torch.equal(model(ids).logits, expected)
