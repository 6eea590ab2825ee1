"""Data: sources, partitioners, tokenised arrays and batches."""
