"""A process with one vLLM engine: reads a job, writes what came out. Run by the tests.

A job has the engine's ``options`` and ``rounds``. A round is a list of requests that are handed in
together, or what is done between rounds: {"copy": [from, to]} replaces an adapter's folder,
{"unwrap": true} takes this library's block keys away, {"clear": true} empties the prefix cache.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.v1.core import kv_cache_utils

    import reft.serving.vllm.worker as worker

    calls = []
    original = worker.apply_edit

    def apply_edit(hidden, plan, weights, **options):
        calls.append(plan.num_rows)
        return original(hidden, plan, weights, **options)

    worker.apply_edit = apply_edit
    llm = LLM(**job["options"])
    results = []
    for requests in job["rounds"]:
        if isinstance(requests, dict):
            if "copy" in requests:
                source, target = requests["copy"]
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target)
            if "unwrap" in requests:
                name = "generate_block_hash_extra_keys"
                setattr(kv_cache_utils, name, getattr(kv_cache_utils, name).__wrapped__)
            if "clear" in requests:
                llm.reset_prefix_cache()
            continue
        params = [
            SamplingParams(
                max_tokens=asked["count"], temperature=0, detokenize=False, ignore_eos=True,
                logprobs=0, extra_args=asked["extra"] or None,
            )
            for asked in requests
        ]  # fmt: skip
        before = len(calls)
        tokens = [{"prompt_token_ids": asked["ids"]} for asked in requests]
        try:
            outputs = llm.generate(tokens, params, use_tqdm=False)
        except (ValueError, VLLMClientError) as error:
            results.append({"error": str(error), "kind": type(error).__name__})
            continue
        results.append(
            {
                "tokens": [list(out.outputs[0].token_ids) for out in outputs],
                "logprobs": [
                    [next(iter(at.values())).logprob for at in out.outputs[0].logprobs]
                    for out in outputs
                ],
                "cached": [out.num_cached_tokens for out in outputs],
                "calls": calls[before:],
                "kept": [
                    params[at].extra_args == (requests[at]["extra"] or None)
                    for at in range(len(requests))
                ],
            }
        )
    preempted = 0
    for metric in llm.get_metrics():
        if metric.name == "vllm:num_preemptions":
            preempted += metric.value
    Path(sys.argv[2]).write_text(json.dumps({"rounds": results, "preempted": preempted}))


if __name__ == "__main__":
    main()
