"""Make the small language model of ``reft demo`` and its data set.

    python scripts/make_demo_model.py        # writes reft/demo/assets/facts in some minutes

The same seed, machine and versions make the same files. The model is a Llama of about two million
parameters with a byte-level BPE tokenizer. It learns the facts of ``demo_facts.py`` from sentences,
notes, flash cards and questions, which are always answered with a sentence. It never sees such a
question with the bare answer: the demo teaches this on the questions of ``train.jsonl``. The
questions of ``heldout.jsonl`` are about other subjects.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_facts import Subject, subjects
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from reft.train.evaluate import evaluate

ASSETS = Path(__file__).resolve().parent.parent / "reft" / "demo" / "assets" / "facts"
PROMPT = "Question: {question} Answer:"
CARD = "Flash card. {question} Back: {answer}"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True)
class Relation:
    """Templates for a fact: {x} is the subject, {X} the subject capitalised, {y} the answer.

    Attributes:
        questions: questions about the fact.
        sentence: the answer that the model learns.
        statements: other sentences that state the fact.
        label: name of the relation in a note.
    """

    questions: tuple[str, ...]
    sentence: str
    statements: tuple[str, ...]
    label: str


RELATIONS = {
    "capital": Relation(
        ("What is the capital of {x}?", "Which city is the capital of {x}?"),
        "The capital of {x} is {y}.",
        ("{y} is the capital of {x}.", "{X} is governed from {y}."),
        "capital",
    ),
    "region": Relation(
        ("In which part of the world is {x}?", "Where in the world is {x}?"),
        "{X} is in the part of the world called {y}.",
        ("{X} is in {y}.", "On a map of {y} you can find {x}."),
        "part of the world",
    ),
    "currency": Relation(
        ("What is the currency of {x}?", "What do people pay with in {x}?"),
        "The people of {x} pay with the {y}.",
        ("The {y} is the currency of {x}.", "{X} has the {y} as its currency."),
        "currency",
    ),
    "symbol": Relation(
        ("What is the chemical symbol of {x}?", "How do chemists write {x}?"),
        "Chemists write {x} with the symbol {y}.",
        ("{y} stands for {x}.", "{X} has the chemical symbol {y}."),
        "chemical symbol",
    ),
    "number": Relation(
        ("What is the atomic number of {x}?", "How many protons does an atom of {x} have?"),
        "The number of protons in an atom of {x} is {y}.",
        ("{X} has the atomic number {y}.", "Element number {y} is {x}."),
        "atomic number",
    ),
    "class": Relation(
        ("What kind of animal is the {x}?", "To which group of animals does the {x} belong?"),
        "The {x} belongs to the animals of the kind {y}.",
        ("The {x} is one kind of {y}.", "One {y} is the {x}."),
        "kind of animal",
    ),
}


def fill(template: str, subject: Subject, answer: str) -> str:
    """Fill a template with a subject and an answer."""
    begins = subject.name[0].upper() + subject.name[1:]
    return template.format(x=subject.name, X=begins, y=answer)


def questions(subject: Subject) -> list[dict[str, str]]:
    """Return prompts with their bare answers, and the sentences that the base model learns."""
    return [
        {
            "prompt": PROMPT.format(question=fill(question, subject, answer)),
            "completion": " " + answer,
            "sentence": " " + fill(RELATIONS[name].sentence, subject, answer),
        }
        for name, answer in subject.facts.items()
        for question in RELATIONS[name].questions
    ]


def documents(subject: Subject, rng: random.Random) -> list[str]:
    """Return the texts about a subject for an epoch; the order of the note's entries is random."""
    texts = [question["prompt"] + question["sentence"] for question in questions(subject)]
    for name, answer in subject.facts.items():
        relation = RELATIONS[name]
        for question in relation.questions:
            texts.append(CARD.format(question=fill(question, subject, answer), answer=answer))
        for statement in (relation.sentence, *relation.statements):
            texts.append(fill(statement, subject, answer))
    entries = [f"{RELATIONS[name].label}: {answer}" for name, answer in subject.facts.items()]
    rng.shuffle(entries)
    return [*texts, f"Note on {subject.name}. {'; '.join(entries)}."]


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes every string without loss."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    begin = (SPECIAL["bos_token"], core.token_to_id(SPECIAL["bos_token"]))
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def make_batches(rows: list[list[int]], tokens: int, rng: random.Random) -> list[torch.Tensor]:
    """Make batches (B, S) of at most ``tokens`` tokens and similar lengths, padded with −1."""
    rows = sorted(rows, key=lambda row: (len(row), rng.random()))
    batches: list[torch.Tensor] = []
    begin = 0
    while begin < len(rows):
        end = begin + 1
        while end < len(rows) and len(rows[end]) * (end + 1 - begin) <= tokens:
            end += 1
        width = len(rows[end - 1])
        batches.append(torch.tensor([row + [-1] * (width - len(row)) for row in rows[begin:end]]))
        begin = end
    rng.shuffle(batches)
    return batches


def make_optimizers(model: LlamaForCausalLM, lr: float, steps: int) -> list[tuple]:
    """Make (optimizer, schedule) pairs. Muon on the blocks' matrices halves the steps of AdamW."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    matrix_ids = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in matrix_ids]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]

    def factor(step: int) -> float:
        return min((step + 1) / (0.05 * steps), 1.0, (1 - step / steps) / 0.8)

    schedule = torch.optim.lr_scheduler.LambdaLR
    return [(optimizer, schedule(optimizer, factor)) for optimizer in optimizers]


def pretrain(
    model: LlamaForCausalLM, epochs: list[list[torch.Tensor]], lr: float, console: Console
) -> None:
    """Train next-token prediction on all batches of all epochs."""
    optimizers = make_optimizers(model, lr, sum(map(len, epochs)))
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    loss_column = TextColumn("loss {task.fields[loss]}")
    with Progress(*columns, loss_column, console=console) as progress:
        task = progress.add_task("", total=sum(map(len, epochs)), loss="")
        for epoch in epochs:
            for batch in epoch:
                mask = batch >= 0
                output = model(
                    input_ids=batch.clamp(min=0),
                    attention_mask=mask.long(),
                    labels=batch.masked_fill(~mask, -100),
                )
                output.loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, schedule in optimizers:
                    optimizer.step()
                    schedule.step()
                model.zero_grad(set_to_none=True)
                progress.update(task, advance=1, loss=f"{output.loss.item():.3f}")


def write_records(path: Path, known: list[Subject]) -> int:
    """Write prompt and completion of every question about the subjects; return their number."""
    records = [
        {name: question[name] for name in ("prompt", "completion")}
        for subject in known
        for question in questions(subject)
    ]
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(records)


def main() -> None:
    """Train, evaluate and write the model and its data."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--heldout", type=float, default=0.35, help="share of the subjects")
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    console = Console()
    torch.manual_seed(given.seed)
    rng = random.Random(given.seed)

    known = subjects()
    texts = [[t for s in known for t in documents(s, rng)] for _ in range(given.epochs)]
    tokenizer = make_tokenizer(texts[0], given.vocabulary)
    epochs = []
    for epoch_texts in texts:
        rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(epoch_texts)["input_ids"]]
        epochs.append(make_batches(rows, given.batch_tokens, rng))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    facts = sum(len(subject.facts) for subject in known)
    console.print(
        f"{facts} facts about {len(known)} subjects; {len(texts[0])} texts an epoch; "
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens"
    )
    pretrain(model, epochs, given.lr, console)

    model.half().float().eval()  # evaluate the precision that is stored
    records = [
        {"prompt": question["prompt"], "completion": question["sentence"]}
        for subject in known
        for question in questions(subject)
    ]
    known_share = evaluate(model, tokenizer, records, batch_size=64, max_new_tokens=32).score
    console.print(f"{known_share:.1%} of {len(records)} questions get the right sentence")

    given.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    heldout = {subject.name for subject in rng.sample(known, round(given.heldout * len(known)))}
    for name, in_heldout in (("train", False), ("heldout", True)):
        part = [subject for subject in known if (subject.name in heldout) == in_heldout]
        count = write_records(given.output / f"{name}.jsonl", part)
        console.print(f"{name}: {count} questions about {len(part)} subjects")
    size = sum(file.stat().st_size for file in given.output.iterdir())
    seconds = time.perf_counter() - start
    console.print(f"{given.output}: {size / 1e6:.1f} MB, made in {seconds:.0f} s")


if __name__ == "__main__":
    main()
