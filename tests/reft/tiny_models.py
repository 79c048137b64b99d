"""Models of a few thousand parameters, and a plain reference of the edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from reft import ReftConfig, ReftModel
from reft.adapter.parameters import AdapterParameters
from reft.model.edited_rows import edited_rows
from reft.model.prompts import ColumnRange, PromptSpans
from reft_kernels import orthonormalize

VOCAB, DIM, LAYERS, PAD = 40, 24, 3, 0


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=DIM,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


def bert(num_hidden_layers: int = LAYERS) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=3,
        pad_token_id=PAD,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).eval()


def tokens(batch: int, columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, columns), generator=generator)


def padded(lengths: Sequence[int], side: str, seed: int = 1) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return (input_ids, attention_mask, the sequences without padding)."""
    singles = [tokens(1, n, seed + i) for i, n in enumerate(lengths)]
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, sequence in enumerate(singles):
        n = sequence.shape[1]
        place = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, place], mask[row, place] = sequence[0], 1
    return ids, mask, singles


def moved(model: ReftModel, size: float = 0.1) -> ReftModel:
    """Add noise to the trainable parameters and switch to eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def parameters_of(model: ReftModel, name: str = "default") -> dict[str, Tensor | None]:
    """Return leaves with the values of an adapter's parameters, and R (L, g, r, D) computed from
    them."""
    adapter = model.base_model.reft.adapter(name)
    leaves = {
        key: value.detach().clone().requires_grad_() for key, value in adapter.named_parameters()
    }
    free = leaves.get("free")
    rotation = leaves.get("decode") if free is None else orthonormalize(free, adapter.base)
    return {"weight": None, **leaves, "rotation": rotation}


def edit(h: Tensor, config: ReftConfig, values: dict, layer: int, group: int) -> Tensor:
    """Compute h' = h + Rᵀ(act(W h + b) − σ R h) for rows h (n, D)."""
    spec, act = config.spec, getattr(torch, config.activation or "clone")
    r, b = values["rotation"][layer, group], values["bias"][layer, group]
    code = b if values["weight"] is None else h.float() @ values["weight"][layer, group].T + b
    code = act(code)
    if spec.subtract:
        code = code - h.float() @ r.T
    return (h.float() + code @ r).to(h.dtype)


def columns(config: ReftConfig, start: int, n: int) -> list[tuple[int, int]]:
    """Return (column, group) of every edited token of a prompt of n tokens from column ``start``
    on."""
    kind = config.parsed_positions
    if kind.kind != "ends":
        return [(start + j, 0) for j in range(n)]
    first, last = min(kind.first, n // 2), min(kind.last, n // 2)
    suffix = 0 if config.tied or not (kind.first and kind.last) else 1
    return [(start + j, 0) for j in range(first)] + [
        (start + n - last + k, suffix) for k in range(last)
    ]


@contextmanager
def plain_edits(
    blocks: Sequence[nn.Module],
    config: ReftConfig,
    values: dict,
    spans: Sequence[tuple[int, int]],
) -> Iterator[None]:
    """Edit the blocks' outputs out of place, token by token. ``spans`` has (start, prompt length)
    of each sequence."""
    layers = config.resolve_layers(len(blocks))

    def hook(index: int):
        def run(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            out = hidden.clone()
            for row, (start, n) in enumerate(spans):
                for column, group in columns(config, start, n):
                    if column < hidden.shape[1]:
                        new = edit(hidden[row, column : column + 1], config, values, index, group)
                        out[row, column] = new[0]
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return run

    handles = [blocks[layer].register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    for path in ("model.layers", "transformer.h", "bert.encoder.layer"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(f"no blocks in {type(model).__name__}")


def perturb(model: ReftModel) -> ReftModel:
    """Change an adapter so far that outputs change, and switch to eval mode."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.base_model.reft.adapter("default").parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


class NoReading(TorchDispatchMode):
    """A mode that fails on every operation that waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        return func(*args, **(kwargs or {}))


def edited_rows_of(
    config: ReftConfig,
    spans: PromptSpans,
    seq_len: int,
    *,
    start: int = 0,
    sequences: Tensor | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The rows that an adapter of this configuration edits in some columns."""
    adapter = AdapterParameters(config, (0,), 16, device="meta")
    chunk = ColumnRange(start, seq_len)
    return edited_rows(adapter, spans, chunk, sequences=sequences, given=given)
