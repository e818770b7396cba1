"""Measure the service, two other wirings, and the service less one guarantee each.

Needs Linux, wrk and PostgreSQL's server programs.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from socket import create_server
from statistics import median
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from matplotlib import figure, rcParams
from sqlmodel import create_engine

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path.insert(0, str(ROOT))

from models import User
from test_main import run_postgresql

OURS, TEXTBOOK, ASYNC = "the service", "walkthrough", "AsyncSession, asyncpg"
OFTEN = "the service, gc at Python's pace"

# Each is the service, with other text in its Procfile or its main.py.
CONTENDERS = {
    OURS: {},
    TEXTBOOK: {"main:app": "walkthrough:app"},
    ASYNC: {"main:app": "async_session:app"},
    "the service, no ping": {"pool_pre_ping=True": "pool_pre_ping=False"},
    "the service, no ORM": {
        "from models import": "import core\nfrom models import",
        "session.get(User, user_id)": "core.get_user(session, user_id)",
        "User.model_validate(new_user)": "core.create_user(session, new_user)",
        "session.add(user)": "",
    },
    "the service, httptools": {"--http h11": "--http httptools"},
    OFTEN: {"gc.set_threshold(100_000)": ""},
}
# In middle tones, which are legible on white (3:1 and more) as on black.
CHART = {OURS: "#2f81f7", TEXTBOOK: "#d4731c", ASYNC: "#1a9c86"}
GRAY = "#7a7f87"
METHODS = ("GET", "POST")
# Who is measured over how many connections.
TURNS = {1: [*CHART], 32: [*CONTENDERS], 256: [*CHART], 1000: [*CHART, OFTEN]}
# What the service takes is given beside each.
COSTS = [(32, name) for name in CONTENDERS] + [(1000, OURS), (1000, OFTEN)]
USERS = """TRUNCATE users RESTART IDENTITY;
INSERT INTO users (email, full_name)
SELECT n || '@example.com', 'Ada Lovelace' FROM generate_series(1, 1000) n"""

Figures = dict[str, float]
Runs = dict[tuple[int, str, str], list[Figures]]  # of each round


def prepare(folder: Path) -> None:
    """Write each contender's main.py, and its command as a shell script."""
    for name, replacements in CONTENDERS.items():
        text = (ROOT / "Procfile").read_text() + (ROOT / "main.py").read_text()
        for old, new in replacements.items():
            if text.count(old) != 1:
                # The variant would be the service itself, or broken.
                sys.exit(f"Not once in the Procfile and main.py, see run.py: {old}")
            text = text.replace(old, new)
        command, code = text.split("\n", 1)
        (folder / name).mkdir()
        (folder / name / "web").write_text(command.replace("web:", "exec"))
        (folder / name / "main.py").write_text(code)


def load(port: int, method: str, connections: int, seconds: int) -> list[float]:
    """Return the number of answers, seconds and failures."""
    options = f"-t1 -c{connections} -d{seconds}s --timeout 10s -s load.lua"
    argument = "1000" if method == "GET" else str(time.time_ns())
    command = f"wrk {options} http://127.0.0.1:{port} -- {method} {argument}"
    printed = subprocess.check_output(command.split(), cwd=BENCH)
    return [float(figure) for figure in printed.splitlines()[-1].split()]


def read_usage(pid: int) -> tuple[float, float]:
    """Return the seconds of CPU used up, and the MB of resident memory."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds, int(fields[21]) * os.sysconf("SC_PAGESIZE") / 1e6


def measure(folder: Path, url: str, clients: int, method: str, seconds: int) -> Figures:
    """From a fresh start, with a second's load to warm up."""
    with create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"DATABASE_URL": url, "PORT": str(port), "PATH": path}
    environment |= {"PYTHONPATH": f"{ROOT}:{BENCH}", "UVICORN_LOG_LEVEL": "error"}
    started = time.monotonic()
    process = subprocess.Popen(["sh", "web"], cwd=folder, env=environment)
    try:
        while process.poll() is None:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/users/1"):
                break
            time.sleep(0.005)
        start = 1000 * (time.monotonic() - started)
        load(port, method, 32, 1)
        before, _ = read_usage(process.pid)
        answers, took, failures = load(port, method, clients, seconds)
        after, memory = read_usage(process.pid)
    finally:
        process.kill()  # a deadlock would ignore anything milder
        process.wait()
    failures += max(clients - answers, 0)  # wrk counts none that is never answered
    cpu = max(after - before, 0.01) * 1e6 / max(answers, 1)
    figures = {"rate": answers / took, "cpu": cpu, "failures": failures}
    return figures | {"start": start, "memory": memory}


def measure_in_turns(url: str, folder: Path, rounds: int, seconds: int) -> Runs:
    prepare(folder)
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    User.metadata.create_all(engine)
    runs: Runs = {(c, m, n): [] for c in TURNS for m in METHODS for n in TURNS[c]}
    turns = [*runs] * rounds
    for done, (clients, method, name) in enumerate(turns, 1):
        with engine.connect() as connection:
            connection.exec_driver_sql(USERS)
            connection.exec_driver_sql("VACUUM ANALYZE users")
        figures = measure(folder / name, url, clients, method, seconds)
        runs[clients, method, name].append(figures)
        said = f"{figures['rate']:.0f}/s, {figures['failures']:.0f} failures"
        print(f"{done}/{len(turns)}", method, clients, name, said, file=sys.stderr)
    return runs


def show(figure: str, its: list[Figures], a: list[Figures], b: list[Figures]) -> str:
    """Its median, and that of the ratios of a to b, neighbours in time, by rounds."""
    ratios = (one[figure] / other[figure] for one, other in zip(a, b, strict=True))
    return f"{median(run[figure] for run in its):.0f} ({median(ratios):.2f})"


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def print_tables(runs: Runs) -> None:
    head = ["CPU, µs a `GET`", "a `POST`", "cold start, ms", "memory, MB"]
    print_row("(the service's to it)", "over", *head)
    print_row(*["---"] * 6)
    for number, name in COSTS:
        get, post = (runs[number, method, name] for method in METHODS)
        our_get, our_post = (runs[number, method, OURS] for method in METHODS)
        both, ours = get + post, our_get + our_post
        row = [show("cpu", get, our_get, get), show("cpu", post, our_post, post)]
        row += [show(figure, both, ours, both) for figure in ("start", "memory")]
        print_row(name, str(number), *row)
    print()
    print_row("requests/s (to its own over 32), over", *map(str, TURNS), "failures")
    print_row(*["---"] * 6)
    for method in METHODS:
        for name in CHART:
            curve = [runs[number, method, name] for number in TURNS]
            row = [show("rate", its, its, curve[1]) for its in curve]
            failures = sum(run["failures"] for its in curve for run in its)
            print_row(f"`{method}`, {name}", *row, f"{failures:.0f}")


def draw(runs: Runs, path: Path) -> None:
    rcParams.update({"svg.fonttype": "none", "text.color": GRAY})
    rcParams.update({"axes.labelcolor": GRAY, "axes.edgecolor": GRAY})
    rcParams.update({"xtick.color": GRAY, "ytick.color": GRAY})
    chart = figure.Figure(figsize=(9, 4), layout="constrained")
    for place, method in enumerate(METHODS, 1):
        axes = chart.add_subplot(1, 2, place, title=f"{method}, requests a second")
        for marks, (name, color) in zip(("o-", "s--", "^:"), CHART.items()):
            rates = [median(r["rate"] for r in runs[n, method, name]) for n in TURNS]
            axes.plot([*map(str, TURNS)], rates, marks, color=color, label=name)
        axes.set(xlabel="connections", ylim=(0, None))
        axes.legend(frameon=False)
    chart.savefig(path, transparent=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print tables, and draw the chart.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6, help="of each measurement")
    parser.add_argument("--svg", type=Path, default=BENCH / "throughput.svg")
    options = parser.parse_args()
    with run_postgresql() as server, TemporaryDirectory() as folder:
        runs = measure_in_turns(
            server.url, Path(folder), options.rounds, options.seconds
        )
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores,", end=" ")
    print(f"medians of {options.rounds} rounds, {options.seconds} seconds each:\n")
    print_tables(runs)
    draw(runs, options.svg)


if __name__ == "__main__":
    main()
