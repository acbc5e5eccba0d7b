"""`adpretrain demo` as a process: where it listens, what it refuses over HTTP, how it ends."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from demo_process import Server, demo, started

from downstream.cli import main
from downstream.web.serving import host_of, names_of

WITHOUT_GRADIO = "import sys; sys.modules['gradio'] = None; from downstream.cli import main; sys.exit(main(['demo']))"


def listening(port: int) -> set[str]:
    """The IPv4 addresses on which this machine listens at a port, as the kernel says."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    pairs = [line.split()[1].split(":") for line in lines if line.split()[3] == "0A"]
    return {socket.inet_ntoa(bytes.fromhex(address)[::-1]) for address, at in pairs if int(at, 16) == port}


def ask(server: Server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers.get("content-security-policy", "")


def post_file(server: Server, name: str, content: bytes) -> tuple[int, bytes]:
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + b"\r\n--b--\r\n"
    kind = "multipart/form-data; boundary=b"
    return ask(server, "POST", "/gradio_api/upload", body, **{"Content-Type": kind})[:2]


def test_the_default_is_this_machine_only() -> None:
    assert host_of(None, {}) == "127.0.0.1"
    assert host_of(None, {"SPACE_ID": "org/space"}) == "0.0.0.0"
    assert host_of("192.168.1.5", {}) == "192.168.1.5"
    assert host_of("127.0.0.1", {"SPACE_ID": "org/space"}) == "127.0.0.1"


def test_the_page_learns_names_not_paths(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "extractor").mkdir(parents=True)
    given = ["embedded", str(tmp_path / "a" / "extractor"), str(tmp_path / "b" / "extractor"), "embedded"]
    assert list(names_of(given)) == ["embedded", "extractor", "extractor (2)"]
    assert list(names_of(given).values()) == given[:3]


def test_without_gradio_the_fix_is_named() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_GRADIO], capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert run.stderr.startswith("adpretrain: error: gradio is needed for this (")
    assert run.stderr.endswith("): pip install 'adpretrain[demo]'\n")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc: what listens where is not known")
def test_it_listens_on_this_machine_only(server: Server) -> None:
    assert listening(server.port) == {"127.0.0.1"}


@pytest.mark.slow
def test_gradio_s_own_doors_are_closed(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    status, page, policy = ask(server, "GET", "/")
    assert status == 200
    assert "default-src 'self'" in policy
    assert b"fonts.googleapis.com" not in page
    assert str(server.folder).encode() not in page  # no path of this machine
    for path in (f"file={secret}", "file=http://127.0.0.1:1/x.png", "file=/etc/passwd"):
        assert ask(server, "GET", f"/gradio_api/{path}")[0] == 403
    assert ask(server, "GET", "/docs")[0] == 404
    for path in (str(secret), f"http://127.0.0.1:{server.port}/theme.css"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = json.dumps({"data": ["x", [file], [file], 5], "fn_index": 0, "session_hash": "abc"}).encode()
        assert ask(server, "POST", "/gradio_api/queue/join", body, **{"Content-Type": "application/json"})[0] == 403
    assert ask(server, "GET", "/", Host="evil.example")[0] == 400


@pytest.mark.slow
def test_uploads_stay_in_their_folder_and_below_their_size(server: Server) -> None:
    status, answer = post_file(server, "../../../<script>x.png", b"content")
    assert status == 200
    (path,) = json.loads(answer)
    assert server.folder.resolve() in Path(path).resolve().parents
    assert "<" not in Path(path).name
    assert ask(server, "GET", f"/gradio_api/file={path}")[:2] == (200, b"content")
    assert post_file(server, "large.png", bytes(20_000_001))[0] == 413


@pytest.mark.slow
def test_it_ends_cleanly_and_leaves_nothing(extractor_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C; SIGTERM ends the Space, in tests/hub."""
    with started(demo("--extractor", str(extractor_dir), "--host", "0.0.0.0"), tmp_path) as server:
        assert post_file(server, "photo.png", b"content")[0] == 200
        assert any(path.name == "photo.png" for path in server.folder.rglob("*"))
        assert server.stop(signal.SIGINT) == 0
        assert not [path for path in server.folder.rglob("*") if "adpretrain" in path.name]
        warned = "warning: listening on 0.0.0.0: everybody who can reach this machine can use the demo"
        assert warned in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_taken_port_is_named(extractor_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["demo", "--extractor", str(extractor_dir), "--device", "cpu", "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in said
    assert "choose another --port" in said
