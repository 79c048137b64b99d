"""Make the small language model that `reft demo` ships with, and its data set; seeded, a few minutes on two cores.

    python scripts/make_demo_model.py            # writes reft/demo/assets/facts/

The model (a Llama of about two million parameters with its own byte-level BPE tokenizer) learns the facts of
``demo_facts.py`` in several phrasings: sentences that begin with the subject or with the answer, short notes, and
questions. It answers a question in one way only, with a whole sentence. What it is never shown is a question followed by
the bare answer: that is what LoReFT teaches in the demo, from the questions about the training subjects alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from demo_facts import Subject, subjects
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "reft" / "demo" / "assets" / "facts"
PROMPT = "Question: {question}\nAnswer:"
CARD = "Flash card. {question}\nBack: {answer}."

# relation → its questions, the sentence that answers them, other sentences that say the same, its label in a note
# {x} the subject, {X} the same at the start of a sentence, {y} the answer
PHRASINGS: dict[str, tuple[list[str], str, list[str], str]] = {
    "capital": (
        ["What is the capital of {x}?", "Which city is the capital of {x}?"],
        "The capital of {x} is {y}.",
        ["{y} is the capital of {x}.", "{X} is governed from {y}."],
        "capital",
    ),
    "region": (
        ["In which part of the world is {x}?", "Where in the world is {x}?"],
        "{X} is in the part of the world called {y}.",
        ["{X} is in {y}.", "On a map of {y} you can find {x}."],
        "part of the world",
    ),
    "currency": (
        ["What is the currency of {x}?", "What do people pay with in {x}?"],
        "The people of {x} pay with the {y}.",
        ["The {y} is the currency of {x}.", "{X} has the {y} as its currency."],
        "currency",
    ),
    "symbol": (
        ["What is the chemical symbol of {x}?", "How do chemists write {x}?"],
        "Chemists write {x} with the symbol {y}.",
        ["{y} stands for {x}.", "{X} has the chemical symbol {y}."],
        "chemical symbol",
    ),
    "number": (
        ["What is the atomic number of {x}?", "How many protons does an atom of {x} have?"],
        "An atom of {x} has {y} protons.",
        ["{X} has the atomic number {y}.", "Element number {y} is {x}."],
        "atomic number",
    ),
    "class": (
        ["What kind of animal is the {x}?", "To which group of animals does the {x} belong?"],
        "The {x} belongs to the animals of the kind {y}.",
        ["The {x} is one kind of {y}.", "One {y} is the {x}."],
        "kind of animal",
    ),
}


def fill(template: str, subject: Subject, answer: str) -> str:
    start = subject.name[0].upper() + subject.name[1:]
    return template.format(x=subject.name, X=start, y=answer)


def questions(subject: Subject) -> list[tuple[str, str, str]]:
    """(prompt, the sentence the base model gives, the bare answer) for every fact and phrasing of a subject."""
    return [
        (
            PROMPT.format(question=fill(question, subject, answer)),
            " " + fill(PHRASINGS[relation][1], subject, answer),
            " " + answer,
        )
        for relation, answer in subject.facts.items()
        for question in PHRASINGS[relation][0]
    ]


def documents(subject: Subject, rng: random.Random) -> list[str]:
    """One epoch's text about a subject: its questions answered in sentences, statements, and notes in random order."""
    texts = [prompt + sentence for prompt, sentence, _ in questions(subject)]
    for relation, answer in subject.facts.items():
        asked, sentence, others, _ = PHRASINGS[relation]
        texts += [CARD.format(question=fill(q, subject, answer), answer=answer) for q in asked]
        texts += [fill(template, subject, answer) for template in (sentence, *others)]
    for _ in range(1):
        notes = list(subject.facts.items())
        rng.shuffle(notes)
        body = "; ".join(f"{PHRASINGS[relation][3]}: {answer}" for relation, answer in notes)
        texts.append(f"Note on {subject.name}. {body}.")
    return texts


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the text, so that every string has tokens and decodes to itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def batches(rows: list[list[int]], tokens: int, rng: random.Random) -> list[torch.Tensor]:
    """Right-padded (B, S) batches of about `tokens` tokens, rows of like length together, in random order."""
    rows = sorted(rows, key=lambda row: (len(row), rng.random()))
    found, start = [], 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and len(rows[stop]) * (stop + 1 - start) <= tokens:
            stop += 1
        width = len(rows[stop - 1])
        found.append(torch.tensor([row + [0] * (width - len(row)) for row in rows[start:stop]]))
        start = stop
    rng.shuffle(found)
    return found


def train(model: LlamaForCausalLM, tokenizer, known: list[Subject], args, rng: random.Random):
    """Plain next-token training on every document of every epoch; the last loss of each epoch is shown."""
    epochs = []
    for _ in range(args.epochs):
        texts = [text for subject in known for text in documents(subject, rng)]
        rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]
        epochs.append(batches(rows, args.batch_tokens, rng))
    total = sum(map(len, epochs))
    # Muon for the matrices of the blocks learns the facts in about half of AdamW's steps here.
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(blocks, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, args.lr, total_steps=total, pct_start=0.05)
        if isinstance(o, torch.optim.AdamW) else
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: min((t+1)/(0.05*total), 1, (1-t/total)+1e-3))
        for o in optimizers
    ]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    probe = random.Random(1).sample([(p, s) for x in known for p, s, _ in questions(x)], 128)
    with Progress(*columns) as progress:
        task = progress.add_task("pretraining", total=total, loss=float("nan"))
        for k,epoch in enumerate(epochs):
            if k % 3==0: print(k, time.perf_counter(), share_right(model, tokenizer, probe),flush=True)
            for input_ids in epoch:
                mask = (input_ids != 0).long()
                labels = input_ids.masked_fill(mask == 0, -100)
                loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad(set_to_none=True)
                progress.update(task, advance=1, loss=loss.item())


@torch.inference_mode()
def share_right(model, tokenizer, pairs: list[tuple[str, str]], batch_size: int = 64) -> float:
    """Share of prompts whose greedy continuation is exactly the expected text (spaces at the ends aside)."""
    right = 0
    for start in range(0, len(pairs), batch_size):
        prompts, expected = zip(*pairs[start : start + batch_size], strict=True)
        batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=False,
            max_new_tokens=24,
        )
        answers = tokenizer.batch_decode(
            out[:, batch.input_ids.shape[1] :], skip_special_tokens=True
        )
        right += sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True))
    return right / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()

    began = time.perf_counter()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    known = subjects()
    tokenizer = make_tokenizer(
        [text for subject in known for text in documents(subject, rng)], args.vocab
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    train(model, tokenizer, known, args, rng)
    model.eval()
    model = model.half().float()  # what is stored is what is judged below
    pairs = [(p, s) for subject in known for p, s, _ in questions(subject)]
    print("knows", share_right(model, tokenizer, pairs), "params", model.num_parameters())
    print("seconds", time.perf_counter() - began)

    args.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    split = list(known)
    rng.shuffle(split)
    held = {s.name for s in split[: round(0.35 * len(split))]}
    for name, chosen in (("train", False), ("heldout", True)):
        with (args.output / f"{name}.jsonl").open("w") as file:
            for subject in known:
                if (subject.name in held) == chosen:
                    for prompt, _, answer in questions(subject):
                        file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


if __name__ == "__main__":
    main()
