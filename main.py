"""A users service: create a user, fetch a user. The environment configures it."""

import gc
import logging
import os
import re
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial, wraps
from math import inf
from secrets import compare_digest
from select import POLLIN, POLLOUT, poll
from signal import SIGINT, SIGTERM, signal
from socket import SOCK_STREAM, gaierror
from threading import current_thread, main_thread
from time import monotonic
from typing import Annotated, NoReturn

import anyio
from anyio.lowlevel import RunVar
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from psycopg2 import extensions as pg
from psycopg2.errors import ReadOnlySqlTransaction
from sqlalchemy import event, exc
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.util.concurrency import await_, greenlet_spawn, in_greenlet
from sqlmodel import Session, SQLModel, create_engine, select

from models import Message, User, UserCreate, UserId, UserRead

REQUEST_TIMEOUT = 4  # seconds, from a request's turn or, if the database fails, arrival

logger = logging.getLogger("uvicorn.error")


def abort_start(reason: str) -> NoReturn:
    logger.error(reason)
    raise SystemExit(3)  # with another status, uvicorn would restart a worker for ever


def read_setting(name: str, default: str, pattern: str, meaning: str) -> str:
    if not re.fullmatch(pattern, value := os.environ.get(name) or default):
        abort_start(f"{name} must be {meaning}")
    return value


# A second @, or a third slash, would move part of the password into a name that errors
# quote, and SQLite in memory would be one database per thread.
DATABASE_URL = read_setting(
    "DATABASE_URL",
    "sqlite:///users.db",
    r"postgres(ql(\+psycopg2)?)?://(?!/.*@)[^@]*@?[^@]+|sqlite:///[^:?]+",
    "like postgresql://user:p%40ssword@host:5432/name or sqlite:///users.db",
)
DB_POOL_SIZE = int(read_setting("DB_POOL_SIZE", "5", r"[1-9]\d{0,2}", "1 to 999"))
API_TOKEN = read_setting("API_TOKEN", "", "[!-~]*", "printable ASCII without spaces")

# By default a name's lookup takes 10 seconds to fail, and holds a thread meanwhile.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")
# By default collecting garbage takes a sixth of the CPU at 1,000 connections.
gc.set_threshold(100_000)

try:
    engine = create_engine(
        # Else SQLAlchemy takes psycopg 3 for postgresql:, and knows no postgres:.
        re.sub("^postgres(ql)?:", "postgresql+psycopg2:", DATABASE_URL),
        pool_pre_ping=True,
        pool_size=DB_POOL_SIZE,
        max_overflow=-1,  # requests take turns, below; a full pool would block the loop
    )
except (exc.ArgumentError, ValueError):
    abort_start("DATABASE_URL must have hosts like db:5432 or ?host=a:5432&host=b:5432")

deadline = ContextVar("deadline", default=inf)  # of the request, monotonic seconds


# In a greenlet, await on the event loop; elsewhere, as in a thread, block.
def wait_for_postgresql(connection: pg.connection) -> None:
    try:
        while (state := connection.poll()) != pg.POLL_OK:
            reads = state == pg.POLL_READ
            if in_greenlet():
                wait = anyio.wait_readable if reads else anyio.wait_writable
                await_(wait(connection.fileno()))
                continue
            poller = poll()
            poller.register(connection.fileno(), POLLIN if reads else POLLOUT)
            left = max(deadline.get() - monotonic(), 0)
            if not poller.poll(None if left == inf else left * 1000):
                raise TimeoutError
    finally:
        del connection  # or an error's traceback would hold it, and so keep it open


# The host, an address and the port, for each address; empty if not found.
async def look_up(host: str, port: str) -> list[tuple[str, str, str]]:
    if not host or host.startswith("/"):  # the folder of a socket
        return [(host, "", port)]
    with suppress(gaierror, UnicodeError), anyio.move_on_after(REQUEST_TIMEOUT / 2):
        found = await anyio.getaddrinfo(host, None, type=SOCK_STREAM)
        return [(host, address, port) for *_, (address, *_) in found]
    return []


if engine.dialect.name == "sqlite":
    logger.warning("Users are kept in a file: for PostgreSQL, set DATABASE_URL")

    # Reads go on beside a write, and writes wait for one another until the deadline.
    pragmas = f"PRAGMA journal_mode=WAL; PRAGMA busy_timeout={REQUEST_TIMEOUT * 1000}"
    event.listen(engine, "connect", lambda db, _: db.executescript(pragmas))
else:
    # Give libpq addresses, since looking names up itself, it would block the loop.
    @event.listens_for(engine, "do_connect", named=True)
    def look_up_hosts(cparams: dict[str, str], **_: object) -> None:
        # Milliseconds, to leave an address without an answer in time for the next one.
        # With a wait callback, libpq ignores connect_timeout.
        cparams.setdefault("tcp_user_timeout", f"{REQUEST_TIMEOUT * 1000 // 2}")
        if not in_greenlet() and deadline.get() - monotonic() < REQUEST_TIMEOUT / 2:
            raise TimeoutError  # in a thread, a lookup may go on for 2 seconds
        if not in_greenlet() or "host" not in cparams or "hostaddr" in cparams:
            return
        hosts = cparams["host"].split(",")
        # Without ports, libpq takes its default for each.
        ports = str(cparams.get("port", "")).split(",") * len(hosts)
        found = [it for place in zip(hosts, ports) for it in await_(look_up(*place))]
        if not found:
            raise exc.OperationalError(None, None, gaierror("host name not found"))
        cparams.update(zip(("host", "hostaddr", "port"), map(",".join, zip(*found))))

    # Time out on the server too, or waits for locks pile up there. In front of the
    # first statement, it costs no round trip.
    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def limit_statement(
        _: object, cursor: pg.cursor, statement: str, parameters: object, *__: object
    ) -> tuple[str, object]:
        db, left = cursor.connection, max(deadline.get() - monotonic(), 0.001)
        idle = db.get_transaction_status() == pg.TRANSACTION_STATUS_IDLE
        if left < inf and idle and not (db.autocommit or cursor.name):
            # LOCAL, since through PgBouncer the next transaction is somebody else's.
            statement = f"SET LOCAL statement_timeout = {left * 1000:.0f}; {statement}"
        return statement, parameters

    @event.listens_for(engine, "handle_error")
    def leave_server(context: ExceptionContext) -> None:
        # What fails to begin, commit or roll back is not used again.
        context.is_disconnect |= context.statement is None
        # After a failover, answer 503, and have new connections look for the primary.
        if isinstance(error := context.original_exception, ReadOnlySqlTransaction):
            context.is_disconnect = True
            raise exc.OperationalError(None, None, error)


turns = RunVar[anyio.Semaphore | None]("turns")  # one semaphore in each event loop
last_failure = RunVar("last_failure", -inf)  # of the database, monotonic seconds
UNAVAILABLE = (503, "Database unavailable", {"Retry-After": "2"})


# What libpq says, in its first line: the rest may be hints, or SQL and its values.
def describe(error: Exception) -> str:
    return str(getattr(error, "orig", "")).partition("\n")[0] or "no answer in time"


async def get_session() -> AsyncGenerator[Session]:
    """A session for one request, closed before the response is sent, errors or not."""
    start = monotonic()
    turns.set(turn := turns.get(None) or anyio.Semaphore(DB_POOL_SIZE))
    # Not to query after a commit; and to fail, not to connect, when used after closing.
    session = Session(engine, expire_on_commit=False, close_resets_only=False)
    try:
        # A PaaS's proxy gives up after 30 seconds.
        with anyio.fail_after(REQUEST_TIMEOUT * 6) as scope:
            async with turn:
                # Nothing failed since: the database is well, only the line is long.
                if last_failure.get() < start:
                    start = monotonic()
                elif monotonic() > start + REQUEST_TIMEOUT:
                    raise HTTPException(*UNAVAILABLE)
                deadline.set(start + REQUEST_TIMEOUT)
                scope.deadline = anyio.current_time() + deadline.get() - monotonic()
                try:
                    yield session
                finally:
                    # After the deadline, another thread may still be using it.
                    with anyio.CancelScope(shield=scope.cancel_called) as end:
                        run = anyio.to_thread.run_sync if end.shield else greenlet_spawn
                        await run(session.close)
                    deadline.set(inf)  # for background tasks
    except (exc.OperationalError, TimeoutError) as error:
        if getattr(error.__cause__, "sqlite_errorname", None) == "SQLITE_ERROR":
            raise  # wrong SQL, which is a bug
        if monotonic() < start + REQUEST_TIMEOUT * 6:  # it had a turn
            last_failure.set(monotonic())
            logger.warning("Database unavailable: %s", describe(error))
        raise HTTPException(*UNAVAILABLE) from None


SessionDep = Annotated[Session, Depends(get_session, scope="function")]


def on_loop(endpoint: Callable[..., object]) -> Callable[..., object]:
    """Run an endpoint on the event loop, where nothing but its session may wait."""
    # Without this, and on SQLite, it runs in a thread: as well, at twice the cost.
    run = wraps(endpoint)(partial(greenlet_spawn, endpoint))
    return endpoint if engine.dialect.name == "sqlite" else run


# Those that are missing, as soon as the database is there.
async def create_tables() -> None:
    reason = "no answer"
    with anyio.move_on_after(30):
        while True:
            try:
                return await greenlet_spawn(SQLModel.metadata.create_all, engine)
            except exc.DBAPIError as error:  # it may be that another process was first
                reason = describe(error)
                logger.warning("Waiting for the database: %s", reason)
            await anyio.sleep(1)
    abort_start(f"No database within 30 seconds: {reason}")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    pg.set_wait_callback(wait_for_postgresql)  # for all of psycopg2 in this process
    if not API_TOKEN:
        logger.warning("Anyone can create and fetch users: to stop that, set API_TOKEN")
    # uvicorn's handlers act only when the start is over, which may take 30 seconds.
    signals = (SIGINT, SIGTERM) if current_thread() is main_thread() else ()
    handlers = [signal(it, lambda number, _: os._exit(128 + number)) for it in signals]
    await create_tables()
    for number, handler in zip(signals, handlers):
        signal(number, handler)
    yield
    engine.dispose()


bearer = HTTPBearer()
BearerDep = Annotated[HTTPAuthorizationCredentials, Depends(bearer)]


async def check_token(sent: BearerDep) -> None:
    if not compare_digest(sent.credentials.encode(), API_TOKEN.encode()):
        raise bearer.make_not_authenticated_error()


PROTECTION = [Depends(check_token)] if API_TOKEN else []
ERROR = {"model": Message}

app = FastAPI(
    lifespan=lifespan,
    redirect_slashes=False,  # a redirect would quote the path
    max_body_size=65_536,  # bytes
    responses={401: ERROR, 413: ERROR, 500: ERROR, 503: ERROR},
)


# The parts of messages that may quote input; what "email address:" precedes does not.
QUOTE = re.compile(r"(?<!email address): .*| \(.*", re.DOTALL)


@app.exception_handler(RequestValidationError)
async def answer_invalid(_: Request, error: RequestValidationError) -> Response:
    # As FastAPI does, without the input: it may be secret, huge, or not UTF-8.
    if isinstance(error.body, bytes):  # FastAPI parses only what is declared as JSON
        detail = "Send JSON, and the header Content-Type: application/json"
        return JSONResponse({"detail": detail}, 415)
    problems = [
        {"type": bad["type"], "loc": bad["loc"], "msg": QUOTE.sub("", bad["msg"])}
        for bad in error.errors()
    ]
    return JSONResponse({"detail": problems}, 422)


@app.exception_handler(Exception)
async def answer_bug(_: Request, __: Exception) -> Response:
    # As JSON, where Starlette sends text.
    return JSONResponse({"detail": "Internal Server Error"}, 500)


# Log where an error arose and its class, but not its text: it may quote a user.
def filter_log(record: logging.LogRecord) -> bool:
    if record.exc_info:
        kind, _, trace = record.exc_info
        record.exc_text = "".join(traceback.format_tb(trace)) + str(kind)
    return not str(record.msg).endswith("SystemExit: 3\n")  # after the start's reason


logger.addFilter(filter_log)


@app.get("/", include_in_schema=False)
async def redirect_to_docs() -> RedirectResponse:
    return RedirectResponse("docs")


@app.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
@on_loop
def check_health(session: SessionDep) -> dict[str, str]:
    session.exec(select(1))
    return {"status": "ok"}


@app.post(
    "/users",
    status_code=201,
    response_model=UserRead,
    dependencies=PROTECTION,
    responses={400: ERROR, 409: ERROR, 415: ERROR},
)
@on_loop
def create_user(new_user: UserCreate, session: SessionDep, response: Response) -> User:
    """Create a user with an email that no other user has."""
    user = User.model_validate(new_user)
    session.add(user)
    try:
        session.commit()
    except exc.IntegrityError:  # the only check that holds in a race
        session.rollback()
        raise HTTPException(409, "Email already registered") from None
    response.headers["Location"] = f"/users/{user.id}"
    return user


@app.head("/users/{user_id}", dependencies=PROTECTION, include_in_schema=False)
@app.get(
    "/users/{user_id}",
    response_model=UserRead,
    dependencies=PROTECTION,
    responses={404: ERROR},
)
@on_loop
def read_user(user_id: UserId, session: SessionDep) -> User:
    """Fetch a user by id."""
    user = session.get(User, user_id)
    if user is None:
        raise HTTPException(404, "User not found")
    return user
