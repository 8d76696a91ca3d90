import http.server
import threading

import pytest
import torch


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An address that serves tmp_path/served, and a folder of torch.hub's own.

    Of what is called broken it sends the first half and hangs up.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "served").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def copyfile(self, source, outputfile):
            contents = source.read()
            outputfile.write(contents[: len(contents) // 2] if "broken" in self.path else contents)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
