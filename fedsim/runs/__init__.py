"""Runs: from a config to a run folder, and sweeps of them."""
