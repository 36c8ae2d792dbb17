"""What the scripts share: data, metrics, the training loop, results, tables, the command."""

from common.results import table as table
