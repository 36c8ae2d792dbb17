"""One round of the game: its passes, its first check, its cost, its outcome."""
