"""A stand-in for vLLM's server, as a module that `python -m vllm.entrypoints.openai.api_server` finds."""

import json
from pathlib import Path

SERVER = """
import json, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

arguments = dict(zip(sys.argv[1:], sys.argv[2:]))
if "broken" in sys.argv:
    print("(EngineCore pid=1) ERROR 11-22 [core.py:9] ValueError: this model is broken")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}")
running, made, lock, most = 0, 0, threading.Lock(), int(arguments.get("--max-num-seqs", 256))
places = threading.Semaphore(most)

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): ...
    def do_GET(self):
        body = "" if self.path == "/health" else (
            "# HELP vllm:num_requests_running of it\\n"
            f'vllm:num_requests_running{{engine="0"}} {float(running)}\\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.5\\n'
            f'vllm:generation_tokens_total{{engine="0"}} {float(made)}\\n'
            'vllm:cache_config_info{block_size="16",num_gpu_blocks="100",x="1"} 1.0\\n'
        )
        self.send_response(200); self.end_headers(); self.wfile.write(body.encode())
    def do_POST(self):
        global running, made
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["max_tokens"] == 13:
            self.send_response(400); self.end_headers(); self.wfile.write(b"unlucky"); return
        with places:
            with lock: running += 1
            self.send_response(200); self.end_headers()
            for _ in range(asked["max_tokens"]):
                time.sleep(0.01)
                with lock: made += 1
                self.event({"choices": [{"text": "a"}]})
            self.event({"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}})
            self.wfile.write(b"data: [DONE]\\n\\n")
            with lock: running -= 1
    def event(self, data):
        self.wfile.write(f"data: {json.dumps(data, separators=(',', ':'))}\\n\\n".encode()); self.wfile.flush()

ThreadingHTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""


def model(directory: Path) -> Path:
    """A model directory that the stand-in serves."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"vocab_size": 50}))
    (directory / "model.safetensors").write_bytes(bytes(1000))
    return directory


def install(directory: Path) -> Path:
    """Write the module under `directory`, which is to stand first on PYTHONPATH."""
    package = directory / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER)
    return directory
