"""TRL's GRPOTrainer: completions are sampled and scored with the same edits."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import GRPOConfig
from trl_runs import SETTINGS, edited, losses, outputs_of_block, parameters, trained, wrapped

from reft import ReftGRPOTrainer


@pytest.fixture
def grpo(word_tokenizer, color_records, tmp_path):
    def reds(completion_ids, **kwargs):
        red = word_tokenizer.convert_tokens_to_ids("red")
        return [float(ids.count(red)) for ids in completion_ids]

    def build(model, folder="run", **settings):
        more = {name: settings.pop(name) for name in ("tools", "peft_config") if name in settings}
        args = {
            **SETTINGS, "num_generations": 4, "per_device_train_batch_size": 8,
            "max_completion_length": 4, "learning_rate": 5e-2, **settings,
        }  # fmt: skip
        return ReftGRPOTrainer(
            model,
            reward_funcs=reds,
            args=GRPOConfig(str(tmp_path / folder), **args),
            train_dataset=Dataset.from_list(
                [{"prompt": record["prompt"]} for record in color_records]
            ),
            processing_class=word_tokenizer,
            **more,
        )

    return build


def prompts(tokenizer, *texts):
    return [tokenizer(text)["input_ids"] for text in texts]


class TestGeneration:
    @pytest.mark.parametrize("positions", ["f2+l2", "prompt+g2", "all"])
    def test_is_scored_with_the_same_edits(self, word_llama, word_tokenizer, grpo, positions):
        """Log-probabilities of decoding with a cache against those of the loss."""
        model = trained(word_llama, positions=positions).eval()
        trainer = grpo(model)
        given = prompts(word_tokenizer, "a : one", "b : two ? c")
        width, pad = max(map(len, given)), word_tokenizer.pad_token_id
        ids = torch.tensor([[*[pad] * (width - len(prompt)), *prompt] for prompt in given])
        mask = (ids != pad).long()
        torch.manual_seed(0)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=True,
            top_k=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        answers = out.sequences[:, width:]
        sampled = torch.stack(out.logits, dim=1).log_softmax(-1).gather(2, answers[..., None])
        whole = torch.cat([mask, torch.ones_like(answers)], dim=1)
        with torch.no_grad():
            scored, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, out.sequences, whole, 4
            )
        torch.testing.assert_close(scored, sampled[..., 0], rtol=1e-4, atol=1e-4)
        with model.disable_adapter(), torch.no_grad():
            base, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, out.sequences, whole, 4
            )
        assert float((base - scored).abs().max()) > 1e-2

    def test_edits_the_prompts(self, word_llama, word_tokenizer, grpo):
        model = wrapped(word_llama, positions="f1+l1")
        trainer = grpo(model)
        given = prompts(word_tokenizer, "a : one", "b : two ? c")
        edits = edited(
            model,
            lambda: trainer._generate_single_turn(given, None, {}, num_generations=1),
        )
        assert edits.nonzero().tolist() == [[0, 2], [0, 5], [1, 0], [1, 5]]
        assert "generate" not in word_llama.__dict__

    def test_counts_generated_tokens(self, word_llama, word_tokenizer, grpo):
        """The generate method of the base refuses these positions."""
        model = trained(word_llama, positions="prompt+g2")
        given = prompts(word_tokenizer, "a : one")
        with outputs_of_block(word_llama) as seen:
            grpo(model)._generate_single_turn(given, None, {}, num_generations=1)
        assert seen[0].shape[1] == 4

    def test_chunked_prompts(self, word_llama, word_tokenizer, grpo):
        model = trained(word_llama).eval()
        given = prompts(word_tokenizer, "a : one ? b c", "b : two")
        results = []
        for extra in ({}, {"prefill_chunk_size": 2}):
            trainer = grpo(model, generation_kwargs={"do_sample": False, **extra})
            results.append(trainer._generate_single_turn(given, None, {}, num_generations=1)[0])
        assert results[0] == results[1]


class TestTraining:
    def test_the_loss_and_its_gradient(self, word_llama, word_tokenizer, grpo):
        """The first step after sampling (arXiv 2402.03300, eq. 3 with ratios of 1), computed one
        sequence at a time."""
        model = trained(word_llama, dropout=0.3)
        trainer = grpo(model, loss_type="grpo", temperature=1.5, disable_dropout=True)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        texts = ["a : one", "b : two ? c"]
        rows = [{"prompt": text} for text in texts for _ in range(4)]
        with trainer._without_dropout():
            inputs = trainer._generate_and_score_completions(rows)
        torch.manual_seed(2)
        inputs["advantages"] = torch.randn(8)
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        got = {n: p.grad.clone() for n, p in model.reft.adapter("default").named_parameters()}
        model.zero_grad()
        model.eval()
        terms = []
        for index, row in enumerate(rows):
            prompt = word_tokenizer(row["prompt"])["input_ids"]
            answer = inputs["completion_ids"][index][inputs["completion_mask"][index].bool()]
            ids = torch.tensor([[*prompt, *answer.tolist()]])
            logits = model(ids, prompt_lengths=[len(prompt)]).logits[0, len(prompt) - 1 : -1]
            scores = (logits / 1.5).log_softmax(-1).gather(1, answer[:, None])
            ratio = (scores - scores.detach()).exp().mean()
            terms.append(-inputs["advantages"][index] * ratio)
        expected = torch.stack(terms).mean()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        for name, parameter in model.reft.adapter("default").named_parameters():
            assert float(parameter.grad.abs().max()) > 1e-4
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5)

    def test_the_base_stays(self, word_llama, grpo):
        base = copy.deepcopy(word_llama.state_dict())
        model = trained(word_llama)
        before = parameters(model.reft)
        grpo(model, max_steps=2, temperature=2.0).train()
        assert any(
            not torch.equal(parameter, before[n]) for n, parameter in model.reft.named_parameters()
        )
        state = model.unload().state_dict()
        assert all(torch.equal(state[name], value) for name, value in base.items())

    def test_the_reference_is_the_adapter_as_it_was(self, word_llama, grpo, tmp_path):
        second = copy.deepcopy(word_llama)
        settings = {"beta": 0.1, "save_strategy": "steps", "save_steps": 2}
        whole = grpo(trained(word_llama), **settings)
        assert whole.beta == whole.args.beta == 0.1
        assert list(whole.ref_model.parameters()) == []
        whole.train()
        drift = [entry["kl"] for entry in whole.state.log_history if "kl" in entry]
        assert drift[0] == pytest.approx(0, abs=1e-6)
        assert drift[-1] > 1e-4
        again = grpo(wrapped(second), "again", **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
        resumed = again._reference._copies[0].adapter.state_dict()
        expected = whole._reference._copies[0].adapter.state_dict()
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    def test_without_a_reference_checkpoints_hold_none(self, word_llama, grpo, tmp_path):
        trainer = grpo(trained(word_llama), max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        assert trainer.ref_model is None
        assert not (tmp_path / "run/checkpoint-1/reference").exists()
        assert len(losses(trainer)) == 1


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"use_transformers_continuous_batching": True}, "continuous_batching must be False"),
            ({"use_vllm": True}, "use_vllm must be False"),
            ({"tools": [print]}, "tools must be None"),
            ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model must be False"),
            ({"peft_config": object()}, "peft_config must be None"),
        ],
    )
    def test_options_that_would_lose_edits(self, word_llama, grpo, settings, message):
        model = wrapped(word_llama)
        before = word_llama.config.to_dict()
        with pytest.raises(ValueError, match=message):
            grpo(model, **settings)
        assert word_llama.config.to_dict() == before

    def test_another_model(self, word_llama, grpo):
        with pytest.raises(TypeError, match="ReftGRPOTrainer trains a ReftModel"):
            grpo(word_llama)
