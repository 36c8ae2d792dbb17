"""What must be true: statements, bounds and exact answers that the tests hold the library to."""
