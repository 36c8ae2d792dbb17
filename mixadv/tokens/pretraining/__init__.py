"""Pre-training as a game: tokens are replaced, and found or corrected."""
