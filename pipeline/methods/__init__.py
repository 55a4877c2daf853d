"""Classification methods and one-step networks, one per file, registered by name (``pipeline.config.registry``)."""
