"""How the result of each kind of run looks in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from workbench.commands.found import draw_bisect, draw_search
from workbench.commands.show import facts, lines, number, span

__all__ = ["draw_result", "draw_verdict"]

Result = Mapping[str, Any]
TOP_BLOCKS = 8
BLOCKS = {
    "block": "block",
    "auroc": "AUROC",
    "cohens_d": "Cohen's d",
    "pair_accuracy": "pair accuracy",
    "agreement": "agreement",
    "norm": "mean norm",
}
DOSES = {
    "dose": "dose",
    "margin": "margin (nats)",
    "change": "change",
    "change_low": "95 % from",
    "change_high": "to",
    "kl": "KL (nats)",
    "repetition": "repetition",
}


def draw_result(out: Console, kind: str, result: Result) -> None:
    """Draw the result of a run of `kind`; of one not known here, its plain values."""
    drawers: dict[str, Callable[[Console, Result], None]] = {
        "extract": _extract,
        "verify": draw_verdict,
        "train": _train,
        "learn": _learn,
        "compare": _compare,
        "gradients": _gradients,
        "search": draw_search,
        "bisect": draw_bisect,
        "demo": _demo,
    }
    drawers.get(kind, _plain)(out, result)


def _extract(out: Console, r: Result) -> None:
    top = sorted(r["blocks"], key=lambda row: -row["auroc"])[:TOP_BLOCKS]
    best = [row for row in r["blocks"] if row["block"] == r["best_block"] and row not in top]
    out.print(lines([*top, *best], BLOCKS))
    out.print(r["words"])
    kept = f"Kept as {r['name']}@{r['revision']}; best block {r['best_block']}."
    out.print(f"{kept} Try: --steer {r['name']}={r['suggested_dose']:g}", soft_wrap=True)


def draw_verdict(out: Console, r: Result) -> None:
    """Draw a verdict: the doses, the rules, the answer."""
    out.print(f"Unsteered margin {r['base_margin']:+.2f} nats over {r['pairs']} held-out pairs.")
    out.print(lines(r["doses"], DOSES))
    for rule in r["reasons"]:
        mark = Text("kept    ", "green") if rule["passed"] else Text("not kept", "red")
        out.print(mark, rule["words"])
    asked = r["prompt"]
    out.print(f"The prompt that asks for it changes the margin by {asked['change']:+.2f} nats.")
    if r["break_dose"] is not None:
        out.print(f"Text breaks from dose {r['break_dose']:g}.")
    words = "The direction is verified" if r["passed"] else "The direction is NOT verified"
    style = "bold green" if r["passed"] else "bold red"
    out.print(f"{words} at dose {r['working_dose']:g} ({span(r['seconds'])}).", style=style)


def _train(out: Console, r: Result) -> None:
    out.print(_measures(r))
    out.print(
        facts({"recovered": _share(r["recovered"]), "weights changed": _share(r["changed_share"])})
    )
    _taken(out, r)
    kept = f"Kept as {r['name']}@{r['revision']}, trained on {r['vector']} at dose {r['dose']:g}"
    out.print(f"{kept} in {span(r['seconds'])}. Try: --with {r['name']}=1", soft_wrap=True)


def _learn(out: Console, r: Result) -> None:
    if r["log_prob"]:
        rows = [{"side": side, "log_prob": value} for side, value in r["log_prob"].items()]
        out.print(lines(rows, {"side": "", "log_prob": "log-probability of held-out tokens"}))
    else:
        out.print("Too few were given to hold any out, so what was learnt was not measured.")
    if r["margin"]:
        out.print(facts({f"margin, {side} (nats)": number(v) for side, v in r["margin"].items()}))
    out.print(
        facts(
            {
                "recovered": _share(r["recovered"]),
                "KL on neutral text": number(r["kl"]["trained"]),
                "weights changed": _share(r["changed_share"]),
            }
        )
    )
    _taken(out, r)
    kept = f"Kept as {r['name']}@{r['revision']}, {r['decisions']} decisions of {r['source']}"
    out.print(f"{kept}, in {span(r['seconds'])}. Try: --with {r['name']}=1", soft_wrap=True)


def _taken(out: Console, r: Result) -> None:
    if "steps" not in r:  # of a run before tiers were chosen
        return
    steps = r["steps"]
    out.print(f"Tier {r['tier']['tier']}: {r['tier']['why']}.", soft_wrap=True)
    out.print(f"{steps['steps']} steps; the weights are those of step {steps['kept_step']}.")
    if r.get("last"):
        out.print(f"Those of the last step are kept as {r['last']}.")


def _gradients(out: Console, r: Result) -> None:
    from workbench.runs.flow_report import table_rows  # noqa: PLC0415  # only here

    names = ("weight", "context", "decision", "frozen", "layers", "silent")
    out.print(lines(table_rows(r["weights"]), {name: name for name in names}))
    shares = [{"share of": name, **row} for name, row in r["shares"].items()]
    out.print(lines(shares, {"share of": "share of", "gdn": "recurrent", "attention": "attention"}))
    out.print(facts({f"tier {t}, MiB": size / 2**20 for t, size in r["memory"].items()}))
    for claim in r["claims"]:
        verdict = {True: "Holds", False: "Does not hold", None: "Cannot be told"}[claim["holds"]]
        out.print(f"{verdict}: {claim['says']}", style="bold")
        out.print(claim["measured"])
    if "report" in r:
        out.print(f"The report, with plots: {r['report']}", soft_wrap=True)


def _compare(out: Console, r: Result) -> None:
    for row in r["rows"]:
        out.print(row["prompt"], style="bold")
        out.print(facts({side: row[side] for side in ("base", "steered", "trained")}))
        out.print()
    out.print(_measures(r))
    out.print(f"Recovered {_share(r['recovered'])} of the steering's effect at dose {r['dose']:g}.")


def _measures(r: Result) -> Any:
    sides = [side for side in ("base", "steered", "trained") if side in r["margin"]]
    rows = [{"side": s, "margin": r["margin"][s], "kl": r["kl"].get(s)} for s in sides]
    return lines(rows, {"side": "", "margin": "margin (nats)", "kl": "KL on neutral text"})


def _demo(out: Console, r: Result) -> None:
    rows = [{"what": f"margin, {side} (nats)", "value": v} for side, v in r["margin"].items()]
    rows += [{"what": f"KL, {side} (nats)", "value": v} for side, v in r["kl_neutral"].items()]
    rows += [
        {"what": f"recovered, {words}", "value": _share(r[key])}
        for key, words in (
            ("recovered", "APOLLO"),
            ("recovered_adamw", "AdamW"),
            ("recovered_random", "random direction"),
        )
    ]
    rows.append({"what": "p against random directions", "value": r["p_value"]})
    rows += [{"what": f"seconds, {step}", "value": s} for step, s in r["seconds"].items()]
    out.print(
        lines([{**row, "value": number(row["value"])} for row in rows], {"what": "", "value": ""})
    )
    words = "verified" if r["passed"] else "NOT verified"
    style = "bold green" if r["passed"] else "bold red"
    out.print(f"{r['vector']} is {words} at dose {r['dose']:g}; {r['task']} is kept.", style=style)


def _plain(out: Console, r: Result) -> None:
    out.print(facts({key: v for key, v in r.items() if not isinstance(v, dict | list)}))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
