"""The service's models and endpoints on SQLModel's AsyncSession and asyncpg."""

import os
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Response
from sqlalchemy import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from models import User, UserCreate, UserId, UserRead

url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg")
engine = create_async_engine(url, pool_pre_ping=True)


async def get_session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(get_session)]


app = FastAPI()


@app.post("/users", status_code=201, response_model=UserRead)
async def create_user(new: UserCreate, session: SessionDep, response: Response) -> User:
    user = User.model_validate(new)
    session.add(user)
    try:
        await session.commit()
    except IntegrityError:
        raise HTTPException(409, "Email already registered") from None
    response.headers["Location"] = f"/users/{user.id}"
    return user


@app.get("/users/{user_id}", response_model=UserRead)
async def read_user(user_id: UserId, session: SessionDep) -> User:
    user = await session.get(User, user_id)
    if user is None:
        raise HTTPException(404, "User not found")
    return user
