"""The mathematics of the moves: no model, no game."""
