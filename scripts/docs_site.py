"""MkDocs hooks that let the README and docs/ link to files of the repository as GitHub shows them.

A site has nothing above its root, but pages link to configs, results and tests outside of docs/. Each linked file is
copied to `repository/` of the site and links are rewritten, so that the site is complete by itself. The README becomes
the front page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

COPIES = "repository"
FRONT_PAGE = "index.md"
_TARGET = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page and a copy of every file outside of docs/ that a page links to, directly or not."""
    root = Path(config.config_file_path).parent
    files.append(File.generated(config, FRONT_PAGE, abs_src_path=str(root / "README.md")))
    pages = [_source_path(page.src_uri) for page in files.documentation_pages()]
    copied_paths: set[str] = set()
    while pages:
        source_path = pages.pop()
        for target in _TARGET.findall((root / source_path).read_text(encoding="utf-8")):
            path = _resolve(source_path, target)
            if path in copied_paths or path.startswith("docs/") or path == "README.md":
                continue
            copied_paths.add(path)
            files.append(File.generated(config, f"{COPIES}/{path}", abs_src_path=str(root / path)))
            if path.endswith(".md"):
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files of the repository to links between pages of the site."""
    page_uri = page.file.src_uri
    source_path = _source_path(page_uri)
    folder = posixpath.dirname(page_uri) or "."

    def rewrite(match: re.Match[str]) -> str:
        return f"]({posixpath.relpath(_page_uri(_resolve(source_path, match[1])), folder)}"

    return _TARGET.sub(rewrite, markdown)


def _resolve(source_path: str, target: str) -> str:
    """Return the path from the root of the repository of what the file `source_path` links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source_path), target))


def _source_path(page_uri: str) -> str:
    """Return the file of the repository that is page `page_uri` of the site."""
    if page_uri == FRONT_PAGE:
        return "README.md"
    return page_uri.removeprefix(f"{COPIES}/") if page_uri.startswith(f"{COPIES}/") else f"docs/{page_uri}"


def _page_uri(source_path: str) -> str:
    """Return the page of the site that shows the file `source_path` of the repository."""
    if source_path == "README.md":
        return FRONT_PAGE
    return source_path.removeprefix("docs/") if source_path.startswith("docs/") else f"{COPIES}/{source_path}"
