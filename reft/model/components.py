"""The modules in a block whose outputs can be edited: attention, MLP, or any module by its path.

``attention_output`` and ``mlp_output`` mean what attention and MLP add to the residual stream. The
module that returns it differs between architectures; the tables below say where to look.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

#: Component -> paths in a block of the module whose output is added to the residual stream; the
#: first that exists is taken. If attention or MLP add the residual themselves, or normalise the
#: sum, it is their last projection.
COMPONENT_PATHS: dict[str, tuple[str, ...]] = {
    "attention_output": (
        "self_attention.dense",  # BLOOM, Falcon
        "attention.output.dense",  # BERT and its relatives
        "attention.attn",  # MPNet
        "self_attn",
        "attn",
        "self_attention",
        "linear_attn",
        "multi_head_attention",
        "layer.0.SelfAttention",
        "layer.0.LocalSelfAttention",
        "layer.0.TransientGlobalSelfAttention",
        "attention",
    ),
    "mlp_output": (
        "mlp.dense_4h_to_h",  # BLOOM, Falcon, GPT-NeoX
        "ffn.down_proj",  # MPT
        "mlp",
        "feed_forward",
        "block_sparse_moe",
        "shared_mlp",
        "mlp_block",
        "ffn",
        "layer.2.DenseReluDense",
        "layer.2.mlp",
        "layer.1.DenseReluDense",
        "layer.1.mlp",
        "fc2",
        "output.dense",  # BERT and its relatives
    ),
}

#: Norms (attention's, MLP's) between a component and the residual sum, in blocks that have every
#: module of the row: there the norm's output is added. A single name does not decide it:
#: Llama's ``post_attention_layernorm`` is the norm before the MLP, Nomic BERT's that of the sum.
POST_NORMS: tuple[tuple[str, ...], ...] = (
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM-4
    ("post_self_attn_layernorm", "post_feedforward_layernorm"),  # T5Gemma
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma 2 to 4, OLMo 2, EXAONE 4
    ("post_attention_layernorm", "post_mlp_layernorm", "pre_mlp_layernorm"),  # AFMoE
    ("post_operator_norm", "post_ffn_norm"),  # LFM3
    ("post_norm1", "post_norm2"),  # HyperCLOVA X
)

#: Component -> modules whose outputs a block adds up: none of them alone is the component.
SUMMED: dict[str, tuple[str, ...]] = {"mlp_output": ("block_sparse_moe", "shared_mlp")}

#: Prefix of a component that names a module of the block by its path.
MODULE = "module:"


def find_component(block: nn.Module, component: str, where: str) -> tuple[str, nn.Module]:
    """Find the module of a block whose output is a component.

    Args:
        block: a block of the model.
        component: a key of :data:`COMPONENT_PATHS`, or "module:<path in the block>".
        where: words for the block in messages.

    Returns:
        Its path in the block, and the module.

    Raises:
        ValueError: the block has no such component, or it is a sum of several modules' outputs.
    """
    modules = callable_modules(block)
    summed = SUMMED.get(component, ())
    if summed and all(path in modules for path in summed):
        raise ValueError(
            f"ReftConfig.component must not be {component!r} {where}, which adds up the "
            f"outputs of {list_modules(summed)}; name one of these"
        )
    for path in _candidates(component, modules):
        if path in modules:
            return path, modules[path]
    raise ValueError(
        f"ReftConfig.component {component!r} is no part {where}; name one of its modules: "
        f"{list_modules(modules)}"
    )


def callable_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, of the modules inside a block that have an output: lists are never called."""
    return {
        path: module
        for path, module in block.named_modules()
        if path and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    }


def list_modules(paths: Iterable[str]) -> str:
    """Modules of a block for messages, each as a component that names it."""
    return ", ".join(f"{MODULE}{path}" for path in paths) or "it has none"


def _candidates(component: str, modules: Iterable[str]) -> list[str]:
    """Paths at which a component may be in a block with these modules, the best first."""
    if component not in COMPONENT_PATHS:
        return [component.removeprefix(MODULE)]
    column = list(COMPONENT_PATHS).index(component)
    norms = [row[column] for row in POST_NORMS if all(name in modules for name in row)]
    return [*norms, *COMPONENT_PATHS[component]]
