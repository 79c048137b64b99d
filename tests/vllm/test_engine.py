"""Adapters in vLLM: every token that of transformers with hooks."""

from __future__ import annotations

import itertools

import pytest
from tiny_decoders import ADAPTERS, LAYERS, prompts, request, write_random

NAMES = [
    None,
    "ends",
    "untied",
    "prompt",
    "gelu",
    "all",
    "generated",
    "first",
    "ends",
    None,
    "last",
]
LENGTHS = [7, 130, 40, 5, 64, 33, 96, 100, 1, 31, 65]


def mixed(folder, reference, count=12):
    """(requests, tokens of transformers) of a batch that mixes everything."""
    ids = prompts(LENGTHS)
    asked = [request(prompt, name, count) for prompt, name in zip(ids, NAMES, strict=True)]
    expected = [
        reference.tokens(prompt, name, count, folder)
        for prompt, name in zip(ids, NAMES, strict=True)
    ]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    return asked, expected


ENGINES = {
    "llama": {},
    "llama-compiled": {"enforce_eager": False},
    "llama-own-process": {"env": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}},
    "llama-two-ranks": {
        "tensor_parallel_size": 2, "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    },
    "llama-few-slots": {"reft": {"max_adapters": 1, "max_cpu_adapters": 2}},
    "llama-salted": {"reft": {"prefix_keys": "salt"}},
    "transformers": {"architecture": "ReftTransformersForCausalLM"},
    "transformers-compiled": {
        "architecture": "ReftTransformersForCausalLM", "enforce_eager": False,
    },
    "mistral": {"architecture": "ReftTransformersForCausalLM", "family": "mistral"},
    "qwen2": {"architecture": "ReftTransformersForCausalLM", "family": "qwen2"},
    "qwen3": {"architecture": "ReftTransformersForCausalLM", "family": "qwen3"},
}  # fmt: skip


@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES)
def test_a_mixed_batch_in_chunks(engine, folder, references, settings):
    """The base and eight adapters at once, prompts in chunks of at most 64 tokens."""
    asked, expected = mixed(folder, references(settings.get("family", "llama")))
    out = engine([asked, asked], **dict(settings))
    first, again = out["rounds"]
    assert first["tokens"] == expected
    assert again["tokens"] == expected, "with the prefixes of the first round in the cache"
    assert all(first["kept"]), "the client's parameters were changed"
    assert sum(again["cached"]) > 0


def test_preempted_requests_are_computed_anew(engine, folder, references):
    """Blocks for two requests of six: the others are thrown out and come again."""
    ids = prompts([60, 70, 62, 80, 75, 66], seed=3)
    names = ["ends", None, "prompt", "last", "untied", "all"]
    asked = [request(prompt, name, 60) for prompt, name in zip(ids, names, strict=True)]
    expected = [
        references().tokens(prompt, name, 60, folder)
        for prompt, name in zip(ids, names, strict=True)
    ]
    out = engine([asked], num_gpu_blocks_override=15, enable_prefix_caching=False)
    assert out["rounds"][0]["tokens"] == expected
    assert out["preempted"] > 0


def test_nothing_is_edited_while_tokens_are_generated(engine, folder):
    ids = prompts([40, 20], seed=5)
    out = engine([[request(ids[0], "ends", 20), request(ids[1], None, 20)]])
    assert out["rounds"][0]["calls"] == [6] * LAYERS  # one chunk, three first and three last tokens
    out = engine([[request(ids[0], "ends", 2), request(ids[1], "last", 2)]])
    assert out["rounds"][0]["calls"] == [8] * LAYERS  # two adapters, one call a block


def test_scales(engine, folder, references):
    (ids,) = prompts([50], seed=6)
    scales = [0.5, -1.0, 2, 0.0]
    asked = [request(ids, "ends", reft_scale=scale) for scale in scales]
    reference = references()
    expected = [reference.tokens(ids, "ends", 12, folder, float(scale)) for scale in scales]
    assert expected[3] == reference.tokens(ids) and len({tuple(tokens) for tokens in expected}) == 4
    out = engine([asked, [request(ids, "ends")], [request(ids, "__base__")]])
    assert out["rounds"][0]["tokens"] == expected
    assert out["rounds"][1]["tokens"] == [reference.tokens(ids, "ends", 12, folder)]
    assert out["rounds"][2]["tokens"] == [reference.tokens(ids)]


class TestPrefixCache:
    """Requests one after another that share 64 tokens or more; blocks of 32."""

    LONG, SHORT = prompts([136, 96], seed=7, shared=96)
    WHO = (None, "last", "ends", "prompt")

    def rounds(self, reference, folder, order):
        return (
            [[request(ids, name, 4)] for name, ids in order],
            [[reference.tokens(ids, name, 4, folder)] for name, ids in order],
        )

    @pytest.mark.parametrize("keys", ["blocks", "salt"])
    def test_every_order(self, engine, folder, references, keys):
        reference = references()
        asked, expected = [], []
        mixes = itertools.product(self.WHO[:3], (self.LONG, self.SHORT))
        for order in itertools.permutations(mixes, 3):
            rounds, tokens = self.rounds(reference, folder, order)
            asked += [*rounds, {"clear": True}]
            expected += tokens
        out = engine(asked, reft={"prefix_keys": keys})["rounds"]
        assert len(out) == len(expected) == 360
        assert [output["tokens"] for output in out] == expected

    def test_how_much_is_shared(self, engine, folder, references):
        """An adapter of the last two tokens takes what the base computed, and the other way round;
        one of the first three takes from its own alone; one of the whole prompt too."""
        order = [
            (None, self.SHORT), ("last", self.LONG), ("last", self.SHORT), (None, self.LONG),
            ("ends", self.SHORT), ("ends", self.LONG), ("prompt", self.SHORT),
            ("prompt", self.LONG),
        ]  # fmt: skip
        rounds, expected = self.rounds(references(), folder, order)
        out = engine(rounds)["rounds"]
        assert [output["tokens"] for output in out] == expected
        cached = [output["cached"][0] for output in out]
        # last, long: all of the base's 96. last, short: its own third block is edited. base, long:
        # the fourth block as last computed it, whose edits are in the fifth.
        assert cached == [0, 96, 64, 128, 0, 64, 0, 96]

    def test_without_keys_tokens_are_wrong(self, engine, folder, references):
        """The cache of vLLM as it is: what this library's keys are for."""
        order = [("prompt", self.LONG), (None, self.LONG), ("last", self.LONG), ("ends", self.LONG)]
        rounds, expected = self.rounds(references(), folder, order)
        out = engine([{"unwrap": True}, *rounds])["rounds"]
        assert out[0]["tokens"] == expected[0]
        assert [output["tokens"] for output in out[1:]] != expected[1:]
        assert out[1]["cached"][0] >= 96 and out[1]["tokens"] != expected[1]


def test_a_replaced_adapter_is_never_taken_for_the_old_one(engine, folder, references, tmp_path):
    folder_in_use = tmp_path / "mine" / "adapters"
    first_folder, second_folder = tmp_path / "one" / "adapters", tmp_path / "two" / "adapters"
    write_random(first_folder / "it", 100, **ADAPTERS["prompt"])
    write_random(second_folder / "it", 101, **ADAPTERS["ends"])
    write_random(folder_in_use / "it", 100, **ADAPTERS["prompt"])
    (ids,) = prompts([100], seed=8)
    swap = [
        {"copy": [str(second_folder / "it"), str(folder_in_use / "it")]},
        {"copy": [str(first_folder / "it"), str(folder_in_use / "it")]},
    ]
    asked = [request(ids, "it")]
    out = engine([asked, swap[0], asked, swap[1], asked], reft={"folder": str(folder_in_use)})[
        "rounds"
    ]
    reference = references()
    first = reference.tokens(ids, "it", 12, first_folder)
    second = reference.tokens(ids, "it", 12, second_folder)
    assert first != second
    assert [round["tokens"][0] for round in out] == [first, second, first]


def test_bad_requests_are_refused_in_front_and_the_engine_goes_on(
    engine, folder, references, tmp_path
):
    folder_in_use = tmp_path / "some"
    for name, changes in {
        "good": ADAPTERS["ends"],
        "attention": {"component": "attention_output"},
        "given": {"positions": "given"},
        "large": {"rank": 9},
        "double": {"dtype": "float64"},
    }.items():
        write_random(folder_in_use / name, 1, **changes)
    write_random(folder_in_use / "narrow", 1, dim=32)
    write_random(folder_in_use / "deep", 1, blocks=9, layers=[8])
    (folder_in_use / "empty").mkdir()
    (folder_in_use / "torn").mkdir()
    whole = (folder_in_use / "good" / "adapter_model.safetensors").read_bytes()
    (folder_in_use / "torn" / "adapter_model.safetensors").write_bytes(whole[:-9])
    (tmp_path / "outside").mkdir()
    bad = {
        "nobody": "there is no adapter 'nobody'",
        "../outside": "a folder's plain name",
        "..": "a folder's plain name",
        "": "a folder's plain name",
        "attention": 'component must be "block_output"',
        "given": 'positions must not be "given"',
        "large": "rank must be at most max_rank = 8, got 9",
        "double": 'dtype must not be "float64"',
        "narrow": "must have shape",
        "deep": "layers",
        "empty": "cannot be read",
        "torn": "truncated",
    }
    (ids,) = prompts([40], seed=9)
    good = [request(ids, "good"), request(ids)]
    rounds = [good]
    rounds += [[request(ids, name), request(ids, "good")] for name in bad]
    rounds += [[request(ids, "good", reft_scale="much")], [request(ids, None, reft_scale=2.0)]]
    rounds += [[request(ids, None, reft=3)]]
    out = engine([*rounds, good], reft={"folder": str(folder_in_use), "max_rank": 8})["rounds"]
    words = [
        *bad.values(),
        "reft_scale must be a finite number",
        "needs an adapter's name",
        "got 3",
    ]
    for answer, expected in zip(out[1:-1], words, strict=True):
        assert answer["kind"] == "VLLMValidationError" and expected in answer["error"], answer
    reference = references()
    tokens = [reference.tokens(ids, "good", 12, folder_in_use), reference.tokens(ids)]
    assert out[0]["tokens"] == out[-1]["tokens"] == tokens


def test_a_client_cannot_name_a_copy_itself(engine, references):
    (ids,) = prompts([40], seed=10)
    adapter = {
        "content_hash": "0" * 64,
        "scale": 1.0,
        "position_fields": [["positions", "prompt"]],
        "salted": False,
    }
    out = engine([[request(ids, None, reft_resolved=adapter)]])["rounds"]
    assert out[0]["tokens"] == [references().tokens(ids)]
