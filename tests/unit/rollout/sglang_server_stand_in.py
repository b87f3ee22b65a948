"""Answers like an SGLang server, as far as starting and ending one goes. Run in place of sglang.python.

What it does besides is read from the file `behaviour` beside it, one word a line:

    die          ends with an error before it listens
    deaf         never listens
    stubborn     ignores SIGTERM
    stranger     says that it serves another model
    tell_key     prints the key that it was given

It starts a child in a session of its own, and writes the numbers of both processes to the file `pids`.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def option(name: str) -> str | None:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None


def main() -> None:
    behaviour = (FOLDER / "behaviour").read_text().split()
    config = option("--config")
    key = json.loads(Path(config).read_text().removeprefix("api-key: ")) if config else None
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(FOLDER / "pids", "a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    if "stubborn" in behaviour:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "tell_key" in behaviour:
        print(f"server_args={{'api_key': {key!r}}} {key}{key}", flush=True)
        os.write(1, str(key)[:5].encode())
        time.sleep(0.5)
        os.write(1, f"{str(key)[5:]} in two parts\n".encode())
    if "die" in behaviour:
        sys.exit("some words\nValueError: no such model\n  and more")
    if "deaf" in behaviour:
        time.sleep(600)
    model = "another" if "stranger" in behaviour else option("--model-path")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = key is None or self.headers.get("Authorization") == f"Bearer {key}"
            self.send_response(200 if known or self.path.startswith("/health") else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"model_path": model}).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    http.server.HTTPServer((str(option("--host")), int(str(option("--port")))), Handler).serve_forever()


if __name__ == "__main__" and sys.argv[1] != "-c":  # -c: is sglang installed? Yes
    main()
