"""``reft train``: one adapter from one data file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft.cli import options, preset_run
from reft.cli.errors import UserError, check_folder
from reft.cli.ranks import is_first, refuse_several, shards_the_base

if TYPE_CHECKING:
    from reft.train.collate import ReftDataCollator


def train(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where the adapter goes; of a preset runs/NAME if absent."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder of the base model, or its name on the hub. A preset has one of its own.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "-d",
            help="JSON or JSONL with 'prompt' and 'completion'. With --preset a folder of its "
            "sets; without one they come from the hub.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="A published run (see `reft presets`) or a file like it."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a setting of the preset: train.epochs=3, rank=4.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Of the preset's runs: 42,43. Its own if absent.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="Report the loss on this file each epoch.")
    ] = None,
    intervention: Annotated[
        str, typer.Option("--intervention", help="loreft, direft, noreft, consreft, lobireft, …")
    ] = "loreft",
    rank: Annotated[int, typer.Option("--rank", "-r", help="Directions edited.")] = 8,
    layers: Annotated[
        str, typer.Option("--layers", help='all, or numbers such as "3;9;18;24"; -1 is the last.')
    ] = "all",
    positions: Annotated[
        str,
        typer.Option("--positions", help="Tokens edited: f7+l7, f3, l1, prompt, prompt+g4, all."),
    ] = "f7+l7",
    component: Annotated[
        str,
        typer.Option("--component", help="block_output, attention_output, mlp_output, module:…"),
    ] = "block_output",
    block_path: Annotated[
        str | None,
        typer.Option("--block-path", help="Of the blocks, where they are not found by themselves."),
    ] = None,
    tied: Annotated[
        bool, typer.Option("--tied/--untied", help="One set of weights for first and last tokens.")
    ] = True,
    activation: Annotated[
        str | None, typer.Option("--activation", help="Around the encoder: relu, gelu, silu, …")
    ] = None,
    dropout: Annotated[float, typer.Option("--dropout", help="Of the edit, in [0, 1).")] = 0.0,
    init: Annotated[
        str, typer.Option("--init", help="pyreft: a small random edit; identity: none.")
    ] = "pyreft",
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, help="Passes over the data.")] = 3.0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimizer steps, instead of --epochs.")
    ] = None,
    batch_size: options.BatchSize = 8,
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Batches in one optimizer step.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option("--lr", min=0.0, help="At its highest.")] = 9e-4,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0)] = 0.0,
    warmup: Annotated[
        float, typer.Option("--warmup", min=0.0, max=0.99, help="Share of steps with rising lr.")
    ] = 0.0,
    schedule: Annotated[
        str, typer.Option("--schedule", help="linear, cosine, constant, … as in transformers.")
    ] = "linear",
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="The most tokens of a sequence.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut completions that are too long.")
    ] = False,
    padding_free: Annotated[
        bool, typer.Option("--padding-free", help="Pack the sequences of a batch into one row.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    save_steps: Annotated[
        int | None, typer.Option("--save-steps", min=1, help="A checkpoint every so many steps.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="With --resume: though data, learning rate or the like are others than the "
            "checkpoint's, or the steps fewer.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter that is in --output.")
    ] = False,
    log_steps: Annotated[int, typer.Option("--log-steps", min=1, help="Steps between logs.")] = 10,
    seed: Annotated[int, typer.Option("--seed")] = 42,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Train an adapter of a causal language model on prompts and completions, or run a preset."""
    if preset is not None:
        refuse_several("--preset", "its batches are those that were published")
        preset_run.refuse_other_options(context)
        preset_run.run_preset(
            preset,
            settings or (),
            seeds,
            model=model,
            data=data,
            output=output,
            resume=resume,
            overwrite=overwrite,
            device=device,
        )
        return
    preset_run.refuse_preset_options(settings or (), seeds)
    if model is None or data is None or output is None:
        needed = {"--model": model, "--data": data, "--output": output}
        missing = next(option for option, value in needed.items() if value is None)
        raise UserError(f"missing option {missing} (see reft train --help)")
    from reft.cli.loading import check_model_name, load_base, resolve_device
    from reft.config import ReftConfig
    from reft.train.records import read_records

    # In the order of what they cost: nothing is loaded or written for an input that is refused.
    config = ReftConfig(
        intervention=intervention,
        rank=rank,
        layers=layers,
        positions=positions,
        component=component,
        block_path=block_path,
        tied=tied,
        activation=activation,
        dropout=dropout,
        init=init,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model,
    )
    records = read_records(data)
    eval_records = None if eval_data is None else read_records(eval_data)
    check_model_name(model)
    if allow_changes and not resume:
        raise UserError("--allow-changes goes with --resume")
    checkpoint = _checkpoint(output, resume=resume, overwrite=overwrite)
    check_folder(output)

    from rich.console import Console
    from transformers import PrinterCallback, TrainingArguments, set_seed
    from transformers.trainer_utils import SchedulerType

    from reft.model.reft_model import get_reft_model
    from reft.train.checkpoints import remove_checkpoints
    from reft.train.collate import ReftDataCollator
    from reft.train.evaluate import context_length
    from reft.train.progress import ProgressCallback
    from reft.train.trainer import ReftTrainer, require_accelerate

    require_accelerate()
    if steps is None and epochs <= 0:
        raise UserError(f"--epochs must be above 0, got {epochs:g}")
    schedules = [one.value for one in SchedulerType]
    if schedule not in schedules:
        raise UserError(f"--schedule must be one of {', '.join(schedules)}; got {schedule!r}")
    target = resolve_device(device)
    home = "cpu" if shards_the_base() else str(target)
    base, tokenizer = load_base(model, dtype=dtype, device=home)
    limit = context_length(base)
    if max_length is not None and limit is not None and max_length > limit:
        raise UserError(f"--max-length is {max_length}, but {model} has {limit} positions")
    collator = ReftDataCollator(
        tokenizer,
        max_length=max_length or limit,
        truncate=truncate,
        padding_free=padding_free,
    )
    examples = _tokenize(collator, records, data)
    eval_examples = None if eval_records is None else _tokenize(collator, eval_records, eval_data)

    set_seed(seed)
    wrapped = get_reft_model(base, config)
    console = Console(stderr=True, quiet=not is_first())
    trainable, total = wrapped.get_nb_trainable_parameters()
    opening = (
        f"{len(examples)} records; training {trainable:,} of {total:,} parameters "
        f"({100 * trainable / total:.4f} %) on {target}"
    )
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        max_steps=steps or -1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_steps=warmup,
        lr_scheduler_type=schedule,
        **_checkpointing(TrainingArguments, gradient_checkpointing),
        eval_strategy="no" if eval_examples is None else "epoch",
        save_strategy="no" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        logging_steps=log_steps,
        seed=seed,
        use_cpu=target.type == "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = ReftTrainer(
        wrapped,
        arguments,
        collator,
        examples,
        eval_examples,
        processing_class=tokenizer,
        callbacks=[ProgressCallback(console, opening)],
    )
    trainer.remove_callback(PrinterCallback)
    if overwrite and is_first():
        remove_checkpoints(output)  # before one of a run that is over could be taken for this one's
    result = trainer.train(resume_from_checkpoint=checkpoint, allow_changes=allow_changes)
    metrics = {"train loss": result.training_loss} if trainer.steps_trained else {}
    if eval_examples is not None:
        last = [row for row in trainer.state.log_history if "eval_loss" in row][-1:]
        known = bool(last) and last[0]["step"] == trainer.state.global_step
        metrics["eval loss"] = (last[0] if known else trainer.evaluate())["eval_loss"]
    trainer.save_adapter(output)
    if not is_first():
        return
    done = [f"{name} {value:.4f}" for name, value in metrics.items()]
    if not trainer.steps_trained:
        steps = trainer.state.global_step
        done.insert(0, f"no step was trained, {checkpoint} has all {steps} steps of this run")
    typer.echo(f"{', '.join(done)}; adapter written to {output}")


def _checkpointing(arguments: type, wanted: bool) -> dict[str, Any]:
    """The argument that recomputes activations, by the name that this transformers gives it."""
    names = [field.name for field in fields(arguments)]
    new = "activation_checkpointing"
    name = new if new in names else "gradient_checkpointing"
    return {name: True} if wanted else {}


def _checkpoint(output: Path, *, resume: bool, overwrite: bool) -> str | None:
    """The checkpoint to go on from, if asked; refuses to replace an adapter, or to begin an
    unfinished run anew, unless told to."""
    from reft.io.adapter_files import WEIGHTS_FILE
    from reft.train.checkpoints import last_checkpoint

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    found = last_checkpoint(output)
    if resume:
        if found is None:
            raise UserError(f"--resume: there is no checkpoint to go on from in {output}")
        return str(found)
    if (output / WEIGHTS_FILE).exists() and not overwrite:
        raise UserError(f"{output} holds an adapter already; --overwrite replaces it")
    if found is not None and not overwrite:
        raise UserError(
            f"{output} holds an unfinished run, as far as {found.name}; --resume goes on, "
            "--overwrite begins anew"
        )
    return None


def _tokenize(
    collator: ReftDataCollator, records: Sequence[dict[str, Any]], source: Path | None
) -> list[dict[str, Any]]:
    """The records as token ids, so that one that is too long is found before the first step."""
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            examples.append(collator.tokenize(record))
        except ValueError as error:
            raise UserError(f"{source}, record {number}: {error}") from None
    return examples
