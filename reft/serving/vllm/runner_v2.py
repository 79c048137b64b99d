"""Model Runner V2, the default on GPUs: its own seam, a ``ModelState`` that the model names.

Written against vLLM 0.32 and held to its source by a test; it needs Triton on a GPU to run.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from reft.serving.vllm.patches import ticket_of
from reft.serving.vllm.request_adapter import Ticket


class ReftModelState(DefaultModelState):
    """The default state, and the adapters of the requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._edited: dict[str, tuple[Ticket, int]] = {}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        ticket = ticket_of(new_req_data.sampling_params)
        if ticket is not None:
            assert new_req_data.prompt_token_ids is not None
            prompt_length = len(new_req_data.prompt_token_ids)
            self._edited[new_req_data.req_id] = (ticket, prompt_length)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._edited.pop(req_id, None)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        chunks = []
        for index, req_id in enumerate(input_batch.req_ids[: input_batch.num_reqs]):
            ticket, prompt_length = self._edited.get(req_id, (None, 0))
            start = int(input_batch.num_computed_tokens_np[index])
            count = int(input_batch.num_scheduled_tokens[index])
            chunks.append((ticket, prompt_length, start, count))
        self.model.reft.prepare(chunks, input_batch.num_tokens)
        return inputs
