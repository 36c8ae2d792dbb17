"""What touches a torch module: where δ acts, what a closure returns, how a pass is repeated."""
