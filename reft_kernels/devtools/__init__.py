"""Developer tools for tests and benchmarks. They are not in the wheel."""
