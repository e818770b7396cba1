"""The user: one table, and the schemas of what a client sends and gets back."""

import re
from typing import ClassVar

from email_validator import EmailNotValidError, validate_email
from pydantic import field_validator
from sqlmodel import BigInteger, Column, Field, Integer, SQLModel, String

MAX_ID = 2**63 - 1  # PostgreSQL's BIGINT, and SQLite's row id
CONTROL = r"\x00-\x1f\x7f-\x9f"
# White space around 1 to 200 characters: a JSON Schema cannot say "trimmed".
FULL_NAME = rf"^\s*[^\s{CONTROL}]([^{CONTROL}]{{0,198}}[^\s{CONTROL}])?\s*$"

SURROGATE = r"[\ud800-\udfff]"  # JSON can hold a lone one, UTF-8 cannot


class UserBase(SQLModel):
    email: str = Field(
        max_length=254,  # RFC 5321's longest address
        unique=True,
        description="In any case; stored and answered in lower case. ASCII only: "
        "an internationalised domain is written in its `xn--` form. "
        "Quoted names and reserved domains such as `.test` are refused.",
        schema_extra={
            "examples": ["ada@example.com"],
            "json_schema_extra": {"format": "email"},
        },
    )
    full_name: str = Field(
        sa_type=String(200),
        description="1 to 200 characters of any script, trimmed, no control characters",
        schema_extra={
            "examples": ["Ada Lovelace"],
            "json_schema_extra": {"pattern": FULL_NAME},
        },
    )


class User(UserBase, table=True):
    __tablename__: ClassVar[str] = "users"

    # 64 bits, because a refused duplicate burns a value of PostgreSQL's sequence.
    id: int | None = Field(
        default=None,
        sa_column=Column(
            BigInteger().with_variant(Integer, "sqlite"), primary_key=True
        ),
    )


class UserCreate(UserBase):
    model_config = {"extra": "forbid"}

    @field_validator("email")
    @classmethod
    def normalize_email(cls, email: str) -> str:
        try:
            # As bytes, it must be ASCII.
            validate_email(email.encode(), check_deliverability=False)
        except EmailNotValidError as error:
            # After a colon or a parenthesis, the message quotes the input.
            raise ValueError(re.split(r":| \(", str(error))[0].rstrip(".")) from None
        return email.lower()

    @field_validator("full_name")
    @classmethod
    def trim_full_name(cls, full_name: str) -> str:
        if not re.fullmatch(FULL_NAME, full_name) or re.search(SURROGATE, full_name):
            raise ValueError("A name has 1 to 200 characters, no control characters")
        return full_name.strip()


class UserId(SQLModel):  # apart, since the fields of a last base come first
    id: int = Field(schema_extra={"json_schema_extra": {"format": "int64"}})


class UserRead(UserBase, UserId):
    """A registered user."""


class Message(SQLModel):
    detail: str
