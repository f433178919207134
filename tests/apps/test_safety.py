"""What is read is never run: weights, file names, captions, and the lab that others on the machine could reach."""

import ast
import dataclasses
import http.server
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from vsr1 import config
from vsr1.config import ROOT, InputError
from vsr1.data import video_reader
from vsr1.models import checkpoints, engine

MODULES = sorted([*(ROOT / "vsr1").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


def calls():
    """(where, name as written, {keyword: its source}) of every call in the package and its notebooks' code."""
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in MODULES}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        sources[path.name] = "\n".join(code)
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield f"{name}:{node.lineno}", ast.unparse(node.func), given


@pytest.fixture(scope="module")
def called():
    return list(calls())


def test_no_text_reaches_a_shell(called):
    started = [(where, name, given) for where, name, given in called if name.startswith("subprocess.")]
    assert len(started) >= 2, "the search for calls finds nothing: this test shows nothing"
    for where, name, given in started:
        assert given.get("shell", "False") == "False" and "getoutput" not in name, where
    for where, name, _ in called:
        assert not re.fullmatch(
            r"os\.(system|popen|exec\w*|spawn\w*)|pty\.spawn|.*create_subprocess_shell", name
        ), where


def test_no_text_is_run_as_code(called):
    for where, name, given in called:
        assert name not in ("eval", "exec", "compile"), where
        assert given.get("trust_remote_code", "False") == "False", where
        assert given.get("allow_pickle", "False") == "False", where
        if name == "torch.load":
            assert given.get("weights_only") == "True", where
    imported = {
        word for path in MODULES for word in re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.M)
    }
    assert (
        not imported & {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
        and "torch" in imported
    )


def test_no_archive_is_unpacked(called):
    """`official_release` reads known files out of tars; no name, link or device in one leads anywhere."""
    for where, name, _ in called:
        assert name.rpartition(".")[2] not in ("extract", "extractall", "unpack_archive"), where


# --- Weights


class Trap:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def trapped(tmp_path):
    """trapped(kind, file) -> (a function that loads the folder with a trap in that file, the folder)."""
    profile, sprung = config.load("smoke"), tmp_path / "sprung"
    trap = pickle.dumps({"weight": Trap(sprung)}, protocol=2)

    def make(kind, file):
        source, folder = {"policy": "policy", "engine": "engine-small"}[kind], tmp_path / "model"
        shutil.copytree(
            ROOT / "vsr1/mini/weights" / source, folder, ignore=shutil.ignore_patterns("*.safetensors")
        )
        (folder / file).write_bytes(trap)
        if kind == "policy":
            return lambda: checkpoints.load(str(folder), profile), folder
        return lambda: engine.load(dataclasses.replace(profile, engine=str(folder))), folder

    yield make
    assert not sprung.exists(), "the pickle was run"
    pickle.loads(trap)
    assert sprung.exists(), "the trap does not work: this test shows nothing"


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("kind", ["policy", "engine"])
def test_a_pickle_is_refused_and_not_read(kind, file, trapped):
    """By its name, and by its content under the right name."""
    load, folder = trapped(kind, file)
    with pytest.raises(InputError) as refused:
        load()
    said = str(refused.value)
    assert str(folder) in said and "\n" not in said and re.search("safetensors|header", said)


@pytest.mark.parametrize("kind", ["policy", "engine"])
def test_a_pickle_among_the_shards_is_refused(kind, trapped):
    """An index of safetensors may list it, and the library would open it."""
    load, folder = trapped(kind, "shard.bin")
    listing = {"metadata": {"total_size": 1}, "weight_map": {"weight": "shard.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
    with pytest.raises(InputError, match=r"lists shard\.bin, which is no safetensors file"):
        load()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_checkpoint_is_not_run(file, tmp_path):
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(ROOT / "vsr1" / "mini" / "weights" / "policy", folder)
    own = json.loads((folder / file).read_text())
    own["auto_map"] = {
        "AutoConfig": "trap.Trap",
        "AutoModel": "trap.Trap",
        "AutoTokenizer": ["trap.Trap", "trap.Trap"],
    }
    own["trust_remote_code"] = True
    (folder / file).write_text(json.dumps(own))
    (folder / "trap.py").write_text(f"open({str(sprung)!r}, 'w')\nclass Trap: pass\n")
    made = checkpoints.load(str(folder), config.load("smoke"))
    assert not sprung.exists() and type(made.model).__module__.startswith("transformers.")


# --- Videos


def test_a_video_that_is_a_list_of_addresses_is_not_followed(tmp_path):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        for ending in ("mp4", "ts", "mkv"):
            film = tmp_path / f"film.{ending}"
            film.write_text(
                f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}/{ending}.ts\n#EXT-X-ENDLIST\n"
            )
            assert video_reader.Reader(timeout=20).read(film).problem
        assert asked == []
        with pytest.raises(HTTPError):
            urlopen(f"{address}/this")
        assert asked == ["/this"], "the server hears nothing: this test shows nothing"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- The lab


def test_the_lab_is_on_loopback_and_asks_for_its_token():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vsr1", "lab", "--port", str(port)]
    lab = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address, token = re.search(
            r"(http://127\.0\.0\.1:\d+)/lab\?token=(\w+)", lab.stdout.readline()
        ).groups()
        until = time.monotonic() + 60
        while not listening(port):
            assert time.monotonic() < until and lab.poll() is None, "the lab did not start"
            time.sleep(0.1)
        assert listening(port) == {"0100007F"}, "reached from elsewhere"  # 127.0.0.1 as /proc has it
        for stranger in ("", "?token=", f"?token={'0' * len(token)}"):
            with pytest.raises(HTTPError, match="403"):
                urlopen(f"{address}/api/contents{stranger}")
        with urlopen(f"{address}/api/contents?token={token}") as answer:
            assert json.load(answer)["type"] == "directory"
        assert token not in open(f"/proc/{lab.pid}/cmdline").read() and len(token) >= 32
    finally:
        lab.kill()
        lab.wait()


def listening(port):
    """The addresses on which somebody listens to a port, in the kernel's notation."""
    rows = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        rows += [line.split() for line in open(table).readlines()[1:]] if os.path.exists(table) else []
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
