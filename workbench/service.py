"""The one door: page, command line and Python API all come through here.

    from workbench import Workbench

    wb = Workbench()
    wb.extract("cheerful", name="cheerful")
    print(wb.generate("How was your day?", steer="cheerful=0.2").text)

Long work (`extract`, `verify`, `train`, `learn`, `compare`, `gradients`, `search`, `bisect`, `demo`)
is a run: `start` returns at once, the methods named after the work wait for it. Engines are started
when first needed, and end with the process that started them.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vectors.errors import EngineFailed, InputError, NameNotFound
from vectors.grammar import SteerTerm, check_name, format_tasks, parse_tasks
from workbench.data.contrast import ContrastSets
from workbench.data.kept_data import keep_data
from workbench.engines.base import Engine, Message, Projections, Reply, Request, Sampling
from workbench.models.bundled import BUNDLED
from workbench.models.catalog import Model, find_model, from_anywhere, list_models, remember
from workbench.runs.manager import Runs, Watch
from workbench.runs.record import RunView
from workbench.settings import Home

__all__ = ["ENGINES", "EngineStatus", "Projections", "Workbench", "check_engine"]

ENGINES = ("vllm", "transformers")
WAYS = ("swap", "lora")


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing: stopped, starting, ready or failed."""

    state: str
    model: str
    stage: str = ""
    error: str = ""
    seconds: float = 0.0
    url: str = ""
    log: str = ""


class Workbench:
    """One home, one model at a time, one engine, one library.

    Args:
        home: folder of all state; default `$WORKBENCH_HOME` or the platform's data folder.
        model: the bundled model, a folder, or a Hugging Face name; default `$WORKBENCH_MODEL` or
            the bundled one.
        engine: "vllm", "transformers", or the URL of a `workbench serve`.
    """

    def __init__(
        self,
        home: str | os.PathLike[str] | None = None,
        model: str | None = None,
        engine: str = "vllm",
    ) -> None:
        self.home = Home.default() if home is None else Home.at(home)
        self.model_name = model or os.environ.get("WORKBENCH_MODEL") or BUNDLED
        self.engine_kind = check_engine(engine)
        self.contrast = ContrastSets(self.home)
        self.runs = Runs(self.home)
        self._model: Model | None = None
        self._engine: Engine | None = None
        self._server: Any = None
        self._loras: Any = None
        self._lock = threading.RLock()

    # -- models ---------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """Models that can be named: `name`, `note` (size), `folder`, `ready` (is on this disk)."""
        return list_models(self.home)

    def add_model(self, name: str, folder: str) -> Model:
        """Remember a local checkpoint folder under a name."""
        return remember(self.home, check_name(name, "model name"), Path(folder))

    def model(self, report: Callable[[float, str], None] = lambda share, words: None) -> Model:
        """The model in use, fetched on first use."""
        with self._lock:
            if self._model is None:
                self._model = find_model(self.home, self.model_name, report)
            return self._model

    def use_model(self, name: str) -> None:
        """Change the model; an engine of ours for the old one is stopped."""
        with self._lock:
            if name != self.model_name:
                self.stop_engine()
                self.model_name, self._model = name, None

    # -- engine ---------------------------------------------------------------------------------

    def start_engine(self, port: int | None = None) -> None:
        """Begin to start the engine, or attach to the one that this home has; returns at once."""
        if self.engine_kind != "vllm":
            return
        from workbench.engines.vllm.server import start_or_attach  # noqa: PLC0415  # help is light

        with self._lock:
            if self._server is not None:
                try:
                    _ = self._server.registration
                    return
                except EngineFailed:
                    self.stop_engine()
            self._server = start_or_attach(self.home, self.model(), port=port, loras=self._loras)

    def engine_status(self) -> EngineStatus:
        """What the engine is doing now; never waits."""
        if self.engine_kind != "vllm":
            return EngineStatus("ready", self.model_name, stage=self.engine_kind)
        server = self._server
        if server is None:
            return EngineStatus("stopped", self.model_name)
        try:
            now = server.registration
        except EngineFailed as error:
            return EngineStatus("failed", self.model_name, error=str(error), log=_tail(server.log))
        seconds = (now.ready_at or time.time()) - now.started_at
        log = _tail(server.log)
        return EngineStatus(now.state, now.model, now.stage, "", seconds, now.url, log)

    @property
    def owns_engine(self) -> bool:
        """Whether this process started the engine, so that it ends with this process."""
        return self._server is not None and self._server.owned is not None

    def access(self) -> dict[str, str]:
        """How other clients reach the engine: `url`, `token` and `model`.

        Raises:
            EngineFailed: no vLLM was started by, or attached to, this object.
        """
        if self._server is None:
            raise EngineFailed("No engine is running here; start one with 'workbench serve'.")
        now = self._server.registration
        return {"url": now.url, "token": now.token, "model": now.model}

    def engine(
        self,
        watch: Callable[[EngineStatus], None] = lambda status: None,
        cancel: Callable[[], bool] = lambda: False,
    ) -> Engine:
        """The engine, started if it must be; returns when it is ready.

        Raises:
            EngineFailed: it cannot be started, with the reason.
        """
        with self._lock:
            if self.engine_kind == "transformers":
                return self._transformers()
            if self.engine_kind != "vllm":
                return self._connect(self.engine_kind, os.environ.get("WORKBENCH_TOKEN", ""))
            if self._server is not None and self._engine is not None:
                try:
                    # Another process may have started it anew, at another address.
                    if self._server.registration.url == getattr(self._engine, "url", ""):
                        return self._engine
                except EngineFailed:
                    self.stop_engine()
            self.start_engine()
            server: Any = self._server
        ready = server.wait(lambda _: watch(self.engine_status()), cancel)
        with self._lock:
            self._engine = None
            return self._connect(ready.url, ready.token)

    def _connect(self, url: str, token: str) -> Engine:
        from workbench.engines.vllm.client import VllmEngine  # noqa: PLC0415  # help is light

        if self._engine is None:
            self._engine = VllmEngine(url, token)
        return self._engine

    def _transformers(self) -> Engine:
        from workbench.engines.transformers import TransformersEngine  # noqa: PLC0415  # help is light

        if self._engine is None:
            self._engine = TransformersEngine(self.model(), self.library, self.home)
        return self._engine

    def stop_engine(self) -> None:
        """Stop the engine if this process started it, and forget it."""
        with self._lock:
            if self._server is not None:
                self._server.stop()
            self._server = self._engine = None

    # -- steering -------------------------------------------------------------------------------

    def request(
        self,
        prompt: str | Sequence[Message],
        *,
        steer: str = "",
        tasks: str = "",
        system: str = "",
        max_tokens: int = 128,
        temperature: float = 0.7,
        seed: int | None = None,
        as_: str = "swap",
        rank: int | None = None,
        error: float | None = None,
        project: str = "",
    ) -> Request:
        """Check what a person asked for and make the request; task weights are made here.

        Args:
            as_, rank, error: how the task weights reach the model; see `weights`.
            project: a vector, on which every token of the reply is projected.

        Raises:
            InputError: a bad prompt, term, dose, temperature, number of tokens, rank or error.
        """
        messages: list[Message] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        )
        if not messages or not str(messages[-1]["content"]).strip():
            raise InputError("The prompt is empty; write something to answer.")
        if system.strip():
            messages.insert(0, {"role": "system", "content": system})
        if not 0 <= temperature <= 2:
            raise InputError(f"The temperature must lie between 0 and 2, not {temperature}.")
        if not 1 <= max_tokens <= 32_768:
            raise InputError(f"Ask for between 1 and 32768 tokens, not {max_tokens}.")
        if steer:
            self.check_steer(steer)
        sampling = Sampling(max_tokens, temperature, 1.0, seed)
        weights = self.weights(tasks, as_, rank=rank, error=error)
        if project and self.engine_kind == "transformers":
            raise InputError("The engine transformers projects no tokens; use --engine vllm.")
        return Request(tuple(messages), steer, weights, sampling, project)

    def check_steer(self, steer: str) -> list[str]:
        """Resolve steering terms now, so that a bad one is told early; return warnings."""
        from workbench.engines.vllm.spec import parse_request, resolve_request  # noqa: PLC0415

        terms = parse_request(steer)
        resolve_request(steer, self.library, self.model().base)
        warnings = []
        for term in terms:
            verdict = self.verdict(_ref(term))
            limit = (verdict or {}).get("break_dose")
            if limit is not None and abs(term.dose) >= limit:
                warnings.append(
                    f"Text broke at dose {limit:g} when '{term.name}' was verified; "
                    f"{term.dose:g} is at or beyond it."
                )
        return warnings

    def weights(
        self,
        tasks: str,
        as_: str = "swap",
        *,
        rank: int | None = None,
        error: float | None = None,
    ) -> str:
        """The weight state of task terms ("" is the base), made on this disk.

        Args:
            as_: "swap" makes a checkpoint, exact, that the engine loads in place of the other weights;
                "lora" makes a LoRA, which has the low-rank part of the change and states what it
                loses, and which single requests use while others run beside them.
            rank: of the LoRA, 16 if nothing is said; or
            error: the largest share of the change that it may lose.

        Raises:
            InputError: another `as_`, rank or error out of bounds, or an engine without LoRAs.
        """
        if as_ not in WAYS:
            raise InputError(f"Weights are used as 'swap' or 'lora', not {as_[:40]!r}.")
        if as_ == "swap" and (rank is not None or error is not None):
            raise InputError("A rank and an error are for LoRAs; use them with 'lora'.")
        if not tasks.strip():
            return "base"
        terms = parse_tasks(tasks)
        if as_ == "swap":
            from workbench.engines.weights import materialised  # noqa: PLC0415  # help is light

            return materialised(self.home, self.library, self.model(), terms)
        from workbench.engines.lora import lora_made  # noqa: PLC0415  # help is light

        self._need_loras(rank)
        return lora_made(self.home, self.library, self.model(), terms, rank=rank, error=error)

    def _need_loras(self, rank: int | None) -> None:
        """Refuse LoRAs early where no engine can use them; an engine that is started gets slots."""
        from workbench.engines.vllm.registration import find  # noqa: PLC0415  # help is light
        from workbench.engines.vllm.server import path_of  # noqa: PLC0415
        from workbench.engines.vllm.settings import LoraSlots, check_room  # noqa: PLC0415

        if self.engine_kind == "transformers":
            raise InputError(
                "Only vLLM gives LoRAs to single requests; leave --engine out, or swap the weights."
            )
        if self.engine_kind != "vllm":
            return
        found = find(path_of(self.home, self.model().base))
        if found is None:
            self._loras = LoraSlots.of_environment().holding(rank)
        elif found.state == "ready":
            check_room(found.hello.get("lora", {}), rank)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        steer: str = "",
        with_: str = "",
        system: str = "",
        max_tokens: int = 128,
        temperature: float = 0.7,
        seed: int | None = None,
        as_: str = "swap",
        rank: int | None = None,
        error: float | None = None,
        project: str = "",
    ) -> Reply:
        """Answer one prompt, steered by `steer`, on the weights of the task terms `with_`, which are
        swapped in, or used by this request alone `as_="lora"`; see `weights`. With `project`, the reply
        tells how far each of its tokens lies along that vector."""
        options = {"system": system, "max_tokens": max_tokens, "temperature": temperature}
        options |= {"as_": as_, "rank": rank, "error": error, "project": project}
        request = self.request(prompt, steer=steer, tasks=with_, seed=seed, **options)  # type: ignore[arg-type]
        return self.engine().generate([request])[0]

    def stream(
        self, request: Request, cancel: Callable[[], bool] = lambda: False
    ) -> Iterator[str | Projections | Reply]:
        """Yield pieces of the answer, and the whole `Reply` last; between them, where the request has
        `project`, all `Projections` so far, whenever there are more of them."""
        yield from self.engine(cancel=cancel).stream(request, cancel)

    def as_code(self, request: Request) -> dict[str, str]:
        """The same request as `curl` and as `python`, to run outside the workbench."""
        from workbench.engines.vllm.snippets import curl, python  # noqa: PLC0415  # help is light

        model = self.model()
        url = self._url(model) or "http://127.0.0.1:8000"
        return {"curl": curl(request, url, model.name), "python": python(request, model.name, url)}

    def _url(self, model: Model) -> str:
        """Where the engine of this home and model, or the one named by its URL, answers."""
        if self.engine_kind not in ENGINES:
            return self.engine_kind.rstrip("/").removesuffix("/v1")
        from workbench.engines.vllm.registration import find  # noqa: PLC0415  # as above
        from workbench.engines.vllm.server import path_of  # noqa: PLC0415

        registration = find(path_of(self.home, model.base))
        return registration.url if registration else ""

    # -- runs -----------------------------------------------------------------------------------

    def start(self, kind: str, **parameters: Any) -> RunView:
        """Start a run of one kind, such as `extract` or `train`; returns at once.

        The same work that is under way already is returned instead of started twice.
        """
        from workbench.runs.parameters import checked  # noqa: PLC0415  # help is light

        # A run has a folder of its own, and may be resumed from another one.
        model = from_anywhere(self.home, self.model_name)
        parameters = {"model": model, "engine": self.engine_kind, **parameters}
        return self.runs.start(kind, checked(kind, parameters, self))

    def _run(self, kind: str, watch: Watch, parameters: dict[str, Any]) -> dict[str, Any]:
        view = self.start(kind, **parameters)
        try:
            return self.runs.follow(view.id, watch).result()
        except KeyboardInterrupt:
            self.runs.cancel(view.id)
            raise

    def extract(
        self, contrast: str, *, name: str, watch: Watch = lambda _: None, **options: Any
    ) -> dict[str, Any]:
        """Extract a steering vector from a contrast set (a name or a file), kept as `name`."""
        return self._run("extract", watch, {"contrast": contrast, "name": name, **options})

    def verify(
        self, vector: str, *, watch: Watch = lambda _: None, **options: Any
    ) -> dict[str, Any]:
        """Measure whether a direction is right, with controls, and store the verdict."""
        return self._run("verify", watch, {"vector": vector, **options})

    def train(self, *, name: str, watch: Watch = lambda _: None, **options: Any) -> dict[str, Any]:
        """Train a vector into the weights and keep the task vector as `name`."""
        return self._run("train", watch, {"name": name, **options})

    def learn(self, *, name: str, watch: Watch = lambda _: None, **options: Any) -> dict[str, Any]:
        """Train a person's own data in, kept as `name`: one of `data` (a chat file), `instructions`
        (a file of instructions to strip), or `contrast` with `side`."""
        return self._run("learn", watch, {"name": name, **options})

    def keep_data(self, raw: bytes, suffix: str) -> Path:
        """Keep a chat file or instructions for `learn`, in the library's folder."""
        return keep_data(self.home, raw, suffix)

    def compare(
        self, *, vector: str, task: str, watch: Watch = lambda _: None, **options: Any
    ) -> dict[str, Any]:
        """Base, steered and trained on the same prompts, side by side and measured."""
        return self._run("compare", watch, {"vector": vector, "task": task, **options})

    def gradients(self, *, watch: Watch = lambda _: None, **options: Any) -> dict[str, Any]:
        """Measure where the gradient of decisions flows, and what training moved; writes a report."""
        return self._run("gradients", watch, options)

    def search(
        self,
        recipe: str,
        behaviours: Sequence[str],
        *,
        watch: Watch = lambda _: None,
        **options: Any,
    ) -> dict[str, Any]:
        """Search the coefficients of a recipe's ingredients, scored on contrast sets; `name` keeps
        the best."""
        asked = {"recipe": recipe, "behaviours": list(behaviours), **options}
        return self._run("search", watch, asked)

    def keep_best(self, run_id: str, name: str) -> dict[str, Any]:
        """Keep the best recipe that a search found as `name`; again, and nothing changes.

        Raises:
            NameNotFound: no such run, or a task vector that is no longer in the library.
            InputError: no search that is done, or one that found nothing better than the base.
            NameTaken: the name belongs to something else.
        """
        from workbench.search.keep import keep_best  # noqa: PLC0415  # help is light

        view = self.runs.get(run_id)
        if view.kind != "search" or view.state.state != "done":
            raise InputError(f"The run {run_id} is no search that is done; wait for its end.")
        return keep_best(self.library, view.result(), check_name(name))

    def bisect(
        self, entries: str, *, watch: Watch = lambda _: None, **options: Any
    ) -> dict[str, Any]:
        """Find the version or the ingredient between `good..bad` that changed a behaviour."""
        return self._run("bisect", watch, {"entries": entries, **options})

    def demo(self, *, watch: Watch = lambda _: None, **options: Any) -> dict[str, Any]:
        """The whole loop on `cheerful`, measured; see `workbench demo`."""
        return self._run("demo", watch, options)

    # -- library --------------------------------------------------------------------------------

    @property
    def library(self) -> Any:
        """The versioned store, a `vectors.store.Library`."""
        from vectors.store import Library  # noqa: PLC0415  # help is light

        return Library(self.home.library)

    def verdict(self, ref: str) -> dict[str, Any] | None:
        """The newest verdict on a vector, or None where it was never verified."""
        try:
            entry = self.library.get(ref)
        except NameNotFound:
            return None
        verdicts = self.library.attestations(entry.digest, "verdict")
        return verdicts[-1] if verdicts else None

    def sign(self, ref: str) -> list[dict[str, Any]]:
        """Sign an entry's verdicts and evaluations with this home's key, made on first use.

        Returns the signatures that are new; see `vectors.store.signatures.Signature`.
        """
        from workbench.keys import signing_key  # noqa: PLC0415  # help is light

        return [asdict(row) for row in self.library.sign(ref, signing_key(self.home))]

    def signatures(self, ref: str) -> list[dict[str, Any]]:
        """Who signed what was attested to an entry, whether it holds, and whether it is `own`."""
        from workbench.keys import own_key  # noqa: PLC0415  # help is light

        own = own_key(self.home)
        return [{**asdict(r), "own": r.key == own} for r in self.library.signatures(ref)]

    def verify_signature(self, ref: str, key: str = "") -> list[dict[str, Any]]:
        """Prove that an entry's newest verdict and evaluation are signed, by `key` if it is given.

        Args:
            key: a public key of 64 hex digits, or a file that holds one.

        Raises:
            SignatureInvalid: not signed, not by that key, or changed since.
        """
        from workbench.keys import named_key  # noqa: PLC0415  # help is light

        rows = self.library.verify_signature(ref, named_key(key) if key else "")
        return [asdict(row) for row in rows]

    def library_rows(self) -> list[dict[str, Any]]:
        """Every entry for a table: name, kind, revision, created, base, bytes, words."""
        rows = []
        library = self.library
        passed = library.passed("verdict")
        for entry in library.list():
            verdict = passed.get(entry.digest)
            words = "" if verdict is None else ("verified" if verdict else "not verified")
            rows.append(
                {
                    "name": entry.name,
                    "kind": entry.kind,
                    "revision": entry.revision,
                    "created": entry.created,
                    "base": (entry.base or "")[:12],
                    "bytes": library.disk_use(entry) if entry.bytes is not None else 0,
                    "digest": entry.digest,
                    "words": words,
                }
            )
        return rows

    def combine(
        self,
        name: str,
        terms: str,
        method: str = "linear",
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Keep `terms` (name=weight, joined by commas), merged by `method`, as a recipe.

        A recipe is recomputed from the base, so leaving a term out removes that behaviour exactly,
        whatever the method.

        Args:
            method: one of `merge_methods`; "linear" adds.
            options: the method's own, the others at their defaults.

        Raises:
            NameNotFound: no such task vector, recipe or method.
            InputError: options that the method does not have, or out of bounds.
        """
        from workbench.engines.weights import save_recipe  # noqa: PLC0415  # help is light

        entry = save_recipe(
            self.library, self.model(), check_name(name), parse_tasks(terms), method, options or {}
        )
        kept = {"name": entry.name, "revision": entry.revision, "digest": entry.digest}
        return {**kept, "terms": terms, "method": method}

    def merge_methods(self) -> list[dict[str, Any]]:
        """The ways to merge: `name`, `summary`, `paper`, `code`, `differs`, `least` and `options`.

        The options are a JSON schema's properties, each with `description` and `default`.
        """
        from vectors.tasks.registry import METHODS  # noqa: PLC0415  # help is light

        return [
            {
                **{key: getattr(m, key) for key in ("name", "summary", "paper", "code", "least")},
                "differs": list(m.differs),
                "options": m.parameters.model_json_schema().get("properties", {}),
            }
            for m in METHODS.values()
        ]

    def interference(self, tasks: str) -> dict[str, Any]:
        """How task vectors get in each other's way: cosine, sign conflict, overlap, by layer.

        Args:
            tasks: names joined by commas; weights play no part.

        Raises:
            NameNotFound: no such task vector.
            InputError: fewer than two.
            ModelMismatch: one of another base.
        """
        from workbench.engines.weights import interference_of  # noqa: PLC0415  # help is light

        names = [part.partition("=")[0].strip() for part in tasks.split(",")]
        return interference_of(self.library, self.model(), [name for name in names if name])

    def parts(self, recipe: str) -> dict[str, Any]:
        """What a recipe is made of: `terms` (name, weight), `text`, `method` and all its `options`."""
        from workbench.relations import parts_of  # noqa: PLC0415  # help is light

        return parts_of(self.library, recipe)

    def difference(self, old: str, new: str) -> dict[str, Any]:
        """What differs between two entries, by tensor, layer, block, term, file and information."""
        from workbench.relations import difference_of  # noqa: PLC0415  # help is light

        return difference_of(self.library, old, new)

    def lineage(self, ref: str) -> dict[str, Any]:
        """What an entry comes from, its revisions, what was made of them, and the runs that did it."""
        from workbench.relations import lineage_of  # noqa: PLC0415  # help is light

        return lineage_of(self.library, self.runs.list(), ref)

    def negate(self, task: str, name: str) -> dict[str, Any]:
        """Keep the opposite of a task vector as a recipe."""
        return self.scale(task, -1.0, name)

    def scale(self, task: str, weight: float, name: str) -> dict[str, Any]:
        """Keep a task vector at another weight as a recipe."""
        terms = [type(t)(t.name, t.weight * weight, t.revision) for t in parse_tasks(task)]
        return self.combine(name, format_tasks(terms))

    def export(self, ref: str, path: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
        """Write an entry as another program's file; see `workbench.exchange.export_entry`."""
        from workbench.exchange import export_entry  # noqa: PLC0415  # help is light

        return export_entry(self, ref, Path(path), **options)

    def import_(self, path: str | os.PathLike[str], name: str, **options: Any) -> dict[str, Any]:
        """Keep another program's file as an entry; see `workbench.exchange.import_entry`."""
        from workbench.exchange import import_entry  # noqa: PLC0415  # help is light

        return import_entry(self, Path(path), name, **options)

    def close(self) -> None:
        """Stop what this process started."""
        self.stop_engine()

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_engine(engine: str) -> str:
    """Return `engine`, or raise InputError where it is no kind of engine and no URL."""
    if engine not in ENGINES and not re.fullmatch(r"https?://[^\s/]+\S*", engine):
        raise InputError(
            f"There is no engine {engine[:80]!r}; use vllm, transformers, or the URL of a "
            "'workbench serve'."
        )
    return engine


def _ref(term: SteerTerm) -> str:
    return term.name if term.revision is None else f"{term.name}@{term.revision}"


def _tail(path: Path, lines: int = 12) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
