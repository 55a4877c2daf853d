"""Params files and overrides that are no params: each is refused in one line, whatever bytes it holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import params as parameters
from pipeline.config.params import DEPTH, VALUES, load
from pipeline.errors import PipelineError
from pipeline.workflow.stage import run
from stages import index
from tests import project
from tests.voc_tree import make_tree, minimal_params

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "latin-1": ("experiment: caf\xe9\n".encode("latin-1"), "not UTF-8; save it as UTF-8"),
    "UTF-16": ("experiment: x\n".encode("utf-16"), "not UTF-8; save it as UTF-8"),
    "binary": (bytes(range(256)), "not UTF-8; save it as UTF-8"),
    "empty": (b"", "must be a mapping of parameters"),
    "null character": (b"experiment: a\0b\n", "not YAML: unacceptable character #x0000"),
    "brackets": (b"seed: " + b"[" * 100_000, "not YAML: maximum recursion depth exceeded"),
    "nested lists": (b"seed: " + b"[" * 100 + b"]" * 100, f"nests deeper than {DEPTH} levels"),
    "nested mappings": (b"defaults: " + b"{a: " * 100 + b"1" + b"}" * 100, f"nests deeper than {DEPTH} levels"),
    "list in itself": (b"seed: &a [*a]\n", f"nests deeper than {DEPTH} levels"),
    "mapping in itself": (b"defaults: &a {classifiers: *a}\n", f"nests deeper than {DEPTH} levels"),
    "aliases": (ALIASES.encode(), f"nests into more than {VALUES} values"),
    "long number": (b"seed: " + b"1" * 5000 + b"\n", "not YAML: '1111"),
    "no date": (b"seed: 2024-99-99\n", "not YAML: '2024-99-99': month must be in 1..12"),
    "no number": (b"seed: !!int x\n", "not YAML: 'x': invalid literal"),
    "no time": (b"seed: !!timestamp x\n", "not YAML: 'x': "),
    "code": (b"seed: !!python/object/apply:os.system ['touch MARK']\n", "not YAML: could not determine a constructor"),
    "list as key": (b"{[a]: 1}\n", "not YAML: while constructing a mapping"),
    "bad merge": (b"<<: 3\n", "not YAML: while constructing a mapping"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    project.link_code(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(minimal_params(make_tree(Path("data"), train=2, evaluation=1))))
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="1"):
        run("index", index.main, list(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_holds_no_params_is_refused(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, fault = FILES[name]
    (place / "wrong.yaml").write_bytes(content)
    line = refusal(capsys, "--params", "params.yaml", "wrong.yaml")
    assert line.startswith(f"error: wrong.yaml: {fault}")
    assert not (place / "MARK").exists()


@pytest.mark.parametrize(("file", "fault"), [("data", "cannot be read: Is a directory"), ("gone", "no such file")])
def test_a_path_that_is_no_file_is_refused(
    file: str, fault: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, "--params", file).startswith(f"error: {file}: {fault}")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "not JSON: maximum recursion depth exceeded"),
        ('{"seed": ' + "[" * 500 + "]" * 500 + "}", f"nests deeper than {DEPTH} levels"),
        ('{"defaults": ' + '{"a": ' * 500 + "1" + "}" * 501, f"nests deeper than {DEPTH} levels"),
        ('{"seed": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
        (json.dumps({"seed": 10**30}), f"seed: {10**30} must be at most 4294967295"),
        (json.dumps({"seed": -1}), "seed: -1 must be at least 0"),
        ('{"seed": NaN}', "seed: must be a whole number, not nan"),
        ('{"experiment": "a\\u0000"}', "experiment: 'a\\\\x00' must be UTF-8 text without null characters"),
        ('{"experiment": "\\ud800"}', "experiment: '\\\\ud800' must be UTF-8 text without null characters"),
    ],
    ids=lambda text: text[:25],
)
def test_an_override_that_is_no_params_is_refused(
    text: str, fault: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "--set", text)
    assert fault.replace("\\\\", "\\") in line
    assert len(line) < 300


def test_a_message_stays_on_its_line() -> None:
    error = PipelineError("a: x\nerror: b: \x1b[2J\udce9", "c: é")
    assert error.lines == (r"a: x\nerror: b: \x1b[2J\udce9", "c: é")


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_params_in_utf8_are_read_under_an_ascii_locale(locale: str, place: Path) -> None:
    (place / "data").rename(place / "données")
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["dataset"]["root"] = "données"
    (place / "paramètres.yaml").write_text(f"# é\n{yaml.safe_dump(raw, allow_unicode=True)}", encoding="utf-8")
    command = [sys.executable, "-m", "stages.index", "--params", "paramètres.yaml"]
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(command, env=variables | {"LC_ALL": locale}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads((place / "results/test/index/index.json").read_text())["root"] == "données"


def test_limits_are_far_above_the_projects_own_params() -> None:
    raw = parameters.read([project.ROOT / "params.yaml", project.ROOT / "profiles/voc2012.yaml"])
    assert len(json.dumps(raw)) < VALUES
    assert load([project.ROOT / "params.yaml"], {"seed": 2**32 - 1}).seed == 2**32 - 1
