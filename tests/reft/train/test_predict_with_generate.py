"""ReftTrainer with Seq2SeqTrainingArguments: metrics of generated tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from reft import ReftConfig, ReftDataCollator, ReftTrainer, get_reft_model
from reft.train.predict_with_generate import prompts_of


def t5(size: int, **changes):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, initializer_factor=3.0, **changes,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def bart(size: int):
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=size, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.5,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, dropout=0.0,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


BASES = {
    "encoder": (t5, {}, "encoder.block", "f1+l1"),
    "tied": (t5, {"tie_word_embeddings": True}, "encoder.block", "f1+l1"),
    "decoder": (t5, {}, "decoder.block", "prompt"),
    "bart": (bart, {}, "model.decoder.layers", "prompt"),
}


@pytest.fixture
def features(word_tokenizer, color_records):
    return [
        {
            "input_ids": word_tokenizer(record["prompt"])["input_ids"],
            "labels": [word_tokenizer.convert_tokens_to_ids(record["completion"]), 2],
        }
        for record in color_records
    ]


@pytest.fixture
def seq2seq(word_tokenizer, features, tmp_path):
    def build(name="encoder", kind=ReftTrainer, metrics=None, **changes):
        make, settings, path, positions = BASES[name]
        base = make(len(word_tokenizer), **settings)
        config = ReftConfig(rank=2, positions=positions, block_path=path)
        model = get_reft_model(base, config, generator=torch.Generator().manual_seed(1))
        settings = {
            "max_steps": 1, "save_steps": 1, "predict_with_generate": True, "report_to": "none",
            "use_cpu": True, "disable_tqdm": True, "generation_max_length": 6, "learning_rate": 0.1,
            "per_device_eval_batch_size": 3, **changes,
        }  # fmt: skip
        return kind(
            model, Seq2SeqTrainingArguments(str(tmp_path / "run"), **settings),
            DataCollatorForSeq2Seq(word_tokenizer, model=base), features, features[:4],
            processing_class=word_tokenizer, compute_metrics=metrics,
        )  # fmt: skip

    return build


def begins_with(row, expected: list[int]) -> bool:
    """Whether a row holds these tokens and padding after them."""
    return row.tolist()[: len(expected)] == expected and not any(row[len(expected) :])


def alone(model, ids, **options) -> list[int]:
    """The tokens that generate returns for a single prompt."""
    return model.eval().generate(input_ids=torch.tensor([ids]), **options)[0].tolist()


@pytest.mark.parametrize("name", BASES)
def test_metrics_get_the_generated_tokens(seq2seq, features, name):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"tokens": float(np.asarray(prediction.predictions).size)}

    trainer = seq2seq(name, metrics=metrics)
    trainer.train()
    values = trainer.evaluate()
    assert np.isfinite(values["eval_loss"]) and values["eval_tokens"] >= 4 * 6
    [tokens] = seen
    for row, feature in zip(tokens, features, strict=False):
        assert begins_with(row, alone(trainer.model, feature["input_ids"], max_length=6))
    with trainer.model.disable_adapter():
        plain = [alone(trainer.model, row["input_ids"], max_length=6) for row in features[:4]]
    assert [row.tolist()[:6] for row in tokens] != plain


def test_the_loss_is_that_of_an_evaluation_without_generation(seq2seq):
    losses = [
        seq2seq(predict_with_generate=generated).evaluate()["eval_loss"]
        for generated in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_predict_and_its_keywords(seq2seq, features):
    trainer = seq2seq()
    output = trainer.predict(features[:3], max_new_tokens=3, num_beams=2)
    for row, feature in zip(output.predictions, features, strict=False):
        expected = alone(trainer.model, feature["input_ids"], max_new_tokens=3, num_beams=2)
        assert begins_with(row, expected)
    assert output.metrics["test_loss"] > 0


def test_beams_and_length_of_the_arguments(seq2seq, features):
    trainer = seq2seq(generation_num_beams=3, generation_max_length=5)
    output = trainer.predict(features[:2])
    for row, feature in zip(output.predictions, features, strict=False):
        expected = alone(trainer.model, feature["input_ids"], max_length=5, num_beams=3)
        assert begins_with(row, expected)


def test_a_generation_config_of_the_arguments_is_the_one_that_is_used(seq2seq):
    config = GenerationConfig(
        max_new_tokens=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2
    )
    trainer = seq2seq(generation_config=config, generation_max_length=None)
    base = trainer.model.get_base_model()
    assert base.generation_config.max_new_tokens == 2
    assert "generation_config" not in vars(trainer.model)
    assert not trainer.predict(trainer.eval_dataset).predictions[:, 3:].any()


def test_it_is_a_seq2seq_trainer_and_may_be_combined_with_it(seq2seq):
    class Both(ReftTrainer, Seq2SeqTrainer):
        pass

    for kind in (ReftTrainer, Both):
        trainer = seq2seq(kind=kind)
        assert isinstance(trainer, Seq2SeqTrainer)
        assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_resuming_with_load_best_model(seq2seq):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = seq2seq(max_steps=2, metrics=lambda prediction: {}, **settings)
    trainer.train()
    resumed = seq2seq(max_steps=3, metrics=lambda prediction: {}, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.steps_trained == 1


# ------------------------------------------------------------------ plain arguments


def test_plain_arguments_are_trainers_own(make_trainer, color_records):
    trainer = make_trainer(eval_data=color_records)
    assert type(trainer.args) is TrainingArguments
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(color_records[:2]).predictions.dtype.kind == "f"
    for call in (trainer.evaluate, lambda **options: trainer.predict(color_records, **options)):
        with pytest.raises(
            TypeError, match="num_beams are arguments of generation, which needs Seq2Seq"
        ):
            call(num_beams=2)


# ------------------------------------------------------------------ causal models


@pytest.mark.parametrize("completions", [True, False])
def test_a_causal_model_generates_from_the_prompts(
    word_llama, word_tokenizer, color_records, tmp_path, completions
):
    model = get_reft_model(
        word_llama, ReftConfig(rank=2, positions="l1"), generator=torch.Generator().manual_seed(1)
    )
    records = [dict(record) for record in color_records[:4]]
    records[0]["prompt"] = "a b c : one"
    if not completions:
        records = [{"prompt": record["prompt"]} for record in records]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=9, report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    collator = ReftDataCollator(word_tokenizer)
    trainer = ReftTrainer(model, arguments, collator, processing_class=word_tokenizer)
    output = trainer.predict(records)
    width = 6  # tokens of the longest prompt
    for row, record in zip(output.predictions, records, strict=True):
        ids = word_tokenizer(record["prompt"])["input_ids"]
        expected = alone(model, ids, max_length=9 - width + len(ids))
        assert row.tolist()[width - len(ids) : 9][: len(expected)] == expected
    if completions:
        expected = trainer.evaluate(records, max_new_tokens=1)["eval_loss"]
        assert output.metrics["test_loss"] == pytest.approx(expected)
        assert output.label_ids.shape[0] == 4


def test_prompts_of_a_batch():
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [0, 0, 6, 7, 8, 9], [1, 0, 2, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]])
    labels = torch.tensor(
        [[-100, -100, -100, 4, 5, -100], [-100, -100, -100, 7, 8, 9], [-100] * 4 + [4, 5]]
    )
    expected = [[1, 2, 3], [0, 0, 6], [1, 2, 3]]
    attended = [[1, 1, 1], [0, 0, 1], [1, 1, 1]]
    batch = {"input_ids": ids, "attention_mask": mask, "adapter_names": ["a"] * 3}
    for ends in ({"labels": labels}, {"prompt_lengths": torch.tensor([3, 1, 3])}):
        prompts = prompts_of({**batch, **ends, "position_ids": torch.zeros(3, 6)})
        assert prompts.keys() == {"input_ids", "attention_mask", "adapter_names"}
        assert prompts["attention_mask"].tolist() == attended
        assert (prompts["input_ids"] * prompts["attention_mask"]).tolist() == expected
    whole = prompts_of({"input_ids": ids})
    assert torch.equal(whole["input_ids"], ids)
    with pytest.raises(ValueError, match="predict_with_generate needs padded batches"):
        prompts_of({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 3])})
