"""From image-level tags to pixel masks: the parts that the stages are made of."""
