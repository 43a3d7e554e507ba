"""The page: what it embeds, what it shows in a real browser, hostile names in it, and the live server.

The browser tests use Chromium where it is installed; `.ci/run` installs it.
"""

import html
import http.client
import json
import math
import os
import re
import shutil
import subprocess
import threading

import fake_run
import numpy as np
import pytest
from PIL import Image

from meshgpt.errors import UserError
from meshgpt.report.card import CardOptions
from meshgpt.report.html import in_script, page, thinned
from meshgpt.report.serve import HOST, Server
from meshgpt.report.write import document, read_runs

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVALS = {50: fake_run.harness(0.3, 60.0), 100: fake_run.harness(0.35, 40.0)}
# A folder's name that would run as script, end the script element, load something, or fill a place of the template.
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>{{DATA}}\"'&"


def test_a_browser_is_there_where_ci_promises_one():
    assert BROWSER or not os.environ.get("MESHGPT_NEEDS_BROWSER")


def chromium(tmp_path, address, *options):
    """Runs the browser without a window or a network; gives what it printed."""
    assert BROWSER
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--no-first-run", "--disable-extensions", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=3000", *options, address,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def report(tmp_path, name="small", **fields):
    runs = read_runs([fake_run.write(tmp_path / name, evals=EVALS, **fields)])
    path = tmp_path / "report.html"
    path.write_text(page(*document(runs, CardOptions())), encoding="utf-8")
    return path


def embedded(text):
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)[0])


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    text = report(tmp_path).read_text()
    assert "default-src 'none'" in text
    assert "connect-src 'none'" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)""", text)
    slugs = [panel["slug"] for panel in embedded(text)["panels"]]
    assert slugs[:3] == ["loss_tokens", "loss_flops", "val_bits_per_byte"]
    assert re.findall(r'data-panel="([^"]+)"', text) == slugs


def test_gaps_are_null_in_the_data(tmp_path):
    figures = list(fake_run.rows())
    figures[9]["loss"] = None
    loss = embedded(report(tmp_path, figures=figures).read_text())["panels"][0]["series"][0]
    assert [index for index, value in enumerate(loss["y"]) if value is None] == [9]
    assert loss["y"][0] == pytest.approx(3 + 3 * math.exp(-5 / 30), rel=1e-5)


def test_long_curves_are_thinned_to_their_extremes():
    y = np.sin(np.arange(100_000) / 50)
    y[70_000] = 50.0
    y[30_000:30_003] = np.nan
    kept = thinned(y)
    assert len(kept) <= 1600
    assert y[kept].max(initial=-1, where=np.isfinite(y[kept])) == 50.0
    assert np.isnan(y[kept]).any()
    assert (np.diff(kept) > 0).all()
    assert thinned(y[:100]).tolist() == list(range(100))


def test_data_cannot_end_its_script():
    value = {"a": "</script><!--<script>&amp;\u2028"}
    assert not set("<>&\u2028") & set(in_script(value))
    assert json.loads(in_script(value)) == value


def test_the_browser_draws_every_chart_in_light_and_dark(tmp_path):
    path = report(tmp_path)
    if BROWSER is None:
        return
    dom = chromium(tmp_path, path.as_uri(), "--window-size=1200,900", "--dump-dom")
    charts = re.findall(r"<figure data-panel=.*?</figure>", dom, flags=re.DOTALL)
    assert len(charts) == 8
    for chart in charts:
        assert re.search(r'<path d="M[\d.]+ [\d.]+L', chart)
        assert len(re.findall(r"<text", chart)) >= 6
    brightness = []
    for scheme in (1, 0):  # blink's names for light and dark
        picture = tmp_path / f"{scheme}.png"
        options = (
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1200,3000",
            f"--screenshot={picture}",
        )
        chromium(tmp_path, path.as_uri(), *options)
        with Image.open(picture) as image:
            assert image.size == (1200, 3000)
            pixels = np.asarray(image.convert("L"))
        brightness.append(np.median(pixels))
        assert pixels.std() > 10
    assert brightness[0] > 240
    assert brightness[1] < 60


def test_the_page_fits_a_phone(tmp_path):
    text = report(tmp_path).read_text()
    wrapper = tmp_path / "phone.html"
    # A frame is the narrowest window there is; its width must be all that the page takes.
    wrapper.write_text(
        f'<iframe id="phone" width="360" height="800" srcdoc="{html.escape(text)}"></iframe><script>onload = () => {{'
        'const page = document.getElementById("phone").contentDocument.documentElement;'
        "const {dataset} = document.body; dataset.wide = page.scrollWidth;"
        'dataset.charts = page.querySelectorAll("svg").length'
        "}</script>",
        encoding="utf-8",
    )
    if BROWSER is None:
        return
    dom = chromium(tmp_path, wrapper.as_uri(), "--dump-dom")
    assert int(re.findall(r'data-wide="(\d+)"', dom)[0]) <= 360
    assert int(re.findall(r'data-charts="(\d+)"', dom)[0]) == 8


def test_hostile_names_run_nothing(tmp_path):
    name = HOSTILE.replace("/", "\N{DIVISION SLASH}")
    figures = [row | {"eval/<img src=x onerror=document.title='owned'>/acc": 0.5} for row in fake_run.rows()]
    path = report(tmp_path, name, figures=figures)
    text = path.read_text()
    assert text.count("<script") == 2
    assert "<img" not in text
    assert any("<img" in series["label"] for panel in embedded(text)["panels"] for series in panel["series"])
    if BROWSER is None:
        return
    dom = chromium(tmp_path, path.as_uri(), "--dump-dom")
    title = html.unescape(re.findall(r"<title>(.*?)</title>", dom)[0])
    assert title == name
    assert "<img" not in dom.partition("<script")[0]


def get(server, path, host=None):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.getheader("Content-Type"), body


@pytest.fixture
def serving():
    servers = []

    def start(folder, poll=1.0):
        server = Server([folder], CardOptions(), 0, poll)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_live_page_follows_the_run_and_serves_nothing_else(tmp_path, serving):
    folder = fake_run.write(tmp_path / "small", figures=list(fake_run.rows(50)))
    server = serving(folder)
    assert server.server_address[0] == "127.0.0.1"
    status, kind, text = get(server, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert "connect-src 'self'" in text
    assert embedded(text)["poll"] == 1.0
    first = json.loads(get(server, "/data.json")[2])
    assert json.loads(get(server, "/data.json")[2]) == first
    assert "50 of 100, in progress" in first["sections"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "tokens": 60 * 512, "loss": 3.25}) + "\n" + '{"step": 6')
    second = json.loads(get(server, "/data.json")[2])
    assert second["version"] != first["version"]
    assert second["panels"][0]["series"][0]["y"][-1] == 3.25
    assert "60 of 100, in progress" in second["sections"]
    for path in ("/run.json", "/../run.json", "/.", "/data.json/", "/report.html"):
        assert get(server, path)[0] == 404
    assert get(server, "/", host="evil.example")[0] == 403
    assert get(server, "/data.json", host=f"evil.example:{server.server_address[1]}")[0] == 403
    (folder / "run.json").rename(folder / "away.json")
    assert get(server, "/data.json")[0] == 503


def test_the_browser_refreshes_the_live_page(tmp_path, serving):
    server = serving(fake_run.write(tmp_path / "small"), poll=0.2)
    assert get(server, "/")[0] == 200
    if BROWSER is None:
        return
    dom = chromium(tmp_path, server.address, "--dump-dom")
    assert re.search(r'id="live" role="status">live, \d', dom)
    assert len(re.findall(r"<svg", dom)) >= 6


def test_a_port_that_is_taken_and_a_folder_without_a_run_are_explained(tmp_path, serving):
    server = serving(fake_run.write(tmp_path / "small"))
    with pytest.raises(UserError, match=f"cannot listen on {HOST}:{server.server_address[1]}: .* give another --port"):
        Server([tmp_path / "small"], CardOptions(), server.server_address[1])
    with pytest.raises(UserError, match="holds no run"):
        Server([tmp_path], CardOptions(), 0)
