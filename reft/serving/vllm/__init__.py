"""ReFT adapters on stock vLLM: a plugin, no fork.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). It adds
two architectures, chosen with ``hf_overrides``: ``ReftLlamaForCausalLM``, vLLM's own Llama, and
``ReftTransformersForCausalLM``, any decoder that vLLM runs through transformers. Nothing here is
imported outside vLLM.
"""

from __future__ import annotations

#: Architecture -> where its class is.
ARCHITECTURES = {
    "ReftLlamaForCausalLM": "reft.serving.vllm.models:ReftLlamaForCausalLM",
    "ReftTransformersForCausalLM": "reft.serving.vllm.models:ReftTransformersForCausalLM",
}


def register() -> None:
    """Add the architectures and put the seams in place; a second call does nothing.

    Raises:
        RuntimeError: this vLLM lacks a seam.
    """
    from vllm import ModelRegistry

    from reft.serving.vllm import patches as seams

    for name, where in ARCHITECTURES.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, where)
    seams.install()
