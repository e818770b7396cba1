"""A users service: create a user, fetch a user. The environment configures it."""

import gc
import logging
import os
import re
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial, wraps
from secrets import compare_digest
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Annotated, Any

import anyio
import psycopg2
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from psycopg2 import extensions as pg
from psycopg2.errors import (
    InvalidParameterValue,
    ReadOnlySqlTransaction,
    UndefinedObject,
)
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.util.concurrency import await_, greenlet_spawn, in_greenlet
from sqlmodel import Session, SQLModel, create_engine, select

from models import Message, User, UserCreate, UserId, UserRead

DATABASE_URL = os.environ.get("DATABASE_URL", "").strip() or "sqlite:///users.db"
DB_POOL_SIZE = int(os.environ.get("DB_POOL_SIZE") or 5)
API_TOKEN = os.environ.get("API_TOKEN", "")
REQUEST_TIMEOUT = 10  # seconds to wait for a session and to use it
START_TIMEOUT = 30  # seconds to wait for the database

logger = logging.getLogger("uvicorn.error")

# Python's default since 3.13. With the default before, 700, collecting garbage takes a
# fifth of the CPU at 1,000 connections.
gc.set_threshold(2_000)

engine = create_engine(
    # SQLAlchemy refuses postgres:, and uses another driver for postgresql:.
    re.sub("^postgres(ql)?:", "postgresql+psycopg2:", DATABASE_URL),
    pool_pre_ping=True,
    pool_size=DB_POOL_SIZE,
    # SessionDep limits the connections. The pool would do so by blocking the event loop.
    max_overflow=-1,
    hide_parameters=True,  # no values of users in the log
)
ON_SQLITE = engine.dialect.name == "sqlite"


# psycopg2 blocks, but it can leave its waiting to a function of ours. On PostgreSQL, an
# endpoint with @on_loop runs in a greenlet on the event loop, and while it waits, other
# requests go on. SQLAlchemy's asyncio extension works in the same way.
def on_loop(endpoint: Callable[..., object]) -> Callable[..., Awaitable[object]]:
    """Run a `def` endpoint on the event loop, for half the CPU of a thread.

    Only its session may wait in it. On SQLite it runs in a thread all the same.
    """
    run = run_in_threadpool if ON_SQLITE else greenlet_spawn

    @wraps(endpoint)
    async def run_endpoint(**arguments: object) -> object:
        return await run(partial(endpoint, **arguments))

    return run_endpoint


def wait_for_socket(connection: pg.connection) -> None:
    """In a greenlet, let others go on meanwhile. Elsewhere, block, as in a thread."""
    try:
        while (state := connection.poll()) != pg.POLL_OK:
            reads = state == pg.POLL_READ
            if in_greenlet():
                wait = anyio.wait_readable if reads else anyio.wait_writable
                await_(wait(connection.fileno()))
                continue
            with DefaultSelector() as selector:
                selector.register(connection, EVENT_READ if reads else EVENT_WRITE)
                if not selector.select(REQUEST_TIMEOUT):
                    raise psycopg2.OperationalError("no answer in time")
    finally:
        # An error's traceback would keep the connection open until garbage is collected.
        del connection


def connect_blocking(options: dict[str, Any]) -> pg.connection:
    # When a host is silent for half the limit, libpq tries the next one in the URL. With
    # a wait callback, it ignores connect_timeout.
    options.setdefault("tcp_user_timeout", REQUEST_TIMEOUT * 1000 // 2)  # milliseconds
    # A server's own may be SQL_ASCII.
    options.setdefault("client_encoding", "UTF8")
    connection: pg.connection = psycopg2.connect(**options)
    connection.autocommit = True  # a rollback would undo the setting
    # The server ends what nobody waits for any more. Else requests that gave up would go
    # on waiting for locks, and fill it. PostgreSQL has this since 14, not on Windows.
    with suppress(UndefinedObject, InvalidParameterValue):
        connection.cursor().execute("SET client_connection_check_interval = '100ms'")
    connection.autocommit = False
    return connection


def connect(cparams: dict[str, Any], **_: object) -> object:
    if not in_greenlet():
        return connect_blocking(cparams)
    # In a thread, since libpq blocks while it looks up a name. Slow endpoints may hold
    # all threads that others share, so this one is not counted among them.
    own = anyio.CapacityLimiter(1)
    run = partial(anyio.to_thread.run_sync, abandon_on_cancel=True, limiter=own)
    return await_(run(connect_blocking, cparams))


if ON_SQLITE:
    # Reads go on beside a write.
    event.listen(engine, "connect", lambda db, _: db.execute("PRAGMA journal_mode=WAL"))
else:
    event.listen(engine, "do_connect", connect, named=True)


@event.listens_for(engine, "handle_error")
def leave_read_only_server(context: ExceptionContext) -> None:
    # After a failover, it may be the old primary. Connect anew, and answer 503.
    if isinstance(context.original_exception, ReadOnlySqlTransaction):
        context.is_disconnect = True


def is_unavailable(error: DBAPIError) -> bool:
    """Whether the database is to blame, and not a bug."""
    cause = error.orig
    if isinstance(cause, sqlite3.OperationalError):
        return cause.sqlite_errorname != "SQLITE_ERROR"  # that is wrong SQL
    return isinstance(cause, psycopg2.OperationalError) or error.connection_invalidated


async def limit_time() -> AsyncGenerator[None]:
    """Answer 503 if the database does not answer, or not in time."""
    reason = "no answer in time"
    with anyio.move_on_after(REQUEST_TIMEOUT):
        try:
            yield
            return
        except DBAPIError as error:
            if not is_unavailable(error):
                raise
            reason = str(error.orig).partition("\n")[0]  # more may quote a user
    logger.warning("Database unavailable: %s", reason)
    raise HTTPException(503, "Database unavailable", {"Retry-After": "2"})


async def get_session(
    # It begins first, so the limit includes the wait in line for a session.
    _: Annotated[None, Depends(limit_time, scope="function")],
) -> AsyncGenerator[Session]:
    """A session for one request, closed before the response is sent. See SessionDep."""
    # Objects are not loaded again after a commit. A session that is used after it is
    # closed fails; else it would take a connection, and keep it.
    session = Session(engine, expire_on_commit=False, close_resets_only=False)
    try:
        yield session
    finally:
        await greenlet_spawn(session.close)


SessionDep = Annotated[
    Session, Depends(get_session, scope="function", max_concurrency=DB_POOL_SIZE)
]


async def create_tables() -> None:
    """Create the missing tables, as soon as the database is there.

    This must connect alone: SQLAlchemy makes an engine's first connection under a lock,
    where two at once would block the event loop for ever.
    """
    with anyio.move_on_after(START_TIMEOUT):
        while True:
            try:
                return await greenlet_spawn(SQLModel.metadata.create_all, engine)
            except DBAPIError as error:  # or another process creates them too
                logger.warning("Waiting for the database: %s", error.orig)
            await anyio.sleep(1)
    logger.error("Waited for the database in vain")
    os._exit(1)  # after an exception, uvicorn would stop its other workers too


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    if ON_SQLITE:
        logger.warning("Users are kept in a file: for PostgreSQL, set DATABASE_URL")
    if not API_TOKEN:
        logger.warning("Anyone can create and fetch users: to stop that, set API_TOKEN")
    # Not on import, so that scripts, migrations and notebooks have plain psycopg2.
    pg.set_wait_callback(wait_for_socket)
    await create_tables()
    yield
    engine.dispose()


bearer = HTTPBearer()


async def require_token(
    sent: Annotated[HTTPAuthorizationCredentials, Depends(bearer)],
) -> None:
    if not compare_digest(sent.credentials.encode(), API_TOKEN.encode()):
        raise bearer.make_not_authenticated_error()


PROTECTION = [Depends(require_token)] if API_TOKEN else []
ERROR = {"model": Message}
TOO_LARGE = {"description": "Content Too Large"}  # as JSON or as text

app = FastAPI(
    title="Users",
    lifespan=lifespan,
    max_body_size=65_536,  # bytes
    responses={401: ERROR, 413: TOO_LARGE, 503: ERROR},
)


@app.exception_handler(RequestValidationError)
async def answer_invalid(_: Request, error: RequestValidationError) -> Response:
    """Answer as FastAPI does, without the input: it may not fit into JSON or UTF-8."""
    if isinstance(error.body, bytes):  # FastAPI parses only what is declared as JSON
        detail = "Send JSON, and the header Content-Type: application/json"
        return JSONResponse({"detail": detail}, 415)
    problems = [
        {"type": problem["type"], "loc": problem["loc"], "msg": problem["msg"]}
        for problem in error.errors()
    ]
    return JSONResponse({"detail": problems}, 422)


@app.get("/", include_in_schema=False)
async def redirect_to_docs() -> RedirectResponse:
    return RedirectResponse("docs")


@app.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
@on_loop
def check_health(
    # It does not wait in line with the others: a busy service is a healthy one.
    session: Annotated[
        Session, Depends(get_session, scope="function", max_concurrency=1)
    ],
) -> dict[str, str]:
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
    except IntegrityError:  # a check before could miss a request at the same time
        session.rollback()
        if not session.exec(select(User).where(User.email == new_user.email)).first():
            raise  # another constraint than the email's
        raise HTTPException(409, "Email already registered") from None
    response.headers["Location"] = f"/users/{user.id}"
    return user


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
