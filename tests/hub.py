"""A server that answers as the Hugging Face Hub does for data sets, on 127.0.0.1 only.

Imitated, checked against huggingface_hub 2.4, datasets 5.2 and stored answers of the Hub:
  GET  /api/datasets/ID[/revision/REV]       commit and full name; 307 where the name is another
  GET  /api/datasets/ID/tree/REV[/FOLDER]    the files, with git and LFS ids
  HEAD, GET /datasets/ID/resolve/REV/PATH    a small file: 307 to /api/resolve-cache; a large one (LFS): 302 to the CDN
  HEAD, GET /cdn/OID                         on a port of its own, since the CDN is another host
and the errors, with X-Error-Code. A data set that does not exist is 401, since it could be private.
Xet is advertised, as the Hub does, but a client that uses it is refused.
"""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

ID = r"([^/]+(?:/[^/]+)?)"
LFS_NAMES = (".parquet", ".gz")


class Hub:
    """The server and what it holds, as a context. `log` has a (method, path, bytes sent) for each answered request,
    `stalled` counts those that a fault keeps waiting.

    `faults` are dicts; the first whose regular expression `on` is found in "METHOD /path", and that is past `skip`
    matches and has been used less than `times` times, decides:
      do="status": answer `status` with `headers`; do="drop": hang up after `after` bytes of the body;
      do="stall": nothing more after `after` bytes of the body (None: not even a status) until the server ends.
    """

    def __init__(self):
        self.commits = {}                       # {name: {commit: {path: bytes}}}, the newest last
        self.gated, self.renamed = set(), {}    # names; {old name: new name}
        self.faults, self.log, self.blobs, self.stalled = [], [], {}, 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        handler = type("HubHandler", (Handler,), dict(hub=self))
        self.servers = [Server(("127.0.0.1", 0), handler), Server(("127.0.0.1", 0), handler)]
        self.address, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def commit(self, name, files):
        """Make `files` {path: bytes} the newest commit of a data set."""
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = files
        self.blobs |= {object_id(path, data): data for path, data in files.items()}
        return commit

    def find_fault(self, line):
        with self.lock:
            for fault in self.faults:
                if re.search(fault["on"], line):
                    fault["seen"] = fault.get("seen", 0) + 1
                    if 0 < fault["seen"] - fault.get("skip", 0) <= fault.get("times", 10**9):
                        return fault
        return {}


def object_id(path, data):
    """The LFS id (sha256) of a large file, the git id of another."""
    if path.endswith(LFS_NAMES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.sent = 0
        self.fault = self.hub.find_fault(f"{self.command} {unquote(self.path)}")
        with contextlib.suppress(ConnectionError):
            self.answer()
        with self.hub.lock:
            self.hub.log.append((self.command, unquote(urlsplit(self.path).path), self.sent))

    do_HEAD = do_GET

    def send(self, status, headers=(), body=b""):
        self.send_response(status)
        usual = {"Content-Length": len(body), "X-Request-Id": "Root=1-0", "RateLimit": '"api";r=499;t=300',
                 "X-HF-Warning": "unauthenticated; You are sending unauthenticated requests to the HF Hub."}
        for name, value in (usual | dict(headers)).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        broken = self.fault.get("do") in ("drop", "stall")
        body = body[:self.fault["after"]] if broken else body
        self.wfile.write(body)
        self.sent = len(body)
        if self.fault.get("do") == "stall":
            self.stall()
        self.close_connection |= broken

    def stall(self):
        with self.hub.lock:
            self.hub.stalled += 1
        self.hub.closing.wait()
        self.close_connection = True

    def send_object(self, value):
        self.send(200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode())

    def refuse(self, status, code, message, headers=()):
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.send(status, {name: value for name, value in named.items() if value} | dict(headers),
                  json.dumps(dict(error=message)).encode())

    def redirect(self, status, location, headers=()):
        self.send(status, {"Location": location} | dict(headers), b"Redirecting")

    def answer(self):
        if self.fault.get("do") == "status":
            return self.send(self.fault["status"], self.fault.get("headers", {}))
        if self.fault.get("do") == "stall" and self.fault["after"] is None:
            return self.stall()
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch("/cdn/(.+)|/api/resolve-cache/.+/(.+?)/.+", path):
            return self.send_file(match[1] or parse_qs(urlsplit(self.path).query)["etag"][0].strip('"'))
        for pattern, method in ((f"/api/datasets/{ID}/(revision|tree)/([^/]+)/?(.*)", self.api),
                                (f"/datasets/{ID}/(resolve)/([^/]+)/(.+)", self.resolve),
                                (f"/api/datasets/{ID}()()()", self.api)):
            if match := re.fullmatch(pattern, path):
                name, verb, revision, below = match.groups()
                if found := self.find(name, verb, revision or "main"):
                    method(name, verb, *found, below)
                return None
        return self.refuse(404, None, "Sorry, we can't find the page you are looking for.")

    def find(self, name, verb, revision):
        """(commit, its files), or None after the answer that tells why not."""
        commits = self.hub.commits.get(name)
        if new := self.hub.renamed.get(name):
            return self.redirect(307, self.path.replace(name, new, 1))
        if commits is None:  # the Hub sends no code here: over https, huggingface_hub takes it for this one
            return self.refuse(401, "RepoNotFound", "Invalid username or password.")
        if name in self.hub.gated and verb == "resolve":
            return self.refuse(401, "GatedRepo", f"Access to dataset {name} is restricted.")
        commit = [*commits][-1] if revision == "main" else revision
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, commits[commit]

    def api(self, name, verb, commit, files, below):
        if verb in ("", "revision"):
            return self.send_object(dict(id=name, sha=commit, private=False, gated="auto" if name in self.hub.gated else
                                         False, siblings=[dict(rfilename=path) for path in files], tags=[]))
        prefix = below + "/" if below else ""
        inside = [path for path in files if path.startswith(prefix)]
        if not inside:
            return self.refuse(404, "EntryNotFound", f'{below} does not exist on "main"')
        recursive = "recursive=true" in self.path.lower()
        folders = {path[:match.start()] for path in inside for match in re.finditer("/", path)}
        rows = [dict(type="directory", oid="0", size=0, path=path) for path in sorted(folders)]
        rows += [entry(path, files[path]) for path in inside]
        return self.send_object([row for row in rows if row["path"].startswith(prefix)
                                 and (recursive or "/" not in row["path"][len(prefix):])])

    def resolve(self, name, verb, commit, files, path):
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        oid = object_id(path, files[path])
        linked = {"X-Repo-Commit": commit, "X-Linked-Size": len(files[path]), "X-Linked-ETag": f'"{oid}"'}
        if path.endswith(LFS_NAMES):
            token = f"{self.hub.address}/api/datasets/{name}/xet-read-token/{commit}"
            linked |= {"X-Xet-Hash": oid, "Link": f'<{token}>; rel="xet-auth"'}
            return self.redirect(302, f"{self.hub.cdn}/cdn/{oid}", linked)
        place = f"/api/resolve-cache/datasets/{name}/{commit}/{quote(path, safe='')}?etag=%22{oid}%22"
        return self.redirect(307, place, linked)

    def send_file(self, oid):
        headers = {"ETag": f'"{oid}"'}
        if re.fullmatch("[0-9a-f]{40}", oid):
            headers["X-Repo-Commit"] = re.search("/([0-9a-f]{40})/", self.path)[1]
        self.send(200, headers, self.hub.blobs[oid])


def entry(path, data):
    oid = object_id(path, data)
    large = dict(lfs=dict(oid=oid, size=len(data), pointerSize=134)) if path.endswith(LFS_NAMES) else {}
    return dict(type="file", path=path, size=len(data), oid=oid[:40]) | large


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        pass  # a client that went away
