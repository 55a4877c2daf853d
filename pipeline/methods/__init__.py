"""Methods, one a file: classifiers whose maps locate objects, and one-step networks. See ``pipeline.registry``."""
