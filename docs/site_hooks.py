"""What the site needs beyond docs/: pages and files of the repository that its pages link to, at the same places.

Every page is written to be read in the repository, with links relative to its file. The site has docs/ as its root, so
that a file outside docs/ keeps its path (benchmarks/RESULTS.md), and links change by one step.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/NOTES.md")
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and each file outside docs/ that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for file in list(files.documentation_pages()):
        place = _place(file.src_uri)
        for link in LINK.findall(file.content_string):
            target = (place.parent / link[1]).resolve()
            if target.is_file() and not target.is_relative_to(ROOT / "docs") and target.suffix != ".md":
                uri = str(target.relative_to(ROOT))
                if uri not in files.src_uris:
                    files.append(File.generated(config, uri, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site."""
    place = _place(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = (place.parent / match[2]).resolve()
        if not target.exists():
            return match[0]  # MkDocs says which
        inside = target.is_relative_to(ROOT / "docs")
        uri = Path(target.relative_to(ROOT / "docs" if inside else ROOT))
        return match[1] + str(uri.relative_to(Path(page.file.src_uri).parent, walk_up=True))

    return LINK.sub(moved, markdown)


def _place(uri: str) -> Path:
    """The file in the repository that a page of the site is made of."""
    return ROOT / uri if uri in PAGES else ROOT / "docs" / uri
