"""The service's GET without its database: what FastAPI and uvicorn leave to gain."""

from fastapi import FastAPI

from models import UserRead

app = FastAPI()
USER = UserRead(id=1, email="ada@example.com", full_name="Ada Lovelace")


@app.get("/users/{user_id}", response_model=None)
async def read_user(user_id: int) -> UserRead:
    return USER
