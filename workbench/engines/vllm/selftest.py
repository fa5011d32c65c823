"""Does the edit do what it says, in this model, on this machine? Asked at load, before any request.

A dummy batch gets one token for each block: token `b` is steered at block `b` alone, and one token
at none. The model runs it twice.

1. Uncompiled, with hooks on the layers: the residual stream of token `b` behind block `b` must be that
   of the plain token plus the known vector, and still equal to it before block `b`.
2. As requests will run it (compiled, and through CUDA graphs where there are any) with a vector that
   dwarfs all else: what comes out behind the last block must be what came out uncompiled. An edit that
   is missing from the compiled graph, or applied twice or to the wrong tokens, cannot pass.

Where the engine can capture, every token has a row of its own, and both runs must have summed what the
hooks saw: the residual stream of that token behind every block, once.

Letters: T tokens, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vectors.errors import SteeringNotApplied
from vectors.steering.controls import random_direction
from workbench.engines.vllm.steering import Steering

__all__ = ["Report", "SelfTest", "silent_attention"]

Run = Callable[[int], Tensor]
"""Run a dummy batch of so many tokens, and return the hidden states behind the last norm, `[T, D]`."""

TOKENS = 64
ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
AGREEMENT = 0.2
CAPTURE_ROUNDING = 1e-5
DWARFING = 64.0
LARGEST_HALF = 1e4


@dataclass(frozen=True)
class Report:
    """What was checked: how many blocks, on which paths, and the largest error of each."""

    blocks: int
    stream_error: float
    path_errors: Mapping[str, float] = field(default_factory=dict)


class SelfTest:
    """Runs the two checks of this file.

    Args:
        model: the loaded model.
        layers: its decoder layers.
        steering: what was attached to it; no request may be running.
        plain: runs uncompiled.
        paths: the ways in which requests run, by name.
        tokens: most tokens of a dummy batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        steering: Steering,
        plain: Run,
        paths: Mapping[str, Run],
        tokens: int,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.steering = steering
        self.plain = plain
        self.paths = paths
        self.table = steering.table
        self.captures = steering.captures
        most = min(TOKENS, tokens, self.table.rows)
        if self.captures is not None:
            most = min(most, self.captures.table.sum_LRD.shape[1] - 1)
        self.at_once = max(1, most - 1)

    @torch.inference_mode()
    def run(self) -> Report:
        """Check every block.

        Raises:
            SteeringNotApplied: the block and the path where the edit is not what it should be.
        """
        blocks = range(len(self.layers))
        chunks = [blocks[i : i + self.at_once] for i in range(0, len(blocks), self.at_once)]
        norms = self._norms()
        stream_error, path_errors = 0.0, dict.fromkeys(self.paths, 0.0)
        live = self.table.live
        try:
            if live is not None:
                live.update(dict.fromkeys(blocks, self.table.projecting > 0))
            if self.captures is not None and self.captures.table.live is not None:
                self.captures.table.live.update(blocks)
            for chunk in chunks:
                stream_error = max(stream_error, self._check_streams(chunk, norms))
                for name, error in self._check_paths(chunk, norms).items():
                    path_errors[name] = max(path_errors[name], error)
        finally:
            self._forget()
            if live is not None:
                live.clear()
            if self.captures is not None and self.captures.table.live is not None:
                self.captures.table.live.clear()
        return Report(len(blocks), stream_error, path_errors)

    def _norms(self) -> list[float]:
        streams, _ = self._uncompiled(torch.zeros(1, dtype=torch.int32))
        return [float(stream_TD[0].float().norm()) for stream_TD in streams]

    def _check_streams(self, chunk: range, norms: Sequence[float]) -> float:
        added_BD = self._fill(chunk, [max(norms[b], 1e-3) for b in chunk])
        streams, _ = self._uncompiled(self._probe(chunk))
        allowed = ROUNDING.get(self.table.add_LRD.dtype, 6e-2)
        self._check_sums(torch.stack(streams), "uncompiled", CAPTURE_ROUNDING)
        worst = 0.0
        for token, block in enumerate(chunk):
            size = float(added_BD[token].norm())
            stream_TD = streams[block].float()
            error = float((stream_TD[token] - stream_TD[-1] - added_BD[token]).norm()) / size
            before_TD = streams[block][token + 1 : len(chunk)].float()
            if len(before_TD):
                early = float((before_TD - stream_TD[-1]).norm(dim=-1).max()) / size
                error = max(error, early)
            if not error <= allowed:
                raise SteeringNotApplied(
                    f"The self-test failed at block {block} ({type(self.layers[block]).__name__}): "
                    f"the residual stream missed the vector that was added by {error:.2g} of its "
                    f"norm, and {allowed:g} is rounding; this model cannot be steered here."
                )
            worst = max(worst, error)
        return worst

    def _check_paths(self, chunk: range, norms: Sequence[float]) -> dict[str, float]:
        size = DWARFING * max(*norms, 1e-3)
        if self.table.add_LRD.dtype is torch.float16:
            size = min(size, LARGEST_HALF)
        self._fill(chunk, [size] * len(chunk))
        streams, expected_TD = self._uncompiled(self._probe(chunk))
        found: dict[str, float] = {}
        for name, run in self.paths.items():
            hidden_TD = self._run(run, self._probe(chunk)).float()
            # Before a token's own block, what attention reads in a dummy batch is not dwarfed yet.
            known_LT = torch.tensor([[b >= at for at in chunk] for b in range(len(self.layers))])
            self._check_sums(torch.stack(streams), name, AGREEMENT, known_LT)
            for token, block in enumerate(chunk):
                wanted_D = expected_TD[token].float()
                error = float((hidden_TD[token] - wanted_D).norm() / wanted_D.norm())
                if not error <= AGREEMENT:
                    raise SteeringNotApplied(
                        f"The self-test failed at block {block} on the path '{name}': what comes "
                        f"out differs by {error:.2g} from what the same vector does uncompiled, "
                        f"and {AGREEMENT} is allowed; start the engine without compilation and "
                        "CUDA graphs (--enforce-eager)."
                    )
                found[name] = max(found.get(name, 0.0), error)
        return found

    def _check_sums(
        self, stream_LTD: Tensor, path: str, allowed: float, known_LT: Tensor | None = None
    ) -> None:
        """Every token's row must hold its residual stream, and the norm of it, where it is `known`."""
        if self.captures is None:
            return
        sums = self.captures.table
        tokens = stream_LTD.shape[1]
        norm_LT = stream_LTD.norm(dim=-1)
        found_LTD = sums.sum_LRD[:, 1 : tokens + 1]
        # A dummy batch may hold zeros behind the first blocks.
        size_LT = norm_LT.clamp_min(1e-6)
        error_LT = (found_LTD - stream_LTD).norm(dim=-1) / size_LT
        other_LT = (sums.norm_LR[:, 1 : tokens + 1] - norm_LT).abs() / size_LT
        worst_LT = torch.maximum(error_LT, other_LT)
        if known_LT is not None:
            tokens = known_LT.shape[1]
            worst_LT = worst_LT[:, :tokens].masked_fill(~known_LT.to(worst_LT.device), 0)
        worst_L = worst_LT.amax(1)
        block = int(worst_L.nan_to_num(nan=float("inf")).argmax())
        error = float(worst_L[block])
        if not error <= allowed:
            raise SteeringNotApplied(
                f"The self-test failed at block {block} on the path '{path}': what was captured "
                f"differs by {error:.2g} from the residual stream, and {allowed:g} is rounding; "
                "start the engine without capture (--no-capture)."
            )

    # -- underneath -----------------------------------------------------------------------------

    def _probe(self, chunk: range) -> Tensor:
        """Row `i + 1` for token `i`, and row 0 for the plain one, `[T]`."""
        return torch.tensor([*range(1, len(chunk) + 1), 0], dtype=torch.int32)

    def _fill(self, chunk: range, sizes: Sequence[float]) -> Tensor:
        """Give each block of the chunk a row of its own; return what they add, `[T - 1, D]`."""
        self._forget()
        for row, (block, size) in enumerate(zip(chunk, sizes, strict=True), start=1):
            v_D = random_direction(self.table.width, 7919 * (block + 1)) * size
            self.table.add_LRD[block, row] = v_D.to(self.table.add_LRD)
        rows = [self.table.add_LRD[block, row] for row, block in enumerate(chunk, start=1)]
        return torch.stack(rows).float()

    def _forget(self) -> None:
        self.table.add_LRD[:, : self.at_once + 1].zero_()

    def _run(self, run: Run, probe_T: Tensor) -> Tensor:
        self.steering.probe = probe_T
        if self.captures is not None:
            self.captures.probe = torch.arange(1, len(probe_T) + 1, dtype=torch.int32)
            self.captures.table.sum_LRD.zero_()
            self.captures.table.norm_LR.zero_()
        try:
            return run(len(probe_T))[: len(probe_T)].clone()
        finally:
            self.steering.probe = None
            if self.captures is not None:
                self.captures.probe = None
            self.steering.rest()

    def _uncompiled(self, probe_T: Tensor) -> tuple[list[Tensor], Tensor]:
        """The residual stream behind every block, and the hidden states behind the last norm."""
        streams: list[Tensor] = []

        def read(module: Any, inputs: Any, output: Any) -> None:
            # vLLM's norms write into the residual, so that it must be copied now.
            both = (output,) if isinstance(output, Tensor) else output
            streams.append(torch.stack([x[: len(probe_T)].float() for x in both]).sum(0))

        with ExitStack() as stack:
            stack.enter_context(_uncompiled(self.model))
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(read).remove)
            hidden_TD = self._run(self.plain, probe_T)
        if len(streams) != len(self.layers):
            raise SteeringNotApplied(
                f"The self-test saw {len(streams)} of {len(self.layers)} blocks run; this model "
                "cannot be steered here."
            )
        return streams, hidden_TD


@contextmanager
def silent_attention(modules: Iterable[Any]) -> Iterator[None]:
    """Make attention put out zeros, so that the tokens of a dummy batch do not see each other.

    Without it they would read a cache that nobody has written, or memory that nobody has cleared.
    """

    def forward(*args: Any, output: Tensor, **kw: Any) -> Tensor:
        return output.zero_()

    silenced = [m.impl for m in modules if hasattr(getattr(m, "impl", None), "forward")]
    for impl in silenced:
        impl.forward = forward
    try:
        yield
    finally:
        for impl in silenced:
            del impl.forward


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run the modules that vLLM compiles as they are written."""
    compiled: list[Any] = [
        m for m in model.modules() if getattr(m, "do_not_compile", True) is False
    ]
    for module in compiled:
        module.do_not_compile = True
    try:
        yield
    finally:
        for module in compiled:
            module.do_not_compile = False
