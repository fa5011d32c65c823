"""Put steering into a model that vLLM has just loaded and not yet run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vectors.store import Library
from workbench.engines.vllm import edit
from workbench.engines.vllm.capture import table as capture
from workbench.engines.vllm.capture.captures import Captures
from workbench.engines.vllm.capture.table import CaptureTable
from workbench.engines.vllm.edit import EditTable
from workbench.engines.vllm.rows import RowBank
from workbench.engines.vllm.settings import Settings, library_and_base
from workbench.engines.vllm.steering import Steering
from workbench.engines.vllm.tokens import Expand
from workbench.engines.vllm.versions import check_settings
from workbench.models.blocks import decoder_blocks

__all__ = ["attach_steering"]


def attach_steering(model: Any, config: Any, device: torch.device) -> Steering:
    """Return the steering of `model`, whose decoder layers apply it from now on.

    Raises:
        ModelNotSupported: layers or settings of vLLM that steering does not follow.
    """
    check_settings(config)
    settings = Settings.of_environment()
    layers = decoder_blocks(model)
    scheduler = config.scheduler_config
    slots = scheduler.max_num_seqs
    adding, projecting = settings.capacity(slots)
    table = EditTable.make(
        len(layers),
        1 + projecting + adding,
        config.model_config.get_hidden_size(),
        # Longer than any batch: a compiler must not take "all of it" for a fixed size.
        max(scheduler.max_num_batched_tokens, slots) + 1,
        dtype=config.model_config.dtype,
        device=device,
        projecting=1 + projecting if projecting else 0,
        eager=config.model_config.enforce_eager,
    )
    edit.attach(layers, table)
    expand = _expander(device)
    captures = None
    if settings.capture:
        sums = CaptureTable.make(
            len(layers),
            1 + slots,
            table.width,
            len(table.row_of_token_T),
            device=device,
            eager=config.model_config.enforce_eager,
        )
        capture.attach(layers, sums)
        captures = Captures(sums, slots, expand)
    library = Library(library_and_base()[0])
    bank = RowBank(table, library.vector_by_digest)
    agree = _agreement(config.parallel_config)
    return Steering(table, bank, slots, expand, captures, agree)


def _agreement(parallel: Any) -> Callable[[str], str]:
    """How the workers that share a model tell each other that one of them cannot steer a request."""
    if parallel.tensor_parallel_size == 1:
        return str

    def agree(problem: str) -> str:
        # Each of them is given the same requests in the same order, so that all come by here.
        from vllm.distributed import get_tp_group  # noqa: PLC0415

        group = get_tp_group().cpu_group
        hindered = torch.tensor([bool(problem)], dtype=torch.int32)
        torch.distributed.all_reduce(hindered, group=group)
        if not hindered.item():
            return ""
        found = [""] * parallel.tensor_parallel_size
        torch.distributed.all_gather_object(found, problem, group=group)
        return problem or max(found)

    return agree


def _expander(device: torch.device) -> Expand:
    """The kernel where there is a GPU, its reference elsewhere."""
    if device.type == "cuda":
        from steer_kernels.rows import expand_rows  # noqa: PLC0415  # needs triton
    else:
        from vectors.steering.operators import expand_rows  # noqa: PLC0415
    return expand_rows
