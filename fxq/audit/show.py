"""Findings on a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxq.audit.findings import RULES, Findings, Severity

_COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "dim"}


def show(findings: Findings, console: Console) -> None:
    """What was checked, a table of alike findings with an example each, and the verdict."""
    console.print(escape(_headline(findings)))
    groups = findings.groups()
    if groups:
        table = Table(show_lines=True)
        table.add_column("severity")
        table.add_column("count", justify="right")
        table.add_column("rule and why", max_width=40, overflow="fold")
        table.add_column("where and what, for example", overflow="fold")
        for group in groups:
            where = f"{group.example.where}: {group.example.message}"
            if group.count > 1:
                where = f"{group.pattern}\n{where}"
            colour = _COLOURS[group.severity]
            table.add_row(
                f"[{colour}]{group.severity}[/{colour}]",
                str(group.count),
                f"[bold]{group.rule}[/bold]\n[dim]{escape(RULES[group.rule][1])}[/dim]",
                escape(where),
            )
        console.print(table)
    colour = _COLOURS[Severity.ERROR] if findings.errors else "yellow" if findings.warnings else "bold green"
    console.print(f"[{colour}]{escape(findings.verdict)}[/{colour}]")


def _headline(findings: Findings) -> str:
    facts = findings.summary
    linears = ", ".join(f"{count} {kind}" for kind, count in facts["linears"].items()) or "no"
    text = (
        f"{facts['directory']}: {facts['format']} {facts['algorithm']}, {linears} linears in "
        f"{facts['tensors']} tensors, {facts['bytes'] / 1e6:.1f} MB"
    )
    if facts.get("sqnr_db") is not None:
        text += f"; against the base {facts['sqnr_db']:.2f} dB"
        if facts.get("worst_sqnr_db") is not None:
            text += f", worst {facts['worst_sqnr_db']:.2f} dB ({facts['worst']})"
    return text
