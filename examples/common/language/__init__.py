"""What the experiments with a language model share: rows, training, measures."""
