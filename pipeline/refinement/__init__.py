"""Networks trained on maps or labels: refinement networks, one a file (``pipeline.registry``), and affinities."""
