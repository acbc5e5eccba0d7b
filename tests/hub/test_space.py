"""The Space: its front matter is what Hugging Face reads, its app starts as it would there."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
import yaml

from adpretrain.backbones import load_backbone
from adpretrain.extractor import ADExtractor

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "hub" / "space"


def test_the_front_matter_is_complete() -> None:
    match = re.match(r"---\n(.*?)\n---\n", (SPACE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert match
    found = yaml.safe_load(match[1])
    assert found["sdk"] == "gradio"
    assert (SPACE / found["app_file"]).is_file()
    locked = re.search(r'name = "gradio"\nversion = "(.*)"', (ROOT / "uv.lock").read_text())
    assert locked is not None
    assert found["sdk_version"] == locked[1]  # the version that the tests drive
    assert found["python_version"] == "3.11"
    assert len(found["short_description"]) <= 60  # the Hub refuses longer ones
    assert (SPACE / "requirements.txt").read_text().split() == ["adpretrain[demo]"]


@pytest.mark.slow
def test_the_app_answers_to_any_name_on_a_space_only(tmp_path: Path) -> None:
    ADExtractor(load_backbone("lite0", image_size=64)).save_pretrained(tmp_path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "SPACE_ID": "org/space",
            "EXTRACTORS": f"{tmp_path / 'tiny'},",
            "PORT": str(port),
            "TMPDIR": folder,
        }
        process = subprocess.Popen(
            [sys.executable, str(SPACE / "app.py")], env=environment, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert f":{port} " in process.stdout.readline()
            request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "org-space.hf.space"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert b"Visual inspection" in answer.read()
                policy = answer.headers["content-security-policy"]
            assert "frame-ancestors 'self' https://huggingface.co" in policy  # the Hub shows a Space in a frame
            lines = Path("/proc/net/tcp").read_text().splitlines() if sys.platform == "linux" else []
            assert not lines or any(f"00000000:{port:04X} 00000000:0000 0A" in line for line in lines)
            process.terminate()
            assert process.wait(30) == 0
            assert not [path for path in Path(folder).rglob("*") if "adpretrain" in path.name]
        finally:
            process.kill()
            process.wait()
