"""Data: sources, partitioners, tokenized arrays and batches."""
