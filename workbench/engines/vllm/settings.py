"""How the plugin is set, by environment variables that reach every process of vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vectors.errors import InputError
from workbench.engines.vllm.gpu import has_cuda

__all__ = [
    "BASE",
    "CAPTURE",
    "HELD",
    "LIBRARY",
    "LORAS",
    "LORA_RANK",
    "LORA_SLOTS",
    "MOST_SLOTS",
    "OPERATORS",
    "RANKS",
    "ROWS",
    "LoraSlots",
    "Settings",
    "library_and_base",
]

LIBRARY = "WORKBENCH_LIBRARY"
BASE = "WORKBENCH_BASE"
ROWS = "WORKBENCH_ROWS"
OPERATORS = "WORKBENCH_OPERATORS"
CAPTURE = "WORKBENCH_CAPTURE"
LORA_SLOTS = "WORKBENCH_LORA_SLOTS"
LORA_RANK = "WORKBENCH_LORA_RANK"
LORAS = "WORKBENCH_LORAS"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The highest ranks that vLLM lets an engine be started for."""
MOST_SLOTS = 256
HELD = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
)
"""Linear layers of attention and MLP by the last part of their names, as vLLM gives them LoRAs. With
LoRAs on the head, vLLM's CPU runner ends when a batch asks for log-probabilities of prompts."""
PROJECTING = 32
DEFAULT_ROWS = 512


def library_and_base() -> tuple[Path, str]:
    """Read `WORKBENCH_LIBRARY` and `WORKBENCH_BASE`: where vectors are found, and for which model.

    Raises:
        InputError: one of them is not set.
    """
    library, base = os.environ.get(LIBRARY, ""), os.environ.get(BASE, "")
    if not library or not base:
        raise InputError(
            f"The engine steers where {LIBRARY} and {BASE} are set, and {BASE if library else LIBRARY} "
            "is not; take both from workbench.engines.vllm.offline.offline_environment, or unset both."
        )
    return Path(library), base


@dataclass(frozen=True)
class Settings:
    """What is compiled into the model.

    Args:
        rows: most distinct (steering, phase) pairs at once that only add.
        operators: whether there are rows that can do more; additions alone are cheaper.
        projecting: how many of those there are.
        capture: whether activations can be read from requests.
    """

    rows: int = DEFAULT_ROWS
    operators: bool = True
    projecting: int = PROJECTING
    capture: bool = True

    @classmethod
    def of_environment(cls) -> Settings:
        """Read `WORKBENCH_ROWS`, `WORKBENCH_OPERATORS` (`all` or `add`) and `WORKBENCH_CAPTURE` (`1`
        or `0`).

        Under a compiler and CUDA graphs every step pays for what is compiled in, so there `add` and
        `0` are the defaults; in eager mode only the steps that use an operator, or capture, do.

        Raises:
            InputError: another value.
        """
        rows = os.environ.get(ROWS, str(DEFAULT_ROWS))
        operators = os.environ.get(OPERATORS, "add" if has_cuda() else "all")
        capture = os.environ.get(CAPTURE, "0" if has_cuda() else "1")
        # One request alone can need a row for its prompt and another for its decoding.
        if not rows.isdigit() or not 2 <= int(rows) <= 100_000:
            raise InputError(f"{ROWS} must be a number from 2 to 100000, not {rows[:40]!r}.")
        if operators not in ("all", "add"):
            raise InputError(f"{OPERATORS} must be 'all' or 'add', not {operators[:40]!r}.")
        if capture not in ("0", "1"):
            raise InputError(f"{CAPTURE} must be 1 or 0, not {capture[:40]!r}.")
        return cls(int(rows), operators == "all", capture=capture == "1")

    def capacity(self, requests: int) -> tuple[int, int]:
        """How many rows for additions and for the rest, where so many requests can run at once.

        A request needs at most two rows, so that twice as many are never short.
        """
        most = 2 * requests
        return min(self.rows, most), min(self.projecting, most) if self.operators else 0

    def salt(self) -> dict[str, object]:
        """What vLLM's compile cache must tell apart."""
        return {"edit": 2, **asdict(self)}


@dataclass(frozen=True)
class LoraSlots:
    """How many LoRAs may run in one batch, and their highest rank; none by default, since room for
    them is taken at the start and every step looks at them.

    Args:
        slots: 0 starts an engine without LoRA.
        rank: one of `RANKS`.
    """

    slots: int = 0
    rank: int = 64

    @classmethod
    def of_environment(cls) -> LoraSlots:
        """Read `WORKBENCH_LORA_SLOTS` and `WORKBENCH_LORA_RANK`.

        Raises:
            InputError: a number that is out of bounds.
        """
        slots = os.environ.get(LORA_SLOTS, "0")
        rank = os.environ.get(LORA_RANK, str(cls.rank))
        if not slots.isdigit() or not 0 <= int(slots) <= MOST_SLOTS:
            raise InputError(
                f"{LORA_SLOTS} must be a number from 0 to {MOST_SLOTS}, not {slots[:40]!r}."
            )
        if not rank.isdigit() or int(rank) not in RANKS:
            known = ", ".join(map(str, RANKS))
            raise InputError(f"{LORA_RANK} must be one of {known}, not {rank[:40]!r}.")
        return cls(int(slots), int(rank))

    def holding(self, rank: int | None) -> LoraSlots:
        """The same, or some where there are none, with room for LoRAs of this rank."""
        fits = [r for r in RANKS if r >= (rank or 0)]
        return LoraSlots(self.slots or 4, max(self.rank, fits[0] if fits else RANKS[-1]))

    def options(self) -> list[str]:
        """vLLM's options for them."""
        if not self.slots:
            return []
        numbers = ["--max-loras", str(self.slots), "--max-lora-rank", str(self.rank)]
        return ["--enable-lora", *numbers, "--lora-target-modules", *HELD]


def check_room(room: Mapping[str, int], rank: int | None) -> None:
    """Refuse a LoRA that a running engine has no room for.

    Args:
        room: `slots` and highest `rank`, as the engine's workers say.
        rank: of the LoRA, None where it is not known yet.

    Raises:
        InputError: no slots, or a rank above the engine's.
    """
    if not room.get("slots"):
        raise InputError(
            "This engine has no LoRA slots; start it with 'workbench serve --lora-slots 4', or with "
            f"{LORA_SLOTS}=4 in its environment."
        )
    if rank is not None and rank > room["rank"]:
        raise InputError(
            f"The LoRA has rank {rank} and this engine takes at most {room['rank']}; ask for a "
            "lower rank, or start the engine with a higher --lora-rank."
        )
