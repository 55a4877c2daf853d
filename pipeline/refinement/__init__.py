"""Networks trained on maps or pseudo labels: refinement networks, registered by name, and the affinity network."""
