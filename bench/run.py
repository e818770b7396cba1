"""Measure the service beside two other ways to write it, in turns.

Prints tables to stdout and progress to stderr, and draws throughput.svg.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas
import psutil
from matplotlib import pyplot

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH.parent))

from test_main import HERE, PostgreSQL, Service, run_postgresql

APPLICATIONS = {
    "service": "main:app",
    "walkthrough": "walkthrough:app",
    "asyncpg": "async_session:app",
}
CONNECTIONS = [1, 32, 256, 1000]
USERS = """TRUNCATE users RESTART IDENTITY;
INSERT INTO users (email, full_name)
SELECT n || '@example.com', 'Ada Lovelace' FROM generate_series(1, 1000) n;
ANALYZE users"""


def send_load(
    service: Service, method: str, connections: int, seconds: int
) -> list[float]:
    """Return the number of answers, of seconds and of failures."""
    options = f"-t1 -c{connections} -d{seconds}s --timeout 10s -s {BENCH}/load.lua"
    command = f"wrk {options} {service.base_url} -- {method} {time.time_ns()}"
    printed = subprocess.check_output(command.split(), text=True)
    answers, took, failures = map(float, printed.splitlines()[-1].split())
    # wrk counts no connection that never gets an answer.
    failures += max(connections - answers, 0)
    return [answers, took, failures]


def measure(service: Service, method: str, connections: int) -> dict[str, float]:
    """Send a load to a running service, after a second's to warm up."""
    process = psutil.Process(service.process.pid)
    send_load(service, method, 32, 1)
    before = process.cpu_times()
    answers, took, failures = send_load(service, method, connections, 5)
    after = process.cpu_times()
    user = after.user - before.user
    system = after.system - before.system
    return {
        "requests a second": answers / took,
        "CPU of a request, µs": (user + system) * 1e6 / max(answers, 1),
        "memory, MB": process.memory_info().rss / 1e6,
        "failures": failures,
    }


def measure_in_turns(server: PostgreSQL, rounds: int) -> pandas.DataFrame:
    turns = pandas.MultiIndex.from_product(
        [range(rounds), ["GET", "POST"], CONNECTIONS, APPLICATIONS],
        names=["round", "method", "connections", "application"],
    )
    settings = {
        "DATABASE_URL": server.url,
        "PYTHONPATH": f"{HERE}:{BENCH}",
    }
    rows = []
    for turn in turns:
        _, method, connections, name = turn
        started = time.monotonic()
        with (
            TemporaryDirectory() as folder,
            Service(Path(folder), APPLICATIONS[name], **settings) as service,
        ):
            service.get("/users/1")
            start = time.monotonic() - started
            server.query(USERS)
            figures = measure(service, method, connections)
        rows.append(figures | {"cold start, ms": start * 1000})
        print(len(rows), "of", len(turns), turn, file=sys.stderr)
    return pandas.DataFrame(rows, index=turns)


def print_table(figures: pandas.Series) -> None:
    """Print medians, also of the ratios within each round."""
    wide = figures.unstack("application")
    wide["service to asyncpg"] = wide["service"] / wide["asyncpg"]
    wide["service to walkthrough"] = wide["service"] / wide["walkthrough"]
    medians = wide.groupby(["method", "connections"]).median()
    print(medians.round(2).reset_index().to_markdown(index=False))


def draw(rates: pandas.Series) -> None:
    figure, places = pyplot.subplots(ncols=2, figsize=(9, 4), layout="constrained")
    medians = rates.groupby(["method", "connections", "application"]).median()
    for axes, method in zip(places, ["GET", "POST"], strict=True):
        lines = medians[method].unstack("application")
        lines.plot(
            ax=axes,
            logx=True,
            marker="o",
            title=method,
            ylim=(0, None),
        )
    figure.savefig(BENCH / "throughput.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
    )
    options = parser.parse_args()
    with run_postgresql() as server:
        figures = measure_in_turns(server, options.rounds)
    for name in figures:
        print(f"\n{name}:\n")
        print_table(figures[name])
    draw(figures["requests a second"])


if __name__ == "__main__":
    main()
