"""Follow the README's section "Changing it", word for word, on both databases."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from test_main import Service, run_postgresql

README = (HERE / "README.md").read_text()
SECTION = README.partition("\n## Changing it\n")[2].partition("\n## ")[0]
STAMP = re.findall("`(.*alembic stamp head)`", SECTION)[0]
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", SECTION, re.DOTALL)


def run(script: str, folder: Path, database_url: str) -> None:
    environment = os.environ | {"DATABASE_URL": database_url}
    subprocess.run(["sh", "-ec", script], cwd=folder, env=environment, check=True)


def edit(block: str, folder: Path) -> None:
    """Write a block of Python where the README says: its first line tells where."""
    models = folder / "models.py"
    main = folder / "main.py"
    first_line = block.partition("\n")[0]
    if first_line in models.read_text():
        models.write_text(models.read_text().replace(f"{first_line}\n", block))
    elif first_line.startswith("class"):
        models.write_text(f"{models.read_text()}\n\n{block}")
    elif first_line.startswith("from models import"):
        main.write_text(re.sub(r"from models import .*\n", block, main.read_text()))
    else:
        main.write_text(f"{main.read_text()}\n\n{block}")


def follow(database_url: str) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        for name in ["main.py", "models.py", "requirements.txt", "Procfile"]:
            shutil.copy(HERE / name, folder)
        Path(folder, ".venv").symlink_to(sys.prefix)
        settings = {"DATABASE_URL": database_url, "PYTHONPATH": str(folder)}
        with Service(folder, **settings) as service:
            ada = service.create()
            eve = service.create()

        for language, block in BLOCKS:
            if language == "sh":
                run(block, folder, database_url)
                if "alembic init" in block:
                    run(STAMP, folder, database_url)
            else:
                edit(block, folder)
        migrate = '.venv/bin/alembic revision --autogenerate -m "Notes"'
        run(f"{migrate} && .venv/bin/alembic upgrade head", folder, database_url)

        path = f"/users/{ada['id']}"
        with Service(folder, **settings) as service:
            assert service.get(path).json() == ada | {"nickname": None}
            assert service.patch(path, json={"email": eve["email"]}).status_code == 409
            changed = ada | {"nickname": None, "full_name": "Ada"}
            assert service.patch(path, json={"full_name": "Ada"}).json() == changed
        run(".venv/bin/alembic downgrade base", folder, database_url)


with run_postgresql() as server, ThreadPoolExecutor() as threads:
    list(threads.map(follow, ["", server.url]))
print(f"Followed {len(BLOCKS)} blocks of the README, on both databases.")
