"""What each kind of run may be asked: defaults, limits, and what would fail later, checked now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from vectors.errors import DoseError, InputError, ModelMismatch, NameNotFound, NameTaken
from vectors.grammar import check_dose, parse_tasks
from vectors.paths import expanded
from vectors.store.reference import check_new_name
from vectors.tasks import Operation
from vectors.types import Method
from workbench.data.chat import parse_chats
from workbench.data.instructions import read_instructions
from workbench.search.behaviours import check_measurable, parse_behaviours
from workbench.search.between import Over, parse_between, revisions_between
from workbench.search.names import called, name_of
from workbench.search.ways import COEFFICIENTS, Way, check_points
from workbench.service import Workbench, check_engine
from workbench.train.config import last_name

__all__ = ["KINDS", "checked"]

VECTOR = ("steering-vector",)
TASK = ("task-vector", "recipe")
LONGEST = 20_000


def _effective(dose: float) -> float:
    if check_dose(dose) == 0:
        raise DoseError("A dose of 0 steers nothing; try 0.2.")
    return dose


def _sweep(doses: list[float]) -> list[float]:
    # Sorted and without doubles, so that the same sweep is the same run.
    swept = sorted({check_dose(dose) for dose in doses})
    if not any(swept):
        raise DoseError("The doses need one that is not 0; try -0.2,0.1,0.2.")
    return swept


def _ascending(coefficients: list[float]) -> list[float]:
    return sorted(set(coefficients))


def _name_or_none(name: str) -> str:
    return check_new_name(name) if name else ""


Name = Annotated[str, AfterValidator(check_new_name)]
Ref = Annotated[str, Field(min_length=1, max_length=300)]
Dose = Annotated[float, AfterValidator(_effective)]
Doses = Annotated[list[float], Field(min_length=1, max_length=64), AfterValidator(_sweep)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Prompts = Annotated[int, Field(ge=8, le=5000)]
Controls = Annotated[int, Field(ge=1, le=199)]
Path_ = Annotated[str, Field(max_length=4096)]
Contrast = Annotated[str, Field(min_length=1, max_length=4096)]
Coefficient = Annotated[float, Field(ge=-100, le=100)]
Coefficients = Annotated[
    list[Coefficient], Field(min_length=1, max_length=64), AfterValidator(_ascending)
]
Prompt = Annotated[str, Field(min_length=1, max_length=LONGEST)]


class _Parameters(BaseModel):
    """What every run is told."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    model: str = Field(min_length=1, max_length=400)
    engine: Annotated[str, AfterValidator(check_engine)] = "vllm"


class Extract(_Parameters):
    """From a contrast set to a vector called `name`."""

    contrast: str = Field(min_length=1, max_length=4096)
    name: Name
    method: Method = Method.MEAN_DIFFERENCE
    position: Literal["completion-mean", "last"] = "completion-mean"
    reader: Literal["model", "engine"] = "model"


class Verify(_Parameters):
    """Whether a vector is right; with fewer than 19 controls the verdict cannot pass."""

    vector: Ref
    doses: Doses | None = None
    controls: Controls = 19
    seed: Seed = 0


class _Training(_Parameters):
    """How anything is trained into a task vector called `name`."""

    name: Name
    optimizer: Literal["apollo", "adamw", "sgd"] = "apollo"
    targets: Literal["soft", "tokens"] = "soft"
    replay: float = Field(0.25, ge=0, le=0.9)
    learning_rate: float = Field(1e-4, gt=0, le=0.1)
    prompts: Prompts = 150
    passes: int = Field(1, ge=1, le=20)
    tokens: int = Field(48, ge=4, le=512)
    rank: int = Field(256, ge=1, le=65_536)
    tier: Literal["auto", 1, 2, 3] = "auto"
    seed: Seed = 0
    batch: int = Field(6, ge=1, le=1024)
    recompute: bool = False
    reuse: Literal["off", "device", "host", "disk"] = "off"
    refresh_every: int = Field(16, ge=1, le=1024)
    staleness: float = Field(0.05, gt=0, le=10)
    recorded: bool = False
    held_out_every: int = Field(10, ge=1, le=100_000)
    checkpoint_every: int = Field(20, ge=1, le=100_000)
    patience: int = Field(0, ge=0, le=1000)
    keep: Literal["best", "last", "both"] = "both"


class Train(_Training):
    """A vector into a task vector; no dose means the verdict's working dose."""

    vector: Ref
    dose: Dose | None = None
    read_pairs: bool = True
    random_direction: bool = False


class Learn(_Training):
    """A person's own data into a task vector: a chat file, instructions, or a side of a set."""

    data: Path_ = ""
    instructions: Path_ = ""
    contrast: str = Field("", max_length=4096)
    side: Literal["positive", "negative"] = "positive"
    replay_file: Path_ = ""


class Compare(_Parameters):
    """Base, steered and trained; no prompts means some of the held-out ones."""

    vector: Ref
    task: Ref
    dose: Dose | None = None
    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=256)] | None = None
    max_tokens: int = Field(64, ge=1, le=4096)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: Seed = 0


class Gradients(_Parameters):
    """Where the gradient of decisions flows; with a task, what its training moved."""

    contrast: str = Field("cheerful", min_length=1, max_length=4096)
    data: Path_ = ""
    decisions: int = Field(8, ge=1, le=512)
    task: str = Field("", max_length=300)


class Search(_Parameters):
    """The best coefficients of a recipe's ingredients, kept as `name` where one is given."""

    recipe: str = Field(min_length=1, max_length=4000)
    behaviours: Annotated[list[Contrast], Field(min_length=1, max_length=16)]
    way: Way = "together"
    coefficients: Coefficients = list(COEFFICIENTS)
    ranges: Annotated[dict[str, Coefficients], Field(max_length=64)] = {}
    method: str = Field("linear", max_length=100)
    options: dict[str, JsonValue] = {}
    budget: float = Field(0.5, gt=0, le=100)
    pairs: Annotated[int, Field(ge=4, le=100_000)] | None = None
    name: Annotated[str, AfterValidator(_name_or_none)] = ""


class Bisect(_Parameters):
    """What changed a behaviour, or the general loss where no behaviour is named."""

    entries: str = Field(min_length=1, max_length=600)
    behaviour: str = Field("", max_length=4096)
    threshold: float | None = None
    over: Over = "auto"


class Demo(_Parameters):
    """The whole loop; names of what it keeps start with `prefix`."""

    prompts: Prompts = 150
    controls: Controls = 19
    seed: Seed = 0
    random: bool = True
    adamw: bool = True
    prefix: Name = "demo"


KINDS: dict[str, type[_Parameters]] = {
    "extract": Extract,
    "verify": Verify,
    "train": Train,
    "learn": Learn,
    "compare": Compare,
    "gradients": Gradients,
    "search": Search,
    "bisect": Bisect,
    "demo": Demo,
}


def checked(kind: str, parameters: Mapping[str, Any], workbench: Workbench) -> dict[str, Any]:
    """Return the parameters of a run with all defaults, as plain JSON.

    Raises:
        InputError: no such kind or parameter, or a value out of range; the message names it.
        NameNotFound: a contrast set, vector or task vector that is not there.
        NameTaken: the name to keep the result under belongs to something of another kind.
        ModelMismatch: a vector or task vector of another base than the model's.
    """
    if kind not in KINDS:
        raise InputError(f"There is no kind of run called '{kind}'; use {', '.join(KINDS)}.")
    try:
        asked = KINDS[kind].model_validate(dict(parameters))
    except ValidationError as error:
        raise InputError(_why(kind, error)) from error
    found = asked.model_dump(mode="json")
    if isinstance(asked, _Training) and asked.reuse != "off" and asked.tier not in ("auto", 2):
        raise InputError("Contexts are reused where they are frozen; set tier 2, or reuse to off.")
    if isinstance(asked, _Training) and asked.recorded and asked.tier not in ("auto", 2):
        raise InputError(
            "Steps are recorded where contexts are frozen; set tier 2, or leave it out."
        )
    match asked:
        case Extract():
            found["contrast"] = _contrast(asked.contrast, workbench)
            _must_be_free(asked.name, VECTOR, workbench)
        case Verify():
            _must_fit(asked, {asked.vector: VECTOR}, workbench)
        case Train():
            _must_fit(asked, {asked.vector: VECTOR}, workbench)
        case Learn():
            found.update(_data(asked, workbench))
        case Gradients():
            found["contrast"] = _contrast(asked.contrast, workbench)
            if workbench.contrast.get(asked.contrast).by_instruction:
                raise InputError("The gradient needs completions; name a set that has them.")
            if asked.data:
                found["data"] = str(expanded(asked.data).resolve())
                parse_chats(Path(found["data"]))
            if asked.task:
                _must_fit(asked, {asked.task: TASK}, workbench)
        case Search():
            found["behaviours"] = _search(asked, workbench)
        case Bisect():
            found["behaviour"] = _bisect(asked, workbench)
        case Compare():
            _must_fit(asked, {asked.vector: VECTOR, asked.task: TASK}, workbench)
    if isinstance(asked, _Training):
        for name in [asked.name, *([last_name(asked.name)] if asked.keep == "both" else [])]:
            _must_be_free(name, TASK[:1], workbench)
        if asked.keep == "both":
            _must_be_its_own(asked.name, workbench)
    return found


def _why(kind: str, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "parameters"
    if first["type"] == "extra_forbidden":
        known = ", ".join(KINDS[kind].model_fields)
        return f"'{name[:60]}' is not a parameter of {kind}; it has {known}."
    if first["type"] == "missing":
        return f"A run of {kind} needs '{name}'."
    words = first["msg"][0].lower() + first["msg"][1:]
    return f"The parameter '{name}' of {kind} is wrong: {words}, not {first['input']!r:.60}."


def _contrast(named: str, workbench: Workbench) -> str:
    """The set's name, or the whole path of its file: the run has a folder of its own."""
    workbench.contrast.get(named)
    if named in workbench.contrast.names():
        return named
    return str(expanded(named).resolve())


def _data(asked: Learn, workbench: Workbench) -> dict[str, str]:
    """The whole paths of the data, which is read here so that a wrong line is told at once."""
    given = [name for name in ("data", "instructions", "contrast") if getattr(asked, name)]
    if len(given) != 1:
        raise InputError(
            "Give one thing to learn: data (a chat file), instructions (to strip), or contrast (a "
            f"set, with a side); {len(given)} were given."
        )
    paths = {
        name: str(expanded(getattr(asked, name)).resolve())
        for name in ("data", "instructions", "replay_file")
        if getattr(asked, name)
    }
    if asked.data:
        parse_chats(Path(paths["data"]))
    if asked.instructions:
        read_instructions(Path(paths["instructions"]))
    if asked.replay_file:
        parse_chats(Path(paths["replay_file"]), prompts=True)
    return {
        **paths,
        **({"contrast": _contrast(asked.contrast, workbench)} if asked.contrast else {}),
    }


def _search(asked: Search, workbench: Workbench) -> list[str]:
    """The behaviours with their whole paths and weights."""
    terms = parse_tasks(asked.recipe)
    refs = [t.name if t.revision is None else f"{t.name}@{t.revision}" for t in terms]
    _must_fit(asked, dict.fromkeys(refs, TASK), workbench)
    names = _ingredients(refs, workbench)
    if unknown := sorted(set(asked.ranges) - set(names)):
        raise InputError(
            f"'{unknown[0][:100]}' is no ingredient, and has no coefficients; name one of "
            f"{', '.join(names)}."
        )
    if asked.ranges and asked.way == "together":
        raise InputError(
            "Together means the same coefficients for all; search each or grid, or give no "
            "coefficients of their own."
        )
    rows = [asked.ranges.get(name, asked.coefficients) for name in names]
    check_points(asked.way, rows)
    least = Operation.of(asked.method, asked.options).row.least
    if least > 1 and any(0 in row for row in rows) and asked.way != "together":
        raise InputError(
            f"The method '{asked.method}' needs at least {least} ingredients, so none can be left "
            "out; take 0 out of the coefficients."
        )
    if asked.name:
        _must_be_free(asked.name, TASK[1:], workbench)
    weights = parse_behaviours(asked.behaviours)
    for named in weights:
        check_measurable(workbench.contrast.get(named))
    return [f"{_contrast(named, workbench)}={weight!r}" for named, weight in weights.items()]


def _ingredients(refs: list[str], workbench: Workbench) -> list[str]:
    """What the run will call the task vectors of all terms."""
    library = workbench.library
    digests: set[str] = set()
    for ref in refs:
        entry = library.get(ref)
        recipe = library.load_recipe(ref)[1] if entry.kind == "recipe" else None
        digests |= {entry.digest} if recipe is None else {digest for digest, _ in recipe.terms}
    known = called(library, refs)
    found = sorted(name_of(library, digest, known) for digest in digests)
    if not found:
        raise InputError(f"'{refs[0]}' has no ingredients; name a task vector.")
    return found


def _bisect(asked: Bisect, workbench: Workbench) -> str:
    """The behaviour's name or whole path, once it is known that the entries can be told apart."""
    good, bad, over = parse_between(asked.entries, asked.over)
    _must_fit(asked, dict.fromkeys([side for side in (good, bad) if side], TASK), workbench)
    library = workbench.library
    if good and library.get(good).digest == library.get(bad).digest:
        raise InputError(f"'{good}' and '{bad}' are the same; name two entries that differ.")
    if over == "history":
        for entry in revisions_between(library, good, bad):
            _must_fit(asked, {f"{entry.name}@{entry.revision}": TASK}, workbench)
    if not asked.behaviour:
        return ""
    check_measurable(workbench.contrast.get(asked.behaviour))
    return _contrast(asked.behaviour, workbench)


def _must_be_free(name: str, kinds: tuple[str, ...], workbench: Workbench) -> None:
    try:
        entry = workbench.library.get(name)
    except NameNotFound:
        return
    if entry.kind not in kinds:
        raise NameTaken(f"'{name}' is the name of a {entry.kind} already; choose another name.")


def _must_be_its_own(name: str, workbench: Workbench) -> None:
    """The last step's weights must not become a revision of something else."""
    last = last_name(name)
    try:
        trained = workbench.library.get(last).info.get("parameters", {})
    except NameNotFound:
        trained = {"name": name}
    if last == name or trained.get("name") != name:
        raise NameTaken(
            f"The last step's weights of '{name}' would be kept as '{last}', which is something else "
            "already; choose another name, or keep the best or the last alone."
        )


def _must_fit(
    asked: _Parameters, refs: Mapping[str, tuple[str, ...]], workbench: Workbench
) -> None:
    """Find every ref, and hold its base against the others' and, if it is known, the model's."""
    entries = {ref: workbench.library.get(ref, kind=kinds) for ref, kinds in refs.items()}
    bases = {ref: entry.base for ref, entry in entries.items()}
    if len(set(bases.values())) > 1:
        words = " and ".join(f"'{ref}' ({(base or 'none')[:12]})" for ref, base in bases.items())
        raise ModelMismatch(f"{words} belong to different bases; choose two of one model.")
    here = {row["name"] for row in workbench.models() if row["ready"]}
    # A model that is not on this disk yet is told by the run, which can show its fetching.
    if asked.model == workbench.model_name and asked.model in here:
        base = workbench.model().base
        for ref, found in bases.items():
            if found != base:
                raise ModelMismatch(
                    f"'{ref}' belongs to base {(found or 'none')[:12]}, and {asked.model} is "
                    f"{base[:12]}; choose the model that it was made with."
                )
