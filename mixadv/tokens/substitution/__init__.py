"""Word substitution: an adversary that replaces words of a text, and mixtures against it."""
