"""LoRA of PEFT, rank 8 on the query and value projections."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.cases import ModelCase
from benchmarks.machine import installed
from benchmarks.peers import Absent, Peer, Wrapped
from benchmarks.peers.model_calls import greedy_generation, loss_of

_TARGETS = {"llama": ["q_proj", "v_proj"], "roberta": ["query", "value"]}


def wrap(base: nn.Module, case: ModelCase) -> Wrapped:
    """Wrap the edited layers with ``peft.get_peft_model``."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Absent(f"PEFT is not installed: {error}; see benchmarks/README.md") from None
    torch.manual_seed(0)
    settings = LoraConfig(
        r=8,
        target_modules=_TARGETS[case.model],
        layers_to_transform=case.edited_layers,
        lora_dropout=0.0,
        init_lora_weights=False,
    )
    model = get_peft_model(base, settings)
    model.train()

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Wrapped(
        loss_of(model), trainable, model, greedy_generation(model), model.save_pretrained
    )


def load(base: nn.Module, folder: str) -> object:
    """Load with ``peft.PeftModel.from_pretrained``."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)


_NOTE = "rank 8 on q and v, whatever the rank of the case"
PEERS = (Peer("LoRA", installed("peft"), wrap=wrap, load=load, note=_NOTE),)
