# SPDX-License-Identifier: Apache-2.0
"""As much of wandb's server as a run, a report and a dashboard need, on
loopback: `with WandbStub() as stub:`.

Keeps what it is sent the way the server does: history lines go where their
offset says, a run that is there is resumed after its last line, an artifact
with a digest that is there is not made again.
"""

import gzip
import http.server
import json
import threading
from typing import Any

KEY = "x" * 40
_PROJECT = {"id": "P", "name": "tfjax", "entity": {"id": "E", "name": "me"},
            "entityName": "me", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}
_USER = {"id": "U", "entity": "me", "username": "me", "name": "Me",
         "email": "me@example.org", "admin": False, "flags": "{}",
         "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}}


class WandbStub:
  """The server.

  Attributes:
    runs: by id: config, summary, history (a list of rows), groupName, jobType,
      tags, exitcode, and `lines`, how many history lines have ever come in.
    artifacts: by digest: name and type, files (name to content).
    views: the saved workspaces and reports.
    can_rewind: whether the server knows how to truncate a run's history.
    is_down: whether connections are broken off without an answer.
    operations: what it has been asked, in order.
    unknown: what of it the stub does not know.
  """

  def __init__(self, can_rewind: bool = True):
    self.runs: dict[str, dict[str, Any]] = {}
    self.artifacts: dict[str, dict[str, Any]] = {}
    self.views: list[dict[str, Any]] = []
    self.can_rewind = can_rewind
    self.is_down = False
    self.operations: list[str] = []
    self.unknown: list[tuple[str, dict[str, Any]]] = []
    handler = type("Handler", (_Handler,), {"stub": self})
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    self._server.handle_error = lambda *_: None  # clients hang up
    self.url = f"http://127.0.0.1:{self._server.server_port}"

  def __enter__(self) -> "WandbStub":
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._server.shutdown()
    self._server.server_close()

  def environment(self) -> dict[str, str]:
    return dict(WANDB_BASE_URL=self.url, WANDB_API_KEY=KEY,
                WANDB_MODE="online", WANDB_ERROR_REPORTING="false")

  # --- GraphQL, by the name of the operation -----------------------------

  def answer(self, name: str, v: dict[str, Any]) -> dict[str, Any] | None:
    self.operations.append(name)
    function = getattr(self, f"_{name}", None)
    if function is None:
      self.unknown.append((name, v))
      return None
    return function(v)

  def _Viewer(self, v: dict[str, Any]) -> dict[str, Any]:
    return {"viewer": _USER}

  def _GetDefaultEntity(self, v: dict[str, Any]) -> dict[str, Any]:
    return self._Viewer(v)

  def _GetProjects(self, v: dict[str, Any]) -> dict[str, Any]:
    return {"models": {
        "pageInfo": {"endCursor": None, "hasNextPage": False},
        "edges": [{"cursor": "c", "node": dict(
            _PROJECT, createdAt="2026-01-01T00:00:00", isBenchmark=False,
            user=_USER)}]}}

  def _ServerFeaturesQuery(self, v: dict[str, Any]) -> dict[str, Any]:
    return {"serverInfo": {"features": []}}

  def _RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
    run, bucket = self.runs.get(v["name"]), None
    if run is not None:
      bucket = dict(
          id=v["name"], name=v["name"], displayName=v["name"],
          summaryMetrics=json.dumps(run["summary"]), logLineCount=0,
          historyLineCount=len(run["history"]), eventsLineCount=0,
          historyTail=json.dumps([json.dumps(row)
                                  for row in run["history"][-1:]]),
          eventsTail="[]", config=json.dumps(run["config"]),
          tags=run["tags"], notes=None,
          wandbConfig=json.dumps({"t": 1}))
    return {"model": dict(_PROJECT, bucket=bucket)}

  def _UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
    inserted = v["name"] not in self.runs
    run = self.runs.setdefault(v["name"], dict(
        config={}, summary={}, history=[], tags=[], exitcode=None, lines=0))
    if v.get("config"):
      run["config"] = json.loads(v["config"])
    for key in ("groupName", "jobType", "tags", "displayName"):
      if v.get(key) is not None:
        run[key] = v[key]
    return {"upsertBucket": {"inserted": inserted, "bucket": self._bucket(v)}}

  def _bucket(self, v: dict[str, Any]) -> dict[str, Any]:
    run = self.runs[v["name"]]
    return dict(id=v["name"], name=v["name"], displayName=v["name"],
                description="", config=json.dumps(run["config"]),
                sweepName=None, project=_PROJECT,
                historyLineCount=len(run["history"]))

  def _RewindRun(self, v: dict[str, Any]) -> dict[str, Any] | None:
    if not self.can_rewind:
      return None
    name = v["runName"]
    run = self.runs[name]
    del run["history"][int(v["metricValue"]) + 1:]
    return {"rewindRun": {"rewoundRun": dict(
        self._bucket(dict(name=name)),
        projectName="tfjax", entityName="me")}}

  def _CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
    files = [dict(name=name, uploadUrl=f"{self.url}/upload/{name}")
             for name in v["files"]]
    return {"createRunFiles": {
        "runID": v["run"], "uploadHeaders": [], "files": files}}

  # An artifact: created (unless its digest is known), its files uploaded, its
  # manifest too, then committed.

  def _CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
    given = v["input"]
    digest = given["digest"]
    made = self.artifacts.setdefault(digest, dict(
        name=given["artifactCollectionName"], type=given["artifactTypeName"],
        run=given["runName"], state="PENDING", files={}))
    return {"createArtifact": {"artifact": dict(
        id=digest, state=made["state"], artifactSequence=dict(
            id="S", latestArtifact=None))}}

  def _CreateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
    return self._manifest("createArtifactManifest", v)

  def _UpdateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
    return self._manifest("updateArtifactManifest", v)

  def _manifest(self, key: str, v: dict[str, Any]) -> dict[str, Any]:
    return {key: {"artifactManifest": dict(id="M", file=dict(
        id="F", name="manifest", displayName="manifest",
        uploadUrl=f"{self.url}/manifest", uploadHeaders=[]))}}

  def _CreateArtifactFiles(self, v: dict[str, Any]) -> dict[str, Any]:
    return {"createArtifactFiles": {"files": {"edges": [
        {"node": dict(
            id=file["name"], name=file["name"], displayName=file["name"],
            uploadUrl=f"{self.url}/artifact/{file['artifactID']}/"
            f"{file['name']}", uploadHeaders=[],
            storagePath="wandb_artifacts/x", uploadMultipartUrls=None,
            artifact=dict(id=file["artifactID"]))}
        for file in v.get("input", v)["artifactFiles"]]}}}

  def _CommitArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
    digest = v.get("input", v)["artifactID"]
    self.artifacts[digest]["state"] = "COMMITTED"
    return {"commitArtifact": {"artifact": dict(id=digest,
                                                digest=digest)}}

  def _ArtifactByID(self, v: dict[str, Any]) -> dict[str, Any]:
    made = self.artifacts[v["id"]]
    collection = {"__typename": "ArtifactSequence", "id": "S",
                  "name": made["name"], "project": dict(
                      _PROJECT, __typename="Project")}
    return {"artifact": {
        "__typename": "Artifact", "id": v["id"], "digest": v["id"],
        "artifactSequence": collection, "versionIndex": 0,
        "artifactType": {"name": made["type"]}, "description": None,
        "metadata": None, "ttlDurationSeconds": -1, "ttlIsInherited": False,
        "tags": [], "historyStep": None, "state": made["state"],
        "size": sum(map(len, made["files"].values())), "commitHash": "c",
        "fileCount": len(made["files"]), "createdAt": "2026-01-01T00:00:00",
        "updatedAt": None, "aliases": []}}

  # Saved views: workspaces (by name) and reports (by id).

  def _UpsertView2(self, v: dict[str, Any]) -> dict[str, Any]:
    return self._upsertView(v)

  def _upsertView(self, v: dict[str, Any]) -> dict[str, Any]:
    known = [view for view in self.views if view["id"] == v.get("id")]
    view = known[0] if known else dict(
        id=f"view{len(self.views)}", name=v["name"])
    if not known:
      self.views.append(view)
    view.update(type=v["type"], displayName=v["displayName"],
                description=v["description"], spec=v["spec"],
                project=_PROJECT, createdAt=None, updatedAt=None)
    return {"upsertView": {"view": view, "inserted": not known}}

  def _View(self, v: dict[str, Any]) -> dict[str, Any]:
    found = [view for view in self.views if view["name"] == v["viewName"]]
    return {"project": {"allViews": {"edges": [
        {"node": view} for view in found]}}}

  def _ProjectInternalId(self, v: dict[str, Any]) -> dict[str, Any]:
    return {"project": _PROJECT}

  def put(self, path: str, content: bytes) -> None:
    """An uploaded file."""
    if path.startswith("/artifact/"):
      digest, _, name = path.removeprefix("/artifact/").partition("/")
      self.artifacts[digest]["files"][name] = content

  def stream(self, name: str, body: dict[str, Any]) -> None:
    """What a run's file stream brings."""
    run, files = self.runs[name], body.get("files") or {}
    if "wandb-history.jsonl" in files:
      chunk = files["wandb-history.jsonl"]
      lines = [json.loads(line) for line in chunk["content"]]
      start = chunk["offset"]
      run["history"][start:start + len(lines)] = lines
      run["lines"] += len(lines)
    if "wandb-summary.json" in files:
      run["summary"] = json.loads(files["wandb-summary.json"]["content"][-1])
    if body.get("complete"):
      run["exitcode"] = body["exitcode"]


class _Handler(http.server.BaseHTTPRequestHandler):
  """One request."""

  protocol_version = "HTTP/1.1"
  stub: WandbStub

  def log_message(self, *_: Any) -> None:
    pass

  def do_GET(self) -> None:  # pylint: disable=invalid-name
    self._reply({})

  def do_PUT(self) -> None:  # pylint: disable=invalid-name
    content = self._body()
    self.stub.operations.append(f"PUT {self.path}")
    self.stub.put(self.path, content)
    self._reply({})

  def do_POST(self) -> None:  # pylint: disable=invalid-name
    body = self._body()
    if self.path == "/graphql":
      request = json.loads(body)
      query = request["query"].split(None, 1)[1]
      name = query.split("(")[0].split("{")[0].strip()
      data = self.stub.answer(name, request.get("variables") or {})
      self._reply({"data": data} if data is not None else
                  {"errors": [{"message": f"{name} is not known here"}]})
      return
    if self.path.endswith("/file_stream"):
      self.stub.stream(self.path.split("/")[-2], json.loads(body))
    self._reply({})

  def _body(self) -> bytes:
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if self.stub.is_down:
      self.close_connection = True
      raise ConnectionAbortedError
    if self.headers.get("Content-Encoding") == "gzip":
      body = gzip.decompress(body)
    return body

  def _reply(self, value: Any) -> None:
    data = json.dumps(value).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)
