"""A correct run emits no warning and no log message that the bare base does not emit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny_models import llama, padded

from reft import ReftConfig, get_reft_model
from reft.model.forward_inputs import read_inputs
from reft.model.planner import plan_forward

#: Turns every warning into an error, except those of imports, which come first.
RUN = """
import json, logging, sys, warnings

records = []

class Note(logging.Handler):
    def emit(self, record):
        records.append(f"{record.name}: {record.getMessage()}")

import torch, transformers, reft.cli.app
from typer.testing import CliRunner
from reft import ReftConfig, ReftModel, ReftTrainer, get_reft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

note = Note(logging.WARNING)
for name in ("", "reft", "reft_kernels", "transformers", "torch", "accelerate"):
    logging.getLogger(name).addHandler(note)
warnings.simplefilter("error")

folder, root = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained(folder)
data = [{"prompt": f"{one} : two", "completion": "red"} for one in "abcdefgh"]

def train(full, where):
    torch.manual_seed(0)
    model = get_reft_model(
        AutoModelForCausalLM.from_pretrained(folder), ReftConfig(rank=2, positions="f1+l1")
    )
    arguments = TrainingArguments(
        output_dir=where, max_steps=3, per_device_train_batch_size=4, logging_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
        full_determinism=full, learning_rate=1e-2, dataloader_pin_memory=False,
    )
    trainer = ReftTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    trainer.evaluate()
    return model

model = train(False, root + "/plain")
ids = tokenizer("a : two", return_tensors="pt")
model.eval().generate(**ids, max_new_tokens=2, do_sample=False)
model.save_pretrained(root + "/adapter")
again = ReftModel.from_pretrained(base, root + "/adapter")
same = torch.equal(again(**ids).logits, model(**ids).logits)
again.unload()

first, second = (train(True, root + "/full").reft.state_dict() for _ in range(2))
twice = all(torch.equal(first[name], second[name]) for name in first)
deterministic = torch.are_deterministic_algorithms_enabled()
torch.use_deterministic_algorithms(False)

with open(root + "/data.jsonl", "w") as file:
    file.writelines(json.dumps(one) + "\\n" for one in data)
cli, codes = CliRunner(), []
for arguments in (
    ["train", "--model", folder, "--data", root + "/data.jsonl", "--output", root + "/cli",
     "--rank", "2", "--positions", "f1+l1"],
    ["generate", "--adapter", root + "/adapter", "--model", folder, "--prompt", "a : two"],
    ["evaluate", "--adapter", root + "/adapter", "--model", folder, "--data", root + "/data.jsonl"],
):
    result = cli.invoke(reft.cli.app.app, arguments)
    codes.append([result.exit_code, repr(result.exception), result.output[-500:]])
facts = [same, twice, deterministic]
print("RESULT" + json.dumps({"facts": facts, "codes": codes, "records": records}))
"""


def test_no_warning_in_a_clean_run(word_llama, word_tokenizer, tmp_path):
    folder = tmp_path / "base"
    word_llama.save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    result = json.loads(line.removeprefix("RESULT"))
    assert result["facts"] == [True, True, True]
    assert [code for code, *_ in result["codes"]] == [0, 0, 0], result["codes"]
    assert result["records"] == []


def test_padding_that_is_not_a_number_stays_padding():
    """NaN embeddings of left padding do not reach the edited rows."""
    base = llama()
    model = get_reft_model(base, ReftConfig(rank=3, positions="f2+l2"))
    ids, mask, _ = padded([4, 7], "left")
    embedded = base.get_input_embeddings()(ids).detach()

    def plan_of(hidden):
        arguments = {"inputs_embeds": hidden, "attention_mask": mask}
        return plan_forward(model.reft, read_inputs(model.reft, base.model, arguments))

    plan = plan_of(embedded)
    assert plan is not None
    edit = plan.edits[0, "block_output"][0]
    from reft_kernels import lowrank_edit

    args = (edit.rows, *edit.weights[:3])
    poisoned = embedded.masked_fill(~mask.bool().unsqueeze(-1), float("nan"))
    out, expected = lowrank_edit(poisoned, *args), lowrank_edit(embedded, *args)
    attended = mask.bool()
    assert torch.equal(out[attended], expected[attended])
    grads = []
    for hidden in (poisoned, embedded):
        model.zero_grad()
        plan = plan_of(hidden)
        again = plan.edits[0, "block_output"][0]
        lowrank_edit(hidden, again.rows, *again.weights[:3])[attended].sum().backward()
        grads.append([p.grad.clone() for p in model.reft.adapter("default").parameters()])
    assert all(map(torch.equal, *grads))
