"""Tiny decoders, adapters of many kinds, and what transformers says of them; engines in processes
of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from reft import ReftConfig, ReftModel
from reft.adapter.parameters import AdapterParameters
from reft.io.adapter_files import write_adapter

VOCAB, DIM, LAYERS = 256, 64, 4
DRIVER = Path(__file__).with_name("engine.py")
#: Heads of 32: vLLM's attention on CPUs knows no smaller ones.
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": 128,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
ADAPTERS = {
    "ends": {"rank": 4, "positions": "f3+l3"},
    "last": {"rank": 2, "positions": "l2"},
    "first": {"rank": 1, "positions": "f4", "intervention": "direft"},
    "untied": {"rank": 2, "positions": "f3+l2", "tied": False, "layers": [0, 2]},
    "prompt": {"rank": 3, "positions": "prompt", "intervention": "consreft"},
    "gelu": {"rank": 4, "positions": "f3+l3", "activation": "gelu"},
    "all": {"rank": 1, "positions": "all", "layers": [1, 3]},
    "generated": {"rank": 2, "positions": "prompt+g3"},
}


def write_random(path: Path, seed: int, *, dim: int = DIM, blocks: int = LAYERS, **changes) -> Path:
    """An adapter whose every term shows in the tokens."""
    config = ReftConfig(**changes)
    random = torch.Generator().manual_seed(seed)
    adapter = AdapterParameters(config, config.resolve_layers(blocks), dim, generator=random)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            step = torch.randn(parameter.shape, generator=random)
            parameter.add_(step, alpha=1.0 if name == "bias" else 0.1)
    write_adapter(path, config, adapter.export_state_dict())
    return path


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    words = {name: at for at, name in enumerate(special)}
    words |= {f"t{at}": at for at in range(len(special), VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    for name, kind in FAMILIES.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(kind(**SHAPE)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served") / "adapters"
    for seed, (name, changes) in enumerate(ADAPTERS.items()):
        write_random(root / name, seed, **changes)
    return root


class Reference:
    """transformers with this library's hooks, one request at a time."""

    def __init__(self, base: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        model.generation_config.eos_token_id = None  # the engine is told to ignore it
        self.model = ReftModel(model)
        self.known: dict[tuple, list[int]] = {}

    def tokens(self, ids, adapter=None, count=12, folder=None, scale=1.0) -> list[int]:
        name = "__base__"
        if adapter is not None:
            name = f"{folder.parent.name}-{adapter}".replace(".", "-")
            if name not in self.model.pool:
                self.model.pool.add(name, folder / adapter)
        key = (tuple(ids), name, count, scale)
        if key not in self.known:
            out = self.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                adapter_names=[name], adapter_scales=[scale], max_new_tokens=count,
                do_sample=False,
            )  # fmt: skip
            self.known[key] = out[0, len(ids) :].tolist()
        return self.known[key]


@pytest.fixture(scope="session")
def references(bases):
    made: dict[str, Reference] = {}

    def of(family: str = "llama") -> Reference:
        if family not in made:
            made[family] = Reference(bases[family])
        return made[family]

    return of


def prompts(lengths, seed=0, shared=0) -> list[list[int]]:
    """Random prompts; the first ``shared`` tokens are the same."""
    random = torch.Generator().manual_seed(seed)
    head = torch.randint(4, VOCAB, (shared,), generator=random).tolist()
    made = []
    for length in lengths:
        rest = torch.randint(4, VOCAB, (max(length, shared),), generator=random).tolist()
        made.append([*head, *rest[shared:]][:length])
    return made


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of an engine's process."""
    return {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **changes,
    }  # fmt: skip


@pytest.fixture
def engine(bases, folder, tmp_path):
    """Run an engine in a process of its own: settings and rounds of requests in, outputs out."""

    def run(rounds, *, family="llama", architecture="ReftLlamaForCausalLM", env=None, **settings):
        reft = {"folder": str(folder), "cache": str(tmp_path / "cache"), **settings.pop("reft", {})}
        options = {
            "model": str(bases[family]), "dtype": "float32", "block_size": 32,
            "max_num_batched_tokens": 64, "max_model_len": 256, "max_num_seqs": 8,
            "enforce_eager": True, "hf_overrides": {"architectures": [architecture]},
            "additional_config": {"reft": reft}, "skip_tokenizer_init": True,
            "disable_log_stats": False, **settings,
        }  # fmt: skip
        job = {"options": options, "rounds": rounds}
        (tmp_path / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, str(DRIVER), str(tmp_path / "job.json"), str(tmp_path / "out.json")],
            env=environment(**(env or {})), capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return json.loads((tmp_path / "out.json").read_text())

    return run


def request(ids, adapter=None, count=12, **more) -> dict:
    """A request as the driver reads it."""
    extra = {} if adapter is None else {"reft": adapter}
    return {"ids": ids, "count": count, "extra": {**extra, **more}}
