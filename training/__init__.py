"""What surrounds the training loop: caches, validation, records, ranks, checkpoints."""
