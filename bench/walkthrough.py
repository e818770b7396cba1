"""The textbook wiring, as SQLModel's tutorial has it."""

# Over a hundred requests at once deadlock it: each keeps its connection until its
# response is sent, for which it needs a thread, while the threads wait for connections.

import os
from collections.abc import Iterator
from typing import Annotated, ClassVar

from fastapi import Depends, FastAPI, HTTPException
from pydantic import EmailStr
from sqlalchemy import make_url
from sqlmodel import Field, Session, SQLModel, create_engine, select

url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg2")
engine = create_engine(url, pool_pre_ping=True)


class UserBase(SQLModel):
    email: EmailStr = Field(unique=True, max_length=254)
    full_name: str = Field(min_length=1, max_length=200)


class User(UserBase, table=True):
    __tablename__: ClassVar[str] = "users"

    id: int | None = Field(default=None, primary_key=True)


class UserCreate(UserBase):
    pass


class UserRead(UserBase):
    id: int


def get_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


SessionDep = Annotated[Session, Depends(get_session)]

SQLModel.metadata.create_all(engine)
app = FastAPI()


@app.post("/users", status_code=201, response_model=UserRead)
def create_user(new_user: UserCreate, session: SessionDep) -> User:
    if session.exec(select(User).where(User.email == new_user.email)).first():
        raise HTTPException(409, "Email already registered")
    user = User.model_validate(new_user)
    session.add(user)
    session.commit()
    session.refresh(user)
    return user


@app.get("/users/{user_id}", response_model=UserRead)
def read_user(user_id: int, session: SessionDep) -> User:
    user = session.get(User, user_id)
    if user is None:
        raise HTTPException(404, "User not found")
    return user
