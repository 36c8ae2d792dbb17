"""Parts of mixtures.py: what is trained, and what is measured."""
