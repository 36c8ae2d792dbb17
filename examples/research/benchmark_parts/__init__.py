"""Parts of `benchmark.py`."""

MODELS = {  # layers, hidden size, heads, words
    "bert": (6, 384, 12, 30522),
    "tiny": (2, 64, 4, 1000),
}
EMBEDDED = "embedded"
