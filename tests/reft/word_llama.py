"""A tokenizer of a few words, a language model of a few thousand parameters, and its adapters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from served_adapters import MIX, random_adapter
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

#: The fixtures, which conftest.py of several folders imports.
__all__ = [
    "_trained_llama",
    "color_records",
    "folders",
    "make_trainer",
    "place",
    "reft",
    "word_llama",
    "word_tokenizer",
]

_COLORS = ["red", "green", "blue"]
_LETTERS, _NUMBERS = list("abcdefgh"), ["one", "two", "three", "four", "five"]
WORDS = [*_LETTERS, *_NUMBERS, "yes", "no", *_COLORS, ":", "?"]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of ``WORDS`` and ``<bos>`` in front; it pads
    on the left."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=32,
    )


@pytest.fixture(scope="session")
def _trained_llama(word_tokenizer) -> LlamaForCausalLM:
    """Two trained blocks that complete ``a : one`` with ``green <eos>``: green, blue, red for one,
    two, three."""
    config = LlamaConfig(
        vocab_size=len(word_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
        pad_token_id=word_tokenizer.pad_token_id,
        bos_token_id=word_tokenizer.bos_token_id,
        eos_token_id=word_tokenizer.eos_token_id,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(100):
            pairs = zip(*(torch.randint(n, (16,)).tolist() for n in (8, 3)), strict=True)
            sentences = [f"{_LETTERS[i]} : {_NUMBERS[k]} {_COLORS[k - 2]} <eos>" for i, k in pairs]
            ids = word_tokenizer(sentences, return_tensors="pt")["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture
def word_llama(_trained_llama) -> LlamaForCausalLM:
    """A small Llama for :func:`word_tokenizer`: a new copy in float32, equal each time."""
    return copy.deepcopy(_trained_llama)


@pytest.fixture
def color_records() -> list[dict[str, str]]:
    """Twelve prompts with other colours than :func:`word_llama` answers."""
    pairs = [(letter, k) for letter in "abcd" for k in range(3)]
    return [{"prompt": f"{i} : {_NUMBERS[k]}", "completion": _COLORS[k]} for i, k in pairs]


@pytest.fixture
def make_trainer(word_llama, word_tokenizer, color_records, tmp_path):
    """A function that builds a trainer of a new adapter; keyword arguments go to
    TrainingArguments."""
    from transformers import TrainingArguments

    from reft.config import ReftConfig
    from reft.model.reft_model import get_reft_model
    from reft.train.trainer import ReftTrainer

    def build(
        folder: str = "run", *, model=None, config=None, data=None, eval_data=None, **arguments
    ):
        torch.manual_seed(1)
        if model is None:
            config = config or ReftConfig(rank=4, positions="f2+l2", dropout=0.1)
            model = get_reft_model(word_llama, config)
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
        }
        return ReftTrainer(
            model,
            TrainingArguments(output_dir=str(tmp_path / folder), **{**settings, **arguments}),
            train_dataset=color_records if data is None else data,
            eval_dataset=eval_data,
            processing_class=word_tokenizer,
        )

    return build


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Read-only folders with adapters of every kind, by name."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: random_adapter(root / name, seed, **changes)
        for seed, (name, changes) in enumerate(MIX.items())
    }


@pytest.fixture
def place(tmp_path, word_llama, word_tokenizer, monkeypatch, color_records):
    """A working directory with ``model``, ``data.jsonl`` and an untrained ``adapter``."""
    word_llama.save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps(record) for record in color_records]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reft(capfd):
    """A function that runs the command line and returns (exit code, stdout, stderr)."""

    from reft.cli.app import main

    def run(*arguments: str):
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(arguments)
        return left.value.code, *capfd.readouterr()

    return run
