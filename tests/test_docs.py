"""The pages: tables as the benchmarks have them, nothing missing from the menu, quotes that exist."""

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.fixture
def when_pays(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import when_pays

    return when_pays


def test_the_tables_are_those_of_the_results(when_pays):
    page = when_pays.PAGE.read_text(encoding="utf-8")
    parts = when_pays.parts()
    marks = re.findall(r"<!-- ([a-z-]+) -->\n", page)
    assert sorted(marks) == sorted(parts)
    for name, text in parts.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page, re.DOTALL)
        assert found and found[1] == text, f"{name} is old: run python benchmarks/when_pays.py"


def test_a_loss_is_the_gain_turned_round(when_pays):
    assert when_pays.minus([2.0, 1.0, 4.0]) == [-2.0, -4.0, -1.0]
    assert when_pays._faster({"time_ratio": 0.5, "interval": [0.4, 0.8]}) == "2.00 [1.25, 2.50]"


def pages_of_menu(menu):
    for entry in menu:
        for page in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_of_menu(page) if isinstance(page, list) else [page]


def test_the_menu_has_every_page():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    benchmarks = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/*/README.md")]
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES]
    assert sorted(pages_of_menu(menu)) == sorted(
        [*pages, *benchmarks, "start.md", "CONTRIBUTING.md", "CHANGELOG.md"]
    )


def test_links_between_files():
    for page in [*PAGES, ROOT / "README.md", *ROOT.glob("benchmarks/*/README.md")]:
        for link in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links {link}"


def test_quoted_parts_of_scripts_exist_and_all_are_quoted():
    quoted = set()
    for page in PAGES:
        quoted |= set(re.findall(r'--8<-- "([^"]+)"', page.read_text(encoding="utf-8")))
    parts = {
        f"examples/{script.name}:{part}"
        for script in (ROOT / "examples").glob("*.py")
        for part in re.findall(r"--8<-- \[start:(\w+)\]", script.read_text(encoding="utf-8"))
    }
    assert quoted == parts and len(parts) > 15


def test_links_out_of_docs_become_links_between_pages():
    sys.path.insert(0, str(DOCS))
    try:
        import hooks
    finally:
        sys.path.remove(str(DOCS))

    class Page:
        def __init__(self, uri):
            self.file = type("File", (), {"src_uri": uri})

    def moved(uri, text):
        return hooks.on_page_markdown(text, Page(uri))

    assert moved("index.md", "[a](../README.md) [b](methods/tsa.md)") == "[a](start.md) [b](methods/tsa.md)"
    assert moved("methods/tsa.md", "[a](../../benchmarks/x/README.md)") == "[a](../benchmarks/x/README.md)"
    assert moved("start.md", "[a](docs/index.md) [b](https://c.d) [e](#f)") == (
        "[a](index.md) [b](https://c.d) [e](#f)"
    )
    assert (
        moved("benchmarks/dlc_table1/README.md", "[a](../dlc_speed/README.md)")
        == "[a](../dlc_speed/README.md)"
    )
    assert moved("index.md", "1. a\n   - b\n\n  - c") == "1. a\n    - b\n\n  - c"


def test_examples_in_docstrings():
    pytest.importorskip("griffe", reason="needs the extra docs")
    sys.path.insert(0, str(DOCS))
    try:
        from examples_in_docstrings import sectioned
    finally:
        sys.path.remove(str(DOCS))
    assert sectioned("Twice.\n\n>>> twice(2)\n4") == "Twice.\n\nExamples:\n    >>> twice(2)\n    4"
    assert sectioned("Twice.\n\nExample:\n    >>> 1") == "Twice.\n\nExamples:\n    >>> 1"
    assert sectioned("A.\n\nExample: a batch\n    >>> 1") == "A.\n\nExamples:\n    a batch\n\n    >>> 1"
