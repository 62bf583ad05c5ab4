"""Training loops: fine-tuning, pruning while training, resuming, and several processes."""
