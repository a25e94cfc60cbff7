"""The pages: their Python runs, their commands exist, their links lead somewhere, and they build without a warning."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from unittest import mock
from urllib.parse import unquote, urlsplit

import click
import pytest
from conftest import required, table
from markdown_it import MarkdownIt
from markdown_it.token import Token

from nas.architecture import HADAMARD_KINDS
from nas.commands import cli
from nas.models.mixers.hadamard import KINDS
from nas.objectives.objectives import OBJECTIVES
from nas.scoring.accuracy import ESTIMATORS
from nas.scoring.latency import RUNTIME_TRAITS, RUNTIMES
from nas.search.samplers.table import SAMPLERS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), ROOT / "results/README.md"]
)
TABLES = (HADAMARD_KINDS, KINDS, ESTIMATORS, RUNTIME_TRAITS, RUNTIMES, OBJECTIVES, SAMPLERS)
SLOW = {"README.md", "docs/api.md", "docs/faq.md", "docs/extending/objective.md", "docs/extending/space.md"}
"""Pages whose programs take longer than a few seconds."""


@dataclass(frozen=True)
class Block:
    """A block of code: its page, the line it begins in, its language (empty where it is only indented) and text."""

    page: Path
    line: int
    language: str
    text: str


@functools.cache
def tokens_of(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text())


def blocks(page: Path) -> Iterator[Block]:
    for token in tokens_of(page):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            first = token.map[0] + (2 if token.type == "fence" else 1)
            yield Block(page, first, token.info.strip(), token.content)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] if name(p) in SLOW else [], id=name(p)) for p in WITH_PYTHON]
)
def test_python_runs(page, tmp_path, monkeypatch):
    """Every block of a page in turn, as somebody would who reads it from its beginning."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with ExitStack() as stack:
        for table in TABLES:  # what a page puts into a table is taken out again
            stack.enter_context(mock.patch.dict(table))
        for block in blocks(page):
            if block.language == "python":
                code = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's own line
                exec(compile(code, str(page), "exec"), vars(module))


CALL = re.compile(r"(?:\$ )?(?:\S*python3? )?(?:mixnas|\S*cli\.py) (?P<words>[a-z][^>]*)")


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """What a page calls `mixnas` (or `cli.py`) with: the line, and the words after the program."""
    lines = [
        (block.line + i, line)
        for block in blocks(page)
        if block.language in ("", "sh", "console")
        for i, line in enumerate(block.text.replace("\\\n", " ").splitlines())
    ]
    for token in tokens_of(page):
        inline = (child.content for child in token.children or () if child.type == "code_inline")
        lines += [(token.map[0] + 1, text) for text in inline if token.map is not None and "\n" not in text]
    for number, line in lines:
        for part in re.split(r"&&|\|", line):
            if found := CALL.match(part.strip()):
                yield number, [word for word in shlex.split(found["words"], comments=True) if word != "…"]


HAND_WRITTEN = [page for page in PAGES if page.name != "commands.md"]
COMMANDS = [(page, line, words) for page in HAND_WRITTEN for line, words in commands(page)]


def test_commands_are_found():
    assert len(COMMANDS) > 60
    assert {words[0] for _, _, words in COMMANDS} >= set(cli.commands) - {"spaces"}


@table("page, line, words", COMMANDS, by=lambda page, *_: name(page))
def test_command_exists(page, line, words):
    """Its options are those of the command line, and take what they are given. Nothing is run."""
    command = cli.commands.get(words[0])
    assert command is not None, f"there is no command {words[0]}"
    if len(words) == 1:
        return  # a command is named, not called
    try:
        command.make_context(words[0], list(words[1:]))
    except click.ClickException as error:
        pytest.fail(f"{name(page)}:{line}: {error.format_message()}")


def written_commands() -> str:
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page()


def test_reference_is_that_of_the_command_line():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert text == written_commands(), "stale: python docs/commands.py"
    for command_name, command in cli.commands.items():
        section = text.partition(f"\n## {command_name}\n")[2].partition("\n## ")[0]
        assert section, f"no section {command_name}"
        options = [p for p in command.params if isinstance(p, click.Option)]
        assert all(any(f"`{name}" in section for name in p.opts) for p in options), command_name


def anchors(page: Path) -> set[str]:
    """What headings can be linked to, as the sites that show such files name them."""
    titles = (b.content for a, b in itertools.pairwise(tokens_of(page)) if a.type == "heading_open")
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> Iterator[str]:
    for token in tokens_of(page):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target and not urlsplit(str(target)).scheme:
                yield unquote(str(target))


@table("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


class Built(HTMLParser):
    """What a built page refers to and what can be referred to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.references: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.references.append(given["href"])
        is_loaded = tag in ("script", "img", "source", "iframe") or (tag == "link" and given.get("rel") == "stylesheet")
        self.loaded += [given[key] for key in ("src", "href") if is_loaded and given.get(key)]


@pytest.mark.slow
def test_pages_build(tmp_path):
    """Without a warning and without network; every link within leads to a page and a place that is there."""
    if importlib.util.find_spec("sphinx") is None or importlib.util.find_spec("furo") is None:
        required("docs", "the pages' generator is not installed: pip install 'mixnas[docs]'")
    (line,) = (p for p in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if "-m sphinx" in p)
    words = shlex.split(line.strip().partition("python ")[2], comments=True)
    words[-1] = str(tmp_path)
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    built = {path.resolve(): Built(path.read_text()) for path in tmp_path.rglob("*.html")}
    assert len(built) > 30
    for path, page in built.items():
        for target in [*page.references, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                assert target not in page.loaded, f"{path.name} loads {target}"
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert there.exists(), f"{path.name}: {target}"
            if parts.fragment and there in built:
                assert unquote(parts.fragment) in built[there].ids | {""}, f"{path.name}: {target}"


def test_tests_that_pages_name_are_there():
    """`test_name`, or the beginning of several names as `test_na…`."""
    source = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    defined = re.findall(r"^def (test_\w+)", source, flags=re.MULTILINE)
    named = {found for page in PAGES for found in re.findall(r"`(test_\w+…?)`", page.read_text())}
    assert len(named) > 50
    for each in named:
        assert any(d.startswith(each[:-1]) if each.endswith("…") else d == each for d in defined), each


def test_the_changes_on_the_pages_about_extending_fit_the_source():
    pages = (ROOT / "docs" / "extending").glob("*.md")
    found = [block for page in pages for block in blocks(page) if block.language == "diff"]
    assert len(found) >= 3
    for block in found:
        tried = subprocess.run(["git", "apply", "--check"], cwd=ROOT, input=block.text, text=True, capture_output=True)
        assert tried.returncode == 0, f"{block.page.name}: {tried.stderr}"
