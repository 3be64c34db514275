"""A real headless Chromium, by selenium. Where Debian's packages are missing, tests are skipped, and CI fails."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

PACKAGES = "chromium chromium-driver"


def missing() -> str | None:
    """Why there is no browser here; None: there is one."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)}: make chromium installs {PACKAGES}" if absent else None


class Browser:
    """A page in Chromium. `hosts`: those that the newest page asked."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        # Tests may run as root and in small containers.
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-gpu"):
            options.add_argument(word)
        self._profile = tempfile.TemporaryDirectory()
        options.add_argument(f"--user-data-dir={self._profile.name}")
        options.binary_location = shutil.which("chromium") or ""
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        self.driver.set_script_timeout(20)
        self.hosts: set[str] = set()

    def open(self, url: str | Path, width: int = 1280, height: int = 900, scheme: str = "light", phone: bool = False) -> None:
        """Load the page and wait for its charts. Forgets the console's lines of the page before."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        # The page before may have asked until this moment.
        self.driver.get("about:blank")
        self.errors()
        self.hosts.clear()
        self.driver.get(url.resolve().as_uri() if isinstance(url, Path) else url)
        self.wait("return document.querySelectorAll('.plot .main-svg').length >= document.querySelectorAll('.plot').length")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, timeout_s: float = 20) -> Any:
        """What the script returns, once it is true."""
        look: Callable[[Any], Any] = lambda driver: driver.execute_script(script)  # noqa: E731
        return WebDriverWait(self.driver, timeout_s, 0.1).until(look, script)

    def errors(self) -> list[str]:
        """Lines of the console that are warnings or errors, and exceptions, since the last call. Gathers `hosts`."""
        for line in self.driver.get_log("performance"):
            message = json.loads(line["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = urlsplit(message["params"]["request"]["url"])
                # Chromium's own first page is of the scheme chrome.
                if url.scheme not in ("data", "blob", "chrome", "about"):
                    self.hosts.add(url.netloc)
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] in ("WARNING", "SEVERE")]

    def picture(self, path: Path, whole: bool = False) -> None:
        """Write what is seen, or the whole page, as a PNG file."""
        if whole:
            height = min(int(self.run("return document.documentElement.scrollHeight")), 12_000)
            size = self.run("return [innerWidth, 0]")
            metrics = {"width": size[0], "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            self.wait("return true")
        self.driver.save_screenshot(str(path))

    def close(self) -> None:
        self.driver.quit()
        self._profile.cleanup()
