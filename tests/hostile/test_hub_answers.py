"""A Hub, or somebody on the way to it, that lies: in headers that become paths, in contents, in its listing."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from lk_backbones import hub as lk_hub
from lk_backbones.cli import main
from lk_backbones.weights import DownloadError, pull
from lk_backbones.weights.download import fetch_from_hub
from tests.hostile.conftest import Refused
from tests.hub.conftest import client, finish, process  # noqa: F401
from tests.hub.conftest import hub as loopback
from tests.hub.server import Fault, LoopbackHub, git_hash

REPO, SOURCE = "you/tiny", "hf-hub:you/tiny"
WEIGHTS = save({"a": torch.arange(100, dtype=torch.float32)})
OTHERS = save({"a": torch.zeros(100)})  # what must not be loaded
CONFIG = json.dumps({"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}).encode()
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()

hub = loopback  # the fixture
IN_CACHE = ["cache" + "/*" * depth for depth in range(1, 8)]


@pytest.fixture(autouse=True)
def commit(hub: LoopbackHub) -> str:
    return hub.add(REPO, {"model.safetensors": WEIGHTS, "config.json": CONFIG})


def headers(**given: str) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in given.items()}


# Headers that replace those of the right answer, and what the error must name. The bytes are wrong, so that whoever
# does not look loads them.
HEADERS = {
    "an ETag that is no hash": (headers(X_Linked_Etag='"5f3a-18c2"'), "'\"5f3a-18c2\"', which is no checksum"),
    "a weak ETag": (headers(X_Linked_Etag='W/"5f3a"'), "no checksum"),
    "a weak ETag with a hash in it": (headers(X_Linked_Etag=f'W/"{SHA256}"'), "damaged"),
    "an ETag without quotes": (headers(X_Linked_Etag=SHA256), "damaged"),
    "an empty ETag": (headers(X_Linked_Etag='""'), "no checksum"),
    "two empty ETags": (headers(X_Linked_Etag="", ETag=""), "no checksum"),
    "an ETag that is a path": (headers(X_Linked_Etag='"../../../../outside"'), "no checksum"),
    "an ETag that is a path on Windows": (headers(X_Linked_Etag='"..\\..\\outside"'), "no checksum"),
    "an absolute path": (headers(X_Linked_Etag='"/tmp/outside"'), "no checksum"),
    "a hash and a path": (headers(X_Linked_Etag=f'"{SHA256}/../../outside"'), "no checksum"),
    "an ETag of dots": (headers(X_Linked_Etag='".."'), "no checksum"),
    "a hash in capitals": (headers(X_Linked_Etag=f'"{SHA256.upper()}"'), "no checksum"),
    "half a hash": (headers(X_Linked_Etag=f'"{SHA256[:32]}"'), "no checksum"),
    "a hash of a hundred digits": (headers(X_Linked_Etag='"' + "a" * 100 + '"'), "no checksum"),
    "only a plain ETag": (headers(X_Linked_Etag="", ETag='"../../outside"'), "no checksum"),
    "git's hash of other bytes": (headers(X_Linked_Etag=f'"{git_hash(WEIGHTS)}"'), "damaged"),
    "a commit that is a path": (headers(X_Repo_Commit="../../../outside"), "which is no commit hash"),
    "an absolute commit": (headers(X_Repo_Commit="/tmp/outside"), "which is no commit hash"),
    "an empty commit": (headers(X_Repo_Commit=""), "which is no commit hash"),
    "a short commit": (headers(X_Repo_Commit="abc1234"), "which is no commit hash"),
    "a branch for a commit": (headers(X_Repo_Commit="main"), "which is no commit hash"),
    "a file of this machine": (headers(Location="file:///etc/passwd"), "the address 'file:///etc/passwd'"),
    "a data address": (headers(Location="data:text/plain,x"), "the address"),
    "another server without a scheme": (headers(Location="//localhost/x"), "the address"),
    "a hash of Xet's that is a path": (headers(X_Xet_Hash="../../x", X_Xet_Refresh_Route="http://localhost/x"), "Xet"),
    "more bytes than there are": (headers(X_Linked_Size="4096"), "model.safetensors"),
    "an exabyte": (headers(X_Linked_Size=str(10**18)), "model.safetensors"),
    "fewer than no bytes": (headers(X_Linked_Size="-5"), "model.safetensors"),
}


@pytest.mark.parametrize(("lies", "named"), HEADERS.values(), ids=HEADERS)
@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # of the client
def test_headers_that_lie(lies: dict, named: str, hub: LoopbackHub, client: Path, refused: Refused) -> None:  # noqa: F811
    with (
        hub.fault(method="HEAD", path="/resolve/", add=lies),
        hub.fault(method="GET", path="/cdn/", change=lambda content: OTHERS),
    ):
        refused(["hub", "pull", SOURCE], named, leaves=IN_CACHE)
    nothing_wrong_is_kept(client)
    main(["hub", "pull", SOURCE])  # and the cache is good for the next time


def nothing_wrong_is_kept(cache: Path) -> None:
    kept = [path for path in cache.rglob("*") if path.is_file() and path.name != "CACHEDIR.TAG"]
    for path in kept:
        content = path.read_bytes()
        right = {"blobs": {WEIGHTS, CONFIG}, "refs": set()}.get(path.parent.name, {WEIGHTS, CONFIG})
        begun = path.suffix == ".incomplete"  # what clients before 1.0 begin with next time
        lock = path.suffix == ".lock" and content == b""
        reference = path.parent.name == "refs" and len(content) == 40
        assert begun or lock or reference or content in right, f"{path} is kept: {content[:50]!r}"


@pytest.fixture
def late(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses connections until the client pauses, so that the client drops its session."""
    address, handler = hub.server.server_address, hub.server.RequestHandlerClass
    hub.close()
    server = ThreadingHTTPServer(address, handler, bind_and_activate=False)  # type: ignore[arg-type]
    server.daemon_threads = True
    server.server_bind()  # nobody else gets the port

    def open_and_sleep(seconds: float) -> None:
        if hub.server is not server:
            hub.server = server
            server.server_activate()
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    monkeypatch.setattr("time.sleep", open_and_sleep)


@pytest.mark.parametrize(
    ("lies", "named"),
    [HEADERS["an ETag that is a path"], HEADERS["a commit that is a path"], HEADERS["a weak ETag"]],
)
def test_headers_that_lie_to_a_session_opened_in_the_middle(
    lies: dict,
    named: str,
    hub: LoopbackHub,
    client: Path,  # noqa: F811
    late: None,
    refused: Refused,
) -> None:
    """A redirection within the Hub, which clients before 1.0 follow with a new session."""
    hub.repositories["you/old"] = hub.repositories[REPO]
    moved = headers(
        Location=f"/{REPO}/resolve/main/model.safetensors", X_Repo_Commit=hub.repositories[REPO].refs["main"]
    )
    with (
        hub.fault(method="HEAD", path="/you/old/", status=307, headers=moved),
        hub.fault(method="HEAD", path=f"/{REPO}/", add=lies),
        hub.fault(method="GET", path="/cdn/", change=lambda content: OTHERS),
    ):
        refused(["hub", "pull", "hf-hub:you/old/model.safetensors"], named, leaves=IN_CACHE)
    nothing_wrong_is_kept(client)


def test_answers_that_nobody_has_seen(
    hub: LoopbackHub,
    client: Path,  # noqa: F811
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that asks on other ways than those that are known."""
    monkeypatch.setattr("lk_backbones.weights.download._Answers.look_at", lambda *args: None)
    refused(["hub", "pull", SOURCE], "the answers about it were not seen", leaves=IN_CACHE)
    assert not [path for path in client.rglob("blobs/*") if path.is_file()]


@pytest.mark.parametrize("commit_given", ["../../../outside", "/tmp/outside", "", "main"])
def test_a_missing_file_of_a_commit_that_is_a_path(
    commit_given: str, hub: LoopbackHub, refused: Refused, tmp_path: Path
) -> None:
    """The client keeps in its cache what does not exist, under the commit that the answer names."""
    lie = headers(X_Repo_Commit=commit_given, X_Error_Code="EntryNotFound")
    with hub.fault(method="HEAD", path="/resolve/", status=404, headers=lie):
        refused(["hub", "pull", SOURCE], "no commit hash")
    assert not list(tmp_path.rglob("*outside*"))


def test_another_commit_than_was_asked_for(hub: LoopbackHub, commit: str, refused: Refused) -> None:
    other = hub.add(REPO, {"model.safetensors": OTHERS})
    with hub.fault(method="HEAD", path="/resolve/", add=headers(X_Repo_Commit=other)):
        refused(["hub", "pull", f"{SOURCE}@{commit}"], f"the commit {other}, but {commit} was asked for")


SIBLING = {"rfilename": "model.safetensors", "size": len(WEIGHTS), "blobId": "0" * 40}
LISTINGS = {
    "another SHA-256": ([SIBLING | {"lfs": {"sha256": "0" * 64, "size": len(WEIGHTS), "pointerSize": 134}}], "SHA-256"),
    "no SHA-256 at all": ([SIBLING | {"lfs": {"sha256": "\x1b[31m", "size": 1, "pointerSize": 134}}], r"\x1b[31m"),
    "another size": ([SIBLING | {"size": 7, "lfs": {"sha256": SHA256, "size": 7, "pointerSize": 134}}], "not 7"),
    "another git hash": ([SIBLING], "git's SHA-1"),
    "without the file": ([{"rfilename": "../../model.safetensors"}], "it is not in it"),
}


@pytest.mark.parametrize(("siblings", "named"), LISTINGS.values(), ids=LISTINGS)
def test_a_listing_that_contradicts_the_file(
    siblings: list[dict[str, Any]],
    named: str,
    hub: LoopbackHub,
    commit: str,
    client: Path,  # noqa: F811
    refused: Refused,
) -> None:
    listing = json.dumps({"id": REPO, "sha": commit, "siblings": siblings}).encode()
    with hub.fault(path="/api/models/", status=200, body=listing):
        refused(["hub", "pull", SOURCE], "own listing says", named, leaves=IN_CACHE)
    assert not [path for path in client.rglob("blobs/*") if path.is_file()]


# A Hub that gives no listing to compare with is no liar: its checksum counts, and what was compared is said.
UNUSABLE = {
    "not found": ({"status": 404}, "HTTP 404"),
    "refused": ({"status": 403}, "HTTP 403"),
    "a web page": ({"status": 200, "body": b"<html>"}, "could not be had"),
    "a list": ({"status": 200, "body": b"[]"}, "could not be had"),
    "empty": ({"status": 200, "body": b'{"id": "you/tiny", "siblings": []}'}, "it is empty"),
    "of other things": ({"status": 200, "body": b'{"id": "you/tiny", "siblings": [7]}'}, "could not be had"),
    "without checksums": (
        {"status": 200, "body": b'{"id": "x", "siblings": [{"rfilename": "model.safetensors"}]}'},
        "holds no checksum",
    ),
}


@pytest.mark.parametrize(("fault", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_without_a_listing_it_is_said(fault: dict, said: str, hub: LoopbackHub) -> None:
    hub.repositories[REPO].commit({"README.md": b"x"})
    del hub.repositories[REPO].commits[-1][1]["config.json"]
    with hub.fault(path="/api/models/", **fault):
        weights = pull(SOURCE)
        with hub.fault(path="/cdn/", change=lambda content: OTHERS):
            assert float(weights.state_dict["a"][1]) == 1
    how = weights.verified["model.safetensors"]
    assert how.startswith("SHA-256 is the one that the Hub announced; the repository's listing"), how
    assert said in how


def test_what_was_compared_is_printed(hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    main(["hub", "pull", SOURCE])
    out = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    announced = "is the one that the Hub announced; size and"
    assert out["verified model.safetensors"] == f"SHA-256 {announced} SHA-256 are those of the repository's listing"
    assert out["verified config.json"] == f"git's SHA-1 {announced} git's SHA-1 are those of the repository's listing"
    assert len([path for _, path in hub.requests if path.startswith("/api/")]) == 1  # one listing for both
    hub.requests.clear()
    main(["hub", "pull", SOURCE])  # from the cache
    assert "verified model.safetensors: SHA-256 is the one that the Hub announced\n" in capsys.readouterr().out
    assert not [path for _, path in hub.requests if path.startswith("/api/")]


def test_a_local_file_is_not_called_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.safetensors").write_bytes(WEIGHTS)
    main(["hub", "pull", str(tmp_path / "x.safetensors")])
    assert "verified x.safetensors: not verified: it lay on this machine" in capsys.readouterr().out


def test_a_cache_without_links_says_what_it_does_not_know(
    hub: LoopbackHub,
    client: Path,  # noqa: F811
    commit: str,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *args: False)
    first = pull(SOURCE)
    assert not first.file.is_symlink()
    assert first.verified["model.safetensors"].endswith("those of the repository's listing")
    assert pull(SOURCE).verified["model.safetensors"] == "SHA-256 is the one that the Hub announced"  # asked again
    again = pull(f"{SOURCE}@{commit}")  # without a question
    assert again.verified["model.safetensors"] == "not verified: the cache keeps no checksum of it"
    first.file.write_bytes(OTHERS)  # goes bad
    assert float(pull(SOURCE).state_dict["a"][1]) == 1  # is noticed, and fetched again
    with hub.fault(path="/cdn/", change=lambda content: OTHERS):
        first.file.unlink()
        refused(["hub", "pull", SOURCE], "arrived damaged", leaves=IN_CACHE)


def test_a_link_out_of_the_cache_is_not_followed_nor_its_end_removed(
    hub: LoopbackHub,
    commit: str,
    client: Path,  # noqa: F811
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an older client left of an ETag with a path in it."""
    thesis = tmp_path / "thesis"
    thesis.write_bytes(OTHERS)
    pointer = client / "models--you--tiny" / "snapshots" / commit / "model.safetensors"
    pointer.parent.mkdir(parents=True)
    pointer.symlink_to(thesis)
    assert float(pull(f"{SOURCE}@{commit}").state_dict["a"][1]) == 1  # fetched again
    assert thesis.read_bytes() == OTHERS
    pointer.unlink()
    pointer.symlink_to(thesis)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(["hub", "pull", f"{SOURCE}@{commit}"], "leads out of the cache", leaves=IN_CACHE)


NAMES = ["../../x", "..", "a/../../x", "a//b", "/etc/passwd", "a\\..\\x", "C:/x", "x\x1b[31m", "x\n"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_that_leads_elsewhere(name: str, hub: LoopbackHub, refused: Refused) -> None:
    refused(["hub", "pull", f"{SOURCE}/{name}"], "is no ")
    with pytest.raises(DownloadError, match="is no path of a file in the repository 'you/tiny'"):
        fetch_from_hub(REPO, name)
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["../../../x", "..", "/x", "a//b", "x\\y", "x\x1b]0;t\x07", "a b", ".x", "x.lock"])
def test_a_revision_that_leads_elsewhere(revision: str, hub: LoopbackHub, refused: Refused) -> None:
    """A checkpoint may name one, and the client keeps a file under it."""
    refused(["hub", "pull", f"{SOURCE}@{revision}"], "is no revision")
    refused(["hub", "pull", SOURCE, "--revision", revision], "is no revision")
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "v1.0", "feature/x", "release-2_b"])
def test_usual_revisions_are_none_of_those(revision: str, hub: LoopbackHub, commit: str) -> None:
    hub.repositories[REPO].refs[revision] = commit
    assert pull(SOURCE, revision).source == f"{SOURCE}@{commit}"


def test_a_listing_of_names_that_forge_output(hub: LoopbackHub, refused: Refused) -> None:
    hub.add("you/forged", {"\x1b[2J\x1b]0;title\x07[red]x[/]\r\nfatal: none.pth": b"x", "[/].pth": b"x"})
    names = ("has no model.safetensors", r"\x1b[2J", "[red]x[/]", "[/].pth")
    message = refused(["hub", "pull", "hf-hub:you/forged"], *names, leaves=IN_CACHE)
    assert "\x1b" not in message


def test_a_mirror_that_redirects_within_itself(hub: LoopbackHub) -> None:
    """A renamed repository; the redirection may have an ETag of its own that is no checksum."""
    hub.repositories["you/old"] = hub.repositories[REPO]
    moved = headers(Location=f"/{REPO}/resolve/main/model.safetensors", ETag='W/"3d-BS/+x"')
    moved |= headers(X_Repo_Commit=hub.repositories[REPO].refs["main"])
    with hub.fault(method="HEAD", path="/you/old/resolve/main/model.safetensors", status=307, headers=moved):
        assert float(pull("hf-hub:you/old/model.safetensors").state_dict["a"][1]) == 1


PULL = """
import sys, time
sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.01))  # the client's pauses between attempts
from lk_backbones.cli import main
main(["hub", "pull", sys.argv[1]])
"""


def test_the_password_of_the_endpoint_is_never_printed(
    hub: LoopbackHub,
    process: Callable,  # noqa: F811
    tmp_path: Path,
) -> None:
    endpoint = hub.endpoint.replace("http://", "http://someone:geheim%21x@")
    secrets = ("geheim", "someone", "hf_verysecret")
    closed = "http://someone:geheim%21x@127.0.0.1:9"
    faults = [
        (None, endpoint, "hf-hub:you/none", "no model repository", ""),
        ({"method": "GET", "path": "/cdn/", "status": 503}, endpoint, SOURCE, "HTTP 503", "1"),
        (None, closed, SOURCE, "cannot be reached", "1"),
    ]
    for fault, address, source, named, traceback in faults:
        hub.faults[:] = [Fault(**fault)] if fault is not None else []
        environment = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_verysecret", "LK_BACKBONES_TRACEBACK": traceback}
        started = process(PULL, source, env=environment)
        out, err = started.communicate(timeout=120)
        assert started.returncode == 1
        assert named in err
        assert ("Traceback" in err) == bool(traceback)
        assert not [secret for secret in secrets if secret in out + err], out + err


def test_an_answer_of_no_hub(hub: LoopbackHub, refused: Refused) -> None:
    """Such as the page to log in of a network."""
    with hub.fault(method="HEAD", path="/resolve/", drop=["X-Repo-Commit"]):
        refused(["hub", "pull", SOURCE], "did not answer as a Hub does: it named no commit or no ETag", leaves=IN_CACHE)


def test_error_of_the_api_hides_it_too(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = "http://someone:geheim@127.0.0.1:9"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    with pytest.raises(DownloadError) as raised:
        lk_hub.pull(SOURCE)
    assert "geheim" not in str(raised.value)
    assert "127.0.0.1:9" in str(raised.value)


def test_in_a_process_of_its_own(hub: LoopbackHub, process: Callable, tmp_path: Path) -> None:  # noqa: F811
    """As users meet it, with the client set up by the environment alone."""
    with (
        hub.fault(method="HEAD", path="/resolve/", add=headers(X_Linked_Etag='"../../../../../../outside"')),
        hub.fault(method="GET", path="/cdn/", change=lambda content: OTHERS),
    ):
        started = process(PULL, SOURCE)
        _, err = started.communicate(timeout=120)
    assert started.returncode == 1
    assert err.count("error:") == 1
    assert not list(tmp_path.rglob("*outside*"))
    assert SHA256 in finish(process(PULL, SOURCE))
