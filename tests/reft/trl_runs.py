"""Settings, a chat tokenizer and observers for the tests of TRL's trainers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import logsigmoid

from reft import ReftConfig, get_reft_model

SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
}

#: Of a chat: "?" before a user, "yes" before a system's words, "no" before a tool's, ":" before
#: an assistant, whose turn ends with <eos>. ``%s`` stand around what an assistant says.
_TEMPLATE = (
    "<bos> {%% for m in messages %%}"
    "{%% if m.role == 'user' %%}? {{ m.content }} "
    "{%% elif m.role == 'system' %%}yes {{ m.content }} "
    "{%% elif m.role == 'tool' %%}no {{ m.content }} "
    "{%% else %%}: %s{{ m.content }} <eos>%s {%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}: {%% endif %%}"
)
MARKED = _TEMPLATE % ("{% generation %}", "{% endgeneration %}")
UNMARKED = _TEMPLATE % ("", "")


def wrapped(base, **changes):
    torch.manual_seed(1)
    return get_reft_model(base, ReftConfig(**{"rank": 4, "positions": "f2+l2", **changes}))


def trained(base, seed=5, **changes):
    """Build an adapter whose parameters differ from their initialisation."""
    model = wrapped(base, **changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def chat_tokenizer(tokenizer, template):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@contextmanager
def outputs_of_block(base) -> Iterator[list[torch.Tensor]]:
    """Record the first block's edited output in each forward of several columns."""
    seen: list[torch.Tensor] = []

    def keep(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] > 1:
            seen.append(hidden.detach().clone())

    handle = base.model.layers[0].register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def edited(model, run):
    """Return where the first forward of ``run`` edits, bool (B, S), in comparison with the base."""
    base = model.get_base_model()
    with torch.no_grad(), outputs_of_block(base) as seen:
        run()
        count = len(seen)
        with model.disable_adapter():
            run()
    return (seen[0] - seen[count]).abs().amax(-1) > 0


def log_probs(model, tokenizer, prompt, answer):
    """Return Σ log p of an answer and the end token after a prompt, one sequence at a time."""
    prompt = tokenizer(prompt)["input_ids"]
    answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
    logits = model(ids, prompt_lengths=[len(prompt)]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()


def plain_dpo(model, reference, tokenizer, records, beta):
    """Compute the loss of DPO (arXiv 2305.18290, eq. 7); the reference is another model."""
    terms = []
    for record in records:
        ratios = []
        for answer in (record["completion"], " no no "):
            ours = log_probs(model, tokenizer, record["prompt"], answer)
            with torch.no_grad():
                theirs = log_probs(reference, tokenizer, record["prompt"], answer)
            ratios.append(ours - theirs)
        terms.append(-logsigmoid(beta * (ratios[0] - ratios[1])))
    return torch.stack(terms).mean()


def first_loss(trainer):
    trainer.model.train()
    with torch.no_grad():
        return float(
            trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        )


def all_of(trainer):
    """Return the training set as one batch."""
    return trainer.data_collator(list(trainer.train_dataset))


class Prompted:
    """A base that accepts ``prompt_lengths`` and ignores them."""

    def __init__(self, base):
        self.base = base.eval()

    def __call__(self, ids, prompt_lengths):
        return self.base(ids)
