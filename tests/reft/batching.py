"""A model with adapters of every kind, and the expected results of continuous batching."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from tiny_models import VOCAB, llama
from transformers import ContinuousBatchingConfig, GenerationConfig

from reft import ReftConfig, ReftModel, get_reft_model

STEPS = 8

#: name -> configuration: other interventions, ranks, layers, positions.
ADAPTERS = {
    "ends": {"positions": "f7+l7", "rank": 2},
    "untied": {"positions": "f3+l2", "tied": False, "intervention": "direft", "rank": 3},
    "prompt": {"positions": "prompt", "intervention": "consreft", "layers": [0, 2]},
    "early": {"positions": "l4", "prompt_end": "second_to_last", "layers": [1]},
    "each": {"positions": "f2+l2", "tied": False, "untied_by": "position", "rank": 1},
    "relu": {"positions": "f5", "intervention": "noreft", "activation": "relu", "rank": 5},
    "some": {"positions": "prompt+g2", "intervention": "noreft", "prompt_end": "second_to_last"},
    "all": {"positions": "all", "intervention": "direft", "rank": 1},
}

#: Lengths of prompts and their adapters; more than two chunks, and a single token, among them.
LENGTHS = [5, 9, 17, 33, 64, 100, 130, 40, 21, 7, 1, 2, 90, 24]
NAMES = [*ADAPTERS, "__base__", "ends", "some", "untied", "all", "prompt"]


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 4, **changes})


def shake(model: ReftModel, name: str, seed: int, size: float = 0.5) -> None:
    """Change an adapter's parameters so far that outputs change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.reft.adapter(name).parameters():
            value.add_(size * torch.randn(value.shape, generator=generator))


def make_model(adapters: Sequence[str] = tuple(ADAPTERS), base=None) -> ReftModel:
    """Build a model in eval mode whose first adapter is active."""
    base = llama(max_position_embeddings=256) if base is None else base
    base.config.eos_token_id = base.generation_config.eos_token_id = None
    model = get_reft_model(base, config(**ADAPTERS[adapters[0]]), adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config(**ADAPTERS[name]))
    for at, name in enumerate(adapters):
        shake(model, name, at)
    return model.eval()


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def generation(steps: int = STEPS, **changes) -> GenerationConfig:
    """Return settings of greedy search that does not end before ``steps`` tokens."""
    settings = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": -1}
    return GenerationConfig(**{**settings, "pad_token_id": 0, **changes})


def settings(*, page: int = 256, **changes) -> ContinuousBatchingConfig:
    """Return settings with chunks of at most 24 tokens and blocks of ``page`` tokens."""
    field = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
    changes = {"max_batch_tokens": 24, "num_blocks": 1024 // page + 16, **changes}
    return ContinuousBatchingConfig(**{field: page, "return_logprobs": True, **changes})


@torch.no_grad()
def one_by_one(
    model: ReftModel, inputs, names, *, steps: int = STEPS, scales=None
) -> list[tuple[list[int], list[float]]]:
    """Generate greedily for each prompt alone; return the tokens and their log probabilities in one
    forward of prompt and tokens."""
    rows = []
    for at, (ids, name) in enumerate(zip(inputs, names, strict=True)):
        how = {"adapter_names": [name], "adapter_scales": 1.0 if scales is None else scales[at]}
        prompt = torch.tensor([ids])
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=generation(steps, eos_token_id=None),
            **how,
        )
        new = whole[0, len(ids) :]
        logits = model(whole, prompt_lengths=[len(ids)], **how).logits[0, len(ids) - 1 : -1]
        picked = logits.log_softmax(-1)[torch.arange(len(new)), new]
        rows.append((new.tolist(), picked.tolist()))
    return rows


def check(outputs: dict, wanted: list[tuple[list[int], list[float]]]) -> None:
    """Check that the outputs, in order, are these."""
    assert len(outputs) == len(wanted)
    for output, (tokens, logprobs) in zip(outputs.values(), wanted, strict=True):
        assert output.error is None and output.generated_tokens == tokens
        torch.testing.assert_close(
            torch.tensor(output.logprobs), torch.tensor(logprobs), rtol=1e-4, atol=2e-5
        )


def version() -> tuple[int, int]:
    """Return transformers' version."""
    major, minor, *_ = transformers.__version__.split(".")
    return int(major), int(minor)
