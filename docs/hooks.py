"""What mkdocs needs besides the pages: files of the repository that stand outside docs/, and links
to them. It fills nothing in; `python docs/update.py` writes the tables into the pages.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OUTSIDE = {ROOT / "CHANGELOG.md": "changelog.md", ROOT / "CONTRIBUTING.md": "contributing.md"} | {
    path: f"results/{path.name}"
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.*"))
    if path.suffix in (".png", ".svg")
}
"""Files outside docs/ that the site has, and where."""
LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s#]+)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the files of `OUTSIDE`."""
    from mkdocs.structure.files import File

    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that are right in the repository to the same files on the site."""
    here = page.file.src_uri
    source = next((path for path, place in OUTSIDE.items() if place == here), DOCS / here)
    return LINK.sub(lambda match: match[1] + _on_site(match[2], source, here), markdown)


def _on_site(link: str, source: Path, here: str) -> str:
    target = (source.parent / link).resolve()
    if target in OUTSIDE:
        place = OUTSIDE[target]
    elif target.is_relative_to(DOCS) and not source.is_relative_to(DOCS):
        place = target.relative_to(DOCS).as_posix()
    else:
        return link
    return Path(os.path.relpath(place, Path(here).parent)).as_posix()
