"""Classification methods and one-step networks, one a file, found by name (``pipeline.config.registry``)."""
