"""The round loop and the simulated clients."""
