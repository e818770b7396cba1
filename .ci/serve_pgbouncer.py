"""Run PgBouncer in transaction mode before a PostgreSQL of the tests, until Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_main import run_postgresql

CONFIGURATION = """
[databases]
postgres = host=127.0.0.1 port={port} user=bob
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = 8766
auth_type = any
pool_mode = transaction
unix_socket_dir =
"""

with run_postgresql() as server, TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)  # PgBouncer refuses to run as root
    file = Path(folder, "pgbouncer.ini")
    file.write_text(CONFIGURATION.format(port=server.port))
    user = ["--user=nobody"] if os.geteuid() == 0 else []
    subprocess.run(["pgbouncer", "--quiet", *user, file], check=True)
