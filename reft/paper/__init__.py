"""The published runs: tasks, presets and the runs themselves."""
