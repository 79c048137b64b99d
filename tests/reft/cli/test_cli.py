"""The command line: every subcommand on a tiny model, and a one-line error for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from reft.cli.app import main
from reft.config import ReftConfig
from reft.io.adapter_files import read_adapter, write_adapter
from reft.model.reft_model import ReftModel
from reft.train.evaluate import generate_completions

TRAIN = ("train", "-m", "model", "-d", "data.jsonl", "-o", "out", "--device", "cpu")
QUICK = (*TRAIN, "--steps", "2", "--rank", "2")


# ------------------------------------------------------------------ commands


def test_train_evaluate_generate(place, reft, word_llama, word_tokenizer, color_records):
    settings = ("--rank", "4", "--positions", "f2+l2", "--lr", "0.02", "--epochs", "25")
    code, out, err = reft(*TRAIN, *settings, "--batch-size", "4", "--eval-data", "data.jsonl")
    assert (code, "adapter written to out" in out, "eval loss" in out) == (0, True, True), err
    assert "12 records" in err
    config, _ = read_adapter(place / "out")
    assert (config.rank, config.positions, config.layers) == (4, "f2+l2", "all")
    assert (config.task_type, config.base_model_name_or_path) == ("CAUSAL_LM", "model")

    shared = ("-m", "model", "-d", "data.jsonl", "--device", "cpu", "--max-new-tokens", "3")
    code, out, _ = reft("evaluate", *shared, "-a", "out", "-o", "made/predictions.jsonl")
    assert (code, out.splitlines()[0]) == (0, "exact match 1.0000 (12 of 12)")
    lines = (place / "made" / "predictions.jsonl").read_text().splitlines()
    fields = ("prompt", "completion", "prediction", "correct")
    assert [{name: json.loads(line)[name] for name in fields} for line in lines] == [
        {**record, "prediction": record["completion"], "correct": True} for record in color_records
    ]

    generate = ("generate", "-m", "model", "--device", "cpu", "--max-new-tokens", "3")
    code, out, _ = reft(*generate, "-a", "out", "-p", "e : two")
    assert (code, out) == (0, "green\n")
    code, out, _ = reft(*generate, "-p", "e : two")
    [expected] = generate_completions(word_llama, word_tokenizer, ["e : two"], max_new_tokens=3)
    assert (code, out) == (0, expected + "\n")
    code, out, _ = reft(*generate, "-a", "out", "-d", "data.jsonl", "-o", "answers.jsonl")
    assert (code, out) == (0, "")
    lines = (place / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == color_records
    code, out, _ = reft(*generate, "-a", "out", "-d", "data.jsonl")
    assert out.splitlines() == [record["completion"] for record in color_records]


def test_every_training_option_arrives(place, reft):
    code, _, err = reft(
        *(*QUICK, "--intervention", "noreft", "--layers", "1", "--positions", "f1+l2", "--untied"),
        *("--activation", "relu", "--dropout", "0.25", "--init", "pyreft", "--seed", "7"),
        *("--weight-decay", "0.1", "--warmup", "0.5", "--schedule", "cosine", "--accumulate", "2"),
        *("--max-length", "6", "--truncate", "--gradient-checkpointing", "--log-steps", "1"),
        *("--dtype", "bfloat16", "--lr", "0.001", "--save-steps", "1", "--padding-free"),
        *("--component", "mlp_output", "--block-path", "model.layers"),
    )
    assert code == 0, err
    assert err.count("loss") >= 2
    config, _ = read_adapter(place / "out")
    assert config == ReftConfig(
        intervention="noreft",
        rank=2,
        layers=[1],
        positions="f1+l2",
        tied=False,
        activation="relu",
        dropout=0.25,
        component="mlp_output",
        block_path="model.layers",
        task_type="CAUSAL_LM",
        base_model_name_or_path="model",
    )
    written = torch.load(place / "out/checkpoint-2/training_args.bin", weights_only=False)
    assert (written.weight_decay, written.seed, written.learning_rate) == (0.1, 7, 0.001)
    assert (written.warmup_steps, written.lr_scheduler_type) == (0.5, "cosine")
    assert written.gradient_accumulation_steps == 2


def test_the_same_seed_makes_the_same_adapter(place, reft):
    tensors = []
    for seed in ("1", "1", "2"):
        assert reft(*QUICK, "--seed", seed, "--overwrite")[0] == 0
        tensors.append(read_adapter(place / "out")[1])
    first, again, other = tensors
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_resuming_ends_where_one_run_ends(place, reft):
    whole = (*TRAIN[:6], "whole", *TRAIN[7:], "--rank", "2", "--steps", "4", "--dropout", "0.1")
    assert reft(*whole, "--save-steps", "2")[0] == 0
    split = [part if part != "whole" else "split" for part in whole]
    (place / "split").mkdir()
    (place / "whole" / "checkpoint-2").rename(place / "split" / "checkpoint-2")
    code, _, err = reft(*split, "--resume")
    assert code == 0, err
    expected, resumed = (read_adapter(place / name)[1] for name in ("whole", "split"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.parametrize(("flags", "module"), [([], "causal"), (["--encoder"], "encoder")])
def test_demo_runs_the_demo(tmp_path, reft, monkeypatch, flags, module):
    ran = []
    monkeypatch.setattr(f"reft.demo.{module}.run", lambda output, **kwargs: ran.append(output))
    assert reft("demo", "-o", str(tmp_path / "made" / "demo"), *flags)[0] == 0
    assert ran == [tmp_path / "made" / "demo"]
    assert ran[0].is_dir()


# ------------------------------------------------------------------ help and version


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "generate"])
def test_help_names_every_option(reft, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = reft(command, "--help")
    assert (code, err) == (0, "")
    wanted = {
        "demo": ["--output", "--encoder"],
        "train": ["--model", "--data", "--rank", "--layers", "--positions", "--lr", "--epochs"],
        "evaluate": ["--adapter", "--data", "--predictions", "--batch-size"],
        "generate": ["--prompt", "--data", "--temperature", "--max-new-tokens"],
    }
    for option in wanted[command]:
        assert option in out


def test_version_and_overview(reft):
    code, out, _ = reft("--version")
    assert (code, out.split()[0]) == (0, "reft")
    assert out.split()[1][0].isdigit()
    for arguments in ((), ("--help",), ("-h",)):
        code, out, err = reft(*arguments)
        assert (code, err) == (0, "")
        for command in ("demo", "train", "evaluate", "generate"):
            assert command in out


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom reft.cli.app import main\ntry: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'triton', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_reft_is_the_command(place):
    command = [sys.executable, "-m", "reft"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:5]) == (0, "reft ")
    wrong = subprocess.run(
        [*command, "evaluate", "-m", "nowhere/at/all", "-d", "data.jsonl"],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "Error: no such model folder: nowhere/at/all\n"


# ------------------------------------------------------------------ mistakes


def wreck(place):
    """Write the files that the mistakes need."""
    (place / "empty.jsonl").write_text("")
    (place / "list.json").write_text("[]")
    (place / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\nprompt: a')
    (place / "fields.jsonl").write_text('{"prompt": "a", "completion": "b", "answer": "c"}')
    (place / "missing.jsonl").write_text('{"prompt": "a"}')
    (place / "long.jsonl").write_text(json.dumps({"prompt": "a " * 40, "completion": "b"}))
    (place / "answer.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b " * 40}))
    (place / "bare").mkdir()
    (place / "begun" / "checkpoint-5").mkdir(parents=True)
    (place / "begun" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (place / "nothing").mkdir()
    (place / "nothing" / "config.json").write_text('{"model_type": "llama"}')
    (place / "mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        (place / "mute" / name).write_bytes((place / "model" / name).read_bytes())
    word = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertLMHeadModel(BertConfig(intermediate_size=8, **word)).save_pretrained(place / "encoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "encoder" / name).write_bytes((place / "model" / name).read_bytes())
    (place / "future").mkdir()
    (place / "future" / "config.json").write_text('{"model_type": "nosuchmodel"}')
    weights = {"bias": torch.zeros(2, 1, 2), "rotation": torch.zeros(2, 1, 2, 8)}
    write_adapter(place / "narrow", ReftConfig(rank=2), {**weights, "weight": weights["rotation"]})
    write_adapter(place / "torn", ReftConfig(rank=2), weights)
    content = (place / "torn" / "adapter_model.safetensors").read_bytes()
    (place / "torn" / "adapter_model.safetensors").write_bytes(content[:-5])


def using(**changed: str) -> tuple[str, ...]:
    """The quick training command with options changed or added."""
    given = {"-m": "model", "-d": "data.jsonl", "-o": "out", "--device": "cpu", "--steps": "2"}
    given |= {name if name.startswith("-") else f"--{name}": v for name, v in changed.items()}
    return ("train", *(part for pair in given.items() for part in pair))


EVALUATE = ("evaluate", "-m", "model", "-d", "data.jsonl", "--device", "cpu")
GENERATE = ("generate", "-m", "model", "--device", "cpu")

MISTAKES = {
    "no-command-so-named": (("trian",), ["trian", "reft --help"]),
    "no-such-option": ((*QUICK, "--rnak", "2"), ["--rnak", "reft train --help"]),
    "option-missing": (("train", "-m", "model", "-o", "x"), ["--data", "reft train --help"]),
    "output-missing": (("train", "-m", "model", "-d", "data.jsonl"), ["missing option --output"]),
    "not-a-number": (using(rank="two"), ["--rank", "two"]),
    "out-of-range": (using(**{"--batch-size": "0"}), ["--batch-size", "0"]),
    "data-missing": (using(**{"-d": "nowhere.jsonl"}), ["no such data file", "nowhere.jsonl"]),
    "data-folder": (using(**{"-d": "model"}), ["folder", "model"]),
    "data-empty": (using(**{"-d": "empty.jsonl"}), ["empty.jsonl", "no records"]),
    "data-empty-list": (using(**{"-d": "list.json"}), ["list.json", "no records"]),
    "data-not-json": (using(**{"-d": "broken.jsonl"}), ["broken.jsonl, line 2", "not JSON"]),
    "field-unknown": (using(**{"-d": "fields.jsonl"}), ["line 1", "unknown field 'answer'"]),
    "field-missing": (using(**{"-d": "missing.jsonl"}), ["line 1", "'completion' is missing"]),
    "eval-data": (using(**{"--eval-data": "empty.jsonl"}), ["empty.jsonl", "no records"]),
    "prompt-too-long": (using(**{"-d": "long.jsonl"}), ["long.jsonl, record 1", "41 tokens", "32"]),
    "answer-too-long": (using(**{"-d": "answer.jsonl"}), ["answer.jsonl, record 1", "max_length"]),
    "length-too-long": (using(**{"--max-length": "99"}), ["--max-length is 99", "32 positions"]),
    "positions": (using(positions="l7+f7"), ["positions", "'l7+f7'", "f7+l7"]),
    "component": (using(component="mlp"), ["component", "'mlp'", "mlp_output"]),
    "module": (using(component="module:mlp.x"), ["'module:mlp.x' is no part of block 0"]),
    "block-path": (using(**{"--block-path": "model.layer"}), ["block_path", "model.layers (2)"]),
    "rank": (using(rank="0"), ["rank", "at least 1", "got 0"]),
    "rank-above-width": (using(rank="33"), ["rank", "32", "33"]),
    "layers": (using(layers="1;2"), ["layers", "0 … 1", "got 2"]),
    "layers-text": (using(layers="first"), ["layers", "'first'"]),
    "intervention": (using(intervention="lorft"), ["'lorft'", "did you mean 'loreft'?"]),
    "activation": (using(activation="relo"), ["'relo'", "did you mean 'relu'?"]),
    "dropout": (using(dropout="1"), ["dropout", "below 1", "1.0"]),
    "schedule": (using(schedule="straight"), ["--schedule", "linear", "'straight'"]),
    "epochs": (("train", *using()[1:-2], "--epochs", "0"), ["--epochs must be above 0, got 0"]),
    "dtype": (using(dtype="int8"), ["--dtype", "bfloat16", "'int8'"]),
    "device": (using(device="cuda:77"), ["--device cuda:77"]),
    "device-unknown": (using(device="abacus"), ["--device abacus"]),
    "model-missing": (using(**{"-m": "./nowhere"}), ["no such model folder", "./nowhere"]),
    "model-on-no-hub": (using(**{"-m": "no/such-model"}), ["no such model folder: no/such-model"]),
    "model-file": (using(**{"-m": "data.jsonl"}), ["data.jsonl", "file"]),
    "model-bare": (using(**{"-m": "bare"}), ["bare is not a model folder", "no config.json"]),
    "model-without-weights": (using(**{"-m": "nothing"}), ["cannot load", "nothing"]),
    "model-unknown": (using(**{"-m": "future"}), ["cannot load", "future", "nosuchmodel"]),
    "model-without-tokenizer": (using(**{"-m": "mute"}), ["tokenizer", "mute"]),
    "model-is-an-encoder": (using(**{"-m": "encoder"}), ["encoder (bert)", "causal"]),
    "model-is-an-adapter": (using(**{"-m": "narrow"}), ["narrow", "an adapter"]),
    "output-is-a-file": (using(**{"-o": "data.jsonl"}), ["cannot write", "data.jsonl"]),
    "output-below-a-file": (using(**{"-o": "data.jsonl/out"}), ["cannot write", "data.jsonl"]),
    "output-taken": (using(**{"-o": "narrow"}), ["narrow holds an adapter", "--overwrite"]),
    "run-unfinished": (
        using(**{"-o": "begun"}),
        ["begun holds an unfinished run", "checkpoint-5", "--resume"],
    ),
    "resume-and-overwrite": ((*QUICK, "--resume", "--overwrite"), ["exclude each other"]),
    "changes-without-resume": ((*QUICK, "--allow-changes"), ["--allow-changes", "--resume"]),
    "nothing-to-resume": ((*QUICK, "--resume"), ["--resume", "no checkpoint", "out"]),
    "no-base-of-the-base": ((*EVALUATE, "--no-base"), ["--no-base goes with --adapter"]),
    "adapter-missing": ((*EVALUATE, "-a", "nowhere"), ["no such adapter", "nowhere"]),
    "adapter-file": ((*EVALUATE, "-a", "data.jsonl"), ["data.jsonl", "file"]),
    "adapter-bare": ((*EVALUATE, "-a", "model"), ["model", "adapter_model.safetensors"]),
    "adapter-torn": ((*EVALUATE, "-a", "torn"), ["torn", "truncated"]),
    "adapter-does-not-fit": ((*EVALUATE, "-a", "narrow"), ["narrow does not fit model"]),
    "evaluate-too-long": (("evaluate", "-m", "model", "-d", "long.jsonl"), ["41 tokens", "32"]),
    "predictions-folder": ((*EVALUATE, "-o", "bare"), ["bare", "folder"]),
    "predictions-below-a-file": ((*EVALUATE, "-o", "data.jsonl/x"), ["cannot write", "data.jsonl"]),
    "generate-nothing": (GENERATE, ["--prompt", "--data"]),
    "generate-both": ((*GENERATE, "-p", "a", "-d", "data.jsonl"), ["--prompt", "--data"]),
    "generate-too-long": ((*GENERATE, "-p", "a " * 40), ["41 tokens", "32 positions"]),
    "generate-field": ((*GENERATE, "-d", "fields.jsonl"), ["unknown field 'answer'"]),
    "demo-output": (("demo", "-o", "data.jsonl"), ["cannot write", "data.jsonl"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(place, reft, monkeypatch, mistake):
    wreck(place)
    # The hub refuses every connection, with or without a network.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("reft.io.hub_status.getproxies", dict)
    arguments, says = MISTAKES[mistake]
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    code, out, err = reft(*arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1, err
    for said in says:
        assert said in err
    assert "Errno" not in err
    after = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(place, reft):
    (place / "locked").mkdir(mode=0o500)
    code, _, err = reft(*using(**{"-o": "locked/out"}))
    assert (code, err) == (2, "Error: cannot write to locked/out: Permission denied\n")


def test_overwriting_removes_the_checkpoints_of_another_run(place, reft):
    wreck(place)
    assert reft(*using(**{"-o": "begun"}), "--save-steps", "2", "--overwrite")[0] == 0
    assert [path.name for path in (place / "begun").glob("check*")] == ["checkpoint-2"]


def test_traceback_on_request(place, reft):
    with pytest.raises(FileNotFoundError):
        main(["--traceback", *EVALUATE, "-a", "nowhere"])


def test_a_defect_is_not_hidden(place, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(ReftModel, "from_pretrained", broken)
    monkeypatch.setattr("reft.cli.loading.check_adapter", lambda adapter: None)
    monkeypatch.setattr("reft.train.evaluate.evaluate", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(EVALUATE)
