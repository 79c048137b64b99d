"""Make the small language model that ``reft demo`` ships with, and its data set.

    python scripts/make_demo_model.py        # writes reft/demo/assets/facts, in some minutes

Seeded: the same machine and versions make the same files. The model is a Llama of about two million
parameters with a byte-level BPE tokenizer of its own. It learns the facts of ``demo_facts.py`` from
sentences that begin with the subject or with the answer, from notes, from flash cards, and from
questions, which are always answered with a whole sentence. What it never sees is such a question
with the bare answer: the demo teaches it that on the questions of ``train.jsonl``; those of
``heldout.jsonl`` are about other subjects.
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
    """How a fact is put into words: {x} the subject, {X} beginning a sentence, {y} the answer.

    Attributes:
        questions: what is asked.
        sentence: the answer that the model learns to give.
        statements: other sentences that say the same.
        label: the name of the relation in a note.
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
    """A template about a subject."""
    begins = subject.name[0].upper() + subject.name[1:]
    return template.format(x=subject.name, X=begins, y=answer)


def questions(subject: Subject) -> list[dict[str, str]]:
    """Prompt, completion as it is wanted, and the sentence that the base model is to give."""
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
    """One epoch's text about a subject; only the order of its note's entries is random."""
    texts = [one["prompt"] + one["sentence"] for one in questions(subject)]
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
    """Byte-level BPE trained on the text: every string has tokens and decodes to itself."""
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
    """(B, S) of at most ``tokens`` tokens, padded with −1; rows of like length stay together."""
    rows = sorted(rows, key=lambda row: (len(row), rng.random()))
    found: list[torch.Tensor] = []
    begin = 0
    while begin < len(rows):
        end = begin + 1
        while end < len(rows) and len(rows[end]) * (end + 1 - begin) <= tokens:
            end += 1
        width = len(rows[end - 1])
        found.append(torch.tensor([row + [-1] * (width - len(row)) for row in rows[begin:end]]))
        begin = end
    rng.shuffle(found)
    return found


def make_optimizers(model: LlamaForCausalLM, lr: float, steps: int) -> list[tuple]:
    """(optimizer, schedule) pairs: Muon on the blocks' matrices needs half of AdamW's steps."""
    matrices = [one for one in model.model.layers.parameters() if one.ndim == 2]
    taken = {id(one) for one in matrices}
    others = [one for one in model.parameters() if id(one) not in taken]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]

    def factor(step: int) -> float:
        return min((step + 1) / (0.05 * steps), 1.0, (1 - step / steps) / 0.8)

    schedule = torch.optim.lr_scheduler.LambdaLR
    return [(one, schedule(one, factor)) for one in optimizers]


def pretrain(
    model: LlamaForCausalLM, epochs: list[list[torch.Tensor]], lr: float, console: Console
) -> None:
    """Next-token training on all batches of all epochs."""
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
    """Write prompt and completion of every question about the subjects; how many."""
    records = [one for subject in known for one in questions(subject)]
    lines = [json.dumps({name: one[name] for name in ("prompt", "completion")}) for one in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(records)


def main() -> None:
    """Train, judge and write."""
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
    began = time.perf_counter()
    console = Console()
    torch.manual_seed(given.seed)
    rng = random.Random(given.seed)

    known = subjects()
    texts = [[t for s in known for t in documents(s, rng)] for _ in range(given.epochs)]
    tokenizer = make_tokenizer(texts[0], given.vocabulary)
    epochs = []
    for one in texts:
        rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(one)["input_ids"]]
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

    model.half().float().eval()  # what is judged is what is stored
    asked = [
        {"prompt": one["prompt"], "completion": one["sentence"]}
        for subject in known
        for one in questions(subject)
    ]
    known_share = evaluate(model, tokenizer, asked, batch_size=64, max_new_tokens=32).score
    console.print(f"{known_share:.1%} of {len(asked)} questions get the right sentence")

    given.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    held = {one.name for one in rng.sample(known, round(given.heldout * len(known)))}
    for name, wanted in (("train", False), ("heldout", True)):
        chosen = [one for one in known if (one.name in held) == wanted]
        count = write_records(given.output / f"{name}.jsonl", chosen)
        console.print(f"{name}: {count} questions about {len(chosen)} subjects")
    size = sum(one.stat().st_size for one in given.output.iterdir())
    seconds = time.perf_counter() - began
    console.print(f"{given.output}: {size / 1e6:.1f} MB, made in {seconds:.0f} s")


if __name__ == "__main__":
    main()
