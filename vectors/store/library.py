"""The versioned store of steering vectors, task vectors and recipes, and of what attests to them.

Several processes may use one library at once; `catalog.py` says how it lies on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from vectors.errors import InputError, ModelMismatch
from vectors.formats.native import vector_bytes
from vectors.store.attestations import Attestations
from vectors.store.catalog import NONE, Entry
from vectors.store.check import Checked, Checker
from vectors.store.collect import GRACE, RETENTION, Collection, Collector
from vectors.store.exchange import Exchange, Transfer
from vectors.store.histories import Histories
from vectors.store.manifests import Manifest
from vectors.store.payloads import (
    VECTOR_FILE,
    BaseTensors,
    Progress,
    read_recipe,
    read_steering,
    read_tuned,
    write_task,
)
from vectors.store.remote import Remote
from vectors.store.signatures import KIND, SIGNED, Signature, proof, public_key, sign, signatures_in
from vectors.tasks.recipes import Recipe
from vectors.types import SteeringVector

__all__ = ["Library"]


class Library(Histories):
    """The library in the folder `root`; `Catalog` finds its entries, `Histories` changes names.

    Raises:
        OutOfSpace: a folder that cannot be written.
        StoreCorrupt: a damaged library, or one of a newer version.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._attestations = Attestations(self._database, self.objects)

    def save_vector(
        self,
        name: str,
        vector: SteeringVector,
        *,
        files: Mapping[str, bytes] = NONE,
        parents: Iterable[str] = (),
    ) -> Entry:
        """Keep a steering vector, with attachments, as the newest revision of `name`.

        Raises:
            GrammarError: not a name.
            NameTaken: the name belongs to another kind.
            VectorFileError: a vector that its file format cannot carry.
            InputError: an attachment's name or a parent that is not valid.
        """
        self._changes.check_free(name, "steering-vector")
        with self._gate.shared():
            return self._save(name, self._vector(vector, files, parents))

    def put_vector(self, vector: SteeringVector) -> str:
        """Keep a steering vector without a name, and return its digest."""
        with self._gate.shared():
            return self.manifests.put(self._vector(vector))

    def save_task(
        self,
        name: str,
        base: str,
        base_tensors: BaseTensors,
        tuned_tensors: Mapping[str, Tensor],
        *,
        info: Mapping[str, Any] = NONE,
        files: Mapping[str, bytes] = NONE,
        parents: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> Entry:
        """Keep `tuned - base`, exactly, as the newest revision of `name`.

        Tensors that are equal, or that `tuned_tensors` leaves out, are unchanged and take no space.

        Raises:
            GrammarError: not a name.
            NameTaken: the name belongs to another kind.
            ShapeMismatch: a tuned tensor that the base lacks or has in another shape or dtype.
            InputError: information that JSON cannot carry, or an attachment or parent not valid.
        """
        self._changes.check_free(name, "task-vector")
        with self._gate.shared():
            # Drafted first: what the draft refuses is refused before the long work.
            draft = self._draft("task-vector", base, files, parents, info)
            tensors = write_task(self.objects, base_tensors, tuned_tensors, progress)
            return self._save(name, draft.model_copy(update={"tensors": tensors}))

    def save_recipe(
        self,
        name: str,
        recipe: Recipe,
        *,
        info: Mapping[str, Any] = NONE,
        files: Mapping[str, bytes] = NONE,
    ) -> Entry:
        """Keep a recipe as the newest revision of `name`; its fields stand in the entry's info.

        Raises:
            GrammarError: not a name.
            NameTaken: the name belongs to another kind.
            NameNotFound: a term that is no task vector of this library.
            ModelMismatch: a term of another base.
        """
        self._changes.check_free(name, "recipe")
        tasks = [digest for digest, _ in recipe.terms]
        with self._gate.shared():
            for digest in tasks:
                self.task_by_digest(digest, recipe.base)
            info = {**info, **recipe.model_dump(mode="json")}
            return self._save(name, self._draft("recipe", recipe.base, files, tasks, info))

    def load_vector(self, ref: str) -> tuple[Entry, SteeringVector]:
        """Return the steering vector that `ref` points at, with its entry.

        Raises:
            GrammarError, NameNotFound, StoreCorrupt: see `get`.
        """
        entry = self.get(ref, "steering-vector")
        return entry, read_steering(self.objects, entry.manifest, f"'{ref}'")

    def load_recipe(self, ref: str) -> tuple[Entry, Recipe]:
        """Return the recipe that `ref` points at, with its entry.

        Raises:
            GrammarError, NameNotFound, StoreCorrupt: see `get`.
        """
        entry = self.get(ref, "recipe")
        return entry, read_recipe(entry.manifest, f"'{ref}'")

    def vector_by_digest(self, digest: str) -> SteeringVector:
        """Return the steering vector whose whole digest is given.

        Raises:
            NameNotFound: no such steering vector.
            StoreCorrupt: one that is damaged.
        """
        manifest = self._manifest(digest, "steering-vector")
        return read_steering(self.objects, manifest, digest[:12])

    def task_by_digest(self, digest: str, base: str) -> Manifest:
        """Return the manifest of the task vector whose whole digest is given.

        Raises:
            NameNotFound: no such task vector.
            ModelMismatch: one of another base than `base`.
        """
        manifest = self._manifest(digest, "task-vector")
        if manifest.base != base:
            raise ModelMismatch(
                f"The task vector {digest[:12]} belongs to base {(manifest.base or 'none')[:12]}, "
                f"not to {base[:12]}; use it with its own model."
            )
        return manifest

    def tuned_tensor(self, task: Manifest, name: str, base: Tensor) -> Tensor:
        """Return a task vector's tuned tensor, bit for bit; `base` where it did not change.

        Raises:
            ShapeMismatch: a base tensor of another shape or dtype.
            StoreCorrupt: a damaged payload, or other base weights than it was made for.
        """
        part = task.tensors.get(name)
        return base if part is None else read_tuned(self.objects, part, name, base)

    def attest(
        self,
        digest: str,
        kind: str,
        payload: Mapping[str, Any],
        *,
        files: Mapping[str, bytes] = NONE,
    ) -> None:
        """Keep what was found out about the entry `digest`, such as a verdict, beside it.

        Raises:
            NameNotFound: no such entry.
            InputError: a payload that JSON cannot carry, or that has a key `attested`.
        """
        if "attested" in payload:
            raise InputError(
                f"The {kind} on {digest[:12]} has a key 'attested', which the library adds itself; "
                "give it another name."
            )
        with self._gate.shared():
            self._manifest(digest)
            self._attestations.add(digest, kind, dict(payload), self._write_files(files))

    def attestations(self, digest: str, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the payloads attested to `digest`, the oldest first.

        Each has one key more, `attested`: its kind, created, object, and files (name to digest).

        Raises:
            StoreCorrupt: one that is missing or damaged.
        """
        return self._attestations.of(digest, kind)

    def passed(self, kind: str = "verdict") -> dict[str, bool]:
        """Whether the newest attestation of `kind` says `passed`, for every entry that has one."""
        return self._attestations.passed(kind)

    def sign(self, ref: str, private: Ed25519PrivateKey) -> list[Signature]:
        """Sign an entry's verdicts and evaluations; return the signatures that are new.

        The entry and what is signed keep their digests: a signature is an attestation beside them.

        Raises:
            GrammarError, NameNotFound, StoreCorrupt: see `get`.
            InputError: nothing to sign.
        """
        entry, key = self.get(ref), public_key(private)
        with self._gate.shared():
            found = self.attestations(entry.digest)
            rows = [row["attested"] for row in found if row["attested"]["kind"] in SIGNED]
            if not rows:
                raise InputError(
                    f"'{ref}' has no verdict and no evaluation, so there is nothing to sign; "
                    "'workbench verify' makes a verdict."
                )
            done = {s.attestation for s in self.signatures(ref) if s.holds and s.key == key}
            new = dict.fromkeys(r["object"] for r in rows if r["object"] not in done)
            for stored in new:
                self.attest(entry.digest, KIND, sign(private, stored, self.objects.read(stored)))
        return [s for s in self.signatures(ref) if s.attestation in new and s.key == key]

    def signatures(self, ref: str) -> list[Signature]:
        """Check the signatures on what was attested to an entry, the oldest first.

        Raises:
            GrammarError, NameNotFound, StoreCorrupt: see `get`, and `attestations`.
        """
        return signatures_in(self.attestations(self.get(ref).digest), self.objects.read)

    def verify_signature(self, ref: str, key: str = "") -> list[Signature]:
        """Return a signature that holds for an entry's newest verdict, and its newest evaluation.

        `key` is the public key that must have signed; empty is anybody's.

        Raises:
            GrammarError, NameNotFound, StoreCorrupt: see `get`.
            InputError: it has nothing that could be signed.
            SignatureInvalid: not signed, not by that key, or changed since.
        """
        found = self.attestations(self.get(ref).digest)
        return proof(f"'{ref}'", found, self.signatures(ref), key)

    def gc(
        self, *, retention: float = RETENTION, grace: float = GRACE, dry_run: bool = False
    ) -> Collection:
        """Remove what nothing has meant for `retention` seconds and is older than `grace` seconds.

        A dry run says what would go and removes nothing.

        Raises:
            InputError: a negative time.
            StoreCorrupt: a manifest that is needed is damaged; nothing is removed.
            BackendUnavailable: something is being saved for longer than the collector waits.
        """
        parts = (self._database, self.objects, self.manifests, self._attestations, self._gate)
        return Collector(*parts).collect(retention, grace, dry_run)

    def fsck(self, progress: Progress = lambda share, words: None) -> Checked:
        """Check every byte and every reference; damage is moved to `quarantine/`, never deleted.

        Raises:
            OutOfSpace: damage that cannot be moved aside.
        """
        parts = (self._database, self.objects, self.manifests, self._attestations)
        with self._gate.shared():
            return Checker(*parts, self.root / "quarantine").check(progress)

    def push(
        self, url: str, names: Sequence[str] = (), progress: Progress | None = None
    ) -> Transfer:
        """Bring the copy at `url` (a folder, s3://bucket/prefix) up to this library.

        Raises:
            NameNotFound: no such name here.
            NameTaken: a name has other revisions there; the others were pushed.
            BackendUnavailable: the copy cannot be reached or refuses.
            StoreCorrupt: something that is needed is damaged.
        """
        with self._gate.shared():
            return self._exchange(Remote(url), progress).push(names)

    def pull(
        self,
        url: str,
        names: Sequence[str] = (),
        *,
        as_name: str = "",
        progress: Progress | None = None,
    ) -> Transfer:
        """Bring this library up to the copy at `url`; `as_name` renames the one that is named.

        Raises:
            InputError: no library there, or `as_name` without exactly one name.
            NameNotFound: no such name there.
            NameTaken: a name has other revisions here; the others were pulled.
            BackendUnavailable: the copy cannot be reached or refuses.
            StoreCorrupt: something there is damaged; it is not kept.
        """
        with self._gate.shared():
            return self._exchange(Remote(url, make=False), progress).pull(names, as_name)

    def _exchange(self, remote: Remote, progress: Progress | None) -> Exchange:
        watch = progress or (lambda share, words: None)
        return Exchange(self, self._attestations, remote, watch)

    def _vector(
        self,
        vector: SteeringVector,
        files: Mapping[str, bytes] = NONE,
        parents: Iterable[str] = (),
    ) -> Manifest:
        if VECTOR_FILE in files:
            raise InputError(
                f"An attachment cannot be called {VECTOR_FILE}, which is the vector itself; "
                "rename it."
            )
        files = {**files, VECTOR_FILE: vector_bytes(vector)}
        return self._draft("steering-vector", vector.base, files, parents, vector.info)
