"""Measure this service against the textbook wiring, in turns, in one run.

    python bench/run.py --help

Needs Linux, wrk, and PostgreSQL's server programs or `--database-url`, whose table
`users` is dropped. Every contender runs under the Procfile's own uvicorn line.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event, Thread
from uuid import uuid4

import psycopg2

BENCH = Path(__file__).resolve().parent
PROCFILE = (BENCH.parent / "Procfile").read_text().removeprefix("web: ").strip()
PORT = 8765
CONTENDERS = {
    "this service": "main:app",
    "walkthrough": "walkthrough:app",
    "walkthrough, asyncio": "walkthrough_async:app",
    "no database": "ceiling:app",
}
COLORS = ["#2f81f7", "#e5534b", "#b083f0"]

Figures = dict[str, float]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def execute(url: str, *statements: str) -> None:
    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        for statement in statements:
            connection.cursor().execute(statement)


def fill(url: str, rows: int) -> None:
    execute(
        url,
        "DROP TABLE IF EXISTS users",
        "CREATE TABLE users (id BIGSERIAL PRIMARY KEY, "
        "email VARCHAR(254) NOT NULL UNIQUE, full_name VARCHAR(200) NOT NULL)",
        "INSERT INTO users (email, full_name) "
        f"SELECT n || '@example.org', 'Ada Lovelace' FROM generate_series(1, {rows}) n",
        "VACUUM ANALYZE users",
        "CHECKPOINT",
    )


@contextmanager
def throwaway_postgresql() -> Iterator[str]:
    found = [*Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    program = shutil.which("postgres") or (str(max(found)) if found else "")
    if not program:
        sys.exit("Install PostgreSQL's server programs or give --database-url.")
    programs = Path(program).resolve().parent
    user = "postgres" if os.geteuid() == 0 else None  # it refuses root
    with TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user)

        def run(name: str, *arguments: str) -> None:
            subprocess.run(
                [programs / name, "-D", f"{folder}/data", *arguments],
                user=user,
                group=user,
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )

        run("initdb", "-U", "bench", "-A", "trust", "-E", "UTF8")
        options = f"-p {PORT + 1} -k '' -c shared_buffers=1GB -c max_wal_size=4GB"
        run("pg_ctl", "-w", "-o", options, "-l", f"{folder}/log", "start")
        try:
            yield f"postgresql://bench@127.0.0.1:{PORT + 1}/postgres"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")


class Server:
    """A contender in processes of its own, and what the kernel says of them."""

    def __init__(self, name: str, url: str, processes: int = 1, port: int = PORT):
        self.port = port
        folders = f"{BENCH.parent}:{BENCH}"
        environment = os.environ | {
            "DATABASE_URL": url.replace("postgresql://", "postgresql+psycopg2://"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PORT": str(port),
            "PYTHONPATH": folders,
            "WEB_CONCURRENCY": str(processes),
        }
        started = time.monotonic()
        self.process = subprocess.Popen(
            ["sh", "-c", f"exec {PROCFILE.replace('main:app', CONTENDERS[name])}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > started + 30:
                sys.exit(f"{name} does not start.")
            time.sleep(0.005)
        self.cold_start = time.monotonic() - started

    def answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request("GET", "/users/1")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def pids(self) -> list[int]:
        first = self.process.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [first, *map(int, children)]

    def cpu_seconds(self) -> float:
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> float:
        kilobytes = 0
        for pid in self.pids():
            status = Path(f"/proc/{pid}/status").read_text()
            kilobytes += int(status.split("VmRSS:")[1].split()[0])
        return kilobytes / 1024

    def load(
        self, method: str, connections: int, seconds: int, rows: int = 1000
    ) -> Figures:
        argument = str(rows) if method == "GET" else str(uuid4())
        before = self.cpu_seconds()
        printed = subprocess.check_output(
            ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "5s"]
            + ["-s", str(BENCH / "load.lua"), f"http://127.0.0.1:{self.port}"]
            + ["--", method, argument],
            text=True,
        )
        figures: Figures = json.loads(printed.splitlines()[-1])
        if not figures["requests"]:
            figures["failures"] = connections  # wrk counts none that is still waiting
        figures["rate"] = figures["requests"] / figures["seconds"]
        used = self.cpu_seconds() - before
        figures["cpu"] = 1000 * used / figures["requests"] if figures["requests"] else 0
        return figures

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serve(
    name: str, url: str, processes: int = 1, port: int = PORT
) -> Iterator[Server]:
    server = Server(name, url, processes, port)
    try:
        yield server
    finally:
        server.stop()


Runs = defaultdict[tuple[str, int, str], list[Figures]]


def middle(runs: list[Figures], figure: str) -> float:
    return median(run[figure] for run in runs)


def ratio(runs: list[Figures], base: list[Figures], figure: str) -> str:
    """The median over the rounds, each of which compares neighbours in time."""
    pairs = [
        (run[figure], other[figure]) for run, other in zip(runs, base, strict=True)
    ]
    if not all(own and other for own, other in pairs):
        return "-"  # nothing was answered
    return f"{median(own / other for own, other in pairs):.2f}"


def print_table(header: str, rows: Iterable[str]) -> None:
    print(f"\n{header}\n{'|'.join('---' for _ in header.split('|'))}")
    print("\n".join(rows), flush=True)


def compare(url: str, arguments: argparse.Namespace) -> None:
    """Every contender at every number of connections, each from a fresh start."""
    runs: Runs = defaultdict(list)
    for turn in range(arguments.rounds):
        for connections in arguments.connections:
            for method in ("GET", "POST"):
                for name in CONTENDERS:
                    if (name, method) == ("no database", "POST"):
                        continue
                    fill(url, 1000)
                    with serve(name, url) as server:
                        server.load(method, connections, 1)
                        figures = server.load(method, connections, arguments.seconds)
                        figures["start"] = 1000 * server.cold_start
                        figures["memory"] = server.megabytes()
                    runs[method, connections, name].append(figures)
                    say(
                        f"round {turn + 1}/{arguments.rounds}: {method} at "
                        f"{connections}: {figures['rate']:.0f}/s by {name}"
                    )
    print_table(
        "method | connections | contender | requests/s | CPU ms/request "
        "| CPU to walkthrough | p50 ms | p99 ms | failures",
        (
            f"{method} | {connections} | {name} | {middle(several, 'rate'):.0f} "
            f"| {middle(several, 'cpu'):.2f} | "
            f"{ratio(several, runs[method, connections, 'walkthrough'], 'cpu')} "
            f"| {middle(several, 'p50'):.1f} | {middle(several, 'p99'):.1f} "
            f"| {sum(run['failures'] for run in several):.0f}"
            for (method, connections, name), several in runs.items()
        ),
    )
    started = {
        name: [
            run for key, several in runs.items() if key[2] == name for run in several
        ]
        for name in CONTENDERS
    }
    print_table(
        "contender | cold start ms | memory MB",
        (
            f"{name} | {middle(several, 'start'):.0f} | {middle(several, 'memory'):.0f}"
            for name, several in started.items()
        ),
    )
    if arguments.svg:
        arguments.svg.write_text(draw(runs, arguments.connections))


def grow(url: str, arguments: argparse.Namespace) -> None:
    """This service at 32 connections, over tables that differ in size, in turns."""
    runs: Runs = defaultdict(list)
    names = {rows: f"bench_{rows}" for rows in arguments.rows}
    for rows, name in names.items():
        execute(url, f"DROP DATABASE IF EXISTS {name}", f"CREATE DATABASE {name}")
        fill(beside(url, name), rows)
        say(f"filled a table with {rows} rows")
    for turn in range(arguments.rounds):
        for method in ("GET", "POST"):
            for rows, name in names.items():
                with serve("this service", beside(url, name)) as server:
                    server.load(method, 32, 1, rows)
                    figures = server.load(method, 32, arguments.seconds, rows)
                runs[method, rows, name].append(figures)
                say(f"round {turn + 1}: {method} of {rows}: {figures['rate']:.0f}/s")
    for name in names.values():
        execute(url, f"DROP DATABASE {name}")
    first = next(iter(names.items()))
    print_table(
        "method | rows | requests/s | to the smallest table",
        (
            f"{method} | {rows} | {middle(several, 'rate'):.0f} "
            f"| {ratio(several, runs[method, *first], 'rate')}"
            for (method, rows, _), several in runs.items()
        ),
    )


def beside(url: str, name: str) -> str:
    return f"{url.rpartition('/')[0]}/{name}"


def scale(url: str, arguments: argparse.Namespace) -> None:
    """One and two processes, each confined to a share of a core.

    That leaves the rest of two cores to wrk and PostgreSQL, as more cores would.
    """
    runs: Runs = defaultdict(list)
    for turn in range(arguments.rounds):
        for method in ("GET", "POST"):
            for processes in (1, 2):
                fill(url, 1000)
                with serve("this service", url, processes) as server:
                    server.load(method, 32, 1)
                    workers = server.pids()[-processes:]
                    with confined(workers, arguments.share):
                        figures = server.load(method, 32, arguments.seconds)
                runs[method, processes, ""].append(figures)
                say(f"round {turn + 1}: {method}, {processes}: {figures['rate']:.0f}/s")
    print_table(
        f"method | processes at {arguments.share} of a core | requests/s | to one",
        (
            f"{method} | {processes} | {middle(several, 'rate'):.0f} "
            f"| {ratio(several, runs[method, 1, ''], 'rate')}"
            for (method, processes, _), several in runs.items()
        ),
    )


@contextmanager
def confined(pids: list[int], share: float) -> Iterator[None]:
    done = Event()

    def stop_and_go() -> None:
        while not done.is_set():
            for how, part in ((signal.SIGSTOP, 1 - share), (signal.SIGCONT, share)):
                for pid in pids:
                    os.kill(pid, how)
                time.sleep(0.04 * part)

    thread = Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def draw(runs: Runs, connections: list[int]) -> str:
    """Requests a second over connections; the greys are legible on light and dark."""
    width, height, left, top = 720, 360, 60, 40
    names = list(CONTENDERS)[:3]
    charts = []
    for index, method in enumerate(("GET", "POST")):
        x0 = left + index * width // 2
        rates = {
            name: [middle(runs[method, c, name], "rate") for c in connections]
            for name in names
        }
        most = max(max(values) for values in rates.values())
        step = (width // 2 - left - 20) / max(len(connections) - 1, 1)
        charts.append(f'<text x="{x0}" y="24">{method}, requests a second</text>')
        for part in range(5):
            y = height - 60 - part * (height - 60 - top) / 4
            charts.append(
                f'<path class="grid" d="M{x0} {y:.0f}h{width // 2 - left - 20}"/>'
                f'<text x="{x0 - 6}" y="{y + 4:.0f}" text-anchor="end">'
                f"{most * part / 4:.0f}</text>"
            )
        for place, number in enumerate(connections):
            charts.append(
                f'<text x="{x0 + place * step:.0f}" y="{height - 40}" '
                f'text-anchor="middle">{number}</text>'
            )
        for name, color in zip(names, COLORS, strict=True):
            points = " ".join(
                f"{x0 + place * step:.0f},"
                f"{height - 60 - value * (height - 60 - top) / most:.0f}"
                for place, value in enumerate(rates[name])
            )
            charts.append(f'<polyline points="{points}" stroke="{color}"/>')
    for place, (name, color) in enumerate(zip(names, COLORS, strict=True)):
        x = left + place * 220
        charts.append(
            f'<path d="M{x} {height - 12}h24" stroke="{color}"/>'
            f'<text x="{x + 30}" y="{height - 8}">{name}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">\n'
        "<style>text { font: 12px sans-serif; fill: #808890 }"
        " path, polyline { fill: none; stroke-width: 3 }"
        " .grid { stroke: #80889055; stroke-width: 1 }</style>\n"
        + "\n".join(charts)
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure, and print tables.")
    parser.add_argument("--database-url", help="a PostgreSQL to wipe; or a throwaway")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8, help="for each measurement")
    parser.add_argument(
        "--connections", type=int, nargs="+", default=[1, 32, 256, 1000]
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1000, 100_000, 2_000_000]
    )
    parser.add_argument("--share", type=float, default=0.3, help="of a core, to scale")
    parser.add_argument("--svg", type=Path, help="where to draw the chart")
    parser.add_argument(
        "--only", choices=["compare", "grow", "scale"], help="one part of the three"
    )
    arguments = parser.parse_args()
    given = arguments.database_url
    with nullcontext(given) if given else throwaway_postgresql() as url:
        for part in (compare, grow, scale):
            if arguments.only in {None, part.__name__}:
                part(url, arguments)


if __name__ == "__main__":
    main()
