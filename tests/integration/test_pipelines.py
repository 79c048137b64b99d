"""``transformers.pipeline`` accepts a wrapped model without a warning and gives the model's
outputs."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch
from tiny_models import bert, perturb
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from reft import ReftConfig, ReftModel, get_reft_model
from reft.model.pipelines import announce

SETTINGS = {"max_new_tokens": 4, "do_sample": False}
PROMPTS = ["a : one", "b a c : two", "h", "d : three"]
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture
def wrapped(word_llama) -> ReftModel:
    torch.manual_seed(0)
    return perturb(get_reft_model(word_llama, ReftConfig(rank=4, positions="f1+l2")))


@pytest.fixture
def complaints(caplog):
    """A function that lists warnings that transformers logged in this test; its logger does not
    propagate."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    logger.removeHandler(caplog.handler)


def generated(model, tokenizer, prompt: str, **settings) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    row = model.generate(**inputs, **SETTINGS, **settings)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(row, skip_special_tokens=True)


@pytest.fixture
def answers(wrapped, word_tokenizer) -> list[str]:
    """Outputs of ``generate`` for each prompt, which differ from the base's."""
    with wrapped.disable_adapter():
        plain = [generated(wrapped, word_tokenizer, prompt) for prompt in PROMPTS]
    edited = [generated(wrapped, word_tokenizer, prompt) for prompt in PROMPTS]
    assert edited != plain
    return edited


@pytest.mark.parametrize("batch_size", [1, 4])
def test_text_generation(wrapped, word_tokenizer, answers, complaints, recwarn, batch_size):
    base = copy.deepcopy(wrapped).unload()
    pipeline("text-generation", model=base, tokenizer=word_tokenizer)(PROMPTS, **SETTINGS)
    of_the_base = set(complaints())  # transformers 5.16 logs warnings for the bare base
    pipe = pipeline("text-generation", model=wrapped, tokenizer=word_tokenizer)
    assert pipe.model is wrapped
    assert "ReftModel" in repr(pipe)
    outputs = pipe(PROMPTS, batch_size=batch_size, return_full_text=False, **SETTINGS)
    assert [output["generated_text"] for (output,) in outputs] == answers
    (single,) = pipe(PROMPTS[0], **SETTINGS)
    assert single["generated_text"] == PROMPTS[0] + answers[0]
    assert set(complaints()) <= of_the_base
    assert not [warning for warning in recwarn if "ReftModel" in str(warning.message)]


def test_a_chat(wrapped, word_tokenizer):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer.backend_tokenizer,
        **word_tokenizer.special_tokens_map,
        padding_side="left",
        chat_template=TEMPLATE,
    )
    pipe = pipeline("text-generation", model=wrapped, tokenizer=tokenizer)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    single = pipe(chats[1], **SETTINGS)[0]["generated_text"][-1]
    batch = [output["generated_text"][-1] for (output,) in pipe(chats, batch_size=4, **SETTINGS)]
    assert single == batch[1]
    # The template puts no <bos> in front.
    want = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        row = wrapped.generate(input_ids=ids, **SETTINGS)[0, ids.shape[1] :]
        want.append(tokenizer.decode(row, skip_special_tokens=True))
    assert [message["content"] for message in batch] == want


def test_arguments_of_the_wrapper_pass_through(wrapped, word_tokenizer, answers):
    pipe = pipeline("text-generation", model=wrapped, tokenizer=word_tokenizer)
    names = ["default", "__base__"] * 2
    outputs = pipe(PROMPTS, batch_size=4, return_full_text=False, adapter_names=names, **SETTINGS)
    with wrapped.disable_adapter():
        plain = [generated(wrapped, word_tokenizer, prompt) for prompt in PROMPTS]
    want = [plain[i] if i % 2 else answers[i] for i in range(4)]
    assert [output["generated_text"] for (output,) in outputs] == want


def test_a_saved_pipeline_is_an_adapter_and_a_tokenizer(wrapped, word_tokenizer, tmp_path):
    pipeline("text-generation", model=wrapped, tokenizer=word_tokenizer).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_classification(complaints, batch_size):
    model = perturb(
        get_reft_model(bert(), ReftConfig(rank=4, positions="f2+l2", task_type="SEQ_CLS"))
    )
    words = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 40)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>"
    )
    texts = ["w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12 w13 w14 w15"]
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    outputs = pipe(texts, batch_size=batch_size)

    def scores(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)

    for text, answer in zip(texts, outputs, strict=True):
        want = scores(text)
        with model.disable_adapter():
            assert (want - scores(text)).abs().max() > 1e-2
        got = {entry["label"]: entry["score"] for entry in answer}
        for label, score in enumerate(want.tolist()):
            assert got[f"LABEL_{label}"] == pytest.approx(score, abs=1e-5)
    assert not complaints()


def test_the_table_has_the_wrapper_once():
    announce("ReftModel")
    announce("ReftModel")
    table = sys.modules["transformers.pipelines.base"].SUPPORTED_PEFT_TASKS
    assert all(names.count("ReftModel") == 1 for names in table.values())
