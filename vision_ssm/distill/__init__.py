"""From a vision transformer to a state-space model: MOHAWK (Bick et al., 2024, arXiv 2408.10189) for pictures."""
