"""A shortage of memory ends a stage with one line that names the parameters to reduce."""

import json
from pathlib import Path

import pytest

from pipeline.memory import is_shortage
from pipeline.stores import manifest
from pipeline.stores.files import sha256
from pipeline.workflow import stage
from pipeline.workflow.stage import Work
from tests.voc_tree import make_tree, minimal_params


def fail(work: Work) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("name", "block", "line"),
    [
        ("index", [], "index: out of memory; reduce dataset.working_megapixels"),
        (
            "classifier",
            ["base"],
            "classifier base: out of memory; reduce classifiers.base.training.batch_size (and raise accumulation) or "
            "classifiers.base.augmentation.crop",
        ),
    ],
)
def test_a_stage_without_memory_ends_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    block: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = make_tree(Path("voc"))
    Path("params.json").write_text(json.dumps(minimal_params(dataset)))
    Path("results/test/index").mkdir(parents=True)
    files = [Path(f"results/test/index/{part}.json") for part in ("index", "train", "saliency")]
    for file in files:
        file.write_text("{}")
    manifest.write(files[0].parent, outputs={file.name: sha256(file) for file in files})
    with pytest.raises(SystemExit) as caught:
        stage.run(name, fail, [*block, "--params", "params.json"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def test_errors_of_other_kinds_are_no_shortage() -> None:
    assert not is_shortage(RuntimeError("size mismatch"))
    assert not is_shortage(KeyError("memory"))
