"""Networks trained on maps or labels: refinement networks, found by name, and the affinity network."""
