"""What the fine-tuning scripts share: data, metrics, the training loop, results, the command."""

from training.results import table as table
