"""The promises of the README, shown on a running service.

The service is started by the Procfile's own line, on SQLite and on the PostgreSQL
that `TEST_DATABASE_URL` names, whose table `users` is dropped. Outages are made on
a PostgreSQL that the tests start themselves.
"""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    suppress,
)
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier, Event, Thread
from uuid import uuid4

import httpx
import psycopg2
import pytest

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
COMMAND = (HERE / "Procfile").read_text().removeprefix("web: ")
TEST_DATABASE_URL = os.environ.get("TEST_DATABASE_URL", "")
ADA = {"email": "Ada@Example.com", "full_name": "Ada Lovelace"}
# One client, since each costs 30 ms; a connection a request, as from many clients.
HTTP = httpx.Client(
    timeout=30, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
)
NO_TEST_DATABASE = "TEST_DATABASE_URL names no PostgreSQL to test on"


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def find_free_port() -> int:
    """A port below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(10_000, 32_000)
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def new_user() -> dict[str, str]:
    return {"email": f"{uuid4()}@example.com", "full_name": "Ada Lovelace"}


def query(database_url: str, sql: str) -> list[tuple[object, ...]]:
    """Ask the database itself, beside the service."""
    if database_url.startswith("sqlite"):
        with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as file:
            rows = file.execute(sql).fetchall()
            file.commit()
            return rows
    with closing(psycopg2.connect(database_url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []


class Service:
    """The service as a PaaS runs it: the Procfile's line and an environment."""

    def __init__(self, folder: Path, command: str = COMMAND, **settings: str) -> None:
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = folder / f"{self.port}.log"
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": programs, "PORT": str(self.port), **settings}
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"],
                cwd=folder,
                env={"PYTHONPATH": str(HERE), "PYTHONWARNINGS": "error"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def is_ready(self) -> bool:
        try:
            return HTTP.get(f"{self.url}/openapi.json").is_success
        except httpx.TransportError:
            return False

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.is_ready() or self.process.poll() is not None, 20)
        assert self.process.poll() is None, self.log

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serve(folder: Path, **settings: str) -> Iterator[Service]:
    service = Service(folder, **settings)
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.kill()


class PostgreSQL:
    """A server of the tests' own, to stop, freeze and fill up."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs = programs
        self.user = "postgres" if os.geteuid() == 0 else None  # it refuses root
        self.data = folder / "data"
        self.port = find_free_port()
        self.url = f"postgresql://ada:secret@127.0.0.1:{self.port}/postgres"
        if self.user:
            shutil.chown(folder, self.user)
        self.run(
            "initdb", "--username=ada", "--auth=trust", "--encoding=UTF8", "--no-sync"
        )

    def run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.programs / program, "--pgdata", self.data, *arguments],
            cwd=self.data.parent,
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user else None,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def start(self) -> None:
        options = f"-p {self.port} -k '' -c max_connections=20"
        log = str(self.data.parent / "log")
        self.run("pg_ctl", "start", "--wait", f"--options={options}", f"--log={log}")

    def stop(self, mode: str = "immediate") -> None:
        self.run("pg_ctl", "stop", "--wait", f"--mode={mode}")

    def signal(self, how: int) -> None:
        """Signal every process of the server, the first one first."""
        first = (self.data / "postmaster.pid").read_text().split()[0]
        children = Path(f"/proc/{first}/task/{first}/children").read_text()
        for process in [first, *children.split()]:
            os.kill(int(process), how)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    on_path = shutil.which("postgres")
    found = [*Path("/usr/lib/postgresql").glob("*/bin/postgres")]  # Debian's place
    if not on_path and not found:
        pytest.skip("PostgreSQL's server programs are not installed")
    newest = sorted(found, key=lambda path: float(path.parts[-3]))[-1:]
    program = Path(on_path or newest[0]).resolve()
    with TemporaryDirectory() as folder:
        server = PostgreSQL(program.parent, Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/users.db"
    if not TEST_DATABASE_URL:
        pytest.skip(NO_TEST_DATABASE)
    query(TEST_DATABASE_URL, "DROP TABLE IF EXISTS users")
    return TEST_DATABASE_URL


@pytest.fixture(scope="session")
def service(
    database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    with serve(tmp_path_factory.mktemp("service"), DATABASE_URL=database_url) as shared:
        yield shared


@pytest.fixture(scope="session", autouse=True)
def hopeless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service without a database, started first, since it takes 30 s to give up."""
    url = f"postgresql://ada:secret@127.0.0.1:{find_free_port()}/users?password=secret"
    service = Service(tmp_path_factory.mktemp("hopeless"), DATABASE_URL=url)
    yield service
    service.kill()


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url) as client:
        yield client


def test_a_created_user_is_answered_and_can_be_fetched(client: httpx.Client) -> None:
    user = new_user()
    created = client.post("/users", json=user)
    fetched = client.get(created.headers["location"])

    assert created.status_code == 201
    assert created.headers["location"] == f"/users/{created.json()['id']}"
    assert list(created.json()) == ["id", "email", "full_name"]
    assert created.json() == {"id": created.json()["id"], **user}
    assert (fetched.status_code, fetched.json()) == (200, created.json())


def test_head_answers_like_get_without_the_body(client: httpx.Client) -> None:
    path = client.post("/users", json=new_user()).headers["location"]
    head, get = client.head(path), client.get(path)

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(get.content))
    assert client.head("/users/9999999").status_code == 404


def test_a_duplicate_email_in_another_case_is_409(client: httpx.Client) -> None:
    user = new_user()
    client.post("/users", json=user)
    again = client.post("/users", json=user | {"email": user["email"].upper()})

    assert again.status_code == 409
    assert again.json() == {"detail": "Email already registered"}


def test_an_email_is_lower_cased_and_a_name_trimmed(client: httpx.Client) -> None:
    user = new_user()
    sent = {"email": user["email"].upper(), "full_name": " \tAda Lovelace\n "}
    created = client.post("/users", json=sent)

    assert created.json() == {"id": created.json()["id"], **user}


def test_an_unknown_id_is_404(client: httpx.Client) -> None:
    response = client.get(f"/users/{2**63 - 1}")

    assert response.status_code == 404
    assert response.json() == {"detail": "User not found"}


def test_health_asks_the_database(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.head("/health").status_code == 200


def test_the_root_leads_to_the_documentation(client: httpx.Client) -> None:
    response = client.get("/", follow_redirects=True)

    assert response.url.path == "/docs"
    assert "swagger" in response.text


def test_the_document_has_the_two_endpoints_and_all_their_answers(
    client: httpx.Client,
) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    answers = {
        (method, path): {
            status: answer["content"]["application/json"]["schema"]["$ref"].rpartition(
                "/"
            )[2]
            for status, answer in operation["responses"].items()
        }
        for path, operations in paths.items()
        for method, operation in operations.items()
    }

    assert answers == {
        ("post", "/users"): {
            "201": "UserRead",
            "409": "Message",
            "413": "Message",
            "415": "Message",
            "422": "HTTPValidationError",
            "500": "Message",
            "503": "Message",
        },
        ("get", "/users/{user_id}"): {
            "200": "UserRead",
            "404": "Message",
            "422": "HTTPValidationError",
            "500": "Message",
            "503": "Message",
        },
    }


def test_ids_are_64_bit_on_postgresql() -> None:
    if not TEST_DATABASE_URL:
        pytest.skip(NO_TEST_DATABASE)
    sql = "SELECT data_type FROM information_schema.columns WHERE table_name = 'users'"

    assert ("bigint",) in query(TEST_DATABASE_URL, f"{sql} AND column_name = 'id'")


def test_users_survive_a_restart(tmp_path: Path, database_url: str) -> None:
    with serve(tmp_path, DATABASE_URL=database_url) as service:
        created = HTTP.post(f"{service.url}/users", json=new_user())
        status = service.stop()
    with serve(tmp_path, DATABASE_URL=database_url) as service:
        fetched = HTTP.get(service.url + created.headers["location"])

    assert status == -signal.SIGTERM
    assert (created.status_code, fetched.json()) == (201, created.json())


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_every_postgresql_scheme_reaches_psycopg2_with_its_query_string(
    tmp_path: Path, scheme: str
) -> None:
    if not TEST_DATABASE_URL:
        pytest.skip(NO_TEST_DATABASE)
    address = TEST_DATABASE_URL.partition("://")[2]
    url = f"{scheme}://{address}{'&' if '?' in address else '?'}application_name=it"
    sql = "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'it'"
    with serve(tmp_path, DATABASE_URL=url):
        assert query(TEST_DATABASE_URL, sql) == [(True,)]


@pytest.mark.parametrize("backlog", [None, 0], ids=["refusing", "black-holed"])
def test_a_list_of_hosts_reaches_the_primary_behind_a_dead_host(
    tmp_path: Path, backlog: int | None
) -> None:
    if not TEST_DATABASE_URL:
        pytest.skip(NO_TEST_DATABASE)
    parts = psycopg2.extensions.parse_dsn(TEST_DATABASE_URL)
    login = f"{parts['user']}:{parts.get('password', '')}"
    with ExitStack() as stack:
        port = find_free_port()
        if backlog is not None:
            dead = socket.create_server(("127.0.0.1", port), backlog=backlog)
            stack.enter_context(dead)
            stack.enter_context(socket.create_connection(dead.getsockname()))
        hosts = f"host=127.0.0.1:{port}&host={parts['host']}:{parts['port']}"
        url = f"postgresql://{login}@/{parts['dbname']}?{hosts}"
        settings = {"DATABASE_URL": f"{url}&target_session_attrs=read-write"}
        service = stack.enter_context(serve(tmp_path, **settings))

        assert HTTP.get(f"{service.url}/health").status_code == 200
        assert "Waiting 30 s" not in service.log


@pytest.mark.parametrize("value", [{}, {"DATABASE_URL": ""}], ids=["unset", "empty"])
def test_without_a_database_url_users_go_to_a_file_and_the_log_warns_once(
    tmp_path: Path, value: dict[str, str]
) -> None:
    with serve(tmp_path, **value) as service:
        created = HTTP.post(f"{service.url}/users", json=ADA)

    warnings = [line for line in service.log.splitlines() if "DATABASE_URL" in line]
    assert created.status_code == 201
    assert query(f"sqlite:///{tmp_path}/users.db", "SELECT email FROM users") == [
        ("ada@example.com",)
    ]
    assert len(warnings) == 1
    assert "WARNING" in warnings[0]
    assert "ephemeral" in warnings[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"DATABASE_URL": "secret"},
        {"DATABASE_URL": "postgresql://ada:secret@localhost:port/users"},
        {"DATABASE_URL": "postgresql://ada:se@cret@localhost/users"},
        {"DATABASE_URL": "postgresql://ada:secret@localhost/users?plugin=x"},
        {"DATABASE_URL": "mysql://ada:secret@localhost/users"},
        {"DATABASE_URL": "sqlite://"},
        {"DATABASE_URL": "sqlite:///:memory:"},
        {"DATABASE_URL": "sqlite:///file::memory:?uri=true"},
        {"DB_POOL_SIZE": "0"},
        {"DB_POOL_SIZE": "many"},
        {"API_TOKEN": "a secret"},
        {"API_TOKEN": "sécret"},
    ],
    ids=str,
)
def test_a_bad_setting_ends_the_start_with_one_line(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    service = Service(tmp_path, **settings)

    assert service.process.wait(timeout=20) == 3
    assert service.log.startswith(f"Error: {next(iter(settings))} ")
    assert service.log.count("\n") == 1
    assert not re.search("secret|cret@", service.log)


def test_a_file_that_is_no_database_ends_the_start_with_one_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "users.db").write_text("not a database" * 100)
    service = Service(tmp_path)

    assert service.process.wait(timeout=20) == 3
    assert (
        "Cannot use DATABASE_URL, sqlite:///users.db: file is not a database"
        in service.log
    )
    assert "Traceback" not in service.log


def test_sqlite_is_set_up_for_many_processes_and_power_cuts(tmp_path: Path) -> None:
    pragmas = ["journal_mode", "synchronous", "busy_timeout"]
    script = (
        "from main import engine\n"
        "with engine.connect() as connection:\n"
        f"    for pragma in {pragmas}:\n"
        "        sql = f'PRAGMA {pragma}'\n"
        "        print(connection.exec_driver_sql(sql).scalar())\n"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(HERE)}
    )

    assert printed.decode().split() == ["wal", "2", "4000"]


def test_the_procfile_hides_the_server_and_serves_every_interface(
    client: httpx.Client, service: Service
) -> None:
    assert "server" not in client.get("/health").headers
    assert "running on http://0.0.0.0:" in service.log


def test_an_idle_connection_outlives_a_routers(service: Service) -> None:
    seconds = re.search(r"--timeout-keep-alive (\d+)", COMMAND)

    assert seconds
    assert int(seconds[1]) > 60


def test_the_readme_curls_answer_what_the_readme_says(tmp_path: Path) -> None:
    block = re.search(r"```console\n(.*?)```", README, re.DOTALL)
    assert block
    examples = re.findall(r"\$ (curl .*)\n([^$]*)", block[1])
    with serve(tmp_path) as service:
        answers = [
            subprocess.check_output(
                command.replace("localhost:8000", f"127.0.0.1:{service.port}"),
                shell=True,
                text=True,
            )
            for command, _ in examples
        ]

    assert len(examples) >= 2
    assert answers == [answer.removesuffix("\n") for _, answer in examples]


def test_the_readme_commands_run_the_service_and_the_tests() -> None:
    commands = re.findall(r"```sh\n(python3 -m venv .*?)\n```", README, re.DOTALL)

    assert [command.split(" && ")[-1] for command in commands] == [
        ".venv/bin/uvicorn main:app",
        ".venv/bin/python -m pytest -W error",
    ]


def test_the_start_waits_for_the_database_and_then_serves_at_once(
    tmp_path: Path, postgresql: PostgreSQL
) -> None:
    postgresql.stop()
    service = Service(tmp_path, DATABASE_URL=postgresql.url)
    try:
        wait_until(lambda: "Waiting 30 s for" in service.log, 10)
        with pytest.raises(subprocess.TimeoutExpired):
            service.process.wait(timeout=2)
        postgresql.start()
        wait_until(service.is_ready, 2)
    finally:
        service.kill()

    assert service.log.count("Waiting 30 s for") == 1
    assert f"ada:***@127.0.0.1:{postgresql.port}/postgres" in service.log
    assert "secret" not in service.log


@pytest.mark.parametrize("connections", [32, 256, 1000])
def test_no_request_fails_at_any_number_of_connections(
    service: Service, connections: int
) -> None:
    async def load() -> Counter[int]:
        limits = httpx.Limits(max_connections=connections)
        async with httpx.AsyncClient(
            base_url=service.url, limits=limits, timeout=60
        ) as client:
            user = await client.post("/users", json=new_user())
            requests = [
                client.get(user.headers["location"])
                if number % 2
                else client.post("/users", json=new_user())
                for number in range(connections)
            ]
            answers = await asyncio.gather(*requests)
            return Counter(answer.status_code for answer in answers)

    half = connections // 2
    assert asyncio.run(load()) == {200: half, 201: half}


def test_a_process_holds_no_more_connections_than_its_pool(tmp_path: Path) -> None:
    if not TEST_DATABASE_URL:
        pytest.skip(NO_TEST_DATABASE)
    joint = "&" if "?" in TEST_DATABASE_URL else "?"
    url = f"{TEST_DATABASE_URL}{joint}application_name=pool"
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pool'"
    with (
        serve(tmp_path, DATABASE_URL=url, DB_POOL_SIZE="3") as service,
        ThreadPoolExecutor(32) as threads,
    ):
        load = threads.map(
            lambda _: HTTP.get(f"{service.url}/health").status_code,
            range(200),
        )
        held = {query(TEST_DATABASE_URL, sql)[0][0] for _ in range(20)}
        statuses = set(load)

    assert statuses == {200}
    assert held <= {1, 2, 3}


def test_400_stuck_clients_do_not_delay_a_request(service: Service) -> None:
    half_sent = [
        b"GET /users/1 HT",
        b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
        b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n" * 50,  # and reads no answer
        b"GET /users/1 HTTP/1.1\r\nHost: x\r\n\r\n" * 5,
    ]
    with ExitStack() as stack:
        for number in range(400):
            stuck = socket.create_connection(("127.0.0.1", service.port))
            stack.enter_context(stuck).sendall(half_sent[number % 4])
        created = HTTP.post(f"{service.url}/users", json=new_user(), timeout=20)
        started = time.monotonic()
        fetched = HTTP.get(service.url + created.headers["location"], timeout=20)

        assert fetched.json() == created.json()
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("processes", ["1", "4"])
def test_fifty_posts_of_one_email_at_once_make_one_user(
    tmp_path: Path, database_url: str, processes: str
) -> None:
    user = new_user()
    barrier = Barrier(50)
    settings = {"DATABASE_URL": database_url, "WEB_CONCURRENCY": processes}
    with serve(tmp_path, **settings) as racing, ThreadPoolExecutor(50) as threads:

        def post(number: int) -> int:
            email = user["email"].upper() if number % 2 else user["email"]
            with httpx.Client(base_url=racing.url) as client:
                barrier.wait()
                return client.post("/users", json=user | {"email": email}).status_code

        statuses = Counter(threads.map(post, range(50)))

    sql = f"SELECT count(*) FROM users WHERE email = '{user['email']}'"
    assert statuses == {201: 1, 409: 49}
    assert query(database_url, sql) == [(1,)]


def test_eight_processes_start_at_once_on_an_empty_database(
    tmp_path: Path, request: pytest.FixtureRequest, database_url: str
) -> None:
    if database_url.startswith("sqlite"):
        url = f"sqlite:///{tmp_path}/users.db"
    else:
        server = request.getfixturevalue("postgresql")
        query(server.url, "CREATE DATABASE race")
        url = server.url.replace("/postgres", "/race")
    with ExitStack() as stack:
        services = [Service(tmp_path, DATABASE_URL=url) for _ in range(8)]
        for service in services:
            stack.callback(service.kill)
        for service in services:
            service.wait_until_ready()
    logs = "".join(service.log for service in services)

    assert logs.count("Application startup complete") == 8
    assert not re.search("Traceback|ERROR|Waiting 30 s", logs)


class MovableDatabase:
    """The tests' server behind a libpq service file, which new connections obey."""

    def __init__(self, server: PostgreSQL, folder: Path) -> None:
        self.server = server
        self.file = folder / "pg_service.conf"
        self.move("127.0.0.1", server.port)
        self.settings = {
            "DATABASE_URL": "postgresql://?service=users",
            "PGSERVICEFILE": str(self.file),
        }

    def move(self, host: str, port: int) -> None:
        self.file.write_text(
            f"[users]\nhost={host}\nport={port}\n"
            "user=ada\npassword=secret\ndbname=postgres\n"
        )

    def cut_connections(self) -> None:
        """Have the server close every connection but the one that asks for it."""
        query(
            self.server.url,
            "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
        )

    @contextmanager
    def moved(self, host: str, port: int) -> Iterator[None]:
        self.move(host, port)
        self.cut_connections()
        try:
            yield
        finally:
            self.move("127.0.0.1", self.server.port)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.server.stop("fast")
        try:
            yield
        finally:
            self.server.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.server.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.server.signal(signal.SIGCONT)

    @contextmanager
    def full(self) -> Iterator[None]:
        self.cut_connections()
        with ExitStack() as stack:
            with pytest.raises(psycopg2.OperationalError, match="too many clients"):
                while True:
                    connection = psycopg2.connect(self.server.url)
                    stack.enter_context(closing(connection))
            yield

    def set_read_only(self, value: str) -> None:
        name = "default_transaction_read_only"
        query(self.server.url, f"ALTER SYSTEM SET {name} = {value}")
        query(self.server.url, "SELECT pg_reload_conf()")
        wait_until(lambda: query(self.server.url, f"SHOW {name}") == [(value,)], 5)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        self.set_read_only("on")
        try:
            yield
        finally:
            self.set_read_only("off")

    @contextmanager
    def unresolvable(self) -> Iterator[None]:
        with self.moved("no-such-host.invalid", 5432):
            yield

    @contextmanager
    def silent(self) -> Iterator[None]:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            self.moved(*server.getsockname()),
        ):
            yield

    @contextmanager
    def black_holed(self) -> Iterator[None]:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
            address = server.getsockname()
            with socket.create_connection(address), self.moved(*address):
                yield


@pytest.fixture(scope="session")
def database(
    postgresql: PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> MovableDatabase:
    return MovableDatabase(postgresql, tmp_path_factory.mktemp("libpq"))


@pytest.fixture(scope="session")
def outliving_service(
    database: MovableDatabase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """One process that goes through every outage."""
    with serve(tmp_path_factory.mktemp("outages"), **database.settings) as service:
        yield service


@pytest.mark.parametrize(
    "outage",
    [
        MovableDatabase.stopped,
        MovableDatabase.frozen,
        MovableDatabase.full,
        MovableDatabase.read_only,
        MovableDatabase.unresolvable,
        MovableDatabase.silent,
        MovableDatabase.black_holed,
    ],
    ids=lambda outage: outage.__name__,
)
def test_an_outage_is_503_within_5_seconds_and_needs_no_restart(
    outliving_service: Service,
    database: MovableDatabase,
    outage: Callable[[MovableDatabase], AbstractContextManager[None]],
) -> None:
    url = f"{outliving_service.url}/users"
    lines_before = len(outliving_service.log.splitlines())
    with outage(database), ThreadPoolExecutor(3) as threads:
        started = time.monotonic()
        failed = list(threads.map(lambda _: HTTP.post(url, json=new_user()), "abc"))
        seconds = time.monotonic() - started
    back = time.monotonic()
    while (answer := HTTP.post(url, json=new_user())).status_code != 201:
        failed.append(answer)
    log = outliving_service.log.splitlines()[lines_before:]

    assert seconds < 5
    assert time.monotonic() - back < 2
    for answer in failed:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.json() == {"detail": "Database unavailable"}
    assert len(log) <= len(failed)
    assert not re.search("Traceback|INSERT INTO|secret|ada|@", "".join(log))


def test_health_is_503_without_the_database(
    outliving_service: Service, database: MovableDatabase
) -> None:
    with database.stopped():
        assert HTTP.get(f"{outliving_service.url}/health").status_code == 503
    wait_until(lambda: HTTP.get(f"{outliving_service.url}/health").is_success, 2)


def test_a_frozen_database_holds_up_only_what_needs_it_and_no_one_for_long(
    outliving_service: Service, database: MovableDatabase
) -> None:
    url = outliving_service.url

    def get(_: int) -> tuple[int, bool]:
        started = time.monotonic()
        return HTTP.get(f"{url}/users/1").status_code, time.monotonic() - started < 5

    with database.frozen(), ThreadPoolExecutor(40) as threads:
        burst = threads.map(get, range(40))
        others = [
            HTTP.get(f"{url}/users/x", timeout=1).status_code,
            HTTP.post(f"{url}/users", json={}, timeout=1).status_code,
            HTTP.put(f"{url}/users", json={}, timeout=1).status_code,
            HTTP.get(f"{url}/docs", timeout=1).status_code,
        ]
        answers = set(burst)

    assert others == [422, 422, 405, 200]
    assert answers == {(503, True)}
    wait_until(lambda: HTTP.get(f"{url}/health").is_success, 2)


def test_a_locked_table_is_503_and_leaves_no_connections_behind(
    outliving_service: Service, database: MovableDatabase
) -> None:
    url, server = f"{outliving_service.url}/users", database.server.url
    sql = "SELECT count(*) <= 5 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with (
        closing(psycopg2.connect(server)) as locker,
        ThreadPoolExecutor(15) as threads,
    ):
        locker.cursor().execute("LOCK TABLE users IN EXCLUSIVE MODE")
        for _ in range(2):
            started = time.monotonic()
            posts = threads.map(lambda _: HTTP.post(url, json=new_user()), range(15))

            assert {post.status_code for post in posts} == {503}
            assert time.monotonic() - started < 5
            assert query(server, sql) == [(True,)]
    wait_until(lambda: HTTP.post(url, json=new_user()).status_code == 201, 2)


def test_a_slow_database_gets_4_seconds_for_a_request(
    tmp_path: Path, postgresql: PostgreSQL
) -> None:
    pause = 0.0

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                time.sleep(pause)
                target.sendall(data)

    def accept(proxy: socket.socket, stack: ExitStack) -> None:
        with suppress(OSError):
            while True:
                client = stack.enter_context(proxy.accept()[0])
                address = ("127.0.0.1", postgresql.port)
                server = stack.enter_context(socket.create_connection(address))
                for pair in [(client, server), (server, client)]:
                    Thread(target=pass_on, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as proxy, ExitStack() as stack:
        Thread(target=accept, args=(proxy, stack), daemon=True).start()
        port = proxy.getsockname()[1]
        settings = {"DATABASE_URL": f"postgresql://ada@127.0.0.1:{port}/postgres"}
        service = stack.enter_context(serve(tmp_path, **settings))
        created = HTTP.post(f"{service.url}/users", json=new_user())
        pause = 0.9  # each way, for BEGIN, the statement and COMMIT
        started = time.monotonic()
        slow = HTTP.get(service.url + created.headers["location"])
        seconds = time.monotonic() - started

    assert (created.status_code, slow.status_code, seconds < 5) == (201, 503, True)


def test_a_database_of_another_encoding_is_refused(
    tmp_path: Path, postgresql: PostgreSQL
) -> None:
    encoding = "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'"
    query(postgresql.url, f"CREATE DATABASE ascii {encoding} TEMPLATE template0")
    url = postgresql.url.replace("/postgres", "/ascii")
    service = Service(tmp_path, DATABASE_URL=url)

    assert service.process.wait(timeout=20) == 3
    assert "the encoding of the database is not UTF8" in service.log


def test_only_a_taken_email_is_409(
    outliving_service: Service, database: MovableDatabase
) -> None:
    url, server = f"{outliving_service.url}/users", database.server.url
    HTTP.post(url, json=new_user())
    query(server, "SELECT setval('users_id_seq', (SELECT max(id) FROM users), false)")

    assert HTTP.post(url, json=new_user()).status_code == 500
    assert HTTP.post(url, json=new_user()).status_code == 201


def test_idle_connections_killed_on_the_server_cost_nothing(
    outliving_service: Service, database: MovableDatabase
) -> None:
    url = f"{outliving_service.url}/users"
    with ThreadPoolExecutor(5) as threads:
        before = list(threads.map(lambda _: HTTP.post(url, json=new_user()), range(9)))
        database.cut_connections()
        after = list(threads.map(lambda _: HTTP.post(url, json=new_user()), range(9)))

    assert {answer.status_code for answer in before + after} == {201}


class Writers:
    """Eight clients that create users until told to stop, and note each answer."""

    def __init__(self, service: Service) -> None:
        self.url = f"{service.url}/users"
        self.acknowledged: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.stop = Event()

    def write(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self.stop.is_set():
                user = new_user()
                try:
                    answer = client.post(self.url, json=user)
                except httpx.TransportError:
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code == 201:
                    self.acknowledged.append(user["email"])

    def wait_for_more(self) -> None:
        enough = len(self.acknowledged) + 100
        wait_until(lambda: len(self.acknowledged) >= enough, 20)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with ThreadPoolExecutor(8) as threads:
            for _ in range(8):
                threads.submit(self.write)
            try:
                yield
            finally:
                self.stop.set()

    def lost(self, database_url: str) -> list[str]:
        """The acknowledged emails that are not in the database exactly once."""
        stored = Counter(
            row[0] for row in query(database_url, "SELECT email FROM users")
        )
        return [email for email in self.acknowledged if stored[email] != 1]


def test_no_acknowledged_user_is_lost_when_the_service_is_killed(
    tmp_path: Path, database_url: str
) -> None:
    with serve(tmp_path, DATABASE_URL=database_url) as service:
        writers = Writers(service)
        with writers.at_work():
            writers.wait_for_more()
            service.kill()
    with serve(tmp_path, DATABASE_URL=database_url):
        assert writers.acknowledged
        assert writers.lost(database_url) == []


def test_no_acknowledged_user_is_lost_when_postgresql_crashes(
    outliving_service: Service, database: MovableDatabase
) -> None:
    writers = Writers(outliving_service)
    with writers.at_work():
        writers.wait_for_more()
        database.server.stop("immediate")
        failed = writers.statuses[503]
        wait_until(lambda: writers.statuses[503] > failed, 5)
        database.server.start()
        writers.wait_for_more()

    assert set(writers.statuses) == {201, 503}
    assert writers.lost(database.server.url) == []


def test_a_request_in_flight_is_answered_before_the_process_stops(
    tmp_path: Path, database_url: str
) -> None:
    connection: sqlite3.Connection | psycopg2.extensions.connection
    if database_url.startswith("sqlite"):
        connection = sqlite3.connect(database_url.removeprefix("sqlite:///"))
        lock = "BEGIN IMMEDIATE"
    else:
        connection = psycopg2.connect(database_url)
        lock = "LOCK TABLE users IN EXCLUSIVE MODE"
    with (
        closing(connection),
        serve(tmp_path, DATABASE_URL=database_url) as service,
        ThreadPoolExecutor() as threads,
    ):
        connection.cursor().execute(lock)
        post = threads.submit(HTTP.post, f"{service.url}/users", json=new_user())
        with pytest.raises(TimeoutError):
            post.result(timeout=1)
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(TimeoutError):
            post.result(timeout=1)
        connection.rollback()

        assert post.result().status_code == 201
        assert service.process.wait(timeout=5) == -signal.SIGTERM


def test_a_stuck_client_does_not_keep_the_process_from_stopping(
    tmp_path: Path,
) -> None:
    head = b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
    head += b"Content-Type: application/json\r\n\r\n"
    with (
        serve(tmp_path) as service,
        socket.create_connection(("127.0.0.1", service.port)) as stuck,
    ):
        stuck.sendall(head + b'{"email": "ada@')
        started = time.monotonic()
        service.stop()

    assert time.monotonic() - started < 15
    assert "Traceback" not in service.log


@pytest.fixture
def pgbouncer(postgresql: PostgreSQL) -> Iterator[str]:
    """The URL of a PgBouncer in transaction mode, in front of the tests' server."""
    if not shutil.which("pgbouncer"):
        pytest.skip("pgbouncer is not installed")
    port = find_free_port()
    with TemporaryDirectory() as folder:
        settings = Path(folder) / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\npostgres = host=127.0.0.1 port={postgresql.port} user=ada\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\n"
            "unix_socket_dir =\n"
        )
        if postgresql.user:
            shutil.chown(folder, postgresql.user)
        process = subprocess.Popen(
            ["pgbouncer", settings],
            user=postgresql.user,
            group=postgresql.user,
            stderr=subprocess.DEVNULL,
        )
        yield f"postgresql://ada@127.0.0.1:{port}/postgres"
        process.terminate()
        process.wait()


def test_it_works_and_fails_in_time_through_pgbouncer_in_transaction_mode(
    tmp_path: Path, pgbouncer: str, database: MovableDatabase
) -> None:
    with (
        serve(tmp_path, DATABASE_URL=pgbouncer, WEB_CONCURRENCY="2") as service,
        ThreadPoolExecutor(20) as threads,
    ):
        url = f"{service.url}/users"
        posts = threads.map(lambda _: HTTP.post(url, json=new_user()), range(100))
        created = [post.headers["location"] for post in posts]
        fetched = threads.map(lambda path: HTTP.get(service.url + path), created)
        statuses = Counter(answer.status_code for answer in fetched)
        with database.frozen():
            started = time.monotonic()
            frozen = HTTP.post(url, json=new_user()).status_code
            seconds = time.monotonic() - started
        wait_until(lambda: HTTP.post(url, json=new_user()).status_code == 201, 2)

    assert statuses == {200: 100}
    assert (frozen, seconds < 5) == (503, True)


JSON = {"Content-Type": "application/json"}


def assert_refused(client: httpx.Client, answer: httpx.Response, status: int) -> None:
    """A small JSON answer with this status; and the next request works."""
    assert (answer.status_code, answer.headers["content-type"]) == (
        status,
        "application/json",
    )
    assert list(answer.json()) == ["detail"]
    assert len(answer.content) < 4000
    assert client.post("/users", json=new_user()).status_code == 201


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"[{}]",
        b"1",
        b'"marker"',
        b"{",
        b"{}",
        b'{"email": NaN}',
        b'{"email": -Infinity, "full_name": 1e999}',
        b'{"email": true, "full_name": ["marker"]}',
        b'{"email": {"marker": 1}, "full_name": 1}',
        b'{"email": "marker@example.com"}',
        b'{"email": "marker@example.com", "full_name": "marker"} x',
        b'{"email": "marker@example.com", "full_name": "marker", "full_name": "x"}',
        b'{"email": "marker@example.com", "full_name": "marker", "marker": NaN}',
        b'{"email": "marker@example.com", "full_name": "marker\\ud800"}',
        b'{"email": "marker\\ud800@example.com", "full_name": "marker"}',
        b'{"email": "marker@example.com", "full_name": "x", "marker\\ud800": 1}',
        b'{"email": "marker@example.com", "full_name": "marker\\u0000"}',
        b'{"email": "marker@example.com", "full_name": "marker\x00"}',
        b'{"email": "marker@example.com", "full_name": "marker\xff"}',
        '{"email": "marker@example.com", "full_name": "marker"}'.encode("utf-16"),
        b'{"email": ' + b"9" * 50_000 + b"}",
        b"[" * 60_000,
        b'{"marker":' * 6_000,
        b"{" + b",".join(b'"marker%d": 1' % n for n in range(3000)) + b"}",
    ],
    ids=lambda body: repr(body)[2:60],
)
def test_a_bad_body_is_422_without_an_echo_and_stores_nothing(
    client: httpx.Client, database_url: str, body: bytes
) -> None:
    count = "SELECT count(*) FROM users WHERE email LIKE '%marker%'"
    answer = client.post("/users", content=body, headers=JSON)

    assert_refused(client, answer, 422)
    assert b"marker" not in answer.content
    assert query(database_url, count) == [(0,)]


@pytest.mark.parametrize(
    "email",
    [
        "marker",
        "marker@localhost",
        "marker@x.test",
        "marker..x@example.com",
        " marker@example.com",
        "marker@example.com\n",
        "Marker <marker@example.com>",
        '"marker x"@example.com',
        "marker@[127.0.0.1]",
        "märker@example.com",
        "marker@exämple.com",
        "marker\u200b@example.com",
        "marker@example.com\x00",
        "marker@" + "x" * 64 + ".com",
        "x" * 243 + "@example.com",
        "marker" * 10_000,
    ],
    ids=lambda email: repr(email)[1:30],
)
def test_a_bad_email_is_422_and_says_what_is_wrong(
    client: httpx.Client, email: str
) -> None:
    answer = client.post("/users", json=new_user() | {"email": email})

    assert_refused(client, answer, 422)
    assert [problem["loc"] for problem in answer.json()["detail"]] == [
        ["body", "email"]
    ]
    assert " " in answer.json()["detail"][0]["msg"]
    assert not re.search("m[aä]rker|ä", answer.text)


@pytest.mark.parametrize(
    "email",
    [
        "%s@EXAMPLE.com",
        "%s+tag@example.com",
        "%s.o'hara@mail.example.co.uk",
        "%s@xn--exmple-cua.com",
        "%s" + "x" * 206 + "@example.com",
    ],
    ids=str,
)
def test_a_good_email_is_stored_lower_cased(client: httpx.Client, email: str) -> None:
    email = email.replace("%s", str(uuid4()))
    answer = client.post("/users", json={"email": email.upper(), "full_name": "Ada"})

    assert (answer.status_code, answer.json()["email"]) == (201, email.lower())


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        " \t\n\u00a0\u3000",
        "x" * 201,
        "Ada\x00",
        "\x00",
        "A\nda",
        "A\x7fda",
        "A\x85da",
        "A\x1bda",
        "x " * 30_000,
    ],
    ids=lambda name: repr(name)[1:30],
)
def test_a_bad_name_is_422_and_says_what_is_wrong(
    client: httpx.Client, name: str
) -> None:
    answer = client.post("/users", json=new_user() | {"full_name": name})

    assert_refused(client, answer, 422)
    assert answer.json() == {
        "detail": [
            {
                "type": "value_error",
                "loc": ["body", "full_name"],
                "msg": "A name has 1 to 200 characters, no control characters",
            }
        ]
    }


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "x" * 200,
        " " * 300 + "x" * 200 + "\n",
        "e\u0301" * 100,
        "\u05d0\u05d3\u05d4 \u200f\u0639",
        "\U0001f469\u200d\U0001f52c",
        "O'Hara; DROP TABLE users --",
        '%s {} \\ "<b>',
    ],
    ids=lambda name: repr(name)[1:30],
)
def test_a_good_name_comes_back_trimmed(client: httpx.Client, name: str) -> None:
    created = client.post("/users", json=new_user() | {"full_name": name})
    fetched = client.get(created.headers["location"])

    assert (created.status_code, fetched.json()) == (201, created.json())
    assert fetched.json()["full_name"] == name.strip()


@pytest.mark.parametrize(
    "user_id",
    [
        "0",
        "-1",
        "x",
        "1.0",
        "+1",
        "1_0",
        "1e3",
        "%20" + "1",
        "%00",
        "%FF",
        "%zz",
        "\u0663",
        str(2**63),
        str(2**64 + 1),
        "9" * 5000,
    ],
    ids=lambda user_id: user_id[:20],
)
def test_a_bad_id_is_422(client: httpx.Client, user_id: str) -> None:
    answer = client.get(f"/users/{user_id}")

    assert_refused(client, answer, 422)
    assert answer.json()["detail"][0]["loc"] == ["path", "user_id"]


@pytest.mark.parametrize("user_id", [2**31, 2**32, 2**63 - 1])
def test_a_large_id_is_404(client: httpx.Client, user_id: int) -> None:
    assert_refused(client, client.get(f"/users/{user_id}"), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/users", {"POST"}),
        ("DELETE", "/users", {"POST"}),
        ("PUT", "/users/1", {"GET", "HEAD"}),
        ("TRACE", "/users/1", {"GET", "HEAD"}),
        ("ODD", "/health", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_is_405_with_the_right_ones(
    client: httpx.Client, method: str, path: str, allowed: set[str]
) -> None:
    answer = client.request(method, path)

    assert_refused(client, answer, 405)
    assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/users/", "/nowhere", "/users/1/x", "/users%2F1%2F"])
def test_an_unknown_path_is_404(client: httpx.Client, path: str) -> None:
    assert_refused(client, client.get(path), 404)


@pytest.mark.parametrize(
    "media_type", [b"application/x-www-form-urlencoded", b"text/plain", b"\xff", None]
)
def test_a_body_not_declared_as_json_is_415_and_says_what_to_add(
    client: httpx.Client, media_type: bytes | None
) -> None:
    headers = {b"Content-Type": media_type} if media_type else {}
    answer = client.post("/users", content=b"{}", headers=headers)

    assert_refused(client, answer, 415)
    assert "Content-Type: application/json" in answer.json()["detail"]


@pytest.mark.parametrize("declared", [True, False], ids=["length", "chunked"])
def test_100_megabytes_are_413_and_leave_the_memory_flat(
    client: httpx.Client, service: Service, declared: bool
) -> None:
    megabyte = b" " * 2**20

    def resident() -> int:
        """Kilobytes."""
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    before = resident()
    length = {"Content-Length": str(100 * 2**20)} if declared else {}
    answer = client.post(
        "/users", content=(megabyte for _ in range(100)), headers=JSON | length
    )

    assert_refused(client, answer, 413)
    assert resident() < before + 10_000


def test_a_body_of_exactly_64_kib_is_read(client: httpx.Client) -> None:
    body = json.dumps(new_user()).encode().ljust(65_536)

    assert client.post("/users", content=body, headers=JSON).status_code == 201
    assert client.post("/users", content=body + b" ", headers=JSON).status_code == 413


def test_headers_without_an_end_are_cut_off(
    client: httpx.Client, service: Service
) -> None:
    sent = 0
    with (
        socket.create_connection(("127.0.0.1", service.port)) as endless,
        pytest.raises(ConnectionError),
    ):
        endless.sendall(b"GET / HTTP/1.1\r\n")
        while sent < 2**30:
            endless.sendall(b"X: " + b"x" * 2**16 + b"\r\n")
            sent += 2**16

    assert sent < 50 * 2**20
    assert client.get("/health").status_code == 200


TOKEN = "correct-horse"


@pytest.fixture(scope="session")
def protected(
    database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    settings = {"DATABASE_URL": database_url, "API_TOKEN": TOKEN}
    with serve(tmp_path_factory.mktemp("protected"), **settings) as service:
        yield service


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer wrong",
        b"Bearer correct-hors",
        b"Bearer correct-horse2",
        b"Bearer CORRECT-HORSE",
        b"Bearer correct-horse correct-horse",
        b"Bearer \xff\xfe",
        "Bearer töken".encode(),
        b"correct-horse",
        b"Basic Y29ycmVjdC1ob3JzZQ==",
    ],
    ids=str,
)
def test_with_a_token_set_a_request_without_it_is_401(
    protected: Service, header: bytes | None
) -> None:
    headers = {} if header is None else {b"Authorization": header}
    with httpx.Client(base_url=protected.url, headers=headers) as stranger:
        answers = [
            stranger.post("/users", json=new_user()),
            stranger.post(
                "/users", content=b"{", headers={"Content-Type": "text/json"}
            ),
            stranger.post("/users", content=b"{", headers=JSON),
            stranger.get("/users/1"),
            stranger.head("/users/1"),
            stranger.get("/users/x"),
        ]

    assert [answer.status_code for answer in answers] == [401] * 6
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    assert list(answers[0].json()) == ["detail"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_token_both_endpoints_answer(protected: Service, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {TOKEN}"}
    with httpx.Client(base_url=protected.url, headers=headers) as friend:
        created = friend.post("/users", json=new_user())

        assert created.status_code == 201
        assert friend.get(created.headers["location"]).json() == created.json()
    assert TOKEN not in protected.log


def test_the_document_tells_of_the_token_and_stays_open(
    protected: Service, client: httpx.Client
) -> None:
    document = HTTP.get(f"{protected.url}/openapi.json").json()
    operations = [
        document["paths"]["/users"]["post"],
        document["paths"]["/users/{user_id}"]["get"],
    ]

    assert document["components"]["securitySchemes"] == {
        "HTTPBearer": {"type": "http", "scheme": "bearer"}
    }
    for operation in operations:
        assert operation["security"] == [{"HTTPBearer": []}]
        assert "401" in operation["responses"]
    assert HTTP.get(f"{protected.url}/docs").status_code == 200
    assert HTTP.get(f"{protected.url}/health").status_code == 200
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_the_start_says_that_anyone_may_come_in_without_a_token(
    service: Service, protected: Service
) -> None:
    assert service.log.count("API_TOKEN") == 1
    assert "API_TOKEN" not in protected.log


def test_an_unforeseen_error_is_a_constant_500_and_leaks_nothing(
    client: httpx.Client, service: Service, database_url: str
) -> None:
    lines_before = len(service.log.splitlines())
    if database_url.startswith("sqlite"):
        broken = "INSERT INTO users VALUES ('marker@example.com', X'FF', 77777)"
        mended = "DELETE FROM users WHERE id = 77777"
    else:
        broken = "ALTER TABLE users RENAME TO marker"
        mended = "ALTER TABLE marker RENAME TO users"
    query(database_url, broken)
    try:
        answer = client.get("/users/77777")
    finally:
        query(database_url, mended)
    wait_until(lambda: len(service.log.splitlines()) > lines_before, 5)
    log = service.log.splitlines()[lines_before:]

    assert_refused(client, answer, 500)
    assert answer.json() == {"detail": "Internal Server Error"}
    assert len(log) == 1
    assert re.search(r"Error in .*read_user:\d+$", log[0])
    assert not re.search("Traceback|SELECT|marker|77777", log[0])


def test_the_log_of_a_hostile_day_names_no_user(service: Service) -> None:
    """Runs after all that was sent above to the shared service."""
    assert not re.search("Traceback|marker|@|Ada|SELECT|INSERT", service.log)


def test_the_start_gives_up_after_30_seconds_with_one_line(hopeless: Service) -> None:
    wait_until(lambda: "Waiting 30 s for" in hopeless.log, 10)

    assert hopeless.process.wait(timeout=40) == 3
    assert (
        hopeless.log.count("Cannot use DATABASE_URL, postgresql+psycopg2://ada:***@")
        == 1
    )
    assert not re.search("Traceback|secret", hopeless.log)
