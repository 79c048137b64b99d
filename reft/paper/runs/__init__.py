"""Runs of presets: data, training, evaluation and one JSON file of results each."""
