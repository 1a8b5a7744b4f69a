"""What the documents name exists: files, folders, make verbs, public functions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import inlay
from tests.system.environment import ROOT

# Written by builds and runs, so absent from a fresh checkout.
_GENERATED = ("build/", "dist/", "demo-output/", "python/inlay/lib/", ".venv")
_FOLDERS = "csrc|python|tests|benchmarks|docs|cmake|examples|notebooks|\\.ci"
_PATH = re.compile(rf"^(?:(?:{_FOLDERS})/[\w./<>*{{}},-]*|[\w.-]+\.(?:md|toml|lock|txt|in)|Makefile|LICENSE)$")


def _documents() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def _named_paths(text: str) -> set[str]:
    spans = re.findall(r"`([^`\n]+)`", text)
    return {word for span in spans for word in span.split() if _PATH.match(word)}


def test_named_paths_exist() -> None:
    missing = []
    for document in _documents():
        for name in sorted(_named_paths(document.read_text())):
            pattern = re.sub(r"<\w+>", "*", name).rstrip("/")
            if not name.startswith(_GENERATED) and not any(ROOT.glob(pattern)):
                missing.append(f"{document.relative_to(ROOT)}: {name}")
    assert missing == []


def test_links_lead_somewhere() -> None:
    broken = []
    for document in _documents():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert broken == []


def test_make_verbs_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "build", "test", "test-cuda", "demo", "bench", "lint", "format", "sanitize", "wheel"} <= verbs
    unknown = []
    for document in _documents():
        for verb in re.findall(r"(?:`|^ +|^)make ([a-z-]+)", document.read_text(), re.MULTILINE):
            if verb not in verbs:
                unknown.append(f"{document.relative_to(ROOT)}: make {verb}")
    assert unknown == []


def test_named_functions_exist() -> None:
    unknown = []
    for document in _documents():
        for name in re.findall(r"\binlay\.([a-z]\w+)\(", document.read_text()):
            if not hasattr(inlay, name):
                unknown.append(f"{document.relative_to(ROOT)}: inlay.{name}")
    assert unknown == []


def test_the_path_pattern() -> None:
    """The search finds what it should, and leaves prose alone."""
    text = "`csrc/norm/params.h`, `make test`, `a/b`, `python benchmarks/run.py norm`, `x / y`, `README.md`"
    assert _named_paths(text) == {"csrc/norm/params.h", "benchmarks/run.py", "README.md"}
