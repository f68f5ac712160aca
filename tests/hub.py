"""A small Hugging Face Hub and data-set server on this machine, for the real client to talk to."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repos`: {"models/org/name": {file: bytes}}. `rows`: {(data set, config, split): [row]}.
    `faults`: {part of a request's address: what goes wrong, one after the other}: a status,
    "broken" (half the body, then the connection ends), "truncated" (half the body, as if it were
    all), "login" (a web page) or "gated". `seen` holds the addresses of all GET requests, `tokens`
    their Authorization headers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.rows, self.faults, self.seen = {}, {}, {}, []
        self.tokens = set()
        self.page, self.truncated = 100, []  # rows a page at most; cells cut off in its last row
        self.total = None  # rows that a data set claims to have; None: those it has
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer takes 40 ms

    def log_message(self, *args):
        pass

    def reply(self, body: bytes, status: int = 200, fault: object = None, **headers):
        if isinstance(fault, int):
            body, status = b'{"error": "made to fail"}', fault
        if fault == "gated":
            body, status, headers["X_Error_Code"] = b"", 401, "GatedRepo"
            headers["X_Error_Message"] = "Access is restricted. Please log in."
        body = b"<html>Log in</html>" if fault == "login" else body
        body = body[:len(body) // 2] if fault == "truncated" else body
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "Retry-After": 0, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:len(body) // 2] if fault == "broken" else body)
        if fault == "broken":
            self.wfile.flush()
            self.close_connection = True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, url, fault = self.server, urlsplit(self.path), None
        hub.tokens.add(self.headers.get("Authorization"))
        if self.command == "GET":
            hub.seen.append(self.path)
            for part, faults in hub.faults.items():
                if part in self.path and faults:
                    fault = faults.pop(0)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = url.path.strip("/")
        if path == "rows":
            rows = hub.rows.get((query["dataset"], query["config"], query["split"]))
            if rows is None:
                return self.reply(b'{"error": "no such split"}', 404)
            start, length = int(query["offset"]), int(query["length"])
            found = [{"row_idx": start + i, "row": row, "truncated_cells": []}
                     for i, row in enumerate(rows[start:start + min(length, hub.page)])]
            for last in found[-1:]:
                last["truncated_cells"] = hub.truncated
            page = {"features": [], "rows": found, "num_rows_total": hub.total or len(rows),
                    "partial": False}
            return self.reply(json.dumps(page).encode(), fault=fault)
        parts = path.removeprefix("api/").removeprefix("models/").split("/")
        files = hub.repos.get("/".join(["models", *parts[:2]]))
        if files is None:
            return self.reply(b'{"error": "Repository not found"}', 404,
                              X_Error_Code="RepoNotFound", X_Repo_Commit=COMMIT)
        if path.startswith("api/"):
            listing = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                       for name, content in files.items()]
            info = {"id": "/".join(parts[:2]), "sha": COMMIT, "private": False, "tags": [],
                    "downloads": 0, "siblings": [{"rfilename": name} for name in files]}
            found = listing if parts[2] == "tree" else info
            return self.reply(json.dumps(found).encode(), fault=fault)
        name = "/".join(parts[4:])
        if name not in files:
            return self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content, tag = files[name], hashlib.sha256(files[name]).hexdigest()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        return self.reply(content[start:], 206 if start else 200, fault, ETag=f'"{tag}"',
                          X_Repo_Commit=COMMIT, X_Linked_Size=len(content),
                          Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")


HUB = Hub()  # of all tests
