"""The promises of the README, on SQLite and on a PostgreSQL that the tests start."""

import asyncio
import atexit
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import NullPool
from sqlmodel import Session, SQLModel, StaticPool, create_engine

with warnings.catch_warnings(action="ignore"):  # it wants a successor of httpx
    from fastapi.testclient import TestClient

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.timeout(60)]

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
COMMAND = re.search("web: (.*)", (HERE / "Procfile").read_text())[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ROOT = os.geteuid() == 0
POSTGRES = "setpriv --reuid=postgres --regid=postgres --clear-groups" if ROOT else "env"


# What a user needs: the one place in the tests to learn of a new field.
def new_user():
    return {"email": f"{uuid4()}@example.com", "full_name": "Ada Lovelace"}


def wait_until(what, condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


# The statuses of so many requests at once.
def send_at_once(number, request, *arguments):
    with ThreadPoolExecutor(number) as threads:
        sent = [threads.submit(request, *arguments) for _ in range(number)]
    return {answer.result().status_code for answer in sent}


def time_status(request, *arguments):
    answer = request(*arguments)
    if answer.status_code == 503:
        assert answer.headers["retry-after"] == "2"
        assert answer.json() == {"detail": "Database unavailable"}
    return answer.status_code, answer.elapsed.total_seconds()


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


# Debian's newest, the one beside the real postgres on PATH, or Homebrew's.
def find_pg_ctl() -> str | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folders.append(Path(shutil.which("postgres") or "postgres").resolve().parent)
    folders += Path("/opt/homebrew/opt").glob("postgresql*/bin")
    return shutil.which("pg_ctl", path=":".join(map(str, folders)))


# A throwaway server, with a socket in its folder.
class PostgreSQL:
    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, find_free_port()
        self.url = f"postgresql+psycopg2://ada:secret@127.0.0.1:{self.port}/postgres"
        self.options = f"-p {self.port} -k {folder} -c max_connections=50"
        if ROOT:  # as which it refuses to run
            shutil.chown(folder, "postgres")
        self.control("init", "--options=--username=ada --auth=trust --encoding=UTF8 -N")

    def control(self, *arguments: str) -> None:
        program = [*POSTGRES.split(), str(find_pg_ctl()), f"-D{self.folder}/data"]
        subprocess.check_output([*program, *arguments], cwd=self.folder)

    def start(self) -> None:
        self.control("start", f"--options={self.options}", f"--log={self.folder}/log")

    def close(self) -> None:
        self.control("stop", "--mode=immediate")


def serve_postgresql() -> Iterator[PostgreSQL]:
    if not find_pg_ctl():
        pytest.skip("PostgreSQL's server is not here: apt install postgresql")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to stop the server
    with TemporaryDirectory() as folder, closing(PostgreSQL(Path(folder))) as server:
        server.start()
        yield server


run_postgresql = contextmanager(serve_postgresql)
postgresql = pytest.fixture(serve_postgresql, scope="session")


# A connection to the database itself, beside the service.
def connect(database_url):
    options = {"isolation_level": "AUTOCOMMIT", "poolclass": NullPool}
    return create_engine(database_url, **options).connect()


def query(database_url, sql):
    with connect(database_url) as connection:
        result = connection.exec_driver_sql(sql)
        return result.all() if result.returns_rows else []


# A connection that keeps others from writing, until it is closed.
def lock_users(database_url):
    locker, on_file = connect(database_url), database_url.startswith("sqlite")
    locker.exec_driver_sql("BEGIN EXCLUSIVE" if on_file else "BEGIN; LOCK TABLE users")
    return locker


# The URL of an empty database beside this one.
def create_database(database_url, name):
    if database_url.startswith("postgresql"):
        query(database_url, f"CREATE DATABASE {name}")
    return re.sub("/(postgres|users.db)$", f"/{name}", database_url)


PROTOTYPE = """
import time
from fastapi import BackgroundTasks, Body
from sqlalchemy import text
done = []
@app.post("/run")
def run(code: Annotated[str, Body()], session: SessionDep, tasks: BackgroundTasks):
    exec(code, globals() | locals())
@app.post("/run-async")
async def run_async(code: Annotated[str, Body()], session: SessionDep):
    run(code, session, None)
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
    for _ in "ab": [own.exec(select(1)) for _ in range(99)]; own.commit(); time.sleep(5)
  done.append("worked")
tasks.add_task(work)"""


# The Procfile's line on main.py and a prototype's endpoints, and a client of it.
class Service(httpx.Client):
    def __init__(self, folder, command=COMMAND, **settings):
        self.port, self.log_file = find_free_port(), folder / f"{uuid4()}.log"
        main = next(it for it in (folder / "main.py", HERE / "main.py") if it.exists())
        (folder / "prototype.py").write_text(main.read_text() + PROTOTYPE)
        environment = {"PATH": PATH, "PORT": str(self.port), "PYTHONWARNINGS": "error"}
        environment |= {"PYTHONPATH": f"{folder}:{HERE}", **settings}
        how = {"cwd": folder, "env": environment, "process_group": 0}
        line = f"exec {command} >{self.log_file} 2>&1".replace("main:", "prototype:")
        self.log_file.touch()
        atexit.register(self.__exit__)  # whatever happens
        self.process = subprocess.Popen(["sh", "-c", line], **how)
        url = f"http://127.0.0.1:{self.port}"
        headers = {"Content-Type": "application/json", "Connection": "close"}
        super().__init__(base_url=url, headers=headers, timeout=30)

    def __enter__(self):
        self.wait_for("Uvicorn running")
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)

    @property
    def log(self):
        return self.log_file.read_text()

    def wait_for(self, text, count=1, start=0):
        wait_until(text, lambda: self.log[start:].count(text) >= count, 20)

    def create(self):
        return self.post("/users", json=new_user())

    # Run code in a plain endpoint, or one "-on-loop", or "-async".
    def run(self, code=PLAIN, kind=""):
        return self.post(f"/run{kind}", json=code.replace("{0}", str(uuid4())))

    def tell(self, what):
        return self.get("/state").json()[what]

    # VmRSS, the memory now, or VmHWM, the most so far.
    def megabytes(self, measure):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{measure}:")[1].split()[0]) / 1024


# Imports main.py afresh, with these settings.
@pytest.fixture
def load_main(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load(**settings):
        monkeypatch.setattr(os, "environ", settings)
        monkeypatch.delitem(sys.modules, "main", raising=False)
        return importlib.import_module("main")

    return load


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database_url(request, tmp_path_factory):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/users.db"
    return request.getfixturevalue("postgresql").url


@pytest.fixture(scope="session")
def service(database_url, tmp_path_factory):
    with Service(tmp_path_factory.mktemp("service"), DATABASE_URL=database_url) as it:
        if database_url.startswith("postgresql"):  # have ids of more than 32 bits
            query(database_url, f"ALTER SEQUENCE users_id_seq RESTART WITH {2**40}")
        it.run(WORK)  # whose end is tested late
        yield it


def test_a_created_user_is_answered_and_can_be_fetched(service):
    user = new_user()
    created = service.post("/users", json=user)
    path = created.headers["location"]
    fetched, head = service.get(path), service.head(path)

    assert (created.status_code, path) == (201, f"/users/{created.json()['id']}")
    assert created.json() == fetched.json() == {**user, "id": created.json()["id"]}
    assert (fetched.status_code, head.status_code, head.content) == (200, 200, b"")


def test_a_duplicate_email_in_another_case_is_409(service):
    user = service.create().json()
    twin = service.post("/users", json=user | {"email": user["email"].upper()})

    assert twin.status_code == 409
    assert twin.json() == {"detail": "Email already registered"}


def test_an_unknown_id_is_404(service):
    answer = service.get(f"/users/{2**63 - 1}")

    assert (answer.status_code, answer.json()) == (404, {"detail": "User not found"})


def test_health_and_the_documentation_answer(service):
    health, head = service.get("/health"), service.head("/health")

    assert (health.json(), head.status_code) == ({"status": "ok"}, 200)
    assert service.get("/", follow_redirects=True).url.path == "/docs"


def test_the_document_has_all_answers_of_the_two_endpoints(load_main):
    paths = load_main().app.openapi()["paths"]
    post, get = paths["/users"]["post"], paths["/users/{user_id}"]["get"]

    assert {"/", "/health"}.isdisjoint(paths)
    assert " ".join(sorted(post["responses"])) == "201 400 401 409 413 415 422 500 503"
    assert " ".join(sorted(get["responses"])) == "200 401 404 413 422 500 503"


EMAILS = ["marker", "marker@localhost", "marker@example.com\x00", "x@marker€.com"]
EMAILS += ["marker€ \u200b@example.com", "x@xn--marker-€.com", "x@" + "y" * 300]
EMAILS += ["marker\ud800@example.com", "".join(map(chr, range(20_000, 22_000))) + " @"]
NAMES = ["", " \t\n\xa0\u3000", "x" * 201, "marker\x00", "marker\x85x", "marker\ud800"]
IDS = ["0", "1.5", "%00%FF", str(2**63), "9" * 5000]
BODIES = [b"", b"[{}]", b'"marker"', b'{"marker" }', b"{%b}" % (b'"x":1,' * 3000)]
UNREADABLE = [b'{"email": "marker\xff"}', b'{"x": %b}' % (b"9" * 50_000)]
REFUSED = [
    *[(422, ["body", "email"], {"email": email}) for email in EMAILS],
    *[(422, ["body", "full_name"], {"full_name": name}) for name in NAMES],
    *[(422, ["path", "user_id"], f"GET /users/{user_id}") for user_id in IDS],
    *[(422, ["body"], body) for body in BODIES],
    *[(400, [], body) for body in UNREADABLE],
    (400 if sys.version_info < (3, 14) else 422, [], b"[" * 60_000),
    *[(404, [], "GET /users/?marker"), (405, [], "PUT /users")],
    (413, [], b'{"email": "marker@example.com"}'.ljust(65_537)),
]


@pytest.mark.parametrize("status, place, sent", REFUSED, ids=lambda it: ascii(it)[-40:])
def test_bad_input_is_refused_without_an_echo(service, status, place, sent):
    before = len(service.log)
    if isinstance(sent, dict):
        sent = json.dumps(new_user() | sent).encode()
    if isinstance(sent, str):
        answer = service.request(*sent.split())
    else:
        answer = service.post("/users", content=iter([sent]))
    detail = answer.json()["detail"]

    assert (answer.status_code, list(answer.json())) == (status, ["detail"])
    assert len(answer.content) < 1000
    assert not re.search("marker|[€\u200b\u4e20]|\\\\u", answer.text)
    if place:
        assert list(detail[0]) == ["type", "loc", "msg"]
        assert detail[0]["loc"][: len(place)] == place
    assert (service.create().status_code, service.log[before:]) == (201, "")


ODD = "e\u0301 \U0001f469\u200d\U0001f52c \u05d0\u200f\u0639 O'Hara'; -- %s \\ \"<b>"
ACCEPTED = [
    ("email", "ada+tag.O'Hara@MAIL.example.com", "ada+tag.o'hara@mail.example.com"),
    ("email", "ada@xn--exmple-cua.com", "ada@exämple.com"),
    ("email", "adaJ\u030c@example.com", "ada\u01f0@example.com"),
    ("full_name", f" {'x' * 200}\n", "x" * 200),
    ("full_name", ODD, ODD),
]


@pytest.mark.parametrize("field, value, stored", ACCEPTED)
def test_a_good_field_comes_back_lower_cased_or_trimmed(service, field, value, stored):
    created = service.post("/users", json=new_user() | {field: value})

    assert service.get(created.headers["location"]).json()[field] == stored


@pytest.mark.parametrize("kind", [b"application/x-www-form-urlencoded", b"\xff", b""])
def test_a_body_not_declared_as_json_is_415_and_says_what_to_add(service, kind):
    answer = service.post("/users", content=b"{}", headers={b"Content-Type": kind})
    detail = "Send JSON, and the header Content-Type: application/json"

    assert (answer.status_code, answer.json()) == (415, {"detail": detail})


HOST = "HTTP/1.1\r\nHost: x\r\n"
POST = f"POST /users {HOST}Content-Type: application/json\r\n"
ENDLESS = [("Transfer-Encoding: chunked\r\n\r\n", "10000\r\n%b\r\n"), ("", "X: %b\r\n")]


@pytest.mark.parametrize("start, more", ENDLESS, ids=["body", "header"])
def test_what_has_no_end_is_cut_off_and_not_kept_in_memory(service, start, more):
    before = service.megabytes("VmRSS")
    with suppress(OSError), socket.create_connection(("127.0.0.1", service.port)) as it:
        it.sendall(f"{POST}{start}".encode())
        for _ in range(1000):
            it.sendall(more.encode() % (b"x" * 2**16))

    assert service.megabytes("VmHWM") < before + 30
    assert service.create().status_code == 201


OTHERS = "|Bearer|Bearer hors|Bearer horse2|Bearer \xff|Bearer HORSE|Basic horse|horse"


@pytest.mark.parametrize("auth", OTHERS.split("|"))
def test_with_a_token_set_only_a_request_with_it_is_answered(load_main, auth):
    user, sent = new_user(), {"Authorization": auth.encode("latin-1")} if auth else {}
    with TestClient(load_main(API_TOKEN="horse").app, headers=sent) as client:
        answers = [client.post("/users", json=body) for body in ({}, user)]
        answers += [client.get("/users/x"), client.head("/users/1")]
        client.headers["Authorization"] = "bearer horse"
        path = client.post("/users", json=user).headers["location"]
        assert client.get(path).status_code == 200

    assert [answer.status_code for answer in answers] == [401] * 4
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}


@pytest.mark.parametrize("settings", [{}, {"DATABASE_URL": "", "API_TOKEN": ""}])
def test_the_readmes_curls_work_without_settings_and_the_log_warns(tmp_path, settings):
    examples = re.findall(r"^\$ (curl .*)\n((?:[^$`].*\n)*)", README, re.MULTILINE)
    with Service(tmp_path, DB_POOL_SIZE="", **settings) as service:
        for command, answer in examples:
            command = command.replace("localhost:8000", f"localhost:{service.port}")
            printed = json.loads(subprocess.getoutput(command))
            assert json.loads(answer).items() <= printed.items()

    assert len(examples) >= 3 and (tmp_path / "users.db").exists()
    assert len(re.findall("WARNING.*(?:DATABASE_URL|API_TOKEN)", service.log)) == 2


BAD_SETTINGS = """DB_POOL_SIZE=0 DB_POOL_SIZE=1000 API_TOKEN=a\xa0secret API_TOKEN=s\xe9cret
DATABASE_URL=sqlite:///:memory: DATABASE_URL=sqlite:///file::memory:?uri=true
DATABASE_URL=postgresql://a:secret@b:port/c DATABASE_URL=postgresql://a:se@cret@b/c
DATABASE_URL=postgresql://a:secret@/c?host=a:b:c&host=d DATABASE_URL=secret
DATABASE_URL=postgresql://a:secret@b/c?plugin=x DATABASE_URL=mysql://a:secret@b/c
DATABASE_URL=postgres:///a:secret@b/c"""


@pytest.mark.parametrize("setting", re.split("[ \n]", BAD_SETTINGS))
def test_a_bad_setting_ends_the_start_with_one_sentence(load_main, caplog, setting):
    name, _, value = setting.partition("=")
    with pytest.raises(SystemExit) as end:
        load_main(**{name: value})
    (sentence,) = caplog.messages

    assert (end.value.code, sentence.split(" must ")[0]) == (3, name)
    assert not re.search("secret|cret@|\n", sentence)


def test_a_wait_for_the_database_in_vain_ends_with_one_line_that_says_why(tmp_path):
    main = (HERE / "main.py").read_text()
    (tmp_path / "main.py").write_text(main.replace("after(30)", "after(2)"))
    service = Service(tmp_path, DATABASE_URL="postgresql://ada:secret@127.0.0.1:1/db")

    assert service.process.wait(timeout=10) == 3
    assert len(re.findall("No database .* Connection refused", service.log)) == 1
    assert not re.search("Traceback|secret", service.log)


def test_the_start_waits_for_the_database_and_sigterm_ends_the_wait(tmp_path, network):
    network.server.close()
    both = [Service(tmp_path, DATABASE_URL=network.server.url) for _ in "ab"]
    for service in both:
        service.wait_for("Waiting for the database")
    both[0].process.terminate()
    assert both[0].process.wait(timeout=1) == 128 + signal.SIGTERM
    network.server.start()
    with both[1] as service:
        service.process.terminate()
        assert service.process.wait(timeout=5) == -signal.SIGTERM


# Nothing listens on port 1 of 127.0.0.1, and 127.0.0.2 answers no attempt to connect.
URLS = [
    "postgres://ada@/postgres?host=127.0.0.1:1&host=127.0.0.1:{0.port}",
    "postgresql://ada@/postgres?host=127.0.0.2:{0.port}&host=127.0.0.1:{0.port}",
    "postgresql://ada@no.invalid,tw\xf6..dots,127.0.0.1:{0.port}/postgres?sslmode=allow",
    "postgresql+psycopg2://ada@/postgres?host={1.folder}&port={1.port}",
    "postgres://ada@no-such.invalid/postgres?hostaddr=127.0.0.1&port={0.port}",
]


@pytest.mark.parametrize("url", URLS)
def test_a_host_in_a_list_a_folder_or_an_address_is_reached(load_main, network, url):
    url = f"{url.format(network, network.server)}&application_name=it"
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'it'"
    main = load_main(DATABASE_URL=url)
    with TestClient(main.app) as client:
        main.engine.dispose()
        assert client.get("/health").status_code == 200
        assert query(network.server.url, sql) == [(1,)]
    wait_until("it is closed", lambda: query(network.server.url, sql) == [(0,)], 3)


def test_a_name_without_an_answer_is_given_up_for_the_next(load_main, monkeypatch):
    main = load_main(DATABASE_URL="postgresql://ada@silent/users")
    monkeypatch.setattr(main.anyio, "getaddrinfo", lambda *_, **__: asyncio.sleep(9))

    assert asyncio.run(main.look_up("silent", "5432")) == []


def test_the_procfile_serves_every_interface_and_logs_no_request(service):
    assert "server" not in service.get("/health").headers
    assert "running on http://0.0.0.0:" in service.log
    assert "GET /" not in service.log
    # Longer than the 60 seconds of the usual router.
    assert int(re.search(r"--timeout-keep-alive (\d+)", COMMAND)[1]) > 60


# Count the statuses on kept-alive connections: GETs, first a POST on each fourth.
def send_load(service, connections, requests):
    get, statuses = service.create().headers["location"], Counter()
    how = {"base_url": service.base_url, "verify": False, "timeout": 30}

    async def send(number):
        async with httpx.AsyncClient(**how) as one:
            for request in range(requests):
                post = not (request or number % 4)
                sent = one.post("/users", json=new_user()) if post else one.get(get)
                statuses[(await sent).status_code] += 1

    async def send_all():
        await asyncio.gather(*map(send, range(connections)))

    asyncio.run(send_all())
    return statuses


@pytest.mark.parametrize("connections, requests", [(32, 100), (256, 2), (1000, 1)])
def test_no_request_fails_at_any_number_of_connections(service, connections, requests):
    statuses = send_load(service, connections, requests)

    assert (set(statuses), statuses.total()) == ({200, 201}, connections * requests)


def test_a_line_longer_than_the_deadline_fails_nothing(service):
    assert send_at_once(27, service.run, "time.sleep(0.9)") == {200}


SHORTEN = "import prototype; prototype.REQUEST_TIMEOUT = "


def test_a_line_that_does_not_move_is_503_in_the_end(service):
    before, _ = len(service.log), service.run(f"{SHORTEN}0.2")
    statuses = send_at_once(15, service.run, "time.sleep(2)")
    service.run(f"{SHORTEN}4")

    # It is no failure of the database, which the five that held the line may report.
    assert (statuses, service.log[before:].count("\n") < 6) == ({200, 503}, True)


def test_who_waited_too_long_behind_a_failure_is_not_sent_to_the_database(service):
    bad = "[TimeoutError('marker'), exc.OperationalError('marker', None, Exception(9))]"
    code = f"time.sleep(0.9); done.append(9); raise {bad}[len(done) % 2]"
    before, _ = len(service.log), service.run(f"{SHORTEN}0.2")
    with ThreadPoolExecutor() as threads:
        holders = threads.submit(send_at_once, 5, service.run, code)
        wait_until("all turns are taken", lambda: service.tell("turns") == 0, 5)
        assert send_at_once(9, service.create) == {503}
    service.run(f"{SHORTEN}4")

    assert holders.result() == {503}
    assert re.findall("unavailable|marker", service.log[before:]) == ["unavailable"] * 5


def test_400_stuck_clients_delay_no_one_and_leave_no_memory_behind(service):
    stuck = ["GET /users/1 HT", f"{POST}Content-Length: 99\r\n\r\n{{"]
    stuck += [f"GET /docs {HOST}\r\n" * 20, f"GET /users/1 {HOST}\r\n"]  # and no read
    memory = []
    for _ in range(4):
        with ExitStack() as stack:
            for number in range(400):
                client = socket.create_connection(("127.0.0.1", service.port))
                stack.enter_context(client).sendall(stuck[number % 4].encode())
            assert service.create().status_code == 201
            assert time_status(service.create) < (201, 1)
        assert service.create().status_code == 201
        memory.append(service.megabytes("VmRSS"))

    assert memory[3] < memory[0] + 12


def test_sqlite_lets_readers_go_on_beside_a_writer(tmp_path):
    with Service(tmp_path) as service:
        path = service.create().headers["location"]
        with closing(lock_users(f"sqlite:///{tmp_path}/users.db")):
            assert time_status(service.get, path) < (200, 1)


# They start at once on an empty database, and one email makes one user.
def test_two_releases_race_within_20_connections(database_url, tmp_path):
    url = create_database(database_url, "releases")
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'releases'"
    count = "SELECT 0" if url.startswith("sqlite") else count
    both = [Service(tmp_path, DATABASE_URL=url, WEB_CONCURRENCY="2") for _ in "ab"]
    with both[0], both[1], ThreadPoolExecutor(50) as threads:
        for release in both:
            release.wait_for("Application startup complete", count=2)
            assert not re.search("Traceback|ERROR|died", release.log)
        user = new_user()
        posts = threads.map(lambda it: it.post("/users", json=user), both * 25)
        assert Counter(post.status_code for post in posts) == {201: 1, 409: 49}
        loads, held = [threads.submit(send_load, one, 50, 5) for one in both], [0]
        while not all(load.done() for load in loads):
            held += query(database_url, count)[0]

    assert [load.result() for load in loads] == [{201: 13, 200: 237}] * 2
    assert max(held) <= 20


# A proxy before a server, under a name, and what can befall it until `mend`.
class Network:
    def __init__(self, server, folder):
        self.server, self.hosts, self.port = server, folder / "hosts", find_free_port()
        # It answers no attempt to connect, since its backlog is full.
        self.hole = socket.create_server(("127.0.0.2", self.port), backlog=0)
        self.filling = socket.create_connection(self.hole.getsockname())
        # As on a PaaS, the service's role is no superuser.
        role = "CREATE ROLE bob LOGIN IN ROLE pg_read_all_data, pg_write_all_data"
        query(server.url, f"{role}; GRANT CREATE ON SCHEMA public TO bob")
        self.undo = ExitStack()
        self.mend()
        Thread(target=asyncio.run, args=[self.serve()], daemon=True).start()

    async def serve(self):
        proxy = await asyncio.start_server(self.accept, "127.0.0.1", self.port)
        await proxy.serve_forever()

    async def accept(self, reader, writer):
        with suppress(OSError), closing(writer):
            back, on = await asyncio.open_connection("127.0.0.1", self.server.port)
            await asyncio.gather(self.pipe(reader, on), self.pipe(back, writer))

    # Send pieces, after a pause, with odds to be seconds late, or cut.
    async def pipe(self, reader, writer):
        with suppress(OSError), closing(writer):
            while data := await reader.read(65_536):
                for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
                    late = random.uniform(2, 5) if random.random() < self.odds else 0
                    await asyncio.sleep(self.pause + late)
                    while self.frozen:
                        await asyncio.sleep(0.02)
                    writer.write(piece)
                    if random.random() < self.odds:
                        return

    def name(self, line):
        self.hosts.write_text(f"127.0.0.1 localhost\n{line}\n")

    def cut(self):
        sql = "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
        query(self.server.url, f"{sql} WHERE datname > '' AND pid <> pg_backend_pid()")

    # For connections from now on, which keep it when mended, as to an old primary.
    def alter(self, change):
        query(self.server.url, f"ALTER ROLE bob {change}")
        undo = "ALTER ROLE bob RESET ALL; ALTER ROLE bob CONNECTION LIMIT -1"
        self.undo.callback(query, self.server.url, undo)
        self.cut()

    def silence_names(self):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.undo.enter_context(server).bind(("127.0.0.53", 53))
        self.name("")
        self.cut()

    def mend(self):
        self.frozen, self.pause, self.odds = False, 0, 0
        self.name("127.0.0.1 db.users")
        self.undo.close()


FAULTS = {
    "stopped": lambda it: (it.server.close(), it.undo.callback(it.server.start)),
    "frozen": lambda it: setattr(it, "frozen", True),
    "locked": lambda it: it.undo.enter_context(closing(lock_users(it.server.url))),
    "read-only": lambda it: it.alter("SET default_transaction_read_only = on"),
    "full": lambda it: it.alter("CONNECTION LIMIT 0"),
    "slow": lambda it: setattr(it, "pause", 0.5),
    "black-holed": lambda it: (it.name("127.0.0.2 db.users"), it.cut()),
    "nameless": Network.silence_names,
}
NAMESPACES = ROOT and shutil.which("unshare")


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    with run_postgresql() as server:
        yield Network(server, tmp_path_factory.mktemp("network"))


# A service with a name server of its own, as root, which knows the database.
@pytest.fixture(scope="session")
def direct(network):
    folder, command, host = network.hosts.parent, COMMAND, "127.0.0.1"
    if NAMESPACES:
        (folder / "resolv.conf").write_text("nameserver 127.0.0.53\n")
        bind = f"mount --bind {folder}/$name /etc/$name || exit"
        script = f"for name in hosts resolv.conf; do {bind}; done; exec {COMMAND}"
        command, host = f"unshare --mount sh -c '{script}'", "db.users"
    url = f"postgresql://bob@{host}:{network.port}/postgres"
    with Service(folder, command, DATABASE_URL=url) as service:
        yield service


# A service by a PgBouncer in transaction mode.
@pytest.fixture(scope="session")
def bounced(network, tmp_path_factory):
    if not shutil.which("pgbouncer"):
        pytest.skip("PgBouncer is not here: apt install pgbouncer")
    port, file = find_free_port(), network.server.folder / "pgbouncer.ini"
    lines = [f"[databases]\npostgres = host=127.0.0.1 port={network.port} user=ada"]
    lines += [f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}"]
    lines += ["auth_type = any\npool_mode = transaction\nserver_login_retry = 1"]
    file.write_text("\n".join(lines))
    command = f"sh -c '{POSTGRES} pgbouncer --quiet {file} & exec {COMMAND}'"
    url = f"postgresql+psycopg2://ada@127.0.0.1:{port}/postgres"
    with Service(tmp_path_factory.mktemp("bounced"), command, DATABASE_URL=url) as it:
        it.database_url = url
        yield it


# Every turn and connection is back, no more of them than the pool's, no file open.
def assert_at_rest(service, network):
    sql = "SELECT state, count(*) < 6 FROM pg_stat_activity WHERE usename = 'bob'"
    url, rest = network.server.url, ([], [("idle", True)])

    wait_until("all turns", lambda: service.tell("turns") - service.tell("out") == 5, 6)
    wait_until("idleness", lambda: query(url, f"{sql} GROUP BY state") in rest, 6)
    assert len(os.listdir(f"/proc/{service.process.pid}/fd")) < 26


@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_is_503_within_5_seconds_and_heals(network, direct, bounced, fault):
    if fault in ("nameless", "black-holed") and not NAMESPACES:
        pytest.skip("names of its own need Linux and root")
    services = [direct, bounced] if fault in list(FAULTS)[:3] else [direct]
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with ThreadPoolExecutor(37) as threads, ExitStack() as stack:
        stack.callback(network.mend)
        # One that is at work, and asks the database when little of its time is left.
        sent = [threads.submit(time_status, direct.run, f"time.sleep(3.5); {PLAIN}")]
        wait_until("it works", lambda: direct.tell("turns") == 4, 5)
        FAULTS[fault](network)
        for request in [direct.run, *(one.create for one in services)] * 12:
            sent.append(threads.submit(time_status, request))
        while not all(answer.done() for answer in sent):
            assert time_status(direct.get, "/") < (307, 1)
        if fault == "locked":
            wait_until("no wait", lambda: not query(network.server.url, waits), 5)
    for one in services:
        wait_until("it is back", lambda one=one: one.create().status_code == 201, 3)

    assert all((503, 0) < answer.result() < (503, 5) for answer in sent)
    assert not re.search("Traceback|INSERT INTO|secret|@example", direct.log)
    assert_at_rest(direct, network)


def test_connections_that_the_server_closed_cost_nothing(network, direct):
    assert send_at_once(20, direct.create) == {201}
    network.cut()
    assert send_at_once(20, direct.create) == {201}


def test_a_statement_may_take_what_is_left_of_the_deadline(direct):
    show = "session.exec(text('SHOW statement_timeout')).one()[0]"
    direct.run(f"time.sleep(1); session.exec(select(1)); done.append({show})")
    limits = [it for it in direct.tell("done") if it.endswith("ms")]

    assert 2000 < int(limits[0].removesuffix("ms")) <= 3000


def test_pgbouncers_next_transaction_has_no_limit(bounced):
    assert bounced.create().status_code == 201
    assert query(bounced.database_url, "SHOW statement_timeout") == [("0",)]


# Eight clients that create users and fetch them; yields the answers to their posts. In
# the end, each acknowledged user is there exactly once.
@contextmanager
def writers(service, database_url):
    posts, stopped = [], Event()

    def write(_):
        while not stopped.is_set():
            with suppress(httpx.TransportError):
                posts.append(it := service.create())
                if it.is_success:
                    assert json.loads(it.request.content).items() < it.json().items()
                    got = service.get(it.headers["location"])
                    assert got.status_code == 503 or got.json() == it.json()

    with ThreadPoolExecutor(8) as threads, ExitStack() as stack:
        stack.callback(stopped.set)
        written = threads.map(write, range(8))
        yield posts
    stored = Counter(row[0] for row in query(database_url, "SELECT email FROM users"))
    assert [*written] == [None] * 8
    assert {stored[post.json()["email"]] for post in posts if post.is_success} == {1}


def test_no_user_is_lost_when_the_service_is_killed(tmp_path, database_url):
    service = Service(tmp_path, DATABASE_URL=database_url)
    with service, writers(service, database_url) as posts:
        wait_until("users", lambda: sum(it.is_success for it in posts) > 99, 30)
        service.process.kill()


def test_no_user_is_lost_when_postgresql_crashes(network, direct):
    with writers(direct, network.server.url) as posts:
        wait_until("users", lambda: sum(it.is_success for it in posts) > 99, 30)
        network.server.close()
        wait_until("a failure", lambda: posts[-1].is_error, 30)
        network.server.start()
        wait_until("users", lambda: posts[-1].is_success, 30)


def test_a_network_that_delays_splits_and_cuts_mixes_up_no_answers(network, direct):
    with writers(direct, network.server.url) as posts:
        network.odds = 0.02
        while sum(it.is_error for it in posts) < 9:
            assert time_status(direct.get, "/") < (307, 1)
        wait_until("users", lambda: sum(it.is_success for it in posts) > 9, 30)
        network.mend()
    assert_at_rest(direct, network)


def test_what_is_in_flight_is_answered_before_a_stop(tmp_path, database_url):
    short = COMMAND.replace("shutdown 10", "shutdown 3")
    service = Service(tmp_path, short, DATABASE_URL=database_url)
    with service, socket.create_connection(("127.0.0.1", service.port)) as stuck:
        stuck.sendall(f"{POST}Content-Length: 99\r\n\r\n{{".encode())
        with ThreadPoolExecutor() as threads, closing(lock_users(database_url)):
            post = threads.submit(service.create)
            with pytest.raises(TimeoutError):
                post.result(timeout=1)
            service.process.terminate()
            service.wait_for("Shutting down")
        assert post.result().status_code == 201
        assert service.process.wait(timeout=6) == -signal.SIGTERM
    assert "Traceback" not in service.log


@pytest.mark.parametrize("code", ["{}['marker']", "session.exec(text('marker'))"])
def test_a_bug_is_a_constant_500_and_its_frames_and_class_are_logged(service, code):
    before, detail = len(service.log), "Internal Server Error"
    answer = service.run(code, "-on-loop")
    service.wait_for("Error'", start=before)
    log = service.log[before:]

    assert (answer.status_code, answer.json()) == (500, {"detail": detail})
    assert re.search(r'File ".*prototype.py", line \d+, in run\n    exec\(code', log)
    assert "marker" not in log


SNIPPET = f"""{ADD}; session.flush()
try:
    with session.begin_nested(): session.add(User(email="{{0}}", full_name="B"))
except exc.IntegrityError: session.exec(select(User).where(User.email == "{{0}}")).one()
session.commit(); user.__dict__["email"]  # is there without a query
[*session.exec(select(User).execution_options(yield_per=2))]; session.refresh(user)
with Session(engine) as own: own.exec(select(1))
session.commit(); own = engine.connect()
own.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM")); own.close()
"""


@pytest.mark.parametrize("kind", ["", "-on-loop", "-async"])
def test_what_tutorials_write_works_in_twelve_requests_at_once(service, kind):
    assert send_at_once(12, service.run, SNIPPET, kind) == {200}


def test_plain_endpoints_hold_at_256_connections(service):
    assert send_at_once(256, service.run) == {200}


# Closing may have to roll back; or, after the deadline, to wait for another thread.
def test_a_session_is_closed_where_it_can_be_awaited(service):
    service.run("session.close = lambda: done.append(in_greenlet())")
    service.run("session.close = lambda: done.append(in_greenlet()); time.sleep(4.1)")
    assert {True, False} <= {*service.tell("done")}


def test_a_session_used_after_its_request_fails_and_keeps_no_connection(service):
    service.run("def late(): session.exec(select(1))\ntasks.add_task(late)")
    service.wait_for("InvalidRequestError")
    service.run("session.exec(text('COPY users TO STDOUT'))")  # cannot be rolled back

    wait_until("all is back", lambda: service.tell("out") == 0, 12)


def test_a_background_task_of_ten_seconds_has_a_session_of_its_own(service):
    wait_until("it ends", lambda: "worked" in service.tell("done"), 20)


def test_an_async_endpoint_in_wait_of_a_lock_gives_up_in_time(service, database_url):
    with closing(lock_users(database_url)):
        assert (503, 3) < time_status(service.run, PLAIN, "-async") < (503, 5)


@pytest.mark.parametrize("lifespan", [True, False])
def test_a_test_client_works_as_in_the_tutorial(load_main, database_url, lifespan):
    main, users = load_main(DATABASE_URL=database_url), [new_user() for _ in range(30)]
    SQLModel.metadata.create_all(main.engine)
    for client in (TestClient(main.app), TestClient(main.app)):
        with client if lifespan else nullcontext(), ThreadPoolExecutor(30) as threads:
            posts = [threads.submit(client.post, "/users", json=user) for user in users]
        assert {it.result().status_code for it in posts} <= {201, 409}
    main.engine.dispose()


def test_a_session_shared_as_in_the_tutorials_fixture_survives_a_409(load_main):
    main, user = load_main(), new_user()
    engine = create_engine("sqlite://?check_same_thread=no", poolclass=StaticPool)
    SQLModel.metadata.create_all(engine)
    with Session(engine) as session:
        main.app.dependency_overrides[main.get_session] = lambda: session
        client = TestClient(main.app)
        statuses = [client.post("/users", json=it).status_code for it in [user, user]]
        assert [*statuses, client.get("/users/1").status_code] == [201, 409, 200]
    engine.dispose()


SCRIPT = """
from main import Session, SQLModel, User, engine, select
SQLModel.metadata.create_all(engine)
with Session(engine) as session:
    session.add(User(email="script@example.com", full_name="A"))
    session.connection().exec_driver_sql("SELECT pg_sleep(4.1)")
    session.commit()
    session.exec(select(User).execution_options(yield_per=2)).first()
with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
    connection.exec_driver_sql("CREATE INDEX CONCURRENTLY names ON users (full_name)")
    connection.connection.cursor().copy_expert("COPY users TO STDOUT", open("copy", "w"))
"""


def test_a_script_may_wait_and_use_cursors_indexes_and_copy(tmp_path, postgresql):
    url = create_database(postgresql.url, "script")
    env = {"PYTHONPATH": str(HERE), "DATABASE_URL": url}
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=env, check=True)

    assert "script@example.com" in (tmp_path / "copy").read_text()


# A field, an endpoint, a test, and a migration of a table that has a user.
def test_the_readmes_changes_work_word_for_word(tmp_path, database_url):
    url = create_database(database_url, "changed")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    shutil.copy(HERE / "main.py", main := tmp_path / "main.py")
    shutil.copy(HERE / "models.py", models := tmp_path / "models.py")
    field, endpoint, test = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    with Service(tmp_path, DATABASE_URL=url) as service:
        user = service.create().json()
    for commands in re.findall(r"```sh\n([^`]*alembic [^`]*)```", README):
        how = {"cwd": tmp_path, "env": os.environ | {"DATABASE_URL": url}}
        subprocess.run(commands, shell=True, check=True, **how)
        for new in field.split("\n\n\n"):
            old = re.escape(new.split("(")[0]) + r"\(.*?\n(?=\n\n)"
            text = re.sub(old, f"{new.strip()}\n", models.read_text(), flags=re.DOTALL)
            models.write_text(text)
    main.write_text(f"{main.read_text()}\n\n{endpoint}")
    (listed := tmp_path / "listed.py").write_text(test)
    with Service(tmp_path, DATABASE_URL=url) as service:
        assert service.get(f"/users/{user['id']}").json() == {"nickname": None, **user}
        assert service.post("/users", json=new_user() | {"nickname": ""}).is_error
        runpy.run_path(listed)["test_users_are_listed_from_an_id_on"](service)


# Run a command beside such a PostgreSQL: `python test_main.py COMMAND ...`
if __name__ == "__main__":
    with run_postgresql() as server:
        env = os.environ | {"DATABASE_URL": server.url}
        sys.exit(subprocess.call(sys.argv[1:], env=env))
