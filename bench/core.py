"""The endpoints' two statements without the ORM, to measure what it costs."""

from sqlalchemy import bindparam, insert, select
from sqlmodel import Session

from models import User, UserCreate

users = User.metadata.tables["users"]
SELECT = select(users).where(users.c.id == bindparam("id"))
INSERT = insert(users).returning(*users.c)


def create_user(session: Session, new_user: UserCreate) -> object:
    return session.connection().execute(INSERT, new_user.model_dump()).one()


def get_user(session: Session, user_id: int) -> object:
    return session.connection().execute(SELECT, {"id": user_id}).first()
