"""Reading, comparing and drawing runs; needs no torch."""
