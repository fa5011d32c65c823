"""push and pull: histories travel whole, only what is missing moves, and nobody's work is replaced.

    library.json                              what this is, and its version
    objects/<h[:2]>/<h>, manifests/<h>.json   as in a library; created, never replaced
    attestations/<entry>/<object>.json        kind and time of an attestation; created
    names/<name>.json                         revisions and tags of a name; compared and swapped

A name's history moves forward only: one side's revisions must begin with all of the other's. The
order is that of a commit, objects first and names last, so what is cut off leaves nothing that a
name means, and running it again goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vectors.errors import InputError, NameNotFound, NameTaken, StoreCorrupt, WorkbenchError
from vectors.formats.canonical import canonical_json
from vectors.store.adopt import Adopted, adopt, check_adoption
from vectors.store.attestations import Attestations, Row
from vectors.store.database import check_time
from vectors.store.histories import Histories
from vectors.store.manifests import Digest, Kind, Manifest
from vectors.store.objects import DIGEST, Batch, Objects
from vectors.store.reach import Reach, closure
from vectors.store.reference import MOST_REVISIONS, check_new_name, is_name
from vectors.store.remote import Remote

__all__ = ["WORKERS", "Exchange", "Transfer"]

WORKERS = 8
GROUP = 64  # objects that are put under their names together
TRIES = 50
FORMAT = {"format": "steering-workbench-library", "version": 1}
Progress = Callable[[float, str], None]
T = TypeVar("T")
R = TypeVar("R")
M = TypeVar("M", bound=BaseModel)
Number = Annotated[int, Field(ge=1, le=MOST_REVISIONS)]


class _Format(BaseModel):
    format: Literal["steering-workbench-library"]
    version: Literal[1]


class _Names(BaseModel):
    """What `names/<name>.json` holds; revisions are number, digest and time, the oldest first."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    version: Literal[1] = Field(1, alias="schema")
    name: str
    kind: Kind
    revisions: tuple[tuple[Number, Digest, str], ...] = Field(min_length=1)
    tags: dict[str, Number] = {}


class _Attested(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    created: str


@dataclass
class Transfer:
    """What was moved.

    Args:
        names: what became of each: "new", "moved" (revisions were added), "same", "behind" (the
            other side has more), or "apart" (each side has revisions that the other lacks).
        objects, manifests, attestations: how many moved; `bytes`: what the objects weigh.
    """

    url: str
    names: dict[str, str] = field(default_factory=dict)
    objects: int = 0
    manifests: int = 0
    attestations: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Exchange:
    """Moves entries between the library and a remote."""

    def __init__(
        self,
        catalog: Histories,
        attestations: Attestations,
        remote: Remote,
        progress: Progress = lambda share, words: None,
    ) -> None:
        self._catalog = catalog
        self._attestations = attestations
        self._remote = remote
        self._progress = progress

    def push(self, names: Sequence[str]) -> Transfer:
        """Bring the remote up to the library's state of `names`; none means all.

        Raises:
            NameNotFound: no such name here.
            NameTaken: a name has other revisions there; the others were pushed.
            BackendUnavailable: the remote cannot be reached or refuses.
            StoreCorrupt: something that is needed is damaged here, or something is there.
        """
        start, done = time.monotonic(), Transfer(self._remote.url)
        wanted = list(dict.fromkeys(names or (entry.name for entry in self._catalog.list())))
        mine = {name: self._document(name) for name in wanted}
        self._remote.create("library.json", canonical_json(FORMAT))
        self._check_format()
        theirs = self._each(lambda name: self._their(name), wanted)
        done.names = {n: _state(mine[n], t[0]) for n, t in zip(wanted, theirs, strict=True)}
        moving = [name for name in wanted if done.names[name] in ("new", "moved")]
        same = [name for name in wanted if done.names[name] == "same"]
        whole = self._each(lambda name: self._has(mine[name]), same)
        lacking = [name for name, there in zip(same, whole, strict=True) if not there]
        reach = self._reach(_digests(mine[name] for name in (*moving, *lacking)))
        attested = self._missing_attestations(_digests(mine.values()))
        stored = reach.objects | {o for row in attested for o in self._attestations.needs(row)}
        stored |= {row.object for row in attested}
        done.objects, done.bytes = self._send(self._catalog.objects, "objects", sorted(stored))
        done.manifests, _ = self._send(
            self._catalog.manifests, "manifests", sorted(reach.manifests)
        )
        done.attestations = sum(self._each(self._send_attestation, attested))
        self._remote.settle()
        # The histories of which everything was sent, whatever has been saved here since.
        states = self._each(lambda name: self._advance(mine[name]), moving)
        for name, state in zip(moving, states, strict=True):
            done.names[name] = state if state in ("apart", "behind") else done.names[name]
        done.seconds = time.monotonic() - start
        self._refuse_apart(done, "there")
        return done

    def pull(self, names: Sequence[str], as_name: str = "") -> Transfer:
        """Bring the library up to the remote's state of `names`; none means all.

        Raises:
            InputError: `as_name` with more or less than one name, or no library there.
            NameNotFound: no such name there.
            NameTaken: a name has other revisions here; the others were pulled.
            BackendUnavailable: the remote cannot be reached or refuses.
            StoreCorrupt: something there is damaged.
        """
        start, done = time.monotonic(), Transfer(self._remote.url)
        if as_name and len(names) != 1:
            raise InputError("Another name can be given to one entry only; name that one.")
        if as_name:
            check_new_name(as_name)
        self._check_format()
        wanted = list(dict.fromkeys(names or self._their_names()))
        found = dict(
            zip(wanted, self._each(lambda name: self._their(name)[0], wanted), strict=True)
        )
        documents: dict[str, _Names] = {}
        for name, document in found.items():
            if document is None:
                raise NameNotFound(f"{self._remote.url} has nothing called '{name[:100]}'.")
            documents[as_name or name] = document
        for name, theirs in documents.items():
            mine = self._document(name) if self._living(name) else None
            done.names[name] = _state(theirs, mine)
        moving = {n: d for n, d in documents.items() if done.names[n] in ("new", "moved")}
        for name, document in moving.items():
            check_adoption(self._catalog, name, document.kind, document.revisions)
        # Of names that stay as they are here, what is missing is mended, and new attestations taken over.
        whole = [d for n, d in documents.items() if done.names[n] != "apart"]
        manifests = self._fetch_manifests(_digests(whole))
        known = dict(manifests)
        reach = closure(_digests(whole), self._catalog.manifests, None, known)
        for document in moving.values():
            self._check_kinds(document, known)
        rows = self._their_attestations(reach.manifests)
        needed = reach.objects | {row.object for row in rows}
        done.objects, done.bytes = self._fetch_objects(needed)
        more = {o for row in rows for o in self._attestations.needs(row)}
        objects, size = self._fetch_objects(more)
        done.objects, done.bytes = done.objects + objects, done.bytes + size
        with Batch(self._catalog.manifests) as batch:
            for digest, manifest in manifests.items():
                batch.add(manifest.to_json(), digest)
            batch.commit()
        done.manifests = len(manifests)
        done.attestations = self._attestations.adopt(rows)
        for name, document in moving.items():
            adopted = Adopted(name, document.kind, document.revisions, document.tags)
            adopt(self._catalog, adopted, self._remote.url)
        done.seconds = time.monotonic() - start
        self._refuse_apart(done, "here")
        return done

    # -- names ----------------------------------------------------------------------------------

    def _document(self, name: str) -> _Names:
        history = self._catalog._refs.history(name)
        tags = self._catalog.tags(name)
        rows = tuple((ref.revision, ref.digest, ref.created) for ref in reversed(history))
        return _Names.model_validate(
            {"name": name, "kind": history[0].kind, "revisions": rows, "tags": tags}
        )

    def _living(self, name: str) -> bool:
        try:
            self._catalog._refs.history(name)
        except NameNotFound:
            return False
        return True

    def _their(self, name: str) -> tuple[_Names | None, str | None]:
        found = self._remote.read(f"names/{check_new_name(name)}.json")
        if found is None:
            return None, None
        document = _parsed(_Names, found[0], f"{self._remote.url}/names/{name}.json")
        numbers = [number for number, _, _ in document.revisions]
        if document.name != name or numbers != sorted(set(numbers)):
            raise StoreCorrupt(
                f"{self._remote.url}/names/{name}.json tells the history of "
                f"'{document.name[:100]}' or tells it out of order; push the name there again "
                "under another."
            )
        return document, found[1]

    def _their_names(self) -> list[str]:
        """What is no name was left there by something else."""
        keys = [key.removeprefix("names/") for key in self._remote.keys("names")]
        names = (key.removesuffix(".json") for key in keys if key.endswith(".json"))
        return sorted(name for name in names if is_name(name))

    def _has(self, document: _Names) -> bool:
        """Whether the newest manifest of a name is there."""
        place = self._catalog.manifests.place(document.revisions[-1][1])
        return self._remote.size(f"manifests/{place}") is not None

    def _check_kinds(self, document: _Names, known: Mapping[str, Manifest]) -> None:
        for number, digest, _ in document.revisions:
            if known[digest].kind != document.kind:
                raise StoreCorrupt(
                    f"{self._remote.url} calls '{document.name}' a {document.kind}, and its revision "
                    f"{number} is a {known[digest].kind}; push it there again under another name."
                )

    def _advance(self, mine: _Names) -> str:
        """Make the remote's history of a name this one, unless they have parted."""
        name = mine.name
        for _ in range(TRIES):
            theirs, version = self._their(name)
            state = _state(mine, theirs)
            if state not in ("new", "moved"):
                return state
            tags = {**(theirs.tags if theirs else {}), **mine.tags}
            data = mine.model_copy(update={"tags": tags}).model_dump(mode="json", by_alias=True)
            if self._remote.swap(f"names/{name}.json", canonical_json(data), version):
                return state
        return "apart"

    def _refuse_apart(self, done: Transfer, where: str) -> None:
        apart = sorted(name for name, state in done.names.items() if state == "apart")
        if apart:
            first = apart[0]
            raise NameTaken(
                f"{', '.join(apart)} cannot be joined, since each side has revisions that the "
                f"other lacks; nothing of them was changed {where}, so rename yours "
                f"(`workbench library rename {first} {first}-mine`) or pull it under another name."
            )

    def _check_format(self) -> None:
        found = self._remote.read("library.json")
        if found is None:
            raise InputError(
                f"{self._remote.url} holds no library; push one there, or check the address."
            )
        _parsed(_Format, found[0], f"{self._remote.url}/library.json")

    # -- content --------------------------------------------------------------------------------

    def _reach(self, digests: Iterable[str]) -> Reach:
        return closure(digests, self._catalog.manifests, None, {})

    def _send(self, folder: Objects, prefix: str, digests: Sequence[str]) -> tuple[int, int]:
        """Create what the remote lacks; return how many, and their bytes."""
        sizes = self._each(lambda d: self._remote.size(f"{prefix}/{folder.place(d)}"), digests)
        missing = []
        for digest, size in zip(digests, sizes, strict=True):
            if size is None:
                missing.append(digest)
            elif size != folder.size(digest):
                raise StoreCorrupt(
                    f"{self._remote.url} has {size} bytes of the {folder.what} {digest[:12]}, "
                    f"which has {folder.size(digest)} here; check which copy is damaged with "
                    "`workbench library fsck`, and remove that one."
                )
        total, sent = sum(map(folder.size, missing)) or 1, 0

        def send(digest: str) -> int:
            data = folder.read(digest)  # checked: damage does not travel
            self._remote.create(f"{prefix}/{folder.place(digest)}", data)
            return len(data)

        for size in self._stream(send, missing):
            sent += size
            self._progress(sent / total, f"pushing {prefix}")
        return len(missing), sent

    def _missing_attestations(self, digests: set[str]) -> list[Row]:
        there = set(self._remote.keys("attestations"))
        return [row for row in self._attestations.rows(digests) if row.key not in there]

    def _send_attestation(self, row: Row) -> bool:
        data = _Attested(kind=row.kind, created=row.created).model_dump(mode="json")
        return self._remote.create(row.key, canonical_json(data))

    def _their_attestations(self, digests: set[str]) -> list[Row]:
        known = {row.key for row in self._attestations.rows(digests)}
        keys = []
        for key in self._remote.keys("attestations"):
            parts = key.split("/")
            if len(parts) != 3 or parts[1] not in digests or key in known:
                continue
            # Anything else was left there by something else.
            if parts[2].endswith(".json") and DIGEST.fullmatch(parts[2].removesuffix(".json")):
                keys.append(key)

        def read(key: str) -> Row:
            _, digest, file = key.split("/")
            stored = file.removesuffix(".json")
            data = self._remote.read(key) or (b"", "")
            said = _parsed(_Attested, data[0], f"{self._remote.url}/{key}")
            try:
                # It says which of several is the newest.
                check_time(said.created)
            except ValueError as error:
                raise StoreCorrupt(
                    f"{self._remote.url}/{key} has the time {said.created[:40]!r} ({error}); see to the "
                    "clocks here and where it was pushed, or remove that file."
                ) from error
            return Row(digest, said.kind, stored, said.created)

        return self._each(read, keys)

    def _fetch_manifests(self, digests: set[str]) -> dict[str, Manifest]:
        """Read the manifests that the library lacks, and their parents that are there."""
        here, found, waiting = self._catalog.manifests, {}, digests
        needed = set(digests)
        while waiting:
            asked = sorted(digest for digest in waiting if digest not in here)
            pairs = self._each(lambda d: self._remote.read(f"manifests/{here.place(d)}"), asked)
            new: dict[str, Manifest] = {}
            for digest, pair in zip(asked, pairs, strict=True):
                if pair is not None:
                    new[digest] = here.parse(digest, pair[0])
                elif digest in needed:
                    raise StoreCorrupt(
                        f"{self._remote.url} lacks the manifest {digest[:12]}, which one of its "
                        "names needs; push that entry again from a library that has it."
                    )
            found |= new
            needed |= {p for m in new.values() if m.kind == "recipe" for p in m.parents}
            waiting = {p for m in new.values() for p in m.parents} - found.keys()
        return found

    def _fetch_objects(self, digests: Iterable[str]) -> tuple[int, int]:
        objects = self._catalog.objects
        missing = sorted(digest for digest in digests if digest not in objects)
        for start in range(0, len(missing), GROUP):
            group = missing[start : start + GROUP]
            with Batch(objects) as batch:

                def fetch(digest: str, batch: Batch = batch) -> None:
                    batch.add(self._remote.chunks(f"objects/{objects.place(digest)}"), digest)

                try:
                    self._each(fetch, group)
                finally:
                    # What has arrived stays, so that the next try starts from there.
                    batch.commit()
            self._progress(min(1.0, (start + GROUP) / len(missing)), "pulling objects")
        return len(missing), sum(map(objects.size, missing))

    def _each(self, work: Callable[[T], R], things: Sequence[T]) -> list[R]:
        return list(self._stream(work, things))

    def _stream(self, work: Callable[[T], R], things: Sequence[T]) -> Iterable[R]:
        pool = ThreadPoolExecutor(WORKERS)
        try:
            yield from pool.map(work, things)
        except WorkbenchError:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            pool.shutdown()


def _state(ours: _Names, theirs: _Names | None) -> str:
    """How the history that would move, `ours`, stands to the one that is there."""
    if theirs is None:
        return "new"
    a = [(number, digest) for number, digest, _ in ours.revisions]
    b = [(number, digest) for number, digest, _ in theirs.revisions]
    if ours.kind != theirs.kind or a[: len(b)] != b[: len(a)]:
        return "apart"
    if len(a) == len(b):
        return "moved" if ours.tags.items() - theirs.tags.items() else "same"
    return "moved" if len(a) > len(b) else "behind"


def _digests(documents: Iterable[_Names]) -> set[str]:
    return {digest for document in documents for _, digest, _ in document.revisions}


def _parsed(model: type[M], data: bytes, where: str) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        row = error.errors(include_url=False)[0]
        raise StoreCorrupt(
            f"{where} has content that this version does not know "
            f"({'.'.join(map(str, row['loc'])) or 'JSON'}: {row['msg']}); update the workbench, or "
            "push it again."
        ) from error
