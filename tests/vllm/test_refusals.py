"""Unsupported features of vLLM are refused by name before an engine starts, and the functions that
the plugin patches exist."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from tiny_decoders import environment
from vllm.v1.worker.gpu import input_batch

from reft.serving.vllm import patches, register
from reft.serving.vllm.compatibility import OPERATOR, UNSUPPORTED

ASKING = {
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}
    },
    "pipeline parallelism": {"pipeline_parallel_size": 2},
    "data parallelism inside one engine": {"data_parallel_size": 2},
    "LoRA": {"enable_lora": True},
    "prompts of embeddings": {"enable_prompt_embeds": True},
}

CONFIGURE = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
options = json.loads(sys.argv[1])
config = EngineArgs(**options).create_engine_config()
print("MODE", config.compilation_config.cudagraph_mode.name)
print("SPLIT", json.dumps(config.compilation_config.splitting_ops))
"""


def configure(bases, folder, **settings):
    options = {
        "model": str(bases["llama"]), "dtype": "float32", "block_size": 32, "max_model_len": 256,
        "hf_overrides": {"architectures": ["ReftLlamaForCausalLM"]},
        "additional_config": {"reft": {"folder": str(folder)}}, "skip_tokenizer_init": True,
        **settings,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", CONFIGURE, json.dumps(options)],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("name", ASKING)
def test_refused_by_name(bases, folder, name):
    done = configure(bases, folder, **ASKING[name])
    assert done.returncode != 0
    assert f"{name} cannot be used with reft adapters in vLLM" in done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, 'needs additional_config={"reft": {"folder": "adapters"}}'),
        ({"reft": {}}, "reft.folder must be given"),
        ({"reft": {"folder": "/nothing/here"}}, "reft.folder must be a directory"),
        ({"reft": {"folder": ".", "residents": 3}}, "has no field 'residents'"),
        ({"reft": {"folder": ".", "max_adapters": 0}}, "reft.max_adapters must be an integer"),
        ({"reft": {"folder": ".", "hosted": 2}}, "reft.hosted is called reft.max_cpu_adapters now"),
        ({"reft": {"folder": ".", "prefix_keys": "none"}}, "reft.prefix_keys must be"),
    ],
)
def test_settings_that_cannot_be(bases, folder, settings, words):
    done = configure(bases, folder, additional_config=settings)
    assert done.returncode != 0 and words in done.stderr


def test_an_engine_that_starts(bases, folder):
    done = configure(bases, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert OPERATOR in done.stdout.split("SPLIT")[1]


def test_every_refusal_reads_settings_that_vllm_has():
    """Each reads attributes by name: a default configuration has them all and uses no feature."""
    config = vllm.config.VllmConfig()
    for name, is_used in UNSUPPORTED.items():
        if "model_config" not in inspect.getsource(is_used):
            assert is_used(config) is False, name
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size", "enable_dbo"):
        assert hasattr(config.parallel_config, name)
    assert hasattr(type(config.parallel_config), "use_sequence_parallel_moe")
    assert hasattr(config.cache_config, "kv_sharing_fast_prefill")


class TestSeams:
    def test_they_are_wrapped_once(self):
        register()
        before = patches.InputProcessor.process_inputs
        register()
        assert patches.InputProcessor.process_inputs is before
        from vllm.v1.core import block_pool, kv_cache_utils

        wrapped = kv_cache_utils.generate_block_hash_extra_keys
        assert block_pool.generate_block_hash_extra_keys is wrapped
        assert hasattr(wrapped, "__wrapped__")

    def test_a_missing_function_is_named(self):
        class Owner:
            def known(self, first, second):
                pass

        with pytest.raises(RuntimeError, match=r"no .*Owner\.gone"):
            patches._wrap(Owner, "gone", ("self",), lambda original: original)
        with pytest.raises(RuntimeError, match=r"takes \('self', 'first', 'second'\)"):
            patches._wrap(Owner, "known", ("self", "other"), lambda original: original)

    def test_model_runner_v2_has_what_its_state_uses(self):
        """Not run here, where there is no GPU: held to vLLM's source."""
        root = Path(vllm.__file__).parent / "v1" / "worker" / "gpu"
        state = ast.parse((root / "model_states" / "default.py").read_text())
        (default,) = [
            node for node in state.body
            if isinstance(node, ast.ClassDef) and node.name == "DefaultModelState"
        ]  # fmt: skip
        methods = {
            node.name: [argument.arg for argument in node.args.args]
            for node in default.body
            if isinstance(node, ast.FunctionDef)
        }
        assert methods["add_request"] == ["self", "req_index", "new_req_data"]
        assert methods["remove_request"] == ["self", "req_id"]
        assert methods["prepare_inputs"] == ["self", "input_batch", "req_states"]
        fields = input_batch.InputBatch.__annotations__
        needed = {
            "req_ids",
            "num_reqs",
            "num_scheduled_tokens",
            "num_computed_tokens_np",
            "num_tokens",
        }
        assert needed <= fields.keys()
        text = (root / "model_states" / "__init__.py").read_text()
        assert "model.get_model_state_cls()" in text
        runner = (root / "model_runner.py").read_text()
        assert "model_state.prepare_inputs(" in runner and "model_state.remove_request(" in runner

    def test_model_runner_v1_has_what_is_read(self):
        from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

        source = inspect.getsource(InputBatch.__init__)
        for name in ("num_computed_tokens_cpu", "num_prompt_tokens"):
            assert f"self.{name}" in source
        assert "sampling_params" in CachedRequestState.__annotations__
