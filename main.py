"""A users service: create a user, fetch a user. The environment configures it."""

import asyncio
import gc
import logging
import os
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import wraps
from inspect import (
    isasyncgenfunction,
    iscoroutinefunction,
    isgeneratorfunction,
    signature,
)
from secrets import compare_digest
from threading import Event, Thread
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlmodel import Session, SQLModel, create_engine, select

from models import Message, User, UserCreate, UserId, UserRead

DATABASE_URL = os.environ.get("DATABASE_URL", "").strip() or "sqlite:///users.db"
DB_POOL_SIZE = int(os.environ.get("DB_POOL_SIZE") or 4)
API_TOKEN = os.environ.get("API_TOKEN", "").strip()
MAX_WAIT = 10  # seconds that a request waits for a session

logger = logging.getLogger("uvicorn.error")  # despite its name, for all levels

# Python 3.13's default. With 3.12's, 700, garbage collection takes a sixth of the CPU.
gc.set_threshold(2_000)

# Options of PostgreSQL's client. Those in DATABASE_URL win. With these, a server that
# has gone without closing its connections is noticed within ten seconds: after five,
# the client asks it for a sign of life, and tcp_user_timeout limits the wait for that.
POSTGRES_DEFAULTS = {
    "client_encoding": "UTF8",  # a server's own may be SQL_ASCII
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "5",
    "tcp_user_timeout": "5000",
}

url = make_url(DATABASE_URL)
ON_SQLITE = url.get_backend_name() == "sqlite"
if url.drivername.startswith("postgres"):
    # SQLAlchemy does not know Heroku's postgres:, and takes postgresql: for psycopg 3.
    url = url.set(drivername="postgresql+psycopg2", query=POSTGRES_DEFAULTS | url.query)

engine = create_engine(
    url,
    pool_pre_ping=True,
    pool_size=DB_POOL_SIZE,
    hide_parameters=True,  # in the log, SQL stands without its values
)

if ON_SQLITE:

    @event.listens_for(engine, "connect")
    def set_up_sqlite(connection: sqlite3.Connection, _: object) -> None:
        # Reads go on beside a write. Foreign keys stay unchecked: with them, Alembic,
        # which drops a table to change it, would delete what refers to its rows.
        connection.execute("PRAGMA journal_mode = WAL")


RETRY_HEADERS = {"Retry-After": "2"}  # seconds
creating_tables = Event()  # set at the start, until the tables are there


# A request gets its session in three steps:
# 1. limit_wait starts a timeout. It is a dependency of get_session, so it runs first.
# 2. FastAPI lets the request wait until it is one of SessionDep's max_concurrency.
# 3. get_session stops the timeout, and opens the session.
async def limit_wait() -> AsyncGenerator[asyncio.Timeout]:
    """Answer 503 to a request whose turn does not come in time."""
    try:
        async with asyncio.timeout(MAX_WAIT) as timeout:
            yield timeout
    except TimeoutError:
        if not timeout.expired():  # an endpoint raised it
            raise
        logger.warning("No session was free in %s seconds: see DB_POOL_SIZE", MAX_WAIT)
        raise HTTPException(503, "Too busy", RETRY_HEADERS) from None


async def get_session(
    timeout: Annotated[asyncio.Timeout, Depends(limit_wait, scope="function")],
) -> AsyncGenerator[Session]:
    """A session for one request, closed when the request no longer needs it."""
    timeout.reschedule(None)  # its turn has come: from here on, nothing is cancelled
    if creating_tables.is_set():  # answered and logged like an outage
        raise OperationalError(None, None, Exception("tables are not created yet"))
    # expire_on_commit: after a commit, objects are not loaded again.
    # close_resets_only: a session fails if it is used after its request.
    session = Session(engine, expire_on_commit=False, close_resets_only=False)
    try:
        yield session
    finally:
        if session.in_transaction():  # it rolls back, and waits for the database
            await run_in_threadpool(session.close)
        else:
            session.close()


# Use SessionDep, not Depends(get_session).
# max_concurrency: without it, requests that wait for a connection take all threads.
# scope="function": the session is closed before the response is sent, so that a slow
# client does not hold it. A dependency with `yield` that uses SessionDep needs it too.
# Background tasks, streams and websockets last longer: they open a Session(engine).
# After a commit, `refresh` an object that the database itself changes.
SessionDep = Annotated[
    Session, Depends(get_session, scope="function", max_concurrency=DB_POOL_SIZE)
]


# Optional, below @app.get. Without it, FastAPI uses a thread three times: to run the
# endpoint, to validate what it returns, and to close the session. With it, the session
# is closed as soon as the endpoint returns. So load in the endpoint what response_model
# reads. A dependency with `yield` finds the session closed after its `yield`.
def in_one_thread(endpoint: Callable[..., object]) -> Callable[..., Awaitable[object]]:
    """Save a fifth of the CPU of a `def` endpoint whose `session` is a SessionDep."""
    is_generator = isgeneratorfunction(endpoint) or isasyncgenfunction(endpoint)
    is_plain = not is_generator and not iscoroutinefunction(endpoint)
    takes_session = "session" in signature(endpoint).parameters
    assert is_plain and takes_session, "in_one_thread needs a `def` with a `session`"

    @wraps(endpoint)
    async def run_endpoint(session: Session, **arguments: object) -> object:
        def run_and_close() -> object:
            # A session that a test brings, with an engine of its own, stays open.
            with session if session.bind is engine else nullcontext():
                return endpoint(session=session, **arguments)

        return await run_in_threadpool(run_and_close)

    return run_endpoint


def create_tables() -> None:
    """Create the missing tables; try again each second until the database is there."""
    while creating_tables.is_set():
        try:
            SQLModel.metadata.create_all(engine)
            creating_tables.clear()
        except DBAPIError as error:  # no database, or another process creates them too
            logger.warning("Tables are not created yet: %s", error.orig)
            time.sleep(1)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    if ON_SQLITE:
        logger.warning("Users are kept in a file: for PostgreSQL, set DATABASE_URL")
    if not API_TOKEN:
        logger.warning("Anyone can create and fetch users: to stop that, set API_TOKEN")
    creating_tables.set()
    # In a thread: without its database too, the service starts, and stops on Ctrl-C.
    creation = Thread(target=create_tables, daemon=True)
    creation.start()
    creation.join(1)  # usually done by then: nothing is served before
    yield
    creating_tables.clear()
    engine.dispose()


bearer = HTTPBearer()


async def require_token(
    sent: Annotated[HTTPAuthorizationCredentials, Depends(bearer)],
) -> None:
    if not compare_digest(sent.credentials.encode("latin-1"), API_TOKEN.encode()):
        raise bearer.make_not_authenticated_error()


ERROR = {"model": Message}

app = FastAPI(
    title="Users",
    lifespan=lifespan,
    max_body_size=65_536,  # bytes
    redirect_slashes=False,  # behind a router, they would lead from https: to http:
    responses={401: ERROR, 413: {}, 503: ERROR},  # 413 is not always JSON
)


@app.exception_handler(OperationalError)
async def answer_unavailable(_: Request, error: OperationalError) -> Response:
    """Answer 503 if the database is to blame, and not a bug."""
    # Wrong SQL is psycopg2's ProgrammingError, but sqlite3's OperationalError too.
    if getattr(error.orig, "sqlite_errorname", None) == "SQLITE_ERROR":
        raise error
    logger.warning("Database unavailable: %s", str(error.orig).partition("\n")[0])
    return JSONResponse({"detail": "Database unavailable"}, 503, RETRY_HEADERS)


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
@in_one_thread
def check_health(
    # Health checks wait for one another only, since a busy service is healthy. So they
    # may take one connection more than DB_POOL_SIZE.
    session: Annotated[
        Session, Depends(get_session, scope="function", max_concurrency=1)
    ],
) -> dict[str, str]:
    session.exec(select(1))
    return {"status": "ok"}


# Endpoints above are open. Endpoints below, and routers included below, ask for the
# token: FastAPI copies the list into each when it is defined. Mounted applications do
# not ask for it.
if API_TOKEN:
    app.router.dependencies.append(Depends(require_token))


@app.post(
    "/users",
    status_code=201,
    response_model=UserRead,
    responses={400: ERROR, 409: ERROR, 415: ERROR},
)
@in_one_thread
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


@app.get("/users/{user_id}", response_model=UserRead, responses={404: ERROR})
@in_one_thread
def read_user(user_id: UserId, session: SessionDep) -> User:
    """Fetch a user by id."""
    user = session.get(User, user_id)
    if user is None:
        raise HTTPException(404, "User not found")
    return user
