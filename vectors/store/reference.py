"""The ways to point at an entry: name, name@revision, name@date, name@tag, name@digest, digest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date

from vectors.errors import GrammarError
from vectors.grammar import check_name

__all__ = [
    "MOST_REVISIONS",
    "Reference",
    "check_new_name",
    "check_tag",
    "is_name",
    "parse_reference",
]

DIGEST = re.compile(r"[0-9a-f]{8,64}")
REVISION = re.compile(r"[1-9][0-9]{0,6}")
MOST_REVISIONS = 9_999_999
TAG = re.compile(r"[a-z][a-z0-9-]{0,59}")


@dataclass(frozen=True)
class Reference:
    """A parsed reference; at most one of the last four is given, and none means the newest."""

    name: str
    revision: int | None = None
    until: str | None = None
    digest: str | None = None
    tag: str | None = None


def parse_reference(text: str) -> Reference:
    """Parse `name`, `name@3`, `name@2026-11-22`, `name@stable` or `name@9f86d081`.

    A digest on its own is a name to this function; no entry can be called like one.

    Raises:
        GrammarError: text that is none of these.
    """
    name, at, which = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if REVISION.fullmatch(which):
        return Reference(name, revision=int(which))
    if DIGEST.fullmatch(which):
        return Reference(name, digest=which)
    if TAG.fullmatch(which):
        return Reference(name, tag=which)
    try:
        return Reference(name, until=date.fromisoformat(which).isoformat())
    except ValueError:
        raise GrammarError(
            f"{which[:40]!r} in {text[:100]!r} is no revision; write a number ({name}@2), a date "
            f"({name}@2026-11-22), a tag ({name}@stable), or at least 8 digits of a digest."
        ) from None


def check_new_name(name: str) -> str:
    """Return `name`, or raise GrammarError where an entry cannot be called so."""
    check_name(name)
    if DIGEST.fullmatch(name):
        raise GrammarError(
            f"The name {name!r} looks like a digest; choose one with a letter beyond f, or a dash."
        )
    return name


def is_name(name: str) -> bool:
    """Whether an entry can be called so."""
    try:
        return bool(check_new_name(name))
    except GrammarError:
        return False


def check_tag(tag: str) -> str:
    """Return `tag`, or raise GrammarError where it cannot be told from a digest, or is no tag."""
    if not TAG.fullmatch(tag) or DIGEST.fullmatch(tag):
        raise GrammarError(
            f"{tag[:60]!r} cannot be a tag; use up to 60 lower-case letters, digits and '-', "
            "starting with a letter, and not only hex digits."
        )
    return tag
