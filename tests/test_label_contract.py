"""Contract tests that every registered label rule must pass."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import params as parameters
from pipeline.config.registry import RULES, Choice, plain
from pipeline.errors import PipelineError
from pipeline.labels.base import IGNORE, Rule
from pipeline.labels.labelling import label_image
from tests.project import ROOT
from tests.voc_tree import make_tree, minimal_params

NAMES = RULES.names()


def default(name: str) -> Rule:
    rule: Rule = Choice(RULES, name).settings
    return rule


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    @pytest.fixture
    def cues(self) -> Any:
        """Saliency and image of 12 x 16 pixels, and 3 x 4 maps of two classes."""
        random = np.random.default_rng(0)
        saliency, image = random.integers(0, 256, (12, 16), np.uint8), random.integers(0, 256, (12, 16, 3), np.uint8)
        maps = {class_id: random.integers(0, 256, (3, 4), np.uint8) for class_id in (15, 3)}
        return maps, saliency, image

    def test_it_labels_every_pixel_with_a_tag_or_background_or_255(self, name: str, cues: Any) -> None:
        maps, saliency, image = cues
        labels = label_image(maps, saliency, image, default(name), "max", (12, 16))
        assert (labels.shape, labels.dtype) == ((12, 16), np.uint8)
        assert set(np.unique(labels)) <= {0, 3, 15, IGNORE}
        assert {3, 15} & set(np.unique(labels))

    def test_it_reads_only_its_declared_inputs(self, name: str, cues: Any) -> None:
        maps, saliency, image = cues
        rule = default(name)
        needed = saliency if rule.needs_saliency else None, image if rule.needs_image else None
        expected = label_image(maps, saliency, image, rule, "max", (12, 16))
        assert np.array_equal(label_image(maps, *needed, rule, "max", (12, 16)), expected)
        if rule.needs_saliency:
            with pytest.raises(ValueError, match="needs a saliency map"):
                label_image(maps, None, image, rule, "max", (12, 16))
        if rule.needs_image:
            with pytest.raises(ValueError, match="needs the image"):
                label_image(maps, saliency, None, rule, "max", (12, 16))

    def test_an_image_without_maps_gets_no_object(self, name: str, cues: Any) -> None:
        _, saliency, image = cues
        labels = label_image({}, saliency, image, default(name), "max", (12, 16))
        assert set(np.unique(labels)) <= {0, IGNORE}

    def test_its_settings_survive_writing_and_reading(self, name: str) -> None:
        rule = default(name)
        assert Choice(RULES, name, plain(rule)).settings == rule

    def test_it_describes_itself_in_one_line(self, name: str) -> None:
        assert default(name).describe()
        assert "\n" not in default(name).describe()

    def test_an_unknown_key_is_refused(self, name: str) -> None:
        with pytest.raises(PipelineError, match=rf"^block\.rule\.{name}\.colour: unknown key"):
            _ = Choice(RULES, name, {"colour": 1}, "block.rule").settings


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ({"threshold": {"background": "salency"}}, "must be a constant, {power: VALUE} or saliency, not 'salency'"),
        ({"threshold": {"background": True}}, "must be a constant, {power: VALUE} or saliency, not True"),
        ({"edam": {"background": "saliency"}}, "must be a constant or {power: VALUE}, not 'saliency'"),
        ({"oaa": {"background": 1.5}}, "1.5 must be at least 0 and at most 1"),
        ({"oaa": {"background": {"power": 0}}}, "0.0 must be above 0"),
    ],
)
def test_an_invalid_background_is_named(rule: dict[str, Any], fault: str, tmp_path: Path) -> None:
    raw = minimal_params(make_tree(tmp_path), tmp_path / "Saliency")
    raw["pseudo_labels"]["cam"]["rule"] = rule
    with pytest.raises(PipelineError) as caught:
        parameters.validate(raw, "p.yaml", resolve=True)
    (line,) = caught.value.lines
    (name,) = rule
    assert line.startswith(f"p.yaml: pseudo_labels.cam.rule.{name}.background")
    assert line.endswith(fault)


def test_neither_the_rules_nor_their_stage_import_torch() -> None:
    code = (
        "import sys, stages.pseudo_labels\n"
        "from pipeline.config import params\nfrom pathlib import Path\nfrom pipeline.config.registry import RULES\n"
        "params.load([Path('params.yaml')])\n"
        "assert all(RULES[name] for name in RULES.names())\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
