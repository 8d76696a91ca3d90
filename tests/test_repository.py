"""What is written in two places says the same."""

import re
from pathlib import Path

from vision_ops import __version__

ROOT = Path(__file__).parents[1]


def test_precommit_has_the_linters_of_make_lint():
    dev = re.search(r"^dev = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    linters = re.findall(r'"(\S+==\S+)"', dev)
    assert sorted(re.findall(r'"(\S+==\S+)"', (ROOT / ".pre-commit-config.yaml").read_text())) == sorted(linters)


def test_version():
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == __version__
    newest = re.search(r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == __version__
    assert re.search(r'^date-released: "(\S+)"$', (ROOT / "CITATION.cff").read_text(), re.M)[1] == newest[2]
