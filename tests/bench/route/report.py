"""The report: JSON for programs, Markdown for people, and the same tables on the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from tests.bench.route.figures import GOALS

Rows = Sequence[Sequence[str]]
_CELL_HEAD = ("server", "conn.", "requests/s", "p50 ms", "p99 ms", "CPU ms")
_ENGINE_HEAD = ("engine", "prompts/s", "median ms", "service/engine", "added ms", "same teacher", "max diff.")
_FIGURE_HEAD = ("figure", "value", "goal", "verdict", "meaning")


def figure_rows(report: Mapping[str, Any]) -> Rows:
    """Each figure beside its goal."""
    rows = []
    for name, goal in GOALS.items():
        value = report[name]
        verdict = "not measured" if value is None else "met" if goal.met_by(value) else "MISSED"
        rows.append((name, "-" if value is None else f"{value:.3f}", str(goal), verdict, goal.meaning))
    return rows


def cell_rows(report: Mapping[str, Any]) -> Rows:
    """Each server at each number of connections: the median of the rounds and between what they lie."""
    cells = sorted(report["detail"]["cells"], key=lambda cell: cell["connections"])
    return [
        (
            cell["server"],
            str(cell["connections"]),
            _spread(cell["rps"]),
            f"{cell['p50_ms']['median']:.1f}",
            f"{cell['p99_ms']['median']:.0f}",
            f"{cell['cpu_ms']['median']:.1f}",
        )
        for cell in cells
    ]


def engine_rows(report: Mapping[str, Any]) -> Rows:
    """Each engine called directly, what the service makes of it, and how it differs from fp32."""
    return [
        (
            engine,
            _spread(facts["offline_prompts_per_s"]),
            _spread(facts["median_ms"]),
            _number(facts["service_over_offline"], 3),
            _number(facts["c1_overhead_ms"], 2),
            f"{facts['agreement']['agreement']:.4f}",
            f"{facts['agreement']['max_strength_difference']:.2g}",
        )
        for engine, facts in report["detail"]["by_engine"].items()
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    detail, machine = report["detail"], report["machine"]
    changed = ", files changed" if report["changed"] else ""
    parts = [
        "# POST /route, side by side",
        f"{report['date']}, commit {str(report['commit'])[:12]}{changed}; {machine['cpus']} CPUs "
        f"({machine['cpu']}), load {machine['load_average_at_start']:.1f} before. "
        + ("A quick run: one round, few prompts. " if report["quick"] else "")
        + "Medians of the rounds, with least and most.",
        _markdown_table(_FIGURE_HEAD, figure_rows(report)),
        _gate_sentence(report),
        "## Servers",
        "A closed loop over the same prompts; CPU time of all processes of the server, per request.",
        _markdown_table(_CELL_HEAD, cell_rows(report)),
        "## Engines",
        "Called directly, all prompts in one call and one at a time; beside it what the service makes of it.",
        _markdown_table(_ENGINE_HEAD, engine_rows(report)),
    ]
    if detail["livez"]:
        parts += ["## GET /livez beside long prompts", *_livez_lines(detail["livez"])]
    if detail["skipped"]:
        parts += ["## Not measured", *(f"- {what}: {why}" for what, why in detail["skipped"].items())]
    return "\n\n".join(parts) + "\n"


def terminal_tables(report: Mapping[str, Any]) -> list[Table]:
    """The same tables for a terminal, the figures last, where the eye rests."""
    return [
        _terminal_table("Servers", _CELL_HEAD, cell_rows(report)),
        _terminal_table("Engines", _ENGINE_HEAD, engine_rows(report)),
        _terminal_table("Figures", _FIGURE_HEAD[:-1], [row[:-1] for row in figure_rows(report)]),
    ]


def closing_lines(report: Mapping[str, Any]) -> list[str]:
    """What stands below the tables on a terminal."""
    missing = [f"NOT MEASURED: {what}: {why}" for what, why in report["detail"]["skipped"].items()]
    return [*missing, _gate_sentence(report)]


def _gate_sentence(report: Mapping[str, Any]) -> str:
    detail = report["detail"]
    return (
        f"The gated engine is {detail['gated_engine']}: the fastest that passes the product's own gate. "
        f"The better naive server is: {detail['better_naive']}."
    )


def _livez_lines(livez: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterable[str]:
    for engine, runs in livez.items():
        for way, load in runs.items():
            yield (
                f"- {engine}, {way}: p50 {load['p50_ms']:.2f} ms, p99 {load['p99_ms']:.2f} ms, "
                f"most {load['max_ms']:.2f} ms, of {load['answered']} answers"
            )


def _spread(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "-"
    median, least, most = (f"{spread[name]:.1f}" for name in ("median", "least", "most"))
    return median if least == most else f"{median} ({least}..{most})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _markdown_table(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _terminal_table(title: str, head: Sequence[str], rows: Rows) -> Table:
    table = Table(*head, title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*row)
    return table
