"""Measure asena_tornado and its peers, side by side, on this machine.

    python -m tests.benchmarks [--quick] [--cases fanout-* …] [--peers bun tornado …] [--rounds 5] [--out DIR]

Every measurement starts a server of its own on one core and the load generator on another. Rounds are
interleaved: all peers take their turn at a case before any has its next one, in an order that moves on each
round, so that whatever else the machine does hits them alike. A ratio is the median of the ratios within the
rounds. DIR (a temporary one if not given) receives `results.md`, `results.svg` and `results.json`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import json
import os
import platform
import resource
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks.load import CASES, LIFETIME, PATIENCE, Case, Result
from tests.benchmarks.peers import HOST, PEERS, Peer

REPOSITORY = Path(__file__).parents[2]
OURS, BASELINE = "asena_tornado", "tornado"

# (case, peer, at least this many times what the peer does; or, where less is better, at most)
AIMS: list[tuple[str, str, float]] = [
    ("fanout-32", "bun", 1.0),
    ("fanout-32", "tornado", 40.0),
    ("fanout-32-paced", "bun", 0.9),
    ("fanout-1", "bun", 0.95),
    ("echo-16-pieces", "picows", 2.0),
    ("echo-1", "picows", 1.0),
    ("echo-1", "bun", 0.9),
    ("echo-alone", "picows", 1.0),
    ("handshakes", "picows", 1.0),
    ("handshakes", "tornado", 2.0),
    *(("memory", peer, 1.0) for peer in PEERS if peer != "bun" and not peer.startswith(OURS)),
]


@dataclass(frozen=True)
class Measurement:
    """One run of one case against one peer: its result, or why there is none."""

    round: int
    case: str
    peer: str
    result: Result | None = None
    error: str | None = None


@dataclass(frozen=True)
class Cores:
    """Where the two sides run; None is wherever the scheduler likes."""

    server: int | None
    generator: int | None

    @classmethod
    def available(cls) -> Cores:
        cores = sorted(os.sched_getaffinity(0))
        return cls(cores[0], cores[1]) if len(cores) > 1 else cls(None, None)


def on_core(core: int | None) -> list[str]:
    return [] if core is None else ["--core", str(core)]


# ---- one measurement


@contextlib.contextmanager
def server(name: str, core: int | None, *, under: Sequence[str] = ()) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: (port, process id), once it accepts connections.

    `under` is a command to run it by, which has it as its only child.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [*under, sys.executable, "-m", "tests.benchmarks.peers", name, str(port), *on_core(core)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        pid = process.pid
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection((HOST, port), timeout=1).close()
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = [line for line in log.read().splitlines() if line and not line.startswith("py-spy>")]
                    raise RuntimeError(f"the server did not start: {said[-1] if said else 'it said nothing'}")
                time.sleep(0.05)
            if under:
                pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
            yield port, pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 15)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure(peer: Peer, case: Case, options: argparse.Namespace, *, under: Sequence[str] = ()) -> Result:
    """Start the server, load it, stop it.

    Raises:
        RuntimeError: the server did not start, or did not do what the case asks; the message says which.
    """
    cores = Cores.available()
    with server(case.host or peer.name, cores.server, under=under) as (port, pid):
        command = [sys.executable, "-m", "tests.benchmarks.load", case.name]
        command += ["--port", str(port), "--pid", str(pid), "--dialect", peer.dialect]
        command += [
            "--seconds",
            str(options.seconds),
            *on_core(cores.generator),
            *["--quick"] * options.quick,
        ]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIFETIME + 10)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return Result(**json.loads(done.stdout))


def rounds(cases: Sequence[Case], peers: Sequence[Peer], options: argparse.Namespace) -> Iterator[Measurement]:
    """All measurements, interleaved. Who fails a case is not asked again."""
    failed: set[tuple[str, str]] = set()
    for number in range(options.rounds):
        for case in cases:
            start = number % len(peers)
            for peer in [*peers[start:], *peers[:start]]:
                if peer.cannot(case) or (case.name, peer.name) in failed:
                    continue
                try:
                    yield Measurement(number, case.name, peer.name, measure(peer, case, options))
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    failed.add((case.name, peer.name))
                    yield Measurement(number, case.name, peer.name, error=str(error))


def profile(case: Case, options: argparse.Namespace, out: Path) -> list[tuple[float, str]]:
    """Where our server spends a case: (share of the samples, line), the largest first.

    The stacks stay in `out`, folded, as flame graphs want them. py-spy starts the server, since attaching to
    a running process needs privileges.
    """
    stacks = out / f"profile-{case.name}.txt"
    record = ["py-spy", "record", "--rate", "250", "--format", "raw", "--output", str(stacks), "--"]
    measure(PEERS[OURS], case, options, under=record)
    samples: collections.Counter[str] = collections.Counter()
    for line in stacks.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        if "run_forever" in stack:  # once it serves
            samples[stack.rpartition(";")[2]] += int(count)
    return [(count / samples.total(), frame) for frame, count in samples.most_common(12)]


# ---- the report


class Report:
    """What the measurements say. `left_out` is what was not measured, and why."""

    def __init__(self, about: Sequence[str], left_out: list[str]) -> None:
        self.about = about
        self.left_out = left_out
        self.profiles: dict[str, list[tuple[float, str]]] = {}
        self._measurements: list[Measurement] = []
        self._results: dict[str, dict[str, dict[int, Result]]] = {}  # case → peer → round

    def add(self, m: Measurement) -> None:
        self._measurements.append(m)
        if m.result is None:
            self.left_out.append(f"{m.peer} in {m.case}: failed: {m.error}")
        else:
            self._results.setdefault(m.case, {}).setdefault(m.peer, {})[m.round] = m.result

    def write(self, out: Path) -> None:
        """`results.json`, `results.md` and, if there is anything to compare, `results.svg` into the folder."""
        try:
            self._plot(out / "results.svg")
        except ImportError as error:
            self.left_out.append(f"the plot: {error}; pip install -e '.[bench]'")
        everything = {
            "about": self.about,
            "left out": self.left_out,
            "measurements": [asdict(m) for m in self._measurements],
        }
        (out / "results.json").write_text(json.dumps(everything, indent=1))
        (out / "results.md").write_text(self.markdown())

    @property
    def cases(self) -> list[Case]:
        return [case for case in CASES.values() if case.name in self._results]

    def peers(self, case: Case) -> list[str]:
        """Who has a result in the case, the best first."""
        by_median = sorted(self._results[case.name], key=lambda peer: self.values(case.name, peer)[0])
        return by_median if case.lower_is_better else by_median[::-1]

    def values(self, case: str, peer: str) -> tuple[float, float, float]:
        """Median, least and most of the rounds."""
        values = [result.value for result in self._results[case][peer].values()]
        return statistics.median(values), min(values), max(values)

    def ratio(self, case: str, peer: str, to: str) -> float | None:
        """How many times what `to` did `peer` did, as the median of the rounds that both have."""
        a, b = (self._results.get(case, {}).get(name, {}) for name in (peer, to))
        ratios = [a[turn].value / b[turn].value for turn in a if turn in b and b[turn].value]
        return statistics.median(ratios) if ratios else None

    def markdown(self) -> str:
        lines = ["# Benchmarks", "", *(f"- {line}" for line in [*self.about, *self._disturbance()]), ""]
        lines += ["## Medians", "", *self._medians(), "", "## Aims", "", *self._aims(), ""]
        for case in self.cases:
            lines += [f"## {case.title}", "", *self._details(case), ""]
        for name, hottest in self.profiles.items():
            rows = [[f"`{line}`", f"{share:.0%}"] for share, line in hottest]
            lines += [f"## Profile: {CASES[name].title}", "", *table(["line", "of all samples"], rows), ""]
        if self.left_out:
            lines += ["## Left out", "", *(f"- {line}" for line in self.left_out), ""]
        return "\n".join(lines)

    def _disturbance(self) -> list[str]:
        results = [m.result for m in self._measurements if m.result is not None]
        disturbed = sum(result.others_cpu > 0.25 for result in results)
        if disturbed <= len(results) // 10:
            return []
        of = f"{disturbed} of {len(results)} measurements"
        return [f"**In {of} something else used more than a quarter of a core: repeat this on a quiet machine.**"]

    def _medians(self) -> list[str]:
        names = [name for name in PEERS if any(name in of_case for of_case in self._results.values())]
        rows = [
            [f"{case.title} ({case.unit})"]
            + [number(self.values(case.name, name)[0]) if name in self._results[case.name] else "–" for name in names]
            for case in self.cases
        ]
        return table(["", *names], rows)

    def _aims(self) -> list[str]:
        rows = []
        for name, peer, aim in AIMS:
            ratio = self.ratio(name, OURS, peer)
            less = CASES[name].lower_is_better
            met = "not measured" if ratio is None else "yes" if (ratio <= aim if less else ratio >= aim) else "no"
            wanted = f"{'≤' if less else '≥'} {aim:g} × {peer}"
            rows.append([CASES[name].title, wanted, "–" if ratio is None else f"{ratio:.2f} ×", met])
        return table(["case", "aim", "measured", "met"], rows)

    def _details(self, case: Case) -> list[str]:
        """The peers in the case. What a second of the server's CPU does is steadier than a rate on a shared machine."""
        is_rate = case.unit.endswith("/s")
        is_time = case.unit == "µs"
        rows = []
        for peer in self.peers(case):
            results = list(self._results[case.name][peer].values())
            middle, least, most = self.values(case.name, peer)
            server_cpu = statistics.median(result.server_cpu or 0.0 for result in results)
            row = [peer, number(middle), f"{number(least)} – {number(most)}"]
            if is_time:
                row.append(number(statistics.median(result.tail or 0.0 for result in results)))
            for to in (BASELINE, OURS):
                ratio = self.ratio(case.name, peer, to)
                row.append("–" if ratio is None else f"{ratio:.2f}")
            if is_rate:
                row.append(number(statistics.median(r.value / (r.server_cpu or 1.0) for r in results)))
            row.append(f"{server_cpu:.0%}")
            row.append(f"{statistics.median(result.generator_cpu for result in results):.0%}")
            row[-1] += " (the limit)" * any(result.generator_bound for result in results)
            row.append(f"{statistics.median(result.others_cpu for result in results):.0%}")
            rows.append(row)
        header = ["", f"{case.unit}, median", "rounds", *["99th percentile"] * is_time, f"× {BASELINE}", f"× {OURS}"]
        header += [*["per second of its CPU"] * is_rate, "server CPU", "generator CPU", "other CPU"]
        return table(header, rows)

    def _plot(self, path: Path) -> None:
        """One panel per case that has something to compare: bars are medians, lines the range of the rounds."""
        import matplotlib

        matplotlib.use("svg")
        matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a tenth of the size
        from matplotlib import pyplot

        cases = [case for case in self.cases if len(self.peers(case)) > 1]
        if not cases:
            return
        rows = -(-len(cases) // 2)
        figure, axes = pyplot.subplots(rows, 2, figsize=(13, 0.6 + 2.9 * rows), squeeze=False, layout="constrained")
        for panel in axes.flat[len(cases) :]:
            panel.set_visible(False)
        for panel, case in zip(axes.flat, cases, strict=False):
            peers = self.peers(case)
            values = [self.values(case.name, peer) for peer in peers]
            colours = [
                "#d1495b" if peer.startswith(OURS) else "#30638e" if peer == BASELINE else "#a9b4c2" for peer in peers
            ]
            spread = [[m - low for m, low, _ in values], [high - m for m, _, high in values]]
            panel.barh(peers, [m for m, _, _ in values], color=colours, xerr=spread, ecolor="#444444")
            for position, (middle, _, most) in enumerate(values):
                panel.annotate(number(middle), (most, position), (6, 0), textcoords="offset points", va="center")
            better = "less is better" if case.lower_is_better else "more is better"
            panel.set_title(f"{case.title}\n{case.unit}, {better}", fontsize=10, loc="left")
            panel.invert_yaxis()
            panel.margins(x=0.15)
            panel.spines[["top", "right"]].set_visible(False)
            panel.xaxis.set_major_formatter(lambda value, _: number(value))
        figure.savefig(path)


def number(value: float) -> str:
    """Three significant digits, as a person reads them: 1.21 M, 34.5 k, 812, 3.02."""
    size, unit = next(((size, unit) for size, unit in ((1e6, " M"), (1e3, " k")) if value >= 0.9995 * size), (1, ""))
    value /= size
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def about(peers: Sequence[Peer], options: argparse.Namespace) -> list[str]:
    """Under which conditions the numbers came about."""
    with open("/proc/cpuinfo") as info:
        cpu = next(
            (line.partition(":")[2].strip() for line in info if line.startswith("model name")),
            platform.machine(),
        )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.strip()
    cores = Cores.available()
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commit or 'unknown'}",
        f"{cpu}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}",
        *(["**One core for both sides: the numbers say little.**"] if cores.server is None else []),
        *(["**--quick: too short and too small to compare anything.**"] if options.quick else []),
        f"{options.rounds} rounds of {options.seconds:g} s; load average before: {os.getloadavg()[0]:.1f}",
        *(f"{peer.name}: {peer.version()}" for peer in peers),
    ]


def parse() -> argparse.Namespace:
    """The command line; `cases` and `peers` are what its patterns stand for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", default=["*"], metavar="CASE", help=f"wildcards, or of: {', '.join(CASES)}")
    add("--peers", nargs="+", default=["*"], metavar="PEER", help=f"wildcards, or of: {', '.join(PEERS)}")
    add("--rounds", type=int, help="measurements of each (5)")
    add("--seconds", type=float, help="length of each, after a warm-up of a third of it (2.0)")
    add("--quick", action="store_true", help="few sockets, 1 round, 0.3 s: does everything work?")
    add("--profile", action="store_true", help=f"afterwards profile {OURS} in each case, with py-spy")
    add("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (0.3 if options.quick else 2.0)
    if not hasattr(select, "epoll"):
        parser.error("the load generator needs epoll, which only Linux has")
    for option, names in (("cases", list(CASES)), ("peers", list(PEERS))):
        patterns = getattr(options, option)
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                parser.error(f"--{option}: nothing is called {pattern!r}; there are {', '.join(names)}")
        setattr(options, option, [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)])
    return options


def take_stock(options: argparse.Namespace) -> tuple[list[Case], list[Peer], list[str]]:
    """What can be measured here, and what of the wanted cannot and why."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # servers and generators inherit it
    cases, peers, left_out = [], [], []
    for name in options.peers:
        if why := PEERS[name].missing():
            left_out.append(f"{name}: {why}")
        else:
            peers.append(PEERS[name])
    for name in options.cases:
        case = CASES[name].quick() if options.quick else CASES[name]
        if files < case.sockets + 200:
            left_out.append(f"{name}: needs `ulimit -n {case.sockets + 200}`")
            continue
        cases.append(case)
        if case.host is None:  # what only we have, nobody else lacks
            left_out += [f"{peer.name} in {name}: {why}" for peer in peers if (why := peer.cannot(case))]
    return cases, peers, left_out


def main() -> None:
    options = parse()
    cases, peers, left_out = take_stock(options)
    for line in left_out:
        print(f"left out: {line}", flush=True)
    if not cases or not peers:
        raise SystemExit("nothing is left to measure")
    out: Path = options.out or Path(tempfile.mkdtemp(prefix="benchmarks-"))
    out.mkdir(parents=True, exist_ok=True)

    report = Report(about(peers, options), left_out)
    with contextlib.suppress(KeyboardInterrupt):  # what there is by then is reported
        for m in rounds(cases, peers, options):
            report.add(m)
            said = f"failed: {m.error}"
            if m.result is not None:
                said = f"{number(m.result.value)} {CASES[m.case].unit}, generator {m.result.generator_cpu:.0%}"
                said += " (the limit)" * m.result.generator_bound
            print(f"{m.round + 1}/{options.rounds} {m.case:18} {m.peer:20} {said}", flush=True)
        if options.profile and PEERS[OURS] in peers:
            for case in cases:
                if case.unit in ("KiB", "µs"):  # not a matter of where the time goes
                    continue
                try:
                    report.profiles[case.name] = profile(case, options, out)
                except (RuntimeError, OSError) as error:
                    left_out.append(f"profile of {case.name}: {error}")
    report.write(out)
    print(f"\n{report.markdown()}\n\nResults are in {out}")


if __name__ == "__main__":
    main()
