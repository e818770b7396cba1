"""The wiring of many a blog post, with the service's models."""

import os
from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from sqlmodel import Session, create_engine, select

from models import User, UserCreate, UserRead

engine = create_engine(os.environ["DATABASE_URL"], pool_pre_ping=True)


def get_session() -> Iterator[Session]:
    session = Session(engine)
    try:
        yield session
    finally:
        session.close()


SessionDep = Annotated[Session, Depends(get_session)]

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
