"""Makes pages of the Markdown files outside docs/, and of links between files links between pages.

The sources keep the links that work in a checkout: README.md links docs/index.md, a page in docs/methods
links ../../benchmarks/NAME/README.md.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
NESTED = re.compile(r"^ {3}(?=- )", re.MULTILINE)  # the library of mkdocs wants four spaces
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*/*.md", "benchmarks/*/*.svg")


def page_of(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    return "start.md" if path == "README.md" else path.removeprefix("docs/")


def file_of(page: str) -> str:
    """Which file of the repository a page is made of."""
    if page == "start.md":
        return "README.md"
    return f"docs/{page}" if (ROOT / "docs" / page).exists() else page


def on_files(files: Any, config: Any, **_: Any) -> Any:
    from mkdocs.structure.files import File

    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            page = page_of(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here, folder = page.file.src_uri, posixpath.dirname(file_of(page.file.src_uri))

    def moved(link: re.Match) -> str:
        target = page_of(posixpath.normpath(posixpath.join(folder, link[1])))
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return NESTED.sub("    ", LINK.sub(moved, markdown))
