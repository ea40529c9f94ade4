"""Every fault that a download can meet, through the real client: one clear error or success, right bytes or none."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import save

from lk_backbones import hub as lk_hub
from lk_backbones.weights import DownloadError, WeightsError, pull
from lk_backbones.weights.download import fetch_url
from tests.hub.conftest import finish, forget_sessions
from tests.hub.server import LoopbackHub

REPO = "you/tiny"
STATE = {"a.weight": torch.arange(60_000, dtype=torch.float32), "b.bias": torch.ones(3)}
WEIGHTS = save(STATE)
CONFIG = json.dumps({"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]}).encode()
SOURCE = f"hf-hub:{REPO}"


@pytest.fixture(autouse=True)
def commit(hub: LoopbackHub) -> str:
    return hub.add(REPO, {"model.safetensors": WEIGHTS, "config.json": CONFIG})


def check(weights) -> None:
    assert weights.state_dict.keys() == STATE.keys()
    assert all(torch.equal(weights.state_dict[key], value) for key, value in STATE.items())
    assert weights.config == json.loads(CONFIG)


def blobs(cache: Path) -> list[bytes]:
    """Everything that the cache would hand out or go on with."""
    return [path.read_bytes() for path in cache.rglob("blobs/*")]


def nothing_wrong_is_kept(cache: Path) -> None:
    for path in cache.rglob("blobs/*"):
        # Clients before 1.0 keep what has arrived, to go on from there.
        begun = path.suffix == ".incomplete" and WEIGHTS.startswith(path.read_bytes())
        assert begun or path.read_bytes() in (WEIGHTS, CONFIG)
    assert all(path.exists() for path in cache.rglob("snapshots/*/*"))  # no link to a blob that is gone


def test_a_repository_is_pulled_and_pinned(hub: LoopbackHub, client: Path, commit: str) -> None:
    weights = pull(SOURCE)
    check(weights)
    assert weights.source == f"{SOURCE}@{commit}"
    assert weights.preprocessing == {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]}
    # a newer commit does not change what a pinned source means, nor is anything asked for it
    hub.add(REPO, {"model.safetensors": save({"other": torch.zeros(1)})})
    before = len(hub.requests)
    check(pull(weights.source))
    assert hub.requests[before:] == []
    assert pull(SOURCE).state_dict.keys() == {"other"}
    check(pull(SOURCE, revision=commit))


def test_the_token_stays_on_the_hub(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    check(pull(SOURCE))
    sent = {path.split("/")[1] == "cdn": token for path, token in hub.authorizations}
    assert sent == {False: "Bearer hf_secret", True: None}


REPO_GONE = {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}


@pytest.mark.parametrize(
    ("source", "fault", "message"),
    [
        ("hf-hub:you/none", None, r"no model repository 'you/none' on http.*or it is private.*HF_TOKEN"),
        (f"{SOURCE}@v9", None, r"'you/tiny' has no revision 'v9'"),
        (f"{SOURCE}/other.pth", None, r"'you/tiny' has no file 'other\.pth'"),
        (SOURCE, {"status": 401}, r"no model repository.*or it is private.*|access.*refused.*401.*HF_TOKEN"),
        (SOURCE, {"status": 401, "headers": {"X-Error-Message": "Invalid credentials in Authorization header"}},
         r"access to 'model\.safetensors' of 'you/tiny' was refused \(HTTP 401\): .*hf auth login.*HF_TOKEN"),
        (SOURCE, {"status": 403}, r"was refused \(HTTP 403\): .*HF_TOKEN to a token with read access"),
        (SOURCE, {"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, r"is gated: accept its conditions on http"),
        (SOURCE, {"status": 429}, r"no more requests for the moment \(HTTP 429\)"),
        (SOURCE, {"status": 503}, r"answered HTTP 503 .*try again later"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(hub: LoopbackHub, client: Path, source: str, fault: dict | None, message: str) -> None:
    if fault is not None:
        hub.faults.append(hub_fault(method="", path="/resolve/", **fault))
    with pytest.raises(DownloadError, match=message) as raised:
        pull(source)
    assert "Traceback" not in str(raised.value)
    assert len(str(raised.value)) < 400
    assert blobs(client) == []


def hub_fault(**kwargs):
    from tests.hub.server import Fault

    return Fault(**kwargs)


def test_connection_refused(hub: LoopbackHub, client: Path) -> None:
    hub.close()
    with pytest.raises(DownloadError, match=r"not in the cache, and http://127.*cannot be reached.*HF_ENDPOINT"):
        pull(SOURCE)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("where", ["/resolve/", "/cdn/"])
def test_a_busy_server_is_asked_again(hub: LoopbackHub, status: int, where: str) -> None:
    method = "HEAD" if where == "/resolve/" else "GET"
    with hub.fault(method=method, path=where, status=status, times=2):
        check(pull(SOURCE))
    assert len([1 for m, path in hub.requests if m == method and where in path]) >= 3


def test_a_cut_connection_is_resumed(hub: LoopbackHub, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # how often it writes to the disk
    with hub.fault(path="/cdn/", cut_after=100_000, times=1):
        check(pull(SOURCE))
    assert hub.ranges == ["bytes=100000-"]  # not from the beginning
    nothing_wrong_is_kept(client)


def test_a_connection_that_is_always_cut(hub: LoopbackHub, client: Path) -> None:
    with (
        hub.fault(path="/cdn/", cut_after=10_000),
        pytest.raises(DownloadError, match=r"'model\.safetensors' of 'you/tiny'"),
    ):
        pull(SOURCE)
    nothing_wrong_is_kept(client)
    check(pull(SOURCE))


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize("part", ["/cdn/", "config.json"])
def test_wrong_bytes_of_the_right_length(hub: LoopbackHub, client: Path, part: str) -> None:
    with hub.fault(path=part, change=flip, times=1):
        check(pull(SOURCE))  # fetched again by itself
    nothing_wrong_is_kept(client)
    shutil.rmtree(client)
    with hub.fault(path=part, change=flip), pytest.raises(DownloadError, match=r"arrived damaged \(its checksum is"):
        pull(SOURCE)
    nothing_wrong_is_kept(client)


def test_a_file_that_went_bad_in_the_cache_is_fetched_again(hub: LoopbackHub, client: Path) -> None:
    weights = pull(SOURCE)
    weights.file.resolve().write_bytes(flip(WEIGHTS))
    check(pull(SOURCE))
    nothing_wrong_is_kept(client)


def lying_header(offset: int = 8, shape: int = 10) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [shape], "data_offsets": [0, offset]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(40)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(WEIGHTS[:-1000], id="truncated"),
        pytest.param(b"", id="empty"),
        pytest.param(lying_header(offset=4000, shape=1000), id="offsets beyond the file"),
        pytest.param(lying_header(offset=8, shape=10), id="shape and offsets differ"),
        pytest.param(struct.pack("<Q", 1 << 60) + b"{}", id="header of an exabyte"),
        pytest.param(b"<html>sign in</html>", id="a web page"),
    ],
)
def test_a_repository_that_holds_damaged_safetensors(hub: LoopbackHub, content: bytes) -> None:
    hub.add(REPO, {"model.safetensors": content})
    with pytest.raises(WeightsError, match=r"model\.safetensors' is not a whole safetensors file"):
        pull(SOURCE)


class Payload:
    """What a malicious checkpoint does: run code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_a_malicious_pickle_is_not_run(hub: LoopbackHub, tmp_path: Path, kind: str) -> None:
    trace, file = tmp_path / "trace", tmp_path / "evil"
    content = {"state_dict": dict(STATE), "evil": Payload(trace)}
    if kind == "bare":
        file.write_bytes(pickle.dumps(content["evil"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    hub.add("you/evil", {"pytorch_model.bin": file.read_bytes()})
    with pytest.raises(WeightsError, match=r"pickle of more than weights and is not read.*\.safetensors"):
        pull("hf-hub:you/evil")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{not json", r"config\.json' is not JSON"),
        (b"[1, 2]", r"config\.json' must hold a JSON object, not a list"),
        (b'{"architecture": "replknet_31z"}', r"architecture 'replknet_31z'.*did you mean 'replknet_31.*newer version"),
        (b'{"architecture": {}}', r"names the architecture {}"),
    ],
)
def test_a_config_that_makes_no_sense(hub: LoopbackHub, config: bytes, message: str) -> None:
    hub.add(REPO, {"config.json": config})
    with pytest.raises(WeightsError, match=message):
        pull(SOURCE)


PULL = """
import sys
from lk_backbones.weights import pull, WeightsError
try:
    print(pull(sys.argv[1]).sha256)
except WeightsError as error:
    print("refused:", error)
"""


# Even root then obeys file permissions (capset with nothing in it).
WITHOUT_PRIVILEGES = """
import ctypes
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
assert ctypes.CDLL(None).capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())) == 0
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gives up root's privileges in Linux's way")
def test_a_read_only_cache(hub: LoopbackHub, process: Callable, tmp_path: Path) -> None:
    cache = tmp_path / "readonly"
    cache.mkdir()
    cache.chmod(0o555)
    out = finish(process(WITHOUT_PRIVILEGES + PULL, SOURCE, env={"HF_HUB_CACHE": str(cache)}))
    assert "refused: 'model.safetensors' of 'you/tiny' cannot be written into the cache" in out
    assert "HF_HUB_CACHE names another folder" in out
    assert list(cache.iterdir()) == []


def test_a_full_cache(hub: LoopbackHub, process: Callable, tmp_path: Path) -> None:
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"  # no file may grow beyond this
    out = finish(process(limit + PULL, SOURCE))
    assert "refused: 'model.safetensors' of 'you/tiny' cannot be written into the cache" in out
    nothing_wrong_is_kept(tmp_path / "home")
    assert not list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))


def test_two_processes_pull_the_same_file_at_once(hub: LoopbackHub, process: Callable, tmp_path: Path) -> None:
    import hashlib

    started: list[subprocess.Popen[str]] = []
    with hub.fault(path="/cdn/", before=lambda: __import__("threading").Event().wait(0.5)):
        started = [process(PULL, SOURCE) for _ in range(2)]
        printed = [finish(p).strip() for p in started]
    assert printed == [hashlib.sha256(WEIGHTS).hexdigest()] * 2
    nothing_wrong_is_kept(tmp_path / "home")


def set_offline(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    forget_sessions()


def test_offline_mode(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    set_offline(monkeypatch, True)
    with pytest.raises(
        DownloadError, match=r"offline mode \(HF_HUB_OFFLINE\) is on.*lk-backbones hub pull hf-hub:you/tiny"
    ):
        pull(SOURCE)
    set_offline(monkeypatch, False)
    pull(SOURCE)
    set_offline(monkeypatch, True)
    before = len(hub.requests)
    check(pull(SOURCE))
    assert len(hub.requests) == before


def pickled(tmp_path: Path) -> bytes:
    torch.save(STATE, tmp_path / "x.pth")
    return (tmp_path / "x.pth").read_bytes()


@pytest.mark.parametrize("filename", ["pytorch_model.bin", "weights.pth"])
def test_offline_without_a_config(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filename: str, recwarn: pytest.WarningsRecorder
) -> None:
    commit = hub.add("you/bare", {filename: pickled(tmp_path)})
    source = "hf-hub:you/bare" if filename == "pytorch_model.bin" else f"hf-hub:you/bare/{filename}"
    online = pull(source)
    set_offline(monkeypatch, True)
    before = len(hub.requests)
    for asked in (source, f"{source}@{commit}", online.source):
        weights = pull(asked)
        assert torch.equal(weights.state_dict["a.weight"], STATE["a.weight"])
        assert weights.config == {}
        assert weights.source == online.source
    assert len(hub.requests) == before
    assert not [w for w in recwarn if "config.json" in str(w.message)]  # known to be absent: nothing to say


@pytest.mark.parametrize("there", [True, False], ids=["with a config", "without one"])
def test_offline_what_cannot_be_known_is_said(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    hub.add("you/bare", {"pytorch_model.bin": pickled(tmp_path)} | ({"config.json": CONFIG} if there else {}))
    hf_hub_download("you/bare", "pytorch_model.bin")  # as another program may have fetched it, alone
    set_offline(monkeypatch, True)
    with pytest.warns(UserWarning, match=r"offline, it cannot be told whether 'you/bare' has a config\.json"):
        weights = pull("hf-hub:you/bare")
    assert torch.equal(weights.state_dict["a.weight"], STATE["a.weight"])
    assert weights.preprocessing == {}
    set_offline(monkeypatch, False)
    assert bool(pull("hf-hub:you/bare").preprocessing) is there


@pytest.mark.parametrize("trouble", [{"status": 503}, {"status": 403}, {"cut_after": 0}])
def test_online_a_config_that_cannot_be_had_is_not_left_out(hub: LoopbackHub, trouble: dict) -> None:
    with hub.fault(method="", path="config.json", **trouble), pytest.raises(DownloadError, match=r"config\.json"):
        pull(SOURCE)


def test_offline_without_a_config_as_users_set_it(hub: LoopbackHub, process: Callable, tmp_path: Path) -> None:
    hub.add("you/bare", {"pytorch_model.bin": pickled(tmp_path)})
    first = finish(process(PULL, "hf-hub:you/bare"))
    requests = len(hub.requests)
    assert finish(process(PULL, "hf-hub:you/bare", env={"HF_HUB_OFFLINE": "1"})) == first
    assert len(hub.requests) == requests


def test_offline_mode_as_users_set_it(hub: LoopbackHub, process: Callable) -> None:
    assert "refused: 'model.safetensors' of 'you/tiny' is not in the cache" in finish(
        process(PULL, SOURCE, env={"HF_HUB_OFFLINE": "1"})
    )
    assert hub.requests == []


def test_a_repository_without_the_usual_file_names_what_it_has(hub: LoopbackHub, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save(STATE, file)
    hub.add("you/pickles", {"x.pth": file.read_bytes(), "README.md": b""})
    with pytest.raises(
        DownloadError, match=r"no model\.safetensors or pytorch_model\.bin: name one.*you/pickles/x\.pth'"
    ):
        pull("hf-hub:you/pickles")
    weights = pull("hf-hub:you/pickles/x.pth")
    assert torch.equal(weights.state_dict["a.weight"], STATE["a.weight"])
    assert weights.source.startswith("hf-hub:you/pickles/x.pth@")


def test_a_mirror_is_checked_by_the_digits_in_its_name(hub: LoopbackHub, tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "y.pth"
    torch.save({"state_dict": STATE}, file)
    content = file.read_bytes()
    digits = hashlib.sha256(content).hexdigest()[:8]
    hub.repositories["mirror"] = type(hub.repositories[REPO])()
    hub.repositories["mirror"].commit({"y.pth": content})
    url = f"{hub.endpoint}/mirror/y.pth"
    with hub.fault(path="/mirror/", change=flip), pytest.raises(DownloadError, match="arrived damaged"):
        fetch_url(url, digits)
    with hub.fault(path="/mirror/", cut_after=10), pytest.raises(DownloadError, match="arrived damaged"):
        fetch_url(url, digits)
    with (
        hub.fault(path="/mirror/", status=503),
        pytest.raises(DownloadError, match=r"cannot be fetched \(HTTP Error 503"),
    ):
        fetch_url(url, digits)
    assert list((tmp_path / "torch").rglob("*.pth*")) == []
    assert fetch_url(url, digits).read_bytes() == content
    before = len(hub.requests)
    fetch_url(url, digits).write_bytes(flip(content))  # from the cache; then it goes bad there
    assert len(hub.requests) == before
    assert fetch_url(url, digits).read_bytes() == content


def test_the_public_module_is_the_same(hub: LoopbackHub) -> None:
    assert lk_hub.pull is pull
