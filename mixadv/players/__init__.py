"""The two players: the adversary's ascent and strategies, what the learner does after a step."""
