"""The site builds without a warning, its links lead somewhere, and its search finds words."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from snowballstemmer import stemmer

from tests.pages import DOCS, ROOT

pytestmark = pytest.mark.slow
WORDS = {
    "epsilon": "choose",
    "radius": "concepts",
    "accumulation": "howto/loops",
    "bf16": "howto/precision",
    "jailbreak": "howto/language-models",
    "lora": "howto/adapters",
    "ddp": "howto/processes",
    "freelb": "solvers/freelb",
    "typos": "howto/tokens",
    "dropout": "concepts",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    doctrees = tmp_path_factory.mktemp("doctrees")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(doctrees)]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, and the names that it can be linked by."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


def inside(page: Page) -> Iterator[tuple[str, str]]:
    """Yield path and fragment of each link that stays on the site."""
    for link in page.links:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc:
            yield unquote(parts.path), unquote(parts.fragment)


def test_every_link_of_the_site_leads_somewhere(site: Path):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 50
    for path, page in pages.items():
        if "_modules" in path.parts:  # listings of source, whose names are those of aliases
            continue
        for target, fragment in inside(page):
            found = (path.parent / target).resolve() if target else path
            assert found.exists(), (path.name, target)
            if fragment and found in pages:
                assert fragment in pages[found].names, (path.name, target, fragment)


def test_the_search_finds_what_users_type(site: Path):
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(re.sub(r"^Search\.setIndex\(|\)$", "", text.strip()))
    stem = stemmer("english").stemWord  # as the search box does
    for word, page in WORDS.items():
        found = set()
        for where in ("terms", "titleterms"):
            pages = index[where].get(stem(word), [])
            found |= {index["docnames"][n] for n in (pages if isinstance(pages, list) else [pages])}
        assert page in found, word
