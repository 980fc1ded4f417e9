"""A real browser without a screen: opens a file, runs a probe in it, says what the probe found.

Debian: `apt-get install chromium`; tests that need it are skipped where there is none.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PROBE = """<script>
window.failures = [];
window.addEventListener("error", (event) => failures.push(event.message));
</script>"""
_ANSWER = """<script>
addEventListener("load", () => setTimeout(() => {
  let found;
  try { found = (() => { %s })(); } catch (error) { failures.push(String(error)); }
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify({ found, failures });
  document.body.append(answer);
}, 3000));
</script>"""


def executable() -> str:
    """The browser; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return found


def probe(page: Path, script: str, work: Path, *, width: int = 1100, height: int = 900) -> Any:
    """What the body `script` returns in the loaded page; fails on any error of the page's own scripts."""
    text = page.read_text(encoding="utf-8")
    copy = work / "probed.html"
    head = text.replace("<head>", f"<head>{_PROBE}", 1)
    copy.write_text(head.replace("</body>", _ANSWER.replace("%s", script) + "</body>", 1), encoding="utf-8")
    printed = _run(copy, work, f"--window-size={width},{height}", "--dump-dom")
    answer = re.search(r'<pre id="answer">(.*?)</pre>', printed, re.DOTALL)
    assert answer is not None, printed[-2000:]
    read = json.loads(html.unescape(answer[1]))
    assert read["failures"] == [], read["failures"]
    return read.get("found")


def screenshot(
    page: Path, out: Path, work: Path, *, width: int = 1100, height: int = 900, dark: bool = False
) -> Path:
    """A PNG of the page at this window size."""
    flags = ["--force-dark-mode"] if dark else []
    _run(page, work, f"--window-size={width},{height}", f"--screenshot={out}", *flags)
    return out


def _run(page: Path, work: Path, *flags: str) -> str:
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-extensions"]
    # Nothing may be fetched: every name resolves to nothing.
    fixed += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000"]
    command = [executable(), *fixed, f"--user-data-dir={work / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
