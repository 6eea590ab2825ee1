"""The typed config of an experiment, its keys and its errors."""
