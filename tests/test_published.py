"""The figures that papers report: as printed, and kept apart from what was measured."""

import re
from pathlib import Path

import pytest

from pipeline.report.published import ASPP_RESNET101, ASPP_VGG16, PUBLISHED, RESNET101, VGG16, Published
from tests.drawn import RAW, experiment
from tests.test_photo_gallery import again, as_voc

PAPERS = Path(__file__).parents[1] / "../shared/papers"
FILES = {"Jiang": "oaa", "Kim": "drs", "Qin": "amr", "Wu": "edam", "Zhang": "agen"}  # by the first author


def printed(entry: Published) -> str:
    """A pattern of the row as the paper's text prints it, within its table's part on the same network."""
    figures = "\t".join(f"{re.escape(f'{value:.1f}')}%?" for value in (entry.val, entry.test) if value is not None)
    delta = r"non-learnable \(\$\\delta=0.55\$\)" if "delta" in entry.method else "learnable"
    match entry.paper.split()[0], entry.table:
        case "Jiang", _:
            name = {"OAA": "OAA", "OAA+": "OAA ⁺", "OAA++": r"OAA\+\+", "OAA+++": r"OAA\+\+ ⁺"}[entry.method]
            part = {VGG16: "VGGNet", RESNET101: "ResNet"}[entry.network]
            return rf"Table 1\n(?s:.*?)Backbone: {part} [^:]*\n{name}\t10K\+S\t{figures}\n"
        case "Kim", 3:
            return rf"without refine\twith refine\n(?:.*\n)?{delta}\t{figures}\t[^:]*Table 3:"
        case "Kim", _:
            kind = {VGG16: r"Large-FOV \(VGG-16", RESNET101: r"Large-FOV \(ResNet-101", ASPP_RESNET101: "ASPP"}
            name = "Ours (non-learnable)" if "delta" in entry.method else "Ours (learnable)"
            return rf"Network : DeepLab-{kind[entry.network]}[^:]*\n{re.escape(name)}\t✓\t{figures}\n(?s:.*?)Table 4:"
        case "Qin", _:
            return rf"AMR \(Ours\)\t\\mathcal{{I}}\t{figures}\n\nTable 1:"
        case "Wu", _:
            return rf"\nResNet101\t{figures}\n.*\n\nTable 2\."
        case "Zhang", 4:
            return rf"Dataset: val(?s:[^:]*)\nAGEN\t.*[\t ]{figures}\n(?s:.*?)Table 4\."
        case _:
            part = {ASPP_VGG16: "VGG", ASPP_RESNET101: "ResNet"}[entry.network]
            return rf"\nAGEN-{part} \(Ours\)\t10k\t[^\t]*\t{figures}\n(?s:.*?)Table 5\."


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: f"{entry.method} {entry.network}")
def test_published_figures_are_those_of_the_papers(entry: Published) -> None:
    text = PAPERS / f"{FILES[entry.paper.split()[0]]}.txt"
    if not text.exists():
        pytest.skip(f"{text} is missing: the papers are not part of the project")
    assert re.search(printed(entry), text.read_text())


def test_published_figures_are_marked_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph = experiment({**RAW, "dataset": {"root": "data/drawn"}}, train=2, held=1, masks=False)
    as_voc(graph, "2007_{:06d}")
    again(graph.find("report"))
    html = " ".join(Path("results/drawn/report.html").read_text().split())  # as browsers fold white space
    assert html.index("<h2>Methods</h2>") < html.index("<h2>Published figures on PASCAL VOC 2012</h2>")
    section = html.partition("<h2>Published figures on PASCAL VOC 2012</h2>")[2].partition("</section>")[0]
    assert "not measured here" in section
    assert "cannot be compared with the table above" in section
    rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", section)[1:]]
    assert len(rows) == len(PUBLISHED)
    source = "Zhang et al., Attention Guided Enhancement Network, Table 4"
    assert ["AGEN, one step", "AGEN, VGG-16 and ResNet-38", "tags", "63.1", "–", source] in rows
    assert not any(entry.paper in html.replace(section, "") for entry in PUBLISHED)
