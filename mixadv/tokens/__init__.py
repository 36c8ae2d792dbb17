"""Token-space players: adversaries that replace words and tokens."""
