"""Base models, adapters and the forward pass that trainers and evaluators share."""
