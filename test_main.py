"""The promises of the README, on SQLite and on a PostgreSQL that the tests start.

`python test_main.py COMMAND ...` runs a command beside such a PostgreSQL, with its
address in `DATABASE_URL`.
"""

import asyncio
import importlib
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
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from uuid import uuid4

import httpx
import psycopg2
import pytest
from sqlalchemy import event
from sqlmodel import Session, SQLModel, StaticPool, create_engine

with warnings.catch_warnings(action="ignore"):  # it wants a successor of httpx
    from fastapi.testclient import TestClient

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.timeout(60)]

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
COMMAND = re.search("web: (.*)", (HERE / "Procfile").read_text())[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
JSON = {"Content-Type": "application/json"}


def new_user():
    """What a user needs: the one place in the tests to learn of a new field."""
    return {"email": f"{uuid4()}@example.com", "full_name": "Ada Lovelace"}


def wait_until(what, condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def send_at_once(number, request, *arguments):
    """The statuses of so many requests at once."""
    with ThreadPoolExecutor(number) as threads:
        sent = [threads.submit(request, *arguments) for _ in range(number)]
    return {answer.result().status_code for answer in sent}


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def find_postgresql() -> Path | None:
    """The newest server's pg_ctl: Debian's, beside postgres on PATH, or Homebrew's."""
    found = [*Path("/opt/homebrew/opt").glob("postgresql*/bin/pg_ctl")]
    if on_path := shutil.which("postgres"):
        found.append(Path(on_path).resolve().with_name("pg_ctl"))
    debian = Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")
    found += sorted(debian, key=lambda path: float(path.parts[-3]))
    return found[-1] if found else None


class PostgreSQL:
    """A throwaway server, with a socket in its folder."""

    user = "postgres" if os.geteuid() == 0 else None  # it refuses root

    def __init__(self, pg_ctl: Path, folder: Path, settings: tuple[str, ...]) -> None:
        self.pg_ctl, self.folder, self.port = pg_ctl, folder, find_free_port()
        self.url = f"postgresql://ada:secret@127.0.0.1:{self.port}/postgres"
        self.options = " -c ".join([f"-p {self.port} -k {folder}", *settings])
        if self.user:
            shutil.chown(folder, self.user)
        self.control("init", "--options=--username=ada --auth=trust --encoding=UTF8 -N")

    def control(self, *arguments: str) -> None:
        subprocess.run(
            [self.pg_ctl, f"--pgdata={self.folder}/data", *arguments],
            cwd=self.folder,
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user else None,
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def start(self) -> None:
        log = f"--log={self.folder}/log"
        self.control("start", "--wait", f"--options={self.options}", log)

    def stop(self, mode: str = "immediate") -> None:
        self.control("stop", f"--mode={mode}")


@contextmanager
def run_postgresql(*settings: str) -> Iterator[PostgreSQL]:
    """Start a server with settings as in postgresql.conf, like "fsync=off"."""
    pg_ctl = find_postgresql()
    assert pg_ctl, "PostgreSQL's server is not here: apt install postgresql"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to stop the server
    with TemporaryDirectory() as folder:
        server = PostgreSQL(pg_ctl, Path(folder), settings)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def connect(database_url):
    """To the database itself, beside the service."""
    if database_url.startswith("sqlite"):
        path = database_url.removeprefix("sqlite:///")
        return sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection = psycopg2.connect(database_url)
    connection.autocommit = True
    return connection


def query(database_url, sql):
    with closing(connect(database_url)) as connection:
        cursor = connection.cursor()
        cursor.execute(sql)
        return cursor.fetchall() if cursor.description else []


def lock_users(database_url):
    """A connection that keeps others from writing, until it is closed."""
    locker, on_file = connect(database_url), database_url.startswith("sqlite")
    locker.cursor().execute("BEGIN EXCLUSIVE" if on_file else "BEGIN; LOCK TABLE users")
    return locker


def create_database(database_url, tmp_path, name):
    """The URL of an empty one of the same kind."""
    if database_url.startswith("sqlite"):
        return f"sqlite:///{tmp_path}/{name}.db"
    query(database_url, f"CREATE DATABASE {name}")
    return database_url.replace("/postgres", f"/{name}")


PROTOTYPE = """
import time
from fastapi import BackgroundTasks, Body
from sqlalchemy import text
Code = Annotated[str, Body()]
done = []

@app.post("/run")
def run(code: Code, session: SessionDep, tasks: BackgroundTasks):
    exec(code, globals() | locals())

@app.post("/run-async")
async def run_async(code: Code, session: SessionDep, tasks: BackgroundTasks):
    run(code, session, tasks)

app.post("/run-on-loop")(on_loop(run))

@app.get("/state")
async def tell_state():
    free = getattr(turns.get(None), "value", DB_POOL_SIZE)
    return {"turns": free, "out": engine.pool.checkedout(), "done": done}
"""
ADD = "user = User(email='{0}', full_name='A'); session.add(user)"
PLAIN = f"{ADD}; session.commit(); session.refresh(user)"
WORK = """def work():
  with Session(engine) as own:
    for _ in "ab": own.exec(select(1)); own.commit(); time.sleep(5)
  done.append("worked")
tasks.add_task(work)"""


class Service(httpx.Client):
    """The Procfile's line on main.py and a prototype's endpoints, and a client of it."""

    def __init__(self, folder, command=COMMAND, **settings):
        self.port = find_free_port()
        self.log_file = folder / f"{self.port}.log"
        (folder / "prototype.py").write_text((HERE / "main.py").read_text() + PROTOTYPE)
        environment = {"PATH": PATH, "PYTHONWARNINGS": "error", "PORT": str(self.port)}
        environment["PYTHONPATH"] = f"{folder}:{HERE}"
        command = command.replace("main:app", "prototype:app")
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"],
                cwd=folder,
                env=environment | settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        limits = httpx.Limits(max_keepalive_connections=0)  # as of many clients
        url = f"http://127.0.0.1:{self.port}"
        super().__init__(base_url=url, limits=limits, timeout=30)

    def __enter__(self):
        wait_until("the service starts", self.is_ready, 20)
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)

    @property
    def log(self):
        return self.log_file.read_text()

    def wait_for(self, text, count=1):
        wait_until(text, lambda: self.log.count(text) >= count, 20)

    def is_ready(self):
        assert self.process.poll() is None, self.log
        with suppress(httpx.TransportError):
            return self.get("/openapi.json").is_success

    def create(self):
        return self.post("/users", json=new_user())

    def run(self, code=PLAIN, kind=""):
        """Run code in a plain endpoint, or one "-on-loop", or "-async"."""
        return self.post(f"/run{kind}", json=code.replace("{0}", str(uuid4())))

    def has_done(self, what):
        return what in self.get("/state").json()["done"]

    def megabytes(self, measure):
        """VmRSS, the memory now, or VmHWM, the most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{measure}:")[1].split()[0]) / 1024


@pytest.fixture
def load_main(monkeypatch):
    """Imports main.py afresh, with these settings."""

    def load(**settings):
        for name in ("DATABASE_URL", "DB_POOL_SIZE", "API_TOKEN"):
            monkeypatch.setenv(name, settings.get(name, ""))
        monkeypatch.delitem(sys.modules, "main", raising=False)
        return importlib.import_module("main")

    return load


def start_postgresql():
    if not find_postgresql():
        pytest.skip("PostgreSQL's server is not here: apt install postgresql")
    with run_postgresql("max_connections=50") as server:
        yield server


@pytest.fixture(scope="session")
def postgresql():
    yield from start_postgresql()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database_url(request, tmp_path_factory):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/users.db"
    return request.getfixturevalue("postgresql").url


@pytest.fixture(scope="session")
def service(database_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    with Service(folder, DATABASE_URL=database_url) as service:
        service.run(WORK)  # whose end is tested late
        yield service


@pytest.fixture(scope="session", autouse=True)
def hopeless(tmp_path_factory):
    """A service without a database, started first, since it takes 30 s to give up."""
    url = f"postgresql://ada:secret@127.0.0.1:{find_free_port()}/users"
    service = Service(tmp_path_factory.mktemp("hopeless"), DATABASE_URL=url)
    yield service
    service.__exit__()


def test_a_created_user_is_answered_and_can_be_fetched(service):
    user = new_user()
    created = service.post("/users", json=user)
    path = created.headers["location"]
    fetched, head = service.get(path), service.head(path)

    assert (created.status_code, path) == (201, f"/users/{created.json()['id']}")
    assert created.json() == fetched.json() == {**user, "id": created.json()["id"]}
    assert (fetched.status_code, head.status_code, head.content) == (200, 200, b"")
    assert head.headers["content-length"] == fetched.headers["content-length"]


def test_a_duplicate_email_in_another_case_is_409(service):
    user = new_user()
    service.post("/users", json=user)
    again = service.post("/users", json=user | {"email": user["email"].upper()})
    detail = "Email already registered"

    assert (again.status_code, again.json()) == (409, {"detail": detail})


def test_an_unknown_id_is_404(service):
    answer = service.get(f"/users/{2**63 - 1}")

    assert (answer.status_code, answer.json()) == (404, {"detail": "User not found"})


def test_health_and_the_documentation_answer(service):
    assert service.get("/health").json() == {"status": "ok"}
    assert service.head("/health").status_code == 200
    assert service.get("/").headers["location"] == "docs"
    assert "swagger" in service.get("/docs").text


def test_the_document_has_the_two_endpoints_and_all_their_answers(load_main):
    answers = {
        (path, method): sorted(map(int, operation["responses"]))
        for path, methods in load_main().app.openapi()["paths"].items()
        for method, operation in methods.items()
    }

    assert answers == {
        ("/users", "post"): [201, 400, 401, 409, 413, 415, 422, 500, 503],
        ("/users/{user_id}", "get"): [200, 401, 404, 413, 422, 500, 503],
    }


EMAILS = ["marker", "marker@localhost", "marker@example.com\x00", "x@marker€.com"]
EMAILS += ["marker€ \u200b@example.com", "x@xn--marker-€.com", "x@" + "y" * 300]
EMAILS += ["marker\ud800@example.com", "".join(map(chr, range(20_000, 22_000))) + " @"]
NAMES = ["", " \t\n\xa0\u3000", "x" * 201, "marker\x00", "marker\x85x", "marker\ud800"]
IDS = ["0", "1.5", "%00%FF", str(2**63), "9" * 5000]
BODIES = [b"", b"[{}]", b'"marker"', b'{"marker" }', b"{%b}" % (b'"x":1,' * 3000)]
UNREADABLE = [b'{"email": "marker\xff"}', b"[" * 60_000, b'{"x": %b}' % (b"9" * 50_000)]
BAD_INPUT = [
    *[(422, ["body", "email"], {"email": email}) for email in EMAILS],
    *[(422, ["body", "full_name"], {"full_name": name}) for name in NAMES],
    *[(422, ["path", "user_id"], f"GET /users/{user_id}") for user_id in IDS],
    *[(422, ["body"], body) for body in BODIES],
    *[(400, [], body) for body in UNREADABLE],
    *[(405, [], f"{method} /users") for method in ("GET", "PUT")],
    (404, [], "GET /marker"),
    (413, [], b'{"email": "marker@example.com"}'.ljust(65_537)),
]


@pytest.mark.parametrize(
    ("status", "place", "sent"), BAD_INPUT, ids=lambda value: ascii(value)[-40:]
)
def test_bad_input_is_refused_without_an_echo(service, status, place, sent):
    before = len(service.log)
    if isinstance(sent, str):
        answer = service.request(*sent.split())
    elif isinstance(sent, dict):
        body = json.dumps(new_user() | sent)
        answer = service.post("/users", content=body, headers=JSON)
    else:
        answer = service.post("/users", content=iter([sent]), headers=JSON)
    detail = answer.json()["detail"]

    assert (answer.status_code, list(answer.json())) == (status, ["detail"])
    assert len(answer.content) < 1000
    assert not re.search("marker|[€\u200b\u4e20]|\\\\u", answer.text)
    if place:
        assert list(detail[0]) == ["type", "loc", "msg"]
        assert detail[0]["loc"][: len(place)] == place
    assert service.create().status_code == 201
    assert service.log[before:] == ""


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("email", "{}+tag.O'Hara@MAIL.example.com", "{}+tag.o'hara@mail.example.com"),
        ("email", "{}@xn--exmple-cua.com", "{}@exämple.com"),
        ("email", "{}J\u030c@example.com", "{}\u01f0@example.com"),
        ("full_name", f" {'x' * 200}\n", "x" * 200),
        ("full_name", "e\u0301\U0001f469\u200d\U0001f52c \u05d0\u05d3\u200f\u0639", ""),
        ("full_name", "O'Hara; DROP TABLE users -- %s \\ \"<b>", ""),
    ],
)
def test_a_good_field_comes_back_lower_cased_or_trimmed(service, field, value, stored):
    unique = str(uuid4())
    user = new_user() | {field: value.replace("{}", unique)}
    path = service.post("/users", json=user).headers["location"]

    assert service.get(path).json()[field] == (stored or value).replace("{}", unique)


@pytest.mark.parametrize("kind", [b"application/x-www-form-urlencoded", b"\xff", None])
def test_a_body_not_declared_as_json_is_415_and_says_what_to_add(service, kind):
    headers = {b"Content-Type": kind} if kind else {}
    answer = service.post("/users", content=b"{}", headers=headers)
    detail = "Send JSON, and the header Content-Type: application/json"

    assert (answer.status_code, answer.json()) == (415, {"detail": detail})


POST = "POST /users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
ENDLESS = {"body": (b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n%b\r\n")}
ENDLESS["header"] = (b"", b"X: %b\r\n")


@pytest.mark.parametrize("part", ENDLESS)
def test_what_has_no_end_is_cut_off_and_not_kept_in_memory(service, part):
    start, more = ENDLESS[part]
    before = service.megabytes("VmRSS")
    with socket.create_connection(("127.0.0.1", service.port)) as endless:
        endless.sendall(POST.encode() + start)
        with suppress(ConnectionError):
            for _ in range(1000):
                endless.sendall(more % (b"x" * 2**16))

    assert service.megabytes("VmHWM") < before + 30
    assert service.create().status_code == 201


TOKEN = "correct-horse"
OTHERS = ["", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}2", "Bearer \xff"]
OTHERS += [TOKEN, f"Bearer {TOKEN.upper()}", f"Basic {TOKEN}"]


def test_with_a_token_set_only_a_request_with_it_is_answered(load_main, tmp_path):
    main = load_main(DATABASE_URL=f"sqlite:///{tmp_path}/users.db", API_TOKEN=TOKEN)
    requests = [("POST", "/users", new_user()), ("POST", "/users", {})]
    requests += [("GET", "/users/x", None), ("HEAD", "/users/1", None)]
    with TestClient(main.app) as client:
        for header in OTHERS:
            sent = {"Authorization": header.encode("latin-1")} if header else {}
            for method, path, body in requests:
                answer = client.request(method, path, json=body, headers=sent)
                assert answer.status_code == 401, (header, method)
                assert answer.headers["www-authenticate"] == "Bearer"
        client.headers = {"Authorization": f"bearer {TOKEN}"}
        path = client.post("/users", json=new_user()).headers["location"]
        assert client.get(path).status_code == 200
    for methods in main.app.openapi()["paths"].values():
        for operation in methods.values():
            assert operation["security"] == [{"HTTPBearer": []}]


@pytest.mark.parametrize("settings", [{}, {"DATABASE_URL": "", "API_TOKEN": ""}])
def test_the_readmes_curls_work_without_settings_and_the_log_warns(tmp_path, settings):
    examples = re.findall(r"^\$ (curl .*)\n((?:[^$`].*\n)*)", README, re.MULTILINE)
    with Service(tmp_path, DB_POOL_SIZE="", **settings) as service:
        for command, answer in examples:
            command = command.replace("localhost:8000", f"localhost:{service.port}")
            printed = subprocess.check_output(command, shell=True, text=True)
            assert printed == answer.removesuffix("\n")
    stored = query(f"sqlite:///{tmp_path}/users.db", "SELECT email FROM users")

    assert (len(examples) >= 3, stored) == (True, [("ada@example.com",)])
    assert len(re.findall("WARNING.*(?:DATABASE_URL|API_TOKEN)", service.log)) == 2


BAD_SETTINGS = """DB_POOL_SIZE=0 DB_POOL_SIZE=1000 API_TOKEN=a\xa0secret API_TOKEN=s\xe9cret
DATABASE_URL=secret DATABASE_URL=mysql://ada:secret@localhost/users
DATABASE_URL=sqlite:///:memory: DATABASE_URL=sqlite:///file::memory:?uri=true
DATABASE_URL=postgresql://ada:secret@localhost:port/users
DATABASE_URL=postgresql://ada:se@cret@localhost/users
DATABASE_URL=postgresql://ada:secret@/users?host=a:b:c&host=d
DATABASE_URL=postgresql://ada:secret@localhost/users?plugin=x"""


@pytest.mark.parametrize("setting", re.split("[ \n]", BAD_SETTINGS))
def test_a_bad_setting_ends_the_start_with_one_sentence(load_main, caplog, setting):
    name, _, value = setting.partition("=")
    with pytest.raises(SystemExit) as end:
        load_main(**{name: value})
    (sentence,) = caplog.messages

    assert (end.value.code, sentence.split(" must ")[0]) == (3, name)
    assert not re.search("secret|cret@|\n", sentence)


def test_a_start_that_fails_is_not_repeated_by_uvicorn(tmp_path):
    service = Service(tmp_path, DB_POOL_SIZE="0", WEB_CONCURRENCY="2")

    assert service.process.wait(timeout=20) == 0  # of the parent: its workers' is 3
    assert "DB_POOL_SIZE must be 1 to 999" in service.log
    assert not re.search("Traceback|died", service.log)


def test_a_wait_for_the_database_in_vain_ends_with_one_line_that_says_why(hopeless):
    assert hopeless.process.wait(timeout=40) == 3
    assert len(re.findall("No database .* Connection refused", hopeless.log)) == 1
    assert not re.search("Traceback|secret", hopeless.log)


def test_the_start_waits_for_the_database_and_sigterm_ends_the_wait(tmp_path, network):
    network.server.stop()
    both = [Service(tmp_path, DATABASE_URL=network.server.url) for _ in "ab"]
    for service in both:
        service.wait_for("Waiting for the database")
    both[0].process.terminate()
    assert both[0].process.wait(timeout=1) == 128 + signal.SIGTERM
    network.server.start()
    with both[1] as service:
        service.process.terminate()
        assert service.process.wait(timeout=5) == -signal.SIGTERM


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_every_postgresql_scheme_reaches_psycopg2_with_its_query_string(
    load_main, postgresql, scheme
):
    url = f"{scheme}{postgresql.url.removeprefix('postgresql')}?application_name=it"
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'it'"
    with TestClient(load_main(DATABASE_URL=url).app) as client:
        assert client.get("/health").status_code == 200
        assert query(postgresql.url, sql) == [(1,)]
    wait_until("no connection", lambda: query(postgresql.url, sql) == [(0,)], 3)


HOSTS = [
    "127.0.0.1:1&host=127.0.0.1:{0.port}",
    "127.0.0.2:{0.port}&host=127.0.0.1:{0.port}",  # the first is a black hole
    "no-such-host.invalid:{0.port}&host=tw\xf6..dots&host={1.folder}:{1.port}",
    "{1.folder}&port={1.port}",
    "no-such.invalid&hostaddr=127.0.0.1&port={0.port}",
]


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_host_in_a_list_a_folder_or_an_address_is_reached(load_main, network, hosts):
    hosts = hosts.format(network, network.server)
    url = f"postgresql://ada@/postgres?host={hosts}&target_session_attrs=read-write"
    main = load_main(DATABASE_URL=url)
    with TestClient(main.app) as client:
        main.engine.dispose()
        assert client.get("/health").status_code == 200


def test_ids_are_64_bit_and_tables_of_former_versions_go_on_working(
    load_main, database_url, tmp_path
):
    url = create_database(database_url, tmp_path, "former")
    key = "INTEGER" if url.startswith("sqlite") else "BIGSERIAL"
    columns = "email VARCHAR(254) NOT NULL UNIQUE, full_name VARCHAR(200) NOT NULL"
    query(url, f"CREATE TABLE users (id {key} PRIMARY KEY, {columns})")
    user = new_user() | {"email": f"{'x' * 60}@{'y' * 60}.{'z' * 60}.{'v' * 60}.com"}
    with TestClient(load_main(DATABASE_URL=url).app) as client:
        assert client.post("/users", json=user).status_code == 201
        assert client.post("/users", json=user).status_code == 409
    query(url, "DROP TABLE users")
    with TestClient(load_main(DATABASE_URL=url).app) as client:
        sequence = "ALTER SEQUENCE users_id_seq RESTART WITH 9223372036854775807"
        if key == "BIGSERIAL":
            query(url, sequence)
        assert client.post("/users", json=user).status_code == 201


def test_the_procfile_hides_the_server_serves_every_interface_and_logs_no_request(
    service,
):
    assert "server" not in service.get("/health").headers
    assert "running on http://0.0.0.0:" in service.log
    assert "GET /" not in service.log
    # Longer than the 60 seconds of the usual router.
    assert int(re.search(r"--timeout-keep-alive (\d+)", COMMAND)[1]) > 60


def send_load(service, connections, requests, path="/users", body=None):
    """Count the statuses on kept-alive connections: GETs, first a POST on each fourth."""
    head = POST.replace("/users", path)
    get = f"GET {service.create().headers['location']} HTTP/1.1\r\nHost: x\r\n\r\n"

    async def send(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        sent = json.dumps(body.replace("{0}", str(uuid4())) if body else new_user())
        post = f"{head}Content-Length: {len(sent)}\r\n\r\n{sent}"
        statuses = []
        for request in [get if number % 4 else post, *[get] * (requests - 1)]:
            writer.write(request.encode())
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"length: (\d+)", answer)[1]))
            statuses.append(int(answer.split()[1]))
        writer.close()
        return statuses

    async def send_all():
        return await asyncio.gather(*map(send, range(connections)))

    return Counter(chain(*asyncio.run(send_all())))


LOADS = [(10, 100), (256, 2), (1000, 1)]


@pytest.mark.parametrize(("connections", "requests"), LOADS)
def test_no_request_fails_at_any_number_of_connections(service, connections, requests):
    posts = len(range(0, connections, 4))
    wanted = Counter({201: posts, 200: connections * requests - posts})

    assert send_load(service, connections, requests) == wanted


def test_400_stuck_clients_do_not_delay_a_request(service):
    half_sent = [
        b"GET /users/1 HT",
        f"{POST}Content-Length: 99\r\n\r\n{{".encode(),
        b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n" * 50,  # and reads no answer
    ]
    with ExitStack() as stack:
        for number in range(400):
            stuck = socket.create_connection(("127.0.0.1", service.port))
            stack.enter_context(stuck).sendall(half_sent[number % 3])
        assert service.create().status_code == 201

        assert time_status(service.create) < (201, 1)


def test_clients_that_hang_up_leave_no_memory_behind(service):
    memory = []
    for _ in range(3):
        for _ in range(300):
            with socket.create_connection(("127.0.0.1", service.port)) as client:
                client.sendall(b"GET /users/1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert service.create().status_code == 201
        memory.append(service.megabytes("VmRSS"))

    assert memory[2] < memory[0] + 12


def test_two_releases_of_two_processes_race_within_20_connections(
    database_url, tmp_path
):
    """They start at once on an empty database, and one email makes one user."""
    url = create_database(database_url, tmp_path, "releases")
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'releases'"
    both = [Service(tmp_path, DATABASE_URL=url, WEB_CONCURRENCY="2") for _ in "ab"]
    with both[0], both[1], ThreadPoolExecutor(50) as threads:
        for release in both:
            release.wait_for("Application startup complete", count=2)
            assert not re.search("Traceback|ERROR|died", release.log)
        user = new_user()
        loud = user | {"email": user["email"].upper()}
        sent = [(one, body) for one in both for body in (user, loud)] * 12
        answers = threads.map(lambda it: it[0].post("/users", json=it[1]), sent)
        assert Counter(answer.status_code for answer in answers) == {201: 1, 409: 47}
        loads, held = [threads.submit(send_load, one, 50, 5) for one in both], [0]
        while not all(load.done() for load in loads):
            held += [] if url.startswith("sqlite") else query(database_url, count)[0]

    assert [load.result() for load in loads] == [{201: 13, 200: 237}] * 2
    assert max(held) <= 20


def time_status(request, *arguments):
    started = time.monotonic()
    answer = request(*arguments)
    if answer.status_code == 503:
        assert answer.headers["retry-after"] == "2"
        assert answer.json() == {"detail": "Database unavailable"}
    return answer.status_code, time.monotonic() - started


def test_a_line_longer_than_the_deadline_fails_nothing(service):
    assert send_at_once(27, service.run, "time.sleep(0.9)") == {200}


def test_a_line_that_does_not_move_is_503_in_the_end(load_main, monkeypatch, tmp_path):
    main = load_main(DATABASE_URL=f"sqlite:///{tmp_path}/users.db", DB_POOL_SIZE="1")
    monkeypatch.setattr(main, "REQUEST_TIMEOUT", 0.1)
    entered, left = Event(), Event()

    @main.app.get("/stuck")
    def stay(session: main.SessionDep):
        entered.set()
        left.wait(5)

    with TestClient(main.app) as client, ThreadPoolExecutor() as threads:
        stuck = threads.submit(client.get, "/stuck")
        assert entered.wait(5)
        assert time_status(client.get, "/health") < (503, 2)
        left.set()
        assert stuck.result().status_code == 200
        assert client.get("/health").status_code == 200


class Network:
    """A proxy before a server, under a name, and what can befall it."""

    def __init__(self, server, folder):
        self.server, self.hosts, self.port = server, folder / "hosts", find_free_port()
        self.held, self.frozen, self.pause, self.late, self.cuts = [], False, 0, 0, 0
        # It answers no attempt to connect, since its backlog is full.
        self.hole = socket.create_server(("127.0.0.2", self.port), backlog=0)
        self.filling = socket.create_connection(self.hole.getsockname())
        self.name()
        Thread(target=asyncio.run, args=[self.serve()], daemon=True).start()

    def name(self, line="127.0.0.1 db.users"):
        self.hosts.write_text(f"127.0.0.1 localhost\n{line}\n")

    async def serve(self):
        proxy = await asyncio.start_server(self.accept, "127.0.0.1", self.port)
        await proxy.serve_forever()

    async def accept(self, reader, writer):
        with suppress(OSError):
            theirs = await asyncio.open_connection("127.0.0.1", self.server.port)
            ways = [(reader, theirs[1]), (theirs[0], writer)]
            await asyncio.gather(*[self.pass_on(*way) for way in ways])
        writer.close()

    async def pass_on(self, reader, writer):
        """Send pieces, after a pause, with odds to be seconds late, or cut."""
        with suppress(OSError):
            while data := await reader.read(65_536):
                end = len(data) // 2 if random.random() < self.cuts else len(data)
                for piece in (data[: end // 2], data[end // 2 : end]):
                    late = random.uniform(2, 5) if random.random() < self.late else 0
                    await asyncio.sleep(self.pause + late)
                    while self.frozen:
                        await asyncio.sleep(0.02)
                    writer.write(piece)
                if end < len(data):
                    break
        writer.close()

    def cut(self):
        terminate = "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
        others = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        query(self.server.url, f"{terminate} WHERE {others}")

    def rename(self, line=""):
        self.name(line)
        self.cut()

    def silence_names(self):
        self.held.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.held[0].bind(("127.0.0.53", 53))
        self.rename("")

    def fill(self):
        self.cut()
        with pytest.raises(psycopg2.OperationalError, match="too many clients"):
            while True:
                self.held.append(psycopg2.connect(self.server.url))

    def turn_read_only(self, value="on"):
        setting = f"default_transaction_read_only = {value}"
        query(self.server.url, f"ALTER SYSTEM SET {setting}")
        query(self.server.url, "SELECT pg_reload_conf()")

    def mend(self):
        """All but a server that was stopped, or turned read-only."""
        self.frozen, self.pause, self.late, self.cuts = False, 0, 0, 0
        self.name()
        while self.held:
            self.held.pop().close()


FAULTS = {
    "stopped": lambda it: it.server.stop("fast"),
    "frozen": lambda it: setattr(it, "frozen", True),
    "read-only": Network.turn_read_only,
    "locked": lambda it: it.held.append(lock_users(it.server.url)),
    "full": Network.fill,
    "slow": lambda it: setattr(it, "pause", 0.5),
    "black-holed": lambda it: it.rename("127.0.0.2 db.users"),
    "nameless": Network.silence_names,
}
MENDED = {
    "stopped": lambda it: it.server.start(),
    "read-only": lambda it: it.turn_read_only("off"),
}
NAMESPACES = os.geteuid() == 0 and shutil.which("unshare")


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    for server in start_postgresql():
        yield Network(server, tmp_path_factory.mktemp("names"))


@pytest.fixture(scope="session")
def direct(network):
    """A service with a name server of its own, as root, which knows the database."""
    folder, command, host = network.hosts.parent, COMMAND, "127.0.0.1"
    if NAMESPACES:
        (folder / "resolv.conf").write_text("nameserver 127.0.0.53\n")
        bind = f"mount --bind {folder}/$name /etc/$name || exit"
        script = f"for name in hosts resolv.conf; do {bind}; done; exec {COMMAND}"
        command, host = f"unshare --mount sh -c '{script}'", "db.users"
    url = f"postgresql://ada@{host}:{network.port}/postgres?application_name=direct"
    with Service(folder, command, DATABASE_URL=url) as service:
        yield service


@pytest.fixture(scope="session")
def bounced(network, tmp_path_factory):
    """A service by a PgBouncer in transaction mode."""
    if not shutil.which("pgbouncer"):
        pytest.skip("PgBouncer is not here: apt install pgbouncer")
    port, file = find_free_port(), network.server.folder / "pgbouncer.ini"
    file.write_text(
        f"[databases]\npostgres = host=127.0.0.1 port={network.port} user=ada\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
        "pool_mode = transaction\ndefault_pool_size = 2\nserver_login_retry = 1\n"
        "unix_socket_dir =\n"
    )
    silence = {"stderr": subprocess.DEVNULL}
    bouncer = subprocess.Popen(["pgbouncer", file], user=PostgreSQL.user, **silence)
    url = f"postgresql://ada@127.0.0.1:{port}/postgres"
    with Service(tmp_path_factory.mktemp("bounced"), DATABASE_URL=url) as service:
        service.database_url = url
        yield service
    bouncer.kill()
    bouncer.wait()


def assert_at_rest(service, network):
    """Every turn and connection is back, no more of them than the pool's, no file open."""
    sql = "SELECT state FROM pg_stat_activity WHERE application_name = 'direct'"
    files = Path(f"/proc/{service.process.pid}/fd")

    def rests():
        state, rows = service.get("/state").json(), query(network.server.url, sql)
        pooled = len(rows) <= 5 and set(rows) <= {("idle",)}
        return pooled and (state["turns"], state["out"]) == (5, 0)

    wait_until("all turns and connections are back", rests, 6)
    assert len([*files.iterdir()]) < 26


@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_is_503_within_5_seconds_and_needs_no_restart(
    network, direct, bounced, fault
):
    if fault in ("nameless", "black-holed") and not NAMESPACES:
        pytest.skip("names of its own need Linux and root")
    services = [direct, bounced][: 2 if fault in list(FAULTS)[:4] else 1]
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    before, others = len(direct.log), []
    with ThreadPoolExecutor(36) as threads, ExitStack() as stack:
        FAULTS[fault](network)
        stack.callback(MENDED.get(fault, Network.mend), network)
        sent = [direct.run, *(one.create for one in services)] * 12
        requests = [threads.submit(time_status, request) for request in sent]
        while not all(request.done() for request in requests):
            others.append(time_status(direct.get, "/"))
        if fault == "locked":
            wait_until("no wait", lambda: not query(network.server.url, waits), 5)
    for one in services:
        wait_until("it is back", lambda one=one: one.create().status_code == 201, 3)

    for request, done in zip(sent, requests):
        assert done.result() < (503, 6 if request == direct.run else 5)
        assert done.result()[0] == 503
    assert {status for status, _ in others} == {307}
    assert max(seconds for _, seconds in others) < 1
    assert not re.search("Traceback|INSERT INTO|secret|@example", direct.log[before:])
    assert_at_rest(direct, network)


def test_connections_that_the_server_closed_cost_nothing(network, direct):
    assert send_at_once(20, direct.create) == {201}
    network.cut()
    assert send_at_once(20, direct.create) == {201}


def test_a_connection_to_a_server_turned_read_only_is_dropped(direct):
    turn = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
    code = f"with engine.connect() as own: own.exec_driver_sql('{turn}'); own.commit()"
    failed = direct.run(f"{code}; own.exec_driver_sql('CREATE TABLE x ()')", "-on-loop")

    assert (failed.status_code, send_at_once(20, direct.create)) == (503, {201})


def test_a_statement_may_take_what_is_left_of_the_deadline(direct):
    show = "session.exec(text('SHOW statement_timeout')).one()[0]"
    direct.run(f"time.sleep(1); session.exec(select(1)); done.append({show})")
    limits = [it for it in direct.get("/state").json()["done"] if it.endswith("ms")]

    assert 2000 < int(limits[0].removesuffix("ms")) <= 3000


def test_the_end_of_a_slow_transaction_holds_nothing_up(network, direct):
    code = "session.exec(select(1)); done.append('read'); await_(anyio.sleep(1))"
    with ThreadPoolExecutor() as threads:
        slow = threads.submit(direct.run, code, "-on-loop")
        wait_until("it reads", lambda: direct.has_done("read"), 5)
        network.pause = 1
        while not slow.done():
            assert time_status(direct.get, "/") < (307, 1)
        network.pause = 0


def test_pgbouncers_next_transaction_has_no_limit(bounced):
    assert bounced.create().status_code == 201
    assert query(bounced.database_url, "SHOW statement_timeout") == [("0",)]


@contextmanager
def writers(service):
    """Eight clients that create users and fetch them; yields the statuses by email."""
    statuses, stopped = {}, Event()

    def write():
        while not stopped.is_set():
            user = new_user()
            with suppress(httpx.TransportError):
                created = service.post("/users", json=user)
                statuses[user["email"]] = created.status_code
                if created.status_code == 201:
                    assert created.json() == {**user, "id": created.json()["id"]}
                    fetched = service.get(created.headers["location"])
                    assert fetched.json() == created.json() or fetched.status_code > 500

    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(write) for _ in range(8)]
        try:
            yield statuses
        finally:
            stopped.set()
    for future in futures:
        future.result()


def wait_for_statuses(statuses, status, count):
    values = statuses.values()
    enough = [*values].count(status) + count
    wait_until(f"{count} {status}", lambda: [*values].count(status) >= enough, 30)


def assert_kept(database_url, statuses):
    """Each acknowledged user is there exactly once."""
    stored = Counter(row[0] for row in query(database_url, "SELECT email FROM users"))

    assert {stored[email] for email in statuses if statuses[email] == 201} == {1}


def test_no_acknowledged_user_is_lost_when_the_service_is_killed(
    tmp_path, database_url
):
    with Service(tmp_path, DATABASE_URL=database_url) as one, writers(one) as statuses:
        wait_for_statuses(statuses, 201, 100)
        one.process.kill()
    assert_kept(database_url, statuses)


def test_no_acknowledged_user_is_lost_when_postgresql_crashes(network, direct):
    with writers(direct) as statuses:
        wait_for_statuses(statuses, 201, 50)
        network.server.stop("immediate")
        wait_for_statuses(statuses, 503, 1)
        network.server.start()
        wait_for_statuses(statuses, 201, 50)

    assert set(statuses.values()) == {201, 503}
    assert_kept(network.server.url, statuses)


def test_a_network_that_delays_splits_and_cuts_mixes_up_no_answers(network, direct):
    with writers(direct) as statuses:
        network.late = network.cuts = 0.05
        wait_for_statuses(statuses, 503, 5)
        wait_for_statuses(statuses, 201, 5)
        network.mend()

    assert set(statuses.values()) == {201, 503}
    assert_kept(network.server.url, statuses)
    assert_at_rest(direct, network)


def test_a_request_in_flight_is_answered_before_the_process_stops(
    tmp_path, database_url
):
    with (
        Service(tmp_path, DATABASE_URL=database_url) as service,
        closing(lock_users(database_url)) as locker,
        ThreadPoolExecutor() as threads,
    ):
        post = threads.submit(service.create)
        with pytest.raises(TimeoutError):
            post.result(timeout=1)
        service.process.terminate()
        service.wait_for("Shutting down")
        locker.close()

        assert post.result().status_code == 201
        assert service.process.wait(timeout=5) == -signal.SIGTERM


def test_a_stuck_client_keeps_no_process_from_stopping(tmp_path):
    short = COMMAND.replace("shutdown 10", "shutdown 1")
    with (
        Service(tmp_path, short) as service,
        socket.create_connection(("127.0.0.1", service.port)) as stuck,
    ):
        stuck.sendall(f"{POST}Content-Length: 99\r\n\r\n{{".encode())
        service.process.terminate()
        service.process.wait(timeout=5)

    assert (short == COMMAND, "Traceback" in service.log) == (False, False)


@pytest.mark.parametrize("code", ["{}['marker']", "session.exec(text('marker'))"])
def test_a_bug_is_a_constant_500_and_its_frames_and_class_are_logged(service, code):
    before, detail = len(service.log), "Internal Server Error"
    answer = service.run(code, "-on-loop")
    wait_until("it is logged", lambda: "Error'" in service.log[before:], 5)
    log = service.log[before:]

    assert (answer.status_code, answer.json()) == (500, {"detail": detail})
    assert re.search(r'File ".*prototype.py", line \d+, in run\n    exec\(code', log)
    assert "marker" not in log


def test_sqlite_lets_readers_go_on_beside_a_writer(tmp_path):
    with Service(tmp_path) as service:
        path = service.create().headers["location"]
        with closing(lock_users(f"sqlite:///{tmp_path}/users.db")):
            assert time_status(service.get, path) < (200, 1)


SNIPPETS = {
    "": f"""{PLAIN}
[*session.exec(select(User).execution_options(yield_per=2))]
with Session(engine) as own: own.exec(select(1))
session.commit(); own = engine.connect()
own.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM")); own.close()
""",
    "-on-loop": f"""{ADD}; session.flush()
try:
    with session.begin_nested(): {ADD}
except exc.IntegrityError: session.exec(select(User).where(User.email == "{{0}}")).one()
session.commit(); [*session.exec(select(User).execution_options(yield_per=2))]
with Session(engine) as own: own.exec(select(1))
""",
    "-async": f"{ADD}; session.commit(); session.exec(select(User)).all()",
}


@pytest.mark.parametrize("kind", SNIPPETS)
def test_what_tutorials_write_works_in_twelve_requests_at_once(service, kind):
    assert send_at_once(12, service.run, SNIPPETS[kind], kind) == {200}


def test_plain_endpoints_hold_at_256_connections(service):
    assert send_load(service, 256, 1, "/run", PLAIN) == {200: 256}


def test_a_session_used_after_its_request_fails_and_keeps_no_connection(service):
    use = "\n  try: session.exec(select(1))\n  except exc.InvalidRequestError: "
    service.run(f"def late():{use}done.append('late')\ntasks.add_task(late)")

    wait_until("it fails", lambda: service.has_done("late"), 5)
    wait_until("all is back", lambda: service.get("/state").json()["out"] == 0, 12)


def test_a_background_task_of_ten_seconds_has_a_session_of_its_own(service):
    wait_until("it ends", lambda: service.has_done("worked"), 20)


def test_an_async_endpoint_in_wait_of_a_lock_gives_up_in_time(direct, network):
    with closing(lock_users(network.server.url)):
        status, seconds = time_status(direct.run, f"{ADD}; session.commit()", "-async")

    assert (status, seconds < 5) == (503, True)


@pytest.mark.parametrize("context", [True, False])
def test_a_test_client_works_as_in_the_tutorial(
    load_main, service, database_url, context
):
    main = load_main(DATABASE_URL=database_url)
    for client in (TestClient(main.app), TestClient(main.app)):
        with client if context else nullcontext(), ThreadPoolExecutor(30) as threads:
            users = [new_user() for _ in range(30)]
            posts = [threads.submit(client.post, "/users", json=user) for user in users]
        assert {post.result().status_code for post in posts} == {201}
    main.engine.dispose()


def test_a_session_shared_as_in_the_tutorials_fixture_survives_a_409(load_main):
    main, user = load_main(), new_user()
    options = {"connect_args": {"check_same_thread": False}, "poolclass": StaticPool}
    engine = create_engine("sqlite://", **options)
    SQLModel.metadata.create_all(engine)
    with Session(engine) as session:
        main.app.dependency_overrides[main.get_session] = lambda: session
        client = TestClient(main.app)
        statuses = [client.post("/users", json=it).status_code for it in [user, user]]
        assert [*statuses, client.get("/users/1").status_code] == [201, 409, 200]
    engine.dispose()


def test_a_request_is_one_statement(load_main, postgresql):
    main, statements = load_main(DATABASE_URL=postgresql.url), []
    with TestClient(main.app) as client:
        note = event.listens_for(main.engine, "before_cursor_execute")
        note(lambda *arguments: statements.append(arguments))
        client.get(client.post("/users", json=new_user()).headers["location"])

    assert len(statements) == 2


SCRIPT = """
from main import Session, User, engine, select
with Session(engine) as session:
    session.add(User(email="script@example.com", full_name="A"))
    session.connection().exec_driver_sql("SELECT pg_sleep(4.1)")
    session.commit()
    session.exec(select(User).execution_options(yield_per=2)).first()
with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
    connection.exec_driver_sql("CREATE INDEX CONCURRENTLY names ON users (full_name)")
    cursor = connection.connection.cursor()
    cursor.copy_expert("COPY users TO STDOUT", open("copy", "w"))
"""


def test_a_script_may_wait_and_use_cursors_indexes_and_copy(
    load_main, tmp_path, postgresql
):
    url = create_database(postgresql.url, tmp_path, "script")
    environment = {"PATH": PATH, "PYTHONPATH": str(HERE), "DATABASE_URL": url}
    with TestClient(load_main(DATABASE_URL=url).app):
        command = ["python", "-c", SCRIPT]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)

    assert "script@example.com" in (tmp_path / "copy").read_text()


def test_the_readmes_changes_work_word_for_word(tmp_path, database_url):
    """A field, an endpoint, a test, and a migration of a table that has a user."""
    url = create_database(database_url, tmp_path, "changed")
    for file in ["README.md", "Procfile", "requirements.txt", *HERE.glob("*.py")]:
        shutil.copy(HERE / file, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    files = [tmp_path / name for name in ("models.py", "main.py", "test_main.py")]
    models, main, tests = [file.read_text() for file in files]
    field, endpoint, test = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    record, follow = re.findall(r"```sh\n([^`]*alembic [^`]*)```", README)

    def execute(command):
        environment = os.environ | {"DATABASE_URL": url}
        subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True)

    with Service(tmp_path, DATABASE_URL=url) as service:
        user = service.create().json()
    execute(record)
    for new in field.split("\n\n\n"):
        old = re.escape(new.split("(")[0]) + r"\(.*?\n(?=\n\n)"
        models = re.sub(old, new.strip() + "\n", models, flags=re.DOTALL)
    tests = tests.replace('"full_name": "Ada', '"nickname": "A", "full_name": "Ada')
    files[0].write_text(models)
    execute(follow)
    files[1].write_text(f"{main}\n\n{endpoint}")
    files[2].write_text(f"{tests}\n\n{test}")
    with Service(tmp_path, DATABASE_URL=url) as service:
        assert service.get(f"/users/{user['id']}").json() == {**user, "nickname": None}
        odd = service.post("/users", json=new_user() | {"nickname": "\x00"})
        assert odd.status_code == 422
    if url.startswith("sqlite"):
        execute(".venv/bin/python -m pytest -q -k '(listed or fetched) and sqlite'")


if __name__ == "__main__":
    with run_postgresql() as server:
        environment = os.environ | {"DATABASE_URL": server.url}
        sys.exit(subprocess.call(sys.argv[1:], env=environment))
