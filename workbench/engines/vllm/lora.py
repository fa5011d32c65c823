"""LoRAs of the workbench in vLLM: checked, loaded by the workers, proved, and given to single requests.

A request with the header `x-workbench-weights: lora:<digest>` is answered on the base with that LoRA;
requests with others, and with none, run in the same batch. vLLM keeps the last ones used in its slots
and loads the others again from their folders; it keys its prefix cache by the LoRA's name, which is
the digest of all that makes it.
"""

from __future__ import annotations

import asyncio
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vectors.errors import BackendUnavailable, InputError
from vectors.formats.peft import CONFIG
from workbench.engines.base import LoraReceipt
from workbench.engines.lora import LoraFile, lora_folder, read_lora_file
from workbench.engines.vllm.settings import LORAS, check_room

__all__ = ["HEADER", "Loras", "check_folder", "load", "room"]

HEADER = "x-workbench-lora"
NEAR = 0.02  # bf16 rounds each factor by up to 0.004


class Loras:
    """The LoRAs that this server has been asked for.

    Args:
        folder: where the workbench of this home makes them.
        base: digest of the model that is served.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self.folder = folder
        self.base = base
        self._turn = asyncio.Lock()

    async def ready(self, digest: str, client: Any, models: Any) -> LoraReceipt:
        """Load the LoRA if it is not there yet, and return what it is and loses.

        Args:
            client: vLLM's engine client.
            models: vLLM's list of served models, which maps a request's `model` to a LoRA.

        Raises:
            InputError: it cannot be served, and why.
            BackendUnavailable: a worker holds something else than the folder says.
        """
        space = room(client.vllm_config)
        check_room(space, None)
        folder = lora_folder(self.folder, digest)
        stated = read_lora_file(folder)
        if stated is None:
            raise InputError(
                f"The LoRA {digest[:12]} is not made; make it with the workbench of this home first."
            )
        if stated.base != self.base:
            raise InputError(
                f"The LoRA {digest[:12]} belongs to base {stated.base[:12]}, and this engine serves "
                f"{self.base[:12]}; use it with its own model."
            )
        check_room(space, stated.rank)
        async with self._turn:
            if digest not in models.lora_requests:
                from vllm.lora.request import LoRARequest  # noqa: PLC0415  # vLLM is loaded here

                number = models.lora_id_counter.inc(1)
                found = await client.collective_rpc(
                    "workbench_lora", args=(digest, number, str(folder))
                )
                _prove(digest, stated, found)
                models.lora_requests[digest] = LoRARequest(digest, number, str(folder))
        return stated.receipt


def _prove(digest: str, stated: LoraFile, found: list[dict[str, float]]) -> None:
    # Workers of one tensor-parallel group hold parts whose squares add up.
    norm = math.sqrt(sum(one["norm"] ** 2 for one in found))
    if any(one["modules"] != stated.modules for one in found) or not math.isclose(
        norm, stated.norm, rel_tol=NEAR
    ):
        raise BackendUnavailable(
            f"The engine holds {found[0]['modules']} modules with norm {norm:.4g} of the LoRA "
            f"{digest[:12]}, which has {stated.modules} and {stated.norm:.4g}; it is not used. "
            "Swap the weights instead."
        )


def load(runner: Any, name: str, number: int, folder: str) -> dict[str, float]:
    """In a worker: load a LoRA, and measure what lies in its slot then.

    Raises:
        BackendUnavailable: this vLLM keeps LoRAs in a way that the workbench does not know.
    """
    from vllm.lora.request import LoRARequest  # noqa: PLC0415  # vLLM is loaded here

    runner.add_lora(LoRARequest(name, number, folder))
    try:
        manager = runner.lora_manager._adapter_manager
        slot = manager.lora_index_to_id.index(number)
        norms = [
            _norm(up[slot, 0], down[slot, 0])
            for module in manager.modules.values()
            for down, up in zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
        ]
    except (AttributeError, ValueError) as error:
        raise BackendUnavailable(
            f"This vLLM keeps LoRAs in another way ({error}); swap the weights instead."
        ) from error
    return {
        "modules": sum(norm > 0 for norm in norms),
        "norm": math.sqrt(sum(norm**2 for norm in norms)),
    }


def _norm(up_OR: Tensor, down_RI: Tensor) -> float:
    up, down = up_OR.to(torch.float64), down_RI.to(torch.float64)
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def room(holder: Any) -> dict[str, int]:
    """How many LoRAs a batch may have, and the highest rank; zeros without slots.

    Args:
        holder: whatever of vLLM has a `lora_config`.
    """
    config = getattr(holder, "lora_config", None)
    if config is None:
        return {"slots": 0, "rank": 0}
    return {"slots": config.max_loras, "rank": config.max_lora_rank}


def check_folder(request: Any) -> None:
    """Refuse a LoRA whose folder is gone: a worker that misses it would end the engine.

    Raises:
        InputError: the folder is gone.
    """
    folder = Path(request.lora_path)
    if not folder.is_absolute():
        return
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"The LoRA {request.lora_name[:12]} is no longer on the disk; make it again."
        )
    if (os.environ.get(LORAS) or "-") == str(folder.parent):
        os.utime(folder)  # who is used stays; see `workbench.engines.lora`
