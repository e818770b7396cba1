"""The user: one table, and the schemas of what a client sends and gets back."""

from typing import Annotated, ClassVar
from unicodedata import normalize

from pydantic import AfterValidator, EmailStr, StringConstraints
from sqlmodel import BigInteger, Field, Integer, SQLModel

UserId = Annotated[int, Field(ge=1, le=2**63 - 1)]  # BIGINT's, and SQLite's, largest


def lower(email: str) -> str:
    """One spelling: in lower case, a letter may compose with its accent anew."""
    return normalize("NFC", email.lower())


Email = Annotated[EmailStr, AfterValidator(lower)]
Name = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        min_length=1,
        max_length=200,
        # Any script, but no control characters.
        pattern=r"^[^\x00-\x1f\x7f-\x9f]*$",
    ),
]


class UserBase(SQLModel):
    email: str = Field(unique=True)
    full_name: str


class User(UserBase, table=True):
    __tablename__: ClassVar[str] = "users"

    # 64 bits, because a refused duplicate burns a value of PostgreSQL's sequence.
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
