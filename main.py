"""A users service: create a user, fetch a user. The environment configures it."""

import gc
import json
import logging
import os
import re
import sqlite3
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from math import inf
from secrets import compare_digest
from select import POLLIN, POLLOUT, poll
from traceback import extract_tb
from typing import Annotated, Any, NoReturn

import anyio
import psycopg2
from anyio.to_thread import current_default_thread_limiter
from fastapi import Depends, FastAPI, HTTPException, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from psycopg2.errors import QueryCanceled, ReadOnlySqlTransaction
from psycopg2.extensions import POLL_OK, POLL_READ, set_wait_callback
from psycopg2.extensions import connection as PGConnection
from pydantic import BeforeValidator
from sqlalchemy import Engine, bindparam, event, make_url, text
from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InterfaceError,
    InternalError,
    InvalidatePoolError,
    OperationalError,
    SQLAlchemyError,
    TimeoutError,
)
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel import Session, SQLModel, create_engine

from models import MAX_ID, Message, User, UserCreate, UserRead

MAX_BODY = 65_536  # bytes
DATABASE_TIMEOUT = 4  # seconds in which a request must be done with PostgreSQL
STARTUP_TIMEOUT = 30  # seconds

logger = logging.getLogger("uvicorn.error")

# No callback can end a name's lookup, which by default takes 10 seconds to fail.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")


def hide_traceback(record: logging.LogRecord) -> bool:
    """Log an unforeseen error as its class and place: its text may quote a user."""
    if record.exc_info and (error := record.exc_info[1]):
        places = [
            f"{frame.name}:{frame.lineno}"
            for frame in extract_tb(error.__traceback__)
            if frame.filename == __file__
        ]
        record.msg = f"{type(error).__name__} in {' > '.join(places) or 'a library'}"
        record.args = record.exc_info = None
    elif str(record.msg).startswith("Traceback"):  # how uvicorn logs a failed start
        record.msg = record.msg.strip().rpartition("\n")[2]
    return True


logger.addFilter(hide_traceback)


def refuse_start(problem: str) -> NoReturn:
    print(f"Error: {problem}", file=sys.stderr)
    sys.exit(3)  # uvicorn would restart a worker that ends with another status


def read_setting(name: str, default: str, pattern: str, meaning: str) -> str:
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        refuse_start(f"{name} must be {meaning}")
    return value


def connect_engine() -> Engine:
    value = read_setting(
        "DATABASE_URL",
        "sqlite:///users.db",
        r"postgres(ql(\+psycopg2)?)?://.+|sqlite:///(?!:memory:)[^?]+",
        "like postgresql://user:password@host:5432/name or sqlite:///users.db",
    )
    try:
        url = make_url(value)
        if "@" in (url.host or ""):
            raise ValueError  # from a password with an @ that is not written %40
        if url.drivername.startswith("postgres"):
            # Half of the time for a dead host leaves the rest to the next in a list.
            milliseconds = DATABASE_TIMEOUT * 1000 // 2
            query = {"tcp_user_timeout": str(milliseconds), **url.query}
            url = url.set(drivername="postgresql+psycopg2", query=query)
        return create_engine(
            url, pool_size=DB_POOL_SIZE, max_overflow=0, hide_parameters=True
        )
    except (ArgumentError, TypeError, ValueError):
        refuse_start("DATABASE_URL is malformed")


DB_POOL_SIZE = int(
    read_setting("DB_POOL_SIZE", "5", "[1-9][0-9]{0,2}", "a number from 1 to 999")
)
API_TOKEN = read_setting("API_TOKEN", "", "[!-~]*", "ASCII without spaces")

engine = connect_engine()

# Of each request: when it came, and by when it must be done with PostgreSQL.
received: ContextVar[float] = ContextVar("received", default=inf)
deadline: ContextVar[float] = ContextVar("deadline", default=0)
last_timeout = 0.0


def configure_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.execute(f"PRAGMA busy_timeout = {DATABASE_TIMEOUT * 1000}")
    connection.execute("PRAGMA journal_mode = WAL")  # reads go on beside a write
    connection.execute("PRAGMA synchronous = FULL")  # a 201 survives a power cut


def wait_with_deadline(connection: PGConnection) -> None:
    """Raise when PostgreSQL takes longer over a request than `DATABASE_TIMEOUT`.

    A request that stood in line during a timeout fails at once, or the last of many
    would wait for all before it. On a frozen server, no server-side timeout helps.
    """
    if not deadline.get():
        deadline.set(time.monotonic() + DATABASE_TIMEOUT)
        if received.get() < last_timeout:
            raise psycopg2.OperationalError("no answer to the requests before this one")
    while (state := connection.poll()) != POLL_OK:
        left = deadline.get() - time.monotonic()
        poller = poll()
        poller.register(connection.fileno(), POLLIN if state == POLL_READ else POLLOUT)
        if left <= 0 or not poller.poll(left * 1000):
            raise QueryCanceled(f"no answer in {DATABASE_TIMEOUT} seconds")


def limit_statement(
    _: Connection, __: object, statement: str, parameters: object, *___: object
) -> tuple[str, object]:
    """Have the server give up, too, or abandoned waits for a lock would fill it.

    In the same round trip, and for the transaction only, as PgBouncer needs it.
    """
    limit = DATABASE_TIMEOUT * 1000 - 500
    return f"SET LOCAL statement_timeout = {limit}; {statement}", parameters


def refuse_other_encodings(connection: PGConnection, _: object) -> None:
    if connection.info.parameter_status("server_encoding") != "UTF8":
        raise psycopg2.NotSupportedError("the encoding of the database is not UTF8")


def refuse_closed(
    connection: PGConnection, entry: ConnectionPoolEntry, _: object
) -> None:
    """Have the pool reconnect when the server has closed an idle connection.

    Its socket is then readable: this finds out without the round trip of a ping.
    """
    poller = poll()
    poller.register(connection.fileno(), POLLIN)
    if entry.info.get("used") and poller.poll(0):
        raise InvalidatePoolError
    entry.info["used"] = True


def note_error(context: ExceptionContext) -> None:
    """Note a timeout; and reconnect, to the new primary, when a failover left us."""
    global last_timeout
    if isinstance(context.original_exception, QueryCanceled):
        last_timeout = time.monotonic()
    if isinstance(context.original_exception, ReadOnlySqlTransaction):
        context.is_disconnect = True


if engine.dialect.name == "sqlite":
    START_LOCK = "BEGIN IMMEDIATE"
    event.listen(engine, "connect", configure_sqlite)
else:
    START_LOCK = "SELECT pg_advisory_xact_lock(8318823012450)"  # any fixed number
    set_wait_callback(wait_with_deadline)  # for all of psycopg2 in this process
    event.listen(engine, "connect", refuse_other_encodings)
    event.listen(engine, "checkout", refuse_closed)
    event.listen(engine, "before_cursor_execute", limit_statement, retval=True)
    event.listen(engine, "handle_error", note_error)


async def get_session() -> Session:
    """A session that reaches the database inside `with session.begin():` only.

    The end of that block gives its connection back, so that none is held while a
    response is built or sent, and nothing is left to close after the endpoint.
    Being async and without I/O, this function needs no thread.
    """
    received.set(time.monotonic())
    return Session(engine, autobegin=False, expire_on_commit=False)


SessionDep = Annotated[Session, Depends(get_session)]


async def check_token(
    sent: Annotated[
        HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))
    ],
) -> None:
    if not sent or not compare_digest(sent.credentials.encode(), API_TOKEN.encode()):
        raise HTTPException(
            401, "Send Authorization: Bearer <token>", {"WWW-Authenticate": "Bearer"}
        )


ERRORS: dict[int | str, dict[str, Any]] = {
    500: {"model": Message, "description": "An unforeseen error"},
    503: {
        "model": Message,
        "description": "The database is unavailable",
        "headers": {"Retry-After": {"schema": {"type": "integer"}}},
    },
}
PROTECTION = []
if API_TOKEN:
    PROTECTION = [Depends(check_token)]
    ERRORS[401] = {"model": Message, "description": "The token is missing or wrong"}

UNAVAILABLE = (OperationalError, InterfaceError, InternalError, TimeoutError)


def describe(error: Exception) -> str:
    """What the driver says, less the address before it and the hints below it.

    Of an error from within PostgreSQL the class only: its text may quote a user.
    """
    reason = getattr(error, "orig", error)
    if getattr(reason, "pgcode", None):
        return type(reason).__name__
    first_line = str(reason).partition("\n")[0]
    return re.sub("^(connection to|could not translate) .*?: ", "", first_line)


def create_tables() -> None:
    """Create the tables that are missing; the lock makes other processes wait."""
    with engine.begin() as connection:
        connection.exec_driver_sql(START_LOCK)
        SQLModel.metadata.create_all(connection)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Wait for the database and create the tables before the first request."""
    # More threads than connections would only wait for one.
    current_default_thread_limiter().total_tokens = DB_POOL_SIZE
    if not os.environ.get("DATABASE_URL"):
        logger.warning(
            "DATABASE_URL is not set: users are kept in the file users.db, "
            "which a PaaS with an ephemeral disk loses at every restart"
        )
    if not API_TOKEN:
        logger.warning("API_TOKEN is not set: anyone can create and fetch users")
    address = engine.url.set(query={}).render_as_string()  # hides the password
    end = time.monotonic() + STARTUP_TIMEOUT
    waits = False
    while True:
        try:
            await run_in_threadpool(create_tables)
            break
        except SQLAlchemyError as error:
            reason = describe(error)
            if not isinstance(error, UNAVAILABLE) or time.monotonic() > end:
                raise RuntimeError(
                    f"Cannot use DATABASE_URL, {address}: {reason}"
                ) from None
        if not waits:
            logger.warning("Waiting %d s for %s: %s", STARTUP_TIMEOUT, address, reason)
            waits = True
        await anyio.sleep(0.5)
    # With 1,000 requests in line, collecting at Python's pace costs a fifth of the speed.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    yield
    engine.dispose()


NOT_JSON = object()


def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError
    return fields


class StrictRequest(Request):
    """A request with a bounded body of UTF-8 JSON in which no name stands twice."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            body = bytearray()
            async for chunk in self.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"The body is over {MAX_BODY} bytes")
            self._body = bytes(body)
        return self._body

    async def json(self) -> object:
        """The document, or `NOT_JSON`, which becomes a 422 after the token's check."""
        try:
            return json.loads(
                (await self.body()).decode(),
                object_pairs_hook=refuse_duplicates,
            )
        except (ValueError, RecursionError):
            return NOT_JSON


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


app = FastAPI(
    title="Users",
    summary="Create a user, fetch a user.",
    version="1.0.0",
    lifespan=lifespan,
    redirect_slashes=False,
    generate_unique_id_function=lambda route: route.name,
    responses=ERRORS,
)
app.router.route_class = StrictRoute


@app.exception_handler(RequestValidationError)
async def answer_invalid(_: Request, error: RequestValidationError) -> Response:
    """Name each field and what is wrong with it, without a word of the input."""
    if isinstance(error.body, bytes):  # FastAPI parses what is declared as JSON only
        detail = "Send JSON, and the header Content-Type: application/json"
        return JSONResponse({"detail": detail}, 415)
    if error.body is NOT_JSON:
        problem = {"type": "json_invalid", "loc": ["body"], "msg": "This is not JSON"}
        return JSONResponse({"detail": [problem]}, 422)
    problems = {}  # by type and place, since there may be thousands of unknown fields
    for problem in error.errors():
        kind, place = problem["type"], problem["loc"]
        message = problem["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":  # the field's name is input
            known = ", ".join(UserCreate.model_fields)
            place, message = ("body",), f"Unknown field: these are known: {known}"
        problems[kind, place] = {"type": kind, "loc": place, "msg": message}
    return JSONResponse({"detail": list(problems.values())}, 422)


async def answer_unavailable(request: Request, error: Exception) -> Response:
    logger.warning("%s %s 503: %s", request.method, request.url.path, describe(error))
    return JSONResponse({"detail": "Database unavailable"}, 503, {"Retry-After": "2"})


for unavailable in UNAVAILABLE:
    app.add_exception_handler(unavailable, answer_unavailable)


@app.exception_handler(Exception)
async def answer_unforeseen(_: Request, __: Exception) -> Response:
    # Starlette raises the error once more, upon which uvicorn closes the connection.
    return JSONResponse(
        {"detail": "Internal Server Error"}, 500, {"Connection": "close"}
    )


@app.get("/", include_in_schema=False)
async def redirect_to_docs() -> RedirectResponse:
    return RedirectResponse("/docs")


@app.api_route(
    "/health", methods=["GET", "HEAD"], response_model=None, include_in_schema=False
)
def check_health(session: SessionDep) -> dict[str, str]:
    with session.begin():
        session.execute(text("SELECT 1"))
    return {"status": "ok"}


def require_digits(value: str) -> str:
    """Refuse 1.0, +1 and 1_0, which Pydantic takes for integers."""
    if not re.fullmatch("[0-9]+", value):
        raise ValueError("An id is a whole number from 1")
    return value


# Core statements, built once: ORM objects would cost half as much again.
users = SQLModel.metadata.tables[User.__tablename__]
INSERT_USER = users.insert().returning(users)
SELECT_USER = users.select().where(users.c.id == bindparam("user_id"))


@app.post(
    "/users",
    status_code=201,
    response_model=None,  # a model here would cost a second thread hop
    dependencies=PROTECTION,
    responses={
        201: {
            "model": UserRead,
            "description": "The user, at `Location`",
            "headers": {"Location": {"schema": {"type": "string"}}},
        },
        409: {"model": Message, "description": "A user has this email"},
        413: {"model": Message, "description": f"A body over {MAX_BODY} bytes"},
        415: {"model": Message, "description": "A body not declared as JSON"},
    },
)
def create_user(
    new_user: UserCreate, session: SessionDep, response: Response
) -> UserRead:
    """Create a user with a name and an email that no other user has.

    After a 503 the user may be there all the same: send it again, and take a 409 for
    success.
    """
    try:
        with session.begin():
            user = session.execute(INSERT_USER, new_user.model_dump()).one()
    except IntegrityError as error:  # the one check that holds in a race
        if "email" not in str(error.orig).partition("\n")[0]:
            raise
        raise HTTPException(409, "Email already registered") from None
    response.headers["Location"] = f"/users/{user.id}"
    return UserRead.model_validate(user)


@app.get(
    "/users/{user_id}",
    response_model=None,
    dependencies=PROTECTION,
    responses={
        200: {"model": UserRead, "description": "The user"},
        404: {"model": Message, "description": "No user has this id"},
    },
)
@app.api_route(  # takes the requests, so that a 405 allows HEAD too; not documented
    "/users/{user_id}",
    methods=["GET", "HEAD"],
    response_model=None,
    dependencies=PROTECTION,
    include_in_schema=False,
)
def read_user(
    user_id: Annotated[
        int,
        Path(ge=1, le=MAX_ID, json_schema_extra={"format": "int64"}),
        BeforeValidator(require_digits),
    ],
    session: SessionDep,
) -> UserRead:
    """Fetch a user by the id that its creation answered."""
    with session.begin():
        user = session.execute(SELECT_USER, {"user_id": user_id}).one_or_none()
    if user is None:
        raise HTTPException(404, "User not found")
    return UserRead.model_validate(user)
