"""Writes the tables of docs/performance.md, between the markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.cases import CASES

BEGIN = "<!-- Written by `make bench`: edit benchmarks/, not this part. -->"
END = "<!-- End of what `make bench` writes. -->"


def write(page: Path, data: dict[str, Any], plot: str) -> None:
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Performance\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{render(data, plot)}\n{END}{after}", encoding="utf-8")


def render(data: dict[str, Any], plot: str) -> str:
    summaries = {name: results.summarise(case) for name, case in data["cases"].items()}
    parts = []
    if (plot_note := f"[![Lightbus and its peers]({plot})]({plot})") and plot:
        parts.append(plot_note)
    parts += [
        "## Targets",
        _targets(summaries),
        "## Figures",
        *(_case(case.name, data["cases"][case.name], summaries[case.name]) for case in CASES if case.name in summaries),
    ]
    parts += ["## Machine", _machines(data)]
    return "\n\n".join(parts) + "\n"


def _targets(summaries: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| target | goal | measured | |", "|---|---|---|---|"]
    for target, shown, verdict in results.targets(summaries):
        lines.append(f"| {target.what} | {target.goal} | {shown} | {verdict} |")
    return "\n".join(lines)


def _case(name: str, case: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    metrics = [metric for metric in results.METRICS if any(metric in line["metrics"] for line in lines)]
    grouped = any(line["group"] for line in lines)
    parted = any(line["part"] for line in lines)
    lacking = any(line["lacks"] for line in lines)
    head = ["", *(["group"] if grouped else []), *(["part"] if parted else [])]
    for metric in metrics:
        head += [results.METRICS[metric][0], "ratio"]
    head += ["not included"] if lacking else []
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for line in lines:
        cells = [line["label"], *([line["group"]] if grouped else []), *([line["part"]] if parted else [])]
        for metric in metrics:
            cells += _cells(line, metric)
        if line["errors"] and not line["metrics"]:
            cells = [
                *cells[: 1 + grouped + parted],
                f"failed: {_short(line['errors'][0])}",
                *[""] * (2 * len(metrics) - 1),
            ]
        cells += [line["lacks"]] if lacking else []
        rows.append("| " + " | ".join(cells) + " |")
    failed = [
        f"{line['label']} failed in {len(line['errors'])} rounds: {_short(line['errors'][0])}"
        for line in lines
        if line["errors"] and line["metrics"]
    ]
    intro = [f"### {case['title']}", f"`make bench CASE={name}`, {case['rounds']} rounds. {case['note']}".strip()]
    return "\n\n".join([*intro, "\n".join(rows), *failed])


def _cells(line: dict[str, Any], metric: str) -> list[str]:
    found = line["metrics"].get(metric)
    if found is None:
        return ["-", ""]
    spread = f" ({_number(found['min'])} to {_number(found['max'])})" if found["rounds"] > 1 else ""
    return [f"{_number(found['median'])}{spread}", "" if found["ratio"] is None else f"{found['ratio']:.2f}"]


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _short(error: str) -> str:
    return error.replace("|", "/").replace("\n", " ")[:200]


def _machines(data: dict[str, Any]) -> str:
    """One list if all cases ran on the same machine with the same versions; otherwise one list for each."""
    by_machine: dict[str, list[str]] = {}
    for name, case in data["cases"].items():
        by_machine.setdefault(_machine(case["machine"]), []).append(name)
    if len(by_machine) == 1:
        return next(iter(by_machine))
    return "\n\n".join(f"{', '.join(names)}:\n\n{machine}" for machine, names in by_machine.items())


def _machine(machine: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    missing = ", ".join(machine["missing"]) or "none"
    return "\n".join(
        [
            f"- {machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB, Linux {machine['kernel']}"
            if machine["system"] == "Linux"
            else f"- {machine['cores']} cores of {machine['cpu']}, {machine['system']} {machine['kernel']}",
            f"- Python {machine['python']}, RabbitMQ {machine['rabbitmq']} (one node, on the same machine)",
            f"- {libraries}",
            f"- Not installed: {missing}",
            f"- {machine['date']}, load before the run: {machine['load']}",
        ]
    )
