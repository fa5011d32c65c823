"""`workbench library`: signing verdicts and evaluations, and checking who signed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from workbench.commands.shared import Session, command

__all__ = ["add_to", "signature_words"]

Ref = Annotated[str, typer.Argument(help="A name, name@3, name@2026-11-22, name@tag or digest.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `workbench library`."""
    command(app, "sign")(sign)
    command(app, "verify-signature")(verify_signature)


def sign(session: Session, ref: Ref) -> None:
    """Sign an entry's verdicts and evaluations with this home's key, made on first use."""
    made = session.wb.sign(ref)
    rows = session.wb.signatures(ref)
    own = [row for row in rows if row["own"] and row["holds"]]

    def draw(out: Console) -> None:
        kinds = ", ".join(f"{row['kind']} {row['attestation'][:12]}" for row in made)
        out.print(f"Signed: {kinds}." if made else "All of it is signed already.")
        out.print(f"Your public key: {own[0]['key']}", soft_wrap=True)

    session.answer({"signed": made, "key": own[0]["key"]}, draw)


def verify_signature(
    session: Session,
    ref: Ref,
    key: Annotated[
        str, typer.Option("--key", help="Who must have signed: 64 hex digits, or a file of them.")
    ] = "",
) -> None:
    """Prove that an entry's newest verdict and evaluation are signed, and unchanged since."""
    rows = session.wb.verify_signature(ref, key)

    def draw(out: Console) -> None:
        for row in rows:
            out.print(f"The newest {row['kind']} is signed by {row['key']}.", soft_wrap=True)

    session.answer({"verified": rows}, draw)


def signature_words(row: Mapping[str, Any]) -> str:
    """One signature in a sentence."""
    if not row["holds"]:
        return row["words"]
    whose = "this home's key" if row["own"] else "a key that is not this home's"
    return f"The {row['kind']} {row['attestation'][:12]} is signed by {row['key']}, {whose}."
