"""`python -m benchmarks [--case consume ...] [--rounds 3] [--scale 1.0]`"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment, machine, report, results
from benchmarks.cases import CASES, Case
from benchmarks.process import Failed
from benchmarks.suite import ROOT, Suite
from tests.rabbitmq import Node

# All cores, but no busy waiting while idle: that would take CPU from the contestants.
ERLANG = "+sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
DOCS = ROOT / "docs"
FEWEST = 2
"""Minimum number of rounds of each case; also the number of failures after which a contestant is skipped."""
ALL, ONE = 26 * 60.0, 150.0
"""Seconds after which no optional round starts: for the whole suite, and for a single case."""


def main() -> int:
    options = _options()
    chosen = [case for case in CASES if not options.case or case.name in options.case]
    if options.list:
        for case in CASES:
            print(f"{case.name:22} {case.title} ({len(case.rows)} contestants, {case.rounds} rounds)")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the started processes, like Ctrl-C
    began = time.monotonic()
    work = ROOT / ".make" / "bench"
    work.mkdir(parents=True, exist_ok=True)
    if options.peers_python:
        peers, missing = options.peers_python.absolute(), []
    else:
        peers, missing = environment.prepare()
    own = Path(sys.executable)
    output: Path = options.output or (DOCS if options.scale == 1 else work / "docs")
    (output / "performance").mkdir(parents=True, exist_ok=True)
    results_file = output / "performance" / "results.json"
    data: dict[str, Any] = json.loads(results_file.read_text()) if results_file.exists() else {"cases": {}}
    with Node(environment={"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG}) as node:
        version = node.ctl("version").strip()
        facts = machine.describe(own, peers, version, missing)
        node.add_vhosts([case.name for case in chosen])
        measuring = time.monotonic()
        for case, limit in zip(chosen, limits(chosen), strict=True):
            shutil.rmtree(work / case.name, ignore_errors=True)
            suite = Suite(
                node.vhost_url(case.name), own=str(own), peers=str(peers), folder=work / case.name, scale=options.scale
            )
            until = math.inf if options.rounds else measuring + limit
            with contextlib.closing(suite):
                data["cases"][case.name] = run_case(case, suite, options.rounds or case.rounds, until, facts)
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):  # it is deleted with the node
                node.ctl("delete_vhost", case.name)
            # After each case, so that an interrupted run keeps its results.
            data["cases"] = {one.name: data["cases"][one.name] for one in CASES if one.name in data["cases"]}
            results_file.write_text(json.dumps(_with_summaries(data), indent=1) + "\n")
    _finish(output, results_file, data, peers)
    print(f"{time.monotonic() - began:.0f} s. Written: {_shown(output / 'performance.md')}, {_shown(results_file)}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", nargs="*", default=[], choices=[case.name for case in CASES], metavar="CASE")
    parser.add_argument("--rounds", type=int, help="number of rounds of every case (default: set by each case)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiplies the number of events; with a value other than 1, docs/ is not changed",
    )
    parser.add_argument("--output", type=Path, help="the folder for the results, instead of docs/")
    parser.add_argument(
        "--peers-python", type=Path, help="the Python of an environment in which the peers are installed"
    )
    parser.add_argument("--list", action="store_true", help="list the cases and exit")
    return parser.parse_args()


def limits(chosen: Sequence[Case]) -> list[float]:
    """For each case: the seconds since the start of the suite until which it may start a third or later round."""
    every = sum(len(case.rows) * case.rounds for case in CASES)
    runs = list(itertools.accumulate(len(case.rows) * case.rounds for case in chosen))
    whole = ONE if len(chosen) == 1 else max(ONE, ALL * runs[-1] / every)
    return [whole * done / runs[-1] for done in runs]


def run_case(case: Case, suite: Suite, rounds: int, until: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Run the contestants in turn (A B C, A B C, ...), so that other load affects all of them equally."""
    print(f"\n{case.title} ({case.name})", flush=True)
    began = time.monotonic()
    runs: list[dict[str, Any]] = []
    failed: Counter[tuple[str, str]] = Counter()
    for number in range(1, rounds + 1):
        spent = time.monotonic() - began
        if number > FEWEST and time.monotonic() + spent / (number - 1) > until:
            rounds = number - 1
            break
        for row in case.rows:
            if failed[row.label, row.group] == FEWEST:
                continue  # it would fail again, and each failure may take the whole time limit
            run: dict[str, Any] = {"round": number, "label": row.label, "group": row.group, "lacks": row.lacks}
            try:
                run["parts"] = case.measure(suite, row)
            except Exception as error:  # noqa: BLE001 - the other contestants continue
                run["error"] = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
                failed[row.label, row.group] += 1
            runs.append(run)
            _print_run(run)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return {
        "title": case.title,
        "note": case.note,
        "rounds": rounds,
        "baseline": case.baseline,
        "machine": facts,
        "runs": runs,
    }


def _print_run(run: dict[str, Any]) -> None:
    head = f"  {run['round']}  {run['label']}{', ' + run['group'] if run['group'] else ''}"
    if "error" in run:
        print(f"{head:60} failed: {run['error']}", flush=True)
    for part, values in run.get("parts", {}).items():
        shown = ", ".join(
            f"{values[metric]:,.{0 if values[metric] >= 100 else 2}f} {unit}"
            for metric, (unit, _) in results.METRICS.items()
            if metric in values
        )
        print(f"{head + (': ' + part if part else ''):60} {shown}", flush=True)


def _with_summaries(data: dict[str, Any]) -> dict[str, Any]:
    cases = {name: {**case, "summary": results.summarise(case)} for name, case in data["cases"].items()}
    return {**data, "cases": cases}


def _finish(output: Path, results_file: Path, data: dict[str, Any], peers: Path) -> None:
    plot = output / "performance" / "performance.svg"
    command = [str(peers), "-m", "benchmarks.plot", str(results_file), str(plot)]
    try:
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    except subprocess.CalledProcessError as error:
        print(f"No plot: {error.stderr.strip().splitlines()[-1:]}")
    except subprocess.TimeoutExpired as error:
        print(f"No plot: {error}")
    report.write(output / "performance.md", data, "performance/performance.svg" if plot.exists() else "")
    summaries = {name: results.summarise(case) for name, case in data["cases"].items()}
    print("\nTargets")
    for target, shown, verdict in results.targets(summaries):
        print(f"  {target.what:60} {target.goal:20} {shown:>10}  {verdict.strip('*')}")


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
