"""Golden batches and verdicts for ``test_task_batches.py``, computed by the published code itself.

Runs ``examples/loreft/dataset.py`` and ``compute_metrics.py`` of stanfordnlp/pyreft @dafd099 with
pyreft 0.1.0, and ``commonsense_evaluate.py`` and ``evaluate.py`` of AGI-Edgerunners/LLM-Adapters
@8166572, on the records of ``tests/reft/paper/task_data``. Nothing of this library is imported. To
make the files again, with the environment of ``make_golden.py``::

    git clone https://github.com/stanfordnlp/pyreft /tmp/pyreft-examples
    git clone https://github.com/AGI-Edgerunners/LLM-Adapters /tmp/LLM-Adapters
    OMP_NUM_THREADS=1 python tests/parity/make_task_golden.py /tmp/pyreft-examples /tmp/LLM-Adapters

* The records are handed over as ``datasets.Dataset``, since the names of the sets lead to the hub.
* ``evaluate`` and ``fire`` are stubbed: they are imported for what is not called here.
* For batches of prompts the real ``compute_metrics`` runs, up to its call of ``generate``: a model
  that answers nothing keeps what it was called with.
* Every sequence has one token more than its text, onto which the positions point that a short
  prompt does not have. It is stored as it is; the test takes it away.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "tasks"
DATA = HERE.parent / "reft" / "paper" / "task_data"
PACKAGES = ("pyreft", "pyvene", "torch", "transformers", "datasets", "tokenizers")

#: case -> task of the published code, task here, file, split, positions, tied, layers, max_length
CASES: dict[str, tuple[str, str, str, str, str, bool, int, int]] = {
    "commonsense": (
        "commonsense", "commonsense", "ft-training_set/commonsense_170k", "train",
        "f7+l7", True, 3, 512,
    ),
    "commonsense-cut": (
        "commonsense", "commonsense", "ft-training_set/commonsense_170k", "train",
        "f7+l7", True, 3, 60,
    ),
    "commonsense-short": (
        "commonsense", "commonsense", "../short", "train", "f7+l7", True, 2, 512,
    ),
    "commonsense-short-untied": (
        "commonsense", "commonsense", "../short", "train", "f3+l5", False, 2, 512,
    ),
    "commonsense-prompts": (
        "commonsense", "commonsense", "dataset/boolq/test", "test", "f7+l7", True, 2, 512,
    ),
    "commonsense-short-prompts": (
        "commonsense", "commonsense", "../short", "test", "f7+l7", False, 2, 512,
    ),
    "arithmetic": (
        "math", "arithmetic", "ft-training_set/math_10k", "train", "f7+l7", True, 2, 512,
    ),
    "arithmetic-prompts": (
        "math", "arithmetic", "dataset/gsm8k/test", "test", "f7+l7", True, 2, 512,
    ),
    "ultrafeedback": (
        "ultrafeedback", "ultrafeedback", "ultrafeedback/train", "train", "f5+l5", False, 4, 768,
    ),
    "ultrafeedback-cut": (
        "ultrafeedback", "ultrafeedback", "ultrafeedback/train", "train", "f5+l5", False, 4, 100,
    ),
    "alpaca": (
        "alpaca", "alpaca", "ft-training_set/alpaca_data_cleaned", "train", "f1+l1", True, 2, 512,
    ),
    "gsm8k": ("gsm8k", "gsm8k", "gsm8k/train", "train", "f7+l7", False, 2, 512),
    "cola": ("glue", "glue/cola", "cola/train", "train", "f3", True, 2, 256),
    "cola-long-prefix": ("glue", "glue/cola", "cola/train", "train", "f11", True, 2, 256),
    "mnli": ("glue", "glue/mnli", "mnli/train", "train", "f1", True, 2, 256),
    "rte-cut": ("glue", "glue/rte", "rte/train", "train", "f11", True, 2, 16),
    "qnli": ("glue", "glue/qnli", "qnli/train", "train", "f11", True, 2, 256),
    "stsb": ("glue", "glue/stsb", "stsb/train", "train", "f3", True, 2, 256),
}  # fmt: skip

#: Prompts of a few tokens: fewer than are edited.
SHORT = [
    {"instruction": text, "input": "", "output": "the correct answer is true", "answer": "true"}
    for text in ("Why?", "Is it so, true or false?", "a", "Answer", "Two and two are four, or not?")
]


def rows_of(name: str) -> list[dict[str, Any]]:
    if name == "../short":
        return SHORT
    for ending in (".json", ".jsonl"):
        path = DATA / f"{name}{ending}"
        if path.exists():
            text = path.read_text(encoding="utf-8")
            if text.startswith("["):
                return json.loads(text)
            return [json.loads(line) for line in text.splitlines()]
    raise FileNotFoundError(name)


def llama_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer like LLaMA's: pieces with ▁, bytes for unknown text, <s> in front, no
    padding token."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special + bytes_, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def roberta_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer like RoBERTa's: pieces of bytes, <s> A </s></s> B </s>."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    pieces.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
    )


class Silent:
    """Replaces the model in ``compute_metrics``: records its arguments and answers nothing."""

    model = None

    def generate(self, **arguments: Any) -> tuple[None, torch.Tensor]:
        self.arguments = arguments
        return None, arguments["base"]["input_ids"]


def evaluation_batch(
    task: str, tokenizer: PreTrainedTokenizerFast, made: Any, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the batch that the published evaluation passes to ``generate``."""
    from compute_metrics import compute_metrics

    model = Silent()
    trigger = made.trigger_tokens
    compute_metrics(
        task, "set", model, tokenizer, made, rows, trigger, "run", len(made),
        greedy_decoding=True,
    )  # fmt: skip
    base, locations = model.arguments["base"], model.arguments["unit_locations"]
    return {
        "input_ids": base["input_ids"].contiguous(),
        "attention_mask": base["attention_mask"].contiguous(),
        # (layers, batch, positions) as pyvene wants them
        "intervention_locations": torch.tensor(locations["sources->base"][1]).permute(1, 0, 2)
        .contiguous(),
    }  # fmt: skip


def batch_of(case: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> dict[str, Any]:
    from dataset import LoReftGLUEDataset, LoReftSupervisedDataset
    from pyreft import ReftDataCollator

    task, _, name, split, positions, tied, layers, max_length = CASES[case]
    rows = Dataset.from_list(rows_of(name))
    classify = task == "glue"
    tokenizer = tokenizers["roberta" if classify else "llama"]
    tokenizer.model_max_length, tokenizer.padding_side = max_length, "right"
    tokenizer.pad_token = tokenizer.unk_token
    interventions = layers if tied or "+" not in positions else 2 * layers
    settings = {
        "num_interventions": interventions,
        "position": positions,
        "share_weights": tied,
        "test_split": "test",
    }
    if classify:
        set_name = name.split("/")[0]
        if set_name != "stsb":
            classes = 3 if set_name == "mnli" else 2
            rows = rows.cast_column("label", ClassLabel(num_classes=classes))
        made = LoReftGLUEDataset(
            task, set_name, tokenizer, data_split=split, dataset=rows, **settings
        )
        collate = DataCollatorWithPadding(tokenizer=tokenizer, padding="longest")
    else:
        made = LoReftSupervisedDataset(
            task, str(DATA), tokenizer, data_split=split, dataset=rows, **settings
        )
        collate = DataCollatorForSeq2Seq(
            tokenizer=tokenizer, model=None, label_pad_token_id=-100, padding="longest"
        )
    if split == "train":
        batch = ReftDataCollator(data_collator=collate)([made[at] for at in range(len(made))])
        return {
            key: torch.as_tensor(batch[key]).contiguous()
            for key in ("input_ids", "labels", "attention_mask", "intervention_locations")
        }
    return evaluation_batch(task, tokenizer, made, list(rows))


#: Pieces of which answers are made up, with what is known to be odd about each rule.
PIECES = (
    "the correct answer is ", "The correct answer is ", "### Response:", "### Response:\n",
    "true", "false", "True", "solution1", "solution2", "answer1", "answer5", "answer3", "ending4",
    "option1", "option2", "A", "B", "(C)", "A shopkeeper sells", "E", "18", "18.", "-3", "3-4",
    "1,234.50", "$1,000", "25%", "0.625", ".5", "7.0", "1e3", "x = 12", " ", " ", "\n", ".", ",",
    "The answer is ", "is", "not",
)  # fmt: skip


def made_up_answers() -> list[str]:
    chooser = random.Random(0)
    texts = ["", "true", "the correct answer is true", "the correct answer is true.", "3-4"]
    for _ in range(600):
        texts.append("".join(chooser.choice(PIECES) for _ in range(chooser.randint(1, 9))))
    return texts


def verdicts() -> dict[str, Any]:
    import commonsense_evaluate
    import compute_metrics
    import evaluate as llm_evaluate

    texts = made_up_answers()
    triggers = ["the correct answer is ", "### Response:"]
    sets = {
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge",
        "openbookqa",
    }  # fmt: skip

    def number(function: Any, *given: Any) -> float | None:
        value = function(*given)
        return None if value == float("inf") else value

    args = types.SimpleNamespace
    return {
        "texts": texts,
        "output": {
            trigger: [compute_metrics.extract_output(text, trigger) for text in texts]
            for trigger in triggers
        },
        "number": [number(compute_metrics.extract_answer_number, text) for text in texts],
        "letter": [compute_metrics.extract_answer_letter(text) for text in texts],
        "choice": {
            name: [commonsense_evaluate.extract_answer(args(dataset=name), text) for text in texts]
            for name in sorted(sets)
        },
        "llm_number": [
            number(llm_evaluate.extract_answer_number, args(dataset="gsm8k"), text)
            for text in texts
        ],
        "llm_letter": [
            llm_evaluate.extract_answer_letter(args(dataset="AQuA"), text) for text in texts
        ],
    }


def main(pyreft_clone: Path, llm_adapters_clone: Path) -> None:
    stub = types.ModuleType("fire")
    stub.Fire = None  # type: ignore[attr-defined]
    sys.modules["fire"] = stub
    sys.path[:0] = [str(pyreft_clone / "examples" / "loreft")]
    hub = types.ModuleType("evaluate")
    sys.modules["evaluate"] = hub
    import compute_metrics  # noqa: F401  (with the stub of the hub's evaluate)

    texts = [path.read_text(encoding="utf-8") for path in sorted(DATA.rglob("*.json*"))]
    tokenizers = {"llama": llama_tokenizer(texts), "roberta": roberta_tokenizer(texts)}
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(GOLDEN / name)
    tensors = {}
    for case in CASES:
        for key, value in batch_of(case, tokenizers).items():
            tensors[f"{case}/{key}"] = value
    made = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    save_file(tensors, GOLDEN / "batches.safetensors", metadata={"made": json.dumps(made)})
    fields = ("their_task", "task", "file", "split", "positions", "tied", "layers", "max_length")
    cases = {case: dict(zip(fields, row, strict=True)) for case, row in CASES.items()}
    (GOLDEN / "cases.json").write_text(
        json.dumps({"made": made, "short": SHORT, "cases": cases}, indent=1) + "\n",
        encoding="utf-8",
    )
    del sys.modules["evaluate"]  # LLM-Adapters' file of that name is wanted now
    sys.path[:0] = [str(llm_adapters_clone)]
    (GOLDEN / "answers.json").write_text(
        json.dumps(verdicts(), indent=0, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
