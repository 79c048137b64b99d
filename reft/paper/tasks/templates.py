"""Prompt templates, identical to those of the published code."""

COMMONSENSE = "%s\n"

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:\n"
)

ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n%s\n\n### Response:\n"
)

GSM8K_QUESTION = (
    "Answer the above question. First think step by step and then answer the final number."
)
