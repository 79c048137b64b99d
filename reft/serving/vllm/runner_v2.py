"""The adapters of requests in Model Runner V2, vLLM's default on GPUs.

This runner asks a model for its ``ModelState`` class, so nothing is patched. Written against vLLM
0.32; a test compares it with vLLM's source. It needs Triton on a GPU to run.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from reft.serving.vllm.patches import request_adapter_of
from reft.serving.vllm.request_adapter import RequestAdapter


class ReftModelState(DefaultModelState):
    """The default state, and the adapters of the requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adapters: dict[str, tuple[RequestAdapter, int]] = {}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        adapter = request_adapter_of(new_req_data.sampling_params)
        if adapter is not None:
            assert new_req_data.prompt_token_ids is not None
            prompt_length = len(new_req_data.prompt_token_ids)
            self._adapters[new_req_data.req_id] = (adapter, prompt_length)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._adapters.pop(req_id, None)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        chunks = []
        for index, req_id in enumerate(input_batch.req_ids[: input_batch.num_reqs]):
            adapter, prompt_length = self._adapters.get(req_id, (None, 0))
            start = int(input_batch.num_computed_tokens_np[index])
            count = int(input_batch.num_scheduled_tokens[index])
            chunks.append((adapter, prompt_length, start, count))
        self.model.reft.prepare(chunks, input_batch.num_tokens)
        return inputs
