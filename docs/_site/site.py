"""What the documentation site needs beyond Markdown: pages from elsewhere in the repository, and docstrings' roles."""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

ELSEWHERE = {
    "index.md": "README.md",
    "derivation.md": "pacl_scale/kernels/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site whose text lies where a reader of the code looks for it."""

LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
FILE = re.compile(r"\[[^\]]+\]\((LICENSE|CITATION\.cff)\)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|obj|exc):`~?([^`]+)`")
VERBATIM = re.compile(r"``([^`]+)``")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for name, path in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages; what has no page is warned of."""
    source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {path: name for name, path in ELSEWHERE.items()}

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        place = pages.get(path, path.removeprefix("docs/"))
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, FILE.sub(r"`\1`", markdown))


class Roles(griffe.Extension):
    """Docstrings say :class:`Name` and ``verbatim``, as editors and `help` show them; a page shows `code`."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = VERBATIM.sub(r"`\1`", ROLE.sub(r"`\1`", obj.docstring.value))
