"""Helpers for tests of label rules: the label of one pixel, and a pseudo_labels block with a rule."""

import numpy as np

from pipeline.config.registry import RULES, Choice, plain
from pipeline.config.schema import PseudoLabels
from pipeline.labels.base import Rule
from pipeline.labels.labelling import label_image


def label(rule: Rule, saliency: int, **scores: int) -> int:
    """The label of one pixel; scores are grey levels of the classes cat (3), dog (5) and horse (7)."""
    ids = {"cat": 3, "dog": 5, "horse": 7}
    maps = {ids[name]: np.full((1, 1), value, np.uint8) for name, value in scores.items()}
    return int(label_image(maps, np.full((1, 1), saliency, np.uint8), None, rule, "none", (1, 1))[0, 0])


def block(rule: Rule) -> PseudoLabels:
    """A pseudo_labels block with this rule, without normalisation of the maps."""
    name = next(name for name in RULES.names() if type(rule) is RULES[name])
    return PseudoLabels("classifiers/x", Choice(RULES, name, plain(rule)), "none")
