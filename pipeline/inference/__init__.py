"""Trained networks at work on whole images."""
