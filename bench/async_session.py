"""The service's endpoints and models on SQLModel's AsyncSession and asyncpg."""

import os
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from models import User, UserCreate, UserRead

url = os.environ["DATABASE_URL"].replace("psycopg2", "asyncpg")
engine = create_async_engine(url, pool_pre_ping=True)


async def get_session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(get_session)]

app = FastAPI()


@app.post("/users", status_code=201, response_model=UserRead)
async def create_user(new_user: UserCreate, session: SessionDep) -> User:
    user = User.model_validate(new_user)
    session.add(user)
    try:
        await session.commit()
    except IntegrityError:
        raise HTTPException(409, "Email already registered") from None
    return user


@app.get("/users/{user_id}", response_model=UserRead)
async def read_user(user_id: int, session: SessionDep) -> User:
    user = await session.get(User, user_id)
    if user is None:
        raise HTTPException(404, "User not found")
    return user
