"""Solve a zero-sum game: what each player should mix, and how far from it a strategy is."""

from mixadv.games import MatrixGame, solve

# What the row player pays: a goalkeeper dives left or right, the striker shoots left or right.
penalty = MatrixGame([[0.6, 0.9], [0.95, 0.7]])
for method in ("best_response_dynamics", "hedge", "optimistic_hedge", "restarted"):
    solution = solve(penalty, method, steps=300, progress=False)
    left = solution.learner[0].item()
    value, gap = solution.value.item(), solution.gap.value.item()
    print(f"{method:22} dives left {left:.3f}, value {value:.4f}, duality gap {gap:.1e}")
