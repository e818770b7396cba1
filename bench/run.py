"""Measure the service beside three other ways to write it, in turns.

Prints a table to stdout and progress to stderr, and draws throughput.svg.
"""

from argparse import ArgumentParser
from contextlib import ExitStack
from itertools import product
from json import loads
from pathlib import Path
from subprocess import check_output
from sys import stderr
from tempfile import TemporaryDirectory
from time import monotonic

from delay import delay
from matplotlib.pyplot import savefig, tight_layout
from pandas import DataFrame, Series

from test_main import PostgreSQL, Service, run_postgresql

APPLICATIONS = {
    "service": "main:app",
    "asyncpg": "bench.async_session:app",
    "tutorial": "bench.tutorial:app",
    "walkthrough": "bench.walkthrough:app",
}
CONNECTIONS = [1, 32, 256, 1000]
USERS = """TRUNCATE users RESTART IDENTITY;
INSERT INTO users (email, full_name)
SELECT n || '@example.com', 'Ada Lovelace' FROM generate_series(1, 1000) n"""


# For six seconds, as load.lua counts it.
def measure(service: Service, method: str, connections: int) -> dict[str, float]:
    load = f"{service.base_url} -- {method} {connections} {service.process.pid}"
    command = f"wrk -t1 -c{connections} -d6s --timeout 10s -s bench/load.lua {load}"
    printed = check_output(command.split())
    return dict(loads(printed.splitlines()[-1]))


def measure_in_turns(server: PostgreSQL, rounds: int) -> DataFrame:
    near = server.url.replace("postgres:", "postgresql+psycopg2:")
    far = near.replace(str(server.port), delay(server.port))
    urls = {"0 ms away": near, "1 ms away": far}
    figures = {}
    turns = product(range(rounds), urls, ["GET", "POST"], CONNECTIONS)
    for turn in turns:
        _, place, method, connections = turn
        with TemporaryDirectory() as folder, ExitStack() as running:
            services = {}
            for name, application in APPLICATIONS.items():
                started = monotonic()
                service = Service(Path(folder), application, DATABASE_URL=urls[place])
                services[name] = running.enter_context(service)
                service.get("/users/1")
                figures[*turn, "cold start, s", name] = monotonic() - started
            print(*turn, file=stderr)
            server.query(USERS)
            for name, service in services.items():
                for figure, value in measure(service, method, connections).items():
                    figures[*turn, figure, name] = value
                # It may be stuck, and take time from those after it.
                service.process.kill()
    return Series(figures).unstack()


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
    )
    options = parser.parse_args()
    with run_postgresql() as server:
        figures = measure_in_turns(server, options.rounds)
    figures.index.names = ["round", "database", "method", "connections", "measure"]
    for other in ["asyncpg", "tutorial", "walkthrough"]:
        figures[f"to {other}"] = figures["service"] / figures[other]
    medians = figures.groupby(["database", "measure", "method", "connections"]).median()
    print(medians.reset_index().to_markdown(index=False, floatfmt=".4g"))
    rates = medians.xs("requests a second", level="measure")
    rates[list(APPLICATIONS)].plot.bar(
        figsize=(9, 5),
        width=0.8,
        ylabel="requests a second",
    )
    tight_layout()
    savefig("bench/throughput.svg")


if __name__ == "__main__":
    main()
