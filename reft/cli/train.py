"""``reft train``: train an adapter on a data file, or run a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft.cli import options, preset_run
from reft.cli.errors import UserError, check_folder
from reft.cli.ranks import is_first, refuse_several, shards_the_base
from reft.cli.train_steps import (
    check_schedule,
    checkpoint_to_resume,
    checkpointing_argument,
    describe_run,
    final_eval_loss,
    resolve_max_length,
    tokenize_records,
)


def train(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of the adapter; default with --preset: runs/NAME."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder of the base model, or its name on the hub. Default with --preset: the "
            "preset's model.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "-d",
            help="JSON or JSONL with 'prompt' and 'completion'. With --preset: a folder with its "
            "data sets; default: the hub.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", help="Name of a published run (see `reft presets`), or a TOML file."
        ),
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
        str | None,
        typer.Option("--seeds", help="Seeds of the preset's runs: 42,43. Default: its seeds."),
    ] = None,
    eval_data: Annotated[
        Path | None,
        typer.Option("--eval-data", help="Data file for the evaluation loss after each epoch."),
    ] = None,
    intervention: Annotated[
        str, typer.Option("--intervention", help="loreft, direft, noreft, consreft, lobireft, …")
    ] = "loreft",
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank r of the edit.")] = 8,
    layers: Annotated[
        str,
        typer.Option(
            "--layers", help='Edited layers: all, or numbers such as "3;9;18;24"; -1 is the last.'
        ),
    ] = "all",
    positions: Annotated[
        str,
        typer.Option("--positions", help="Edited tokens: f7+l7, f3, l1, prompt, prompt+g4, all."),
    ] = "f7+l7",
    component: Annotated[
        str,
        typer.Option(
            "--component",
            help="Edited output: block_output, attention_output, mlp_output, module:…",
        ),
    ] = "block_output",
    block_path: Annotated[
        str | None,
        typer.Option("--block-path", help="Path of the list of blocks, if it is not detected."),
    ] = None,
    tied: Annotated[
        bool,
        typer.Option("--tied/--untied", help="Whether first and last tokens share their weights."),
    ] = True,
    activation: Annotated[
        str | None,
        typer.Option("--activation", help="Activation around W h + b: relu, gelu, silu, …"),
    ] = None,
    dropout: Annotated[
        float, typer.Option("--dropout", help="Dropout of the edit, in [0, 1).")
    ] = 0.0,
    init: Annotated[
        str,
        typer.Option(
            "--init", help="Initialisation: pyreft, a small random edit; identity, no edit."
        ),
    ] = "pyreft",
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, help="Passes over the data.")] = 3.0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimizer steps, instead of --epochs.")
    ] = None,
    batch_size: options.BatchSize = 8,
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Gradient accumulation steps.")
    ] = 1,
    learning_rate: Annotated[
        float, typer.Option("--lr", min=0.0, help="Peak learning rate.")
    ] = 9e-4,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", min=0.0, help="Weight decay of AdamW.")
    ] = 0.0,
    warmup: Annotated[
        float, typer.Option("--warmup", min=0.0, max=0.99, help="Share of warmup steps.")
    ] = 0.0,
    schedule: Annotated[
        str,
        typer.Option("--schedule", help="Schedule of transformers: linear, cosine, constant, …"),
    ] = "linear",
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Maximum tokens of a sequence.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Truncate completions that are too long.")
    ] = False,
    padding_free: Annotated[
        bool,
        typer.Option(
            "--padding-free", help="Pack the sequences of a batch into one row, without padding."
        ),
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Recompute activations in the backward pass to save memory.",
        ),
    ] = False,
    save_steps: Annotated[
        int | None,
        typer.Option(
            "--save-steps", min=1, help="Steps between checkpoints; default: no checkpoint."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in --output.")
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="With --resume: accept data, learning rate and other settings that differ from "
            "the checkpoint's, or fewer steps.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter in --output.")
    ] = False,
    log_steps: Annotated[int, typer.Option("--log-steps", min=1, help="Steps between logs.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 42,
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

    # Cheap checks come first: nothing is loaded or written for an input that is refused.
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
    checkpoint = checkpoint_to_resume(output, resume=resume, overwrite=overwrite)
    check_folder(output)

    from rich.console import Console
    from transformers import PrinterCallback, TrainingArguments, set_seed

    from reft.model.reft_model import get_reft_model
    from reft.train.checkpoints import remove_checkpoints
    from reft.train.collate import ReftDataCollator
    from reft.train.progress import ProgressCallback
    from reft.train.trainer import ReftTrainer, require_accelerate

    require_accelerate()
    if steps is None and epochs <= 0:
        raise UserError(f"--epochs must be above 0, got {epochs:g}")
    check_schedule(schedule)
    target = resolve_device(device)
    home = "cpu" if shards_the_base() else str(target)
    base, tokenizer = load_base(model, dtype=dtype, device=home)
    collator = ReftDataCollator(
        tokenizer,
        max_length=resolve_max_length(max_length, base, model),
        truncate=truncate,
        padding_free=padding_free,
    )
    examples = tokenize_records(collator, records, data)
    eval_examples = (
        None if eval_records is None else tokenize_records(collator, eval_records, eval_data)
    )

    set_seed(seed)
    wrapped = get_reft_model(base, config)
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
        **checkpointing_argument(TrainingArguments, gradient_checkpointing),
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
        callbacks=[
            ProgressCallback(
                Console(stderr=True, quiet=not is_first()),
                describe_run(wrapped, len(examples), target),
            )
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if overwrite and is_first():
        remove_checkpoints(output)  # so that no checkpoint of the replaced run can be resumed
    result = trainer.train(resume_from_checkpoint=checkpoint, allow_changes=allow_changes)
    metrics = {"train loss": result.training_loss} if trainer.steps_trained else {}
    if eval_examples is not None:
        metrics["eval loss"] = final_eval_loss(trainer)
    trainer.save_adapter(output)
    if is_first():
        summary = [f"{name} {value:.4f}" for name, value in metrics.items()]
        if not trainer.steps_trained:
            total = trainer.state.global_step
            summary.insert(
                0, f"no step was trained, {checkpoint} has all {total} steps of this run"
            )
        typer.echo(f"{', '.join(summary)}; adapter written to {output}")
