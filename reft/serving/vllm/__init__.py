"""ReFT adapters on stock vLLM: a plugin, no fork.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). It adds
two architectures, which ``hf_overrides`` selects: ``ReftLlamaForCausalLM``, vLLM's own Llama, and
``ReftTransformersForCausalLM``, any decoder that vLLM runs through transformers. Outside vLLM
nothing of this package is imported.
"""

from __future__ import annotations

#: Architecture to its class, as vLLM's registry spells it.
ARCHITECTURES = {
    "ReftLlamaForCausalLM": "reft.serving.vllm.models:ReftLlamaForCausalLM",
    "ReftTransformersForCausalLM": "reft.serving.vllm.models:ReftTransformersForCausalLM",
}


def register() -> None:
    """Add the architectures and install the patches. A second call does nothing.

    Raises:
        RuntimeError: this vLLM lacks a function that must be patched.
    """
    from vllm import ModelRegistry

    from reft.serving.vllm import patches

    for name, path in ARCHITECTURES.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, path)
    patches.install()
