"""Solve a game that can be solved by hand: the learner picks a row, the adversary a column.

Without a saddle point, [[a, b], [c, d]] with s = a − b − c + d is worth (a·d − b·c)/s; the first
row is played with probability (d − c)/s, the first column with (d − b)/s. Here s = 7.
"""

import argparse

argparse.ArgumentParser(description=__doc__).parse_args()  # --help explains, and plays nothing

from mixadv.games import MatrixGame, solve

game = MatrixGame([[3, -1], [-2, 1]])  # what the learner pays
solution = solve(game, "restarted", steps=1000)

print("learner  ", solution.learner.tolist())  # 3/7, 4/7
print("adversary", solution.adversary.tolist())  # 2/7, 5/7
print("value    ", solution.value.item())  # 1/7
print("gap      ", solution.gap)  # 0 at an equilibrium, and only there
