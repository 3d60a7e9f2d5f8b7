"""A stand-in for the W&B server, for wire and fault tests: the real `wandb` client talks to it online.

    with StubServer() as server:        WANDB_BASE_URL=server.url WANDB_API_KEY=<40 characters>
        server.become("error")          # every answer is 500 from now on

It knows just enough of the protocol for wandb 0.31 to create and resume a run, stream its history and upload files.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StubServer:
    """Answers on a free port of this host until it is stopped. What it was told is in its attributes."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.graphql: list[tuple[str, dict[str, Any]]] = []  # (operation, variables)
        self.runs: dict[str, dict[str, Any]] = {}  # by id: the variables of its last upsert
        self.history: dict[str, list[dict[str, Any]]] = {}  # by id: rows in the order they came
        self.exits: dict[str, int] = {}  # by id
        self.uploads: list[str] = []
        self.views: list[dict[str, Any]] = []  # saved reports: the variables of each upsert
        self.server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"stub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.released = threading.Event()
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def __enter__(self) -> StubServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def become(self, mode: str) -> None:
        """Answer ("ok"), fail ("error"), stay silent ("hang") or vanish ("gone") from now on."""
        self.mode = mode
        if mode == "gone":
            self.stop()

    def stop(self) -> None:
        if not self.released.is_set():
            self.released.set()
            self.server.shutdown()
            self.server.server_close()

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "cA==", "name": variables.get("project") or "p", "entity": {"id": "ZQ==", "name": "ent"}}
        if "Upsert" in name:
            run = variables.get("name") or "r"
            inserted = run not in self.runs
            self.runs[run] = {**self.runs.get(run, {}), **{key: value for key, value in variables.items() if value is not None}}
            return {"upsertBucket": {"bucket": self.bucket(run) | {"project": project}, "inserted": inserted}}
        if name in ("Viewer", "GetDefaultEntity"):
            teams = {"edges": []}
            return {"viewer": {"id": "dQ==", "entity": "ent", "username": "u", "email": "u@x", "flags": "{}", "teams": teams}}
        if name == "ServerInfo":
            return {"serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": None}}
        if "CreateRunFiles" in name:
            files = [{"name": f, "uploadUrl": f"{self.url}/up/{f}"} for f in variables.get("files", [])]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "Features" in name:
            return {"serverInfo": {"features": []}}
        if "RunResumeStatus" in name:
            run = variables.get("name", "")
            return {"model": project | {"bucket": self.bucket(run) if run in self.runs else None}}
        if name == "ProjectInternalId":
            return {"project": {"id": "cA==", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}
        if "rojects" in name:  # what lists them
            node = {
                "node": {
                    "__typename": "Project",
                    "id": "cA==",
                    "internalId": "1",
                    "name": "birds",
                    "entityName": "ent",
                    "createdAt": "2026-01-01T00:00:00Z",
                    "isBenchmark": False,
                    "user": None,
                },
                "cursor": "0",
            }
            return {"models": {"edges": [node], "pageInfo": {"endCursor": None, "hasNextPage": False}}}
        if "pload" not in name and "iew" in name and "spec" in variables:
            self.views.append(variables)
            view = {"id": variables.get("id") or "VmlldzoxMjM=", "name": variables["name"], "displayName": variables["displayName"], "description": variables["description"], "type": "runs",
                    "project": {"id": "cA==", "name": variables["projectName"], "entityName": variables["entityName"]}, "spec": variables["spec"], "createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z",
                    "user": {"id": "dQ==", "username": "u", "name": "u", "photoUrl": None, "userInfo": {}}, "entityName": "ent", "previewUrl": None, "locked": False, "viewCount": 0}  # fmt: skip
            return {"upsertView": {"view": view, "inserted": True}}
        if "RunStoppedStatus" in name:
            return {"project": {"run": {"stopped": False}}}
        return {}

    def bucket(self, run: str) -> dict[str, Any]:
        """What the server knows of a run: how far its history goes decides where a resumed one counts on."""
        rows = self.history.get(run, [])
        last = rows[-1] if rows else {}
        return {
            "id": "cnVu", "name": run, "displayName": self.runs[run].get("displayName", run), "description": "", "sweepName": "",
            "config": self.runs[run].get("config", "{}"), "historyLineCount": len(rows), "logLineCount": 0, "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(last)]), "eventsTail": "[]", "summaryMetrics": json.dumps(last),
            "tags": [], "wandbConfig": json.dumps({"t": {}}),
        }  # fmt: skip

    def streamed(self, run: str, content: dict[str, Any]) -> None:
        """One message of a run's file stream."""
        lines = content.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.history.setdefault(run, []).extend(json.loads(line) for line in lines)
        if content.get("complete"):
            self.exits[run] = content.get("exitcode", 0)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client went away: wandb-core does when it ends."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: StubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def reply(self, payload: Any, code: int = 200) -> None:
        body = json.dumps(payload).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            data = self.rfile.read(int(length))
        else:
            data = b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def fails(self) -> bool:
        """Do what the mode says instead of answering."""
        if self.stub.mode == "hang":
            self.stub.released.wait(60)
            self.close_connection = True
            return True
        if self.stub.mode == "error":
            self.reply({"error": "broken on purpose"}, 500)
            return True
        return False

    def do_GET(self) -> None:
        if not self.fails():
            self.reply({})

    def do_PUT(self) -> None:
        self.body()
        if not self.fails():
            self.stub.uploads.append(self.path)
            self.reply({})

    def do_POST(self) -> None:
        data = self.body()
        if self.fails():
            return
        if found := re.search(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.stub.streamed(found.group(1), json.loads(data))
            self.reply({"exitcode": None, "limits": {}})
        elif "graphql" in self.path:
            query = json.loads(data)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            name, variables = operation.group(1) if operation else "", query.get("variables") or {}
            self.stub.graphql.append((name, variables))
            self.reply({"data": self.stub.answer(name, variables)})
        else:
            self.reply({})


if __name__ == "__main__":
    with StubServer() as server:
        print(f"WANDB_BASE_URL={server.url} WANDB_API_KEY={'0' * 40}", flush=True)
        while True:
            time.sleep(60)
