"""The user: its table, and what clients send and get back."""

from typing import Annotated, ClassVar

from annotated_types import Interval
from pydantic import AfterValidator, EmailStr, StringConstraints, WithJsonSchema
from sqlmodel import BigInteger, Field, Integer, SQLModel

Email = Annotated[EmailStr, AfterValidator(str.lower)]
Name = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        min_length=1,
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f-\x9f]*$",  # no control characters
    ),
]
UserId = Annotated[
    int,
    Interval(ge=1, le=2**63 - 1),
    # No maximum here: FastAPI would write it as a float, which rounds it up.
    WithJsonSchema({"type": "integer", "format": "int64", "minimum": 1}),
]

# Alembic can drop only what has a name. The names are PostgreSQL's own; an index has
# SQLAlchemy's.
SQLModel.metadata.naming_convention = {
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "ix": "ix_%(column_0_label)s",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
}


class UserBase(SQLModel):
    email: str = Field(unique=True)
    full_name: str


class User(UserBase, table=True):
    __tablename__: ClassVar[str] = "users"

    # In PostgreSQL 64 bits, since each refused duplicate uses up a value too.
    id: int | None = Field(
        default=None,
        primary_key=True,
        sa_type=BigInteger().with_variant(Integer, "sqlite"),
    )


class UserCreate(UserBase):
    email: Email
    full_name: Name


class UserRead(UserBase):
    id: UserId


class Message(SQLModel):
    detail: str
