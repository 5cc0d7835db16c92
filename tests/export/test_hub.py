"""--push_to_hub, against a hub of this process that remembers what it is sent."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from commands import call
from selfnpo.models import ModelOptions
from selfnpo.models.origin import weight_variants, why_not_loaded

SHORT = ("--max_train_steps", 1, "--train_batch_size", 1, "--pool_size", 1, "--num_inference_steps", 10)


class Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            server.repo = json.loads(body)["name"]
            return self.answer(200, {"url": f"{constants.ENDPOINT}/someone/{server.repo}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == f"/api/models/someone/{server.repo}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.answer(200, {"files": files})
        if self.path == f"/api/models/someone/{server.repo}/commit/main" and server.is_open:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            server.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            url = f"{constants.ENDPOINT}/someone/{server.repo}/commit/1"
            return self.answer(200, {"success": True, "commitOid": "1", "commitUrl": url})
        return self.answer(403, {"error": "closed"})

    def do_GET(self):
        files = ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/model.bin")
        if self.path.startswith("/api/models/someone/model/tree/main?recursive=true"):
            return self.answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files])
        return self.answer(404, {"error": "not found"})

    def answer(self, status: int, content: dict | list) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.is_open, server.files = True, {}
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Thread(target=server.serve_forever).start()
    yield server
    server.shutdown()


def train(model: Path, output: Path, *flags: object) -> int:
    base = ("--pretrained_model_name_or_path", model)
    return call("train", *base, "--output_dir", output, *SHORT, "--push_to_hub", *flags)


def test_the_negative_is_uploaded(models, hub, tmp_path, capsys):
    assert train(models("unconditional"), tmp_path / "my-negative") == 0
    assert f"uploaded: {constants.ENDPOINT}/someone/my-negative" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "my-negative" / "negative").iterdir()}
    assert "--negative someone/my-negative " in hub.files["README.md"].decode()
    settings = (tmp_path / "my-negative" / "config.yaml").read_text()
    assert "to_hub" not in settings  # to repeat a run is not to upload it again


def test_who_may_not_write_learns_it_before_training(models, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert train(models("unconditional"), tmp_path / "out", "--hub_model_id", "someone/else") == 2
    assert "error: push_to_hub: someone/else could not be created on the hub (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_costs_no_result(models, hub, tmp_path, capsys):
    hub.is_open = False
    assert train(models("unconditional"), tmp_path / "out") == 2
    negative = tmp_path / "out" / "negative"
    assert f"try again: hf upload someone/out {negative} ." in capsys.readouterr().err
    assert (negative / "diffusion_pytorch_model.safetensors").is_file()


def test_the_hub_is_asked_for_the_files_of_a_part(hub):
    options = ModelOptions("someone/model")
    assert weight_variants("someone/model", "unet", options) == {"fp16"}
    assert why_not_loaded("someone/model", "unet", options, "DiffusionPipeline").endswith("pass --variant fp16")
    assert "from_pretrained('someone/model').save" in why_not_loaded("someone/model", "vae", options, "DiffusionPipeline")
    assert "subfolder='vae')" in why_not_loaded("someone/model", "vae", options, "AutoencoderKL")
