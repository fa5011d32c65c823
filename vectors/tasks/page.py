"""`docs/merging.md`, made from the registry: `python -m vectors.tasks.page > docs/merging.md`."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from vectors.tasks.registry import METHODS, Method

__all__ = ["merging_page"]

HEAD = """\
# Merging task vectors

This page is made from the registry of methods, `vectors/tasks/registry.py`:
`python -m vectors.tasks.page > docs/merging.md`.

A recipe names a base, task vectors by their digests with a weight each, and a method with all of
its options. The model is computed anew from the base each time, so leaving a term out, or giving it
another weight, is exact, whatever the method. A recipe has one digest, in whatever order its terms
were given.

    Recipe(base=digest, terms=((cheerful, 1.0), (formal, -0.5)))                      the sum
    Recipe(op=Operation.of("ties", {"density": 0.3}), base=digest, terms=...)        TIES

Rules that hold for all of them:

* `delta_i = tuned_i - base` and all arithmetic are fp32, or fp64 where noted below; the sum with the
  base is rounded once to the base's type.
* Terms are summed in the order of their digests, so the result does not depend on how they were
  given, on the number of threads, or on the order of tensors.
* A weight of 0 is the same as leaving the term out. A tensor that a term lacks is one that it does
  not change.
* Negating all weights negates the merged task vector, except under `zero_sum: positive` and
  `divisor: signed-weights`, which are there to compare with other codes.
* Elements that do not move keep their bits. Integers are never merged.
* Equal magnitudes share one fate, because in bf16 there are many, and a sort would choose among
  them at random.

`linear` sums also carry infinities and NaN. The other methods refuse deltas that are not finite.
`sce`, `tsv-m`, `iso-c` and `model-stock` compute in fp64 and round to fp32; singular vectors come
from the installed linear algebra library, so another machine may differ in the last bit.

## TIES out of core

The threshold of a whole model is exact and needs no sort: magnitudes are counted by the upper 19
bits of their fp32 pattern, and the few that have lower bits as well are kept one by one. That gives
every rank, so a second merge of the same task vectors with another density, weight or sign rule
reads the counts and goes through the weights once. Counts of library entries are attestations of the
kind `magnitudes` beside them; they can be deleted and counted again. Weights other than bf16 have
too many distinct magnitudes to keep; their threshold takes one more look at one bin.

## On a CUDA device

`ties` and `linear` of bf16 weights run on a CUDA device where there is one, with the processor's
bits, so that a recipe does not say where it was merged. `workbench-made.json` beside the weights
says it, and why if it was the processor; so does `workbench library materialise --json`
(`merged_on`). `WORKBENCH_MERGE_DEVICE=cpu` forbids the device, `cuda` insists on it.

* Threads read into pinned buffers, which cross the bus on a stream of their own while kernels count
  what is there. The counts that are kept are the processor's, byte for byte.
* Where base and terms fit into the device's free memory, 2 bytes a weight each (64 GB for three
  terms of an 8B model), they cross once, and the merge runs in place of the first term. Where only
  the base fits, or nothing, terms cross a second time.
* Every element adds its terms in their order, no product and sum are fused, and means are rounded
  as a division rounds. Only a linear sum that is not a number may have other bits.

Measured on one H100 (80 GB, PyTorch 2.11, Triton 3.6; `workbench bench merge-gpu`): three 8B bf16
fine-tunes from pinned host memory onto a base that is on the device, TIES at density 0.2, merged
weights left on the device: 0.98 s, of which 0.95 s until the cuts are known. That is 49.0 GB/s, 0.89
of the 54.9 GB/s of one large copy in the same run. All 8.03e9 elements equal plain PyTorch's, and the
cuts have their ranks. The merge alone takes 26.4 ms, 0.99 times its floor (10 bytes an element at the
measured 3,020 GB/s). Plain PyTorch with `kthvalue` takes 4.7 s for one of the 32 layers, 176 times as
long an element. A 135M model from files to a file takes 0.79 s with the device and 0.72 s on the 16
cores beside it: there the files are what takes the time. Terms that cross twice were tested and not
timed, and no H200 was there.
"""


def merging_page() -> str:
    """Return the page."""
    rows = "\n".join(f"| [`{m.name}`](#{m.name}) | {m.summary} |" for m in METHODS.values())
    table = f"## Methods\n\n| method | what it does |\n| --- | --- |\n{rows}\n"
    return "\n".join([HEAD, table, *(_section(method) for method in METHODS.values())])


def _section(method: Method) -> str:
    lines = [f"## {method.name}", "", method.summary, ""]
    lines += [f"* Paper: {method.paper}", f"* Reference code: {method.code}"]
    if method.least > 1:
        lines.append(f"* Needs at least {method.least} task vectors.")
    lines += [f"* Here: {words}" for words in method.differs]
    if method.parameters.model_fields:
        lines += ["", "| option | default | values | meaning |", "| --- | --- | --- | --- |"]
        for name, field in method.parameters.model_fields.items():
            default = _spelt(field.default)
            lines.append(f"| `{name}` | `{default}` | {_values(field)} | {field.description} |")
    return "\n".join([*lines, ""])


def _values(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    if field.annotation is bool:
        return "`true`, `false`"
    signs = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
    found = [
        f"{words} {_number(getattr(bound, sign))}"
        for bound in field.metadata
        for sign, words in signs.items()
        if hasattr(bound, sign)
    ]
    return " ".join(found)


def _number(value: float) -> str:
    return (
        f"2^{value.bit_length() - 1}" if isinstance(value, int) and value > 10**6 else f"{value:g}"
    )


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(merging_page(), end="")
