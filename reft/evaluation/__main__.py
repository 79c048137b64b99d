"""Command line of lm-evaluation-harness with ``--model reft``: ``python -m reft.evaluation``."""

import sys

import reft.evaluation.lm_eval  # noqa: F401  registers the name

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
