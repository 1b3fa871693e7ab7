"""MkDocs hooks: pages and pictures of the repository that lie outside docs/ join the site, and links go where they are.

In the repository, links are relative paths that work wherever its Markdown is shown. On the site a link to an included
file is kept, a link to any other file or folder of the repository becomes its text, and a link to nothing is a warning,
which ends a strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
INCLUDED = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "benchmarks/README.md")
RESULTS = "benchmarks/results"

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_log = logging.getLogger("mkdocs.plugins.site_hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/, under its path in the repository."""
    results = (ROOT / RESULTS).iterdir()
    for path in (*INCLUDED, *(f"{RESULTS}/{file.name}" for file in results if file.suffix != ".md")):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them, outside of code."""
    uri = page.file.src_uri
    here = posixpath.dirname(uri if uri in INCLUDED else f"docs/{uri}")
    parts, start = [], 0
    for fence in (*_FENCE.finditer(markdown), None):
        stop = fence.start() if fence else len(markdown)
        parts.append(_LINK.sub(lambda link: _rewritten(link, here, page), markdown[start:stop]))
        if fence:
            parts.append(fence.group())
            start = fence.end()
    return "".join(parts)


def _rewritten(link: re.Match[str], here: str, page: Page) -> str:
    mark, text, url = link.groups()
    if re.match(r"[a-z]+:|#", url):
        return link.group()
    path, _, anchor = url.partition("#")
    target = posixpath.normpath(posixpath.join(here, path))
    if target.startswith("..") or not (ROOT / target).exists():
        _log.warning("%s: link to %s, which is not in the repository", page.file.src_uri, url)
        return link.group()
    uri = target.removeprefix("docs/")
    if uri == target and target not in INCLUDED and not target.startswith(f"{RESULTS}/"):
        return text
    relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
    return f"{mark}[{text}]({relative}{'#' if anchor else ''}{anchor})"


def on_post_page(output: str, page: Page, config: Any) -> str:
    """Fail on what would be loaded from elsewhere."""
    for found in re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))', output):
        _log.warning("%s loads %s", page.file.src_uri, found)
    return output
