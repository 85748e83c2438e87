"""The documentation site: it builds without warnings and without a network, and its pages work in a browser."""

import ast
import functools
import http.server
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

import griffe
import pytest
from markdown_it import MarkdownIt

from rl_plugins.signals import options as signal_options
from rl_plugins.trl import GRPOVariantConfig, MTPCriticConfig, MTPSFTConfig, PPOConfig

from .helpers.site_files import load_site_file

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HREF = re.compile(r'<a [^>]*?href="([^"]+)"')
LOADED = re.compile(r'<(?:script|img|iframe)\b[^>]*?\ssrc="([^"]+)"|<link\b[^>]*?\shref="([^"]+)"')
CODE = re.compile(r"<pre.*?</pre>", re.S)


hooks = load_site_file("hooks")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    # Whatever asks for another host fails: there is no proxy at this address.
    environment = os.environ | {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment | {"NO_MKDOCS_2_WARNING": "1", "NO_PROXY": "", "no_proxy": ""},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    assert build.stderr == ""
    return folder


def pages(site: Path) -> list[str]:
    """Pages that the navigation leads to."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [name for name in found if not name.startswith("source/") and name != "404.html"]


# The build


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for found in LOADED.findall(CODE.sub("", path.read_text())):
            url = "".join(found)
            assert not re.match(r"(https?:)?//", url), f"{path.relative_to(site)} loads {url}"


@pytest.mark.slow
def test_no_link_is_broken(site: Path) -> None:
    texts = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    anchors = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in texts.items()}
    broken = set()
    for name in [*pages(site), "source/recipes/index.html"]:
        for href in HREF.findall(texts[name]):
            if re.match(r"[a-z]+:", href):
                continue
            target, anchor = urldefrag(urljoin(f"/{name}", href))
            target = unquote(target.lstrip("/"))
            there = (site / target).is_file() and (not anchor or unquote(anchor) in anchors.get(target, ()))
            if not there and anchor not in ("__skip", "__codelineno"):
                broken.add(f"{name} -> {href}")
    assert not broken


@pytest.mark.slow
def test_links_to_elsewhere_are_listed(site: Path) -> None:
    listed = set(HREF.findall((site / "links.html").read_text()))
    used = {
        href for name in pages(site) for href in HREF.findall((site / name).read_text()) if href.startswith("http")
    }
    assert used and used <= listed


@pytest.mark.slow
def test_every_public_name_has_its_entry(site: Path) -> None:
    assert {path.parent.name for path in (ROOT / "rl_plugins").glob("*/__init__.py")} == {*hooks.LAYERS}
    text = "".join(path.read_text() for path in (site / "api").rglob("*.html"))
    entries = set(re.findall(r'<h[23] id="(rl_plugins\.[\w.]+)"', text))
    overview = (site / "api.html").read_text()
    for layer in hooks.LAYERS:
        tree = ast.parse((ROOT / "rl_plugins" / layer / "__init__.py").read_text())
        (names,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        for name in ast.literal_eval(names):
            (entry,) = {f"rl_plugins.{layer}.{name}", f"rl_plugins.{layer}.{name}.{name}"} & entries
            assert f'#{entry}"><code>{name}</code>' in overview


@pytest.mark.slow
def test_pages_look_alike_in_the_repository_and_in_the_site(site: Path) -> None:
    # GitHub reads CommonMark, and the site another dialect, which wants lists indented by four.
    for path in [*sorted((ROOT / "docs").rglob("*.md")), *map(ROOT.joinpath, hooks.OUTSIDE)]:
        name = path.relative_to(ROOT).as_posix()
        if name == "docs/api.md":
            continue  # the site fills in a table
        there = MarkdownIt("commonmark").enable("table").render(path.read_text())
        page = hooks.OUTSIDE.get(name, name.removeprefix("docs/")).replace(".md", ".html")
        article = (site / page).read_text().split("<article", 1)[1].split("</article>", 1)[0]
        for tag in ("li", "pre", "tr", "h2", "h3"):
            expected = len(re.findall(rf"<{tag}\b", there))
            assert len(re.findall(rf"<{tag}\b", article)) == expected, (
                f"{name} has {expected} <{tag}> in the repository"
            )


# Links and pages that the hook makes


@pytest.mark.parametrize(
    ("link", "page", "folder", "expected"),
    [
        ("critic.md#limits", "ppo.md", "docs", "critic.md#limits"),
        ("../README.md#results", "ppo.md", "docs", "index.md#results"),
        ("docs/critic.md", "index.md", ".", "critic.md"),
        ("../../recipes/launch/README.md", "howto/scale.md", "docs/howto", "../launch.md"),
        ("../rl_plugins/hooks.py", "tour.md", "docs", "source/rl_plugins/hooks.py.html"),
        ("../../recipes/sums.py", "howto/own.md", "docs/howto", "../source/recipes/sums.py.html"),
        ("recipes/launch", "index.md", ".", "source/recipes/launch/index.html"),
        ("docs/site/hooks.py", "contributing.md", ".", "source/docs/site/hooks.py.html"),
        ("images/curves.png", "critic.md", "docs", "images/curves.png"),
        ("#limits", "critic.md", "docs", "#limits"),
        ("https://arxiv.org/abs/2408.15664", "moe.md", "docs", "https://arxiv.org/abs/2408.15664"),
        ("missing.md", "critic.md", "docs", "missing.md"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(link: str, page: str, folder: str, expected: str) -> None:
    assert hooks.site_link(link, page, folder, SimpleNamespace(repo_url=None)) == expected


def test_links_to_source_files_go_to_the_repository_once_it_has_an_address() -> None:
    config = SimpleNamespace(repo_url="https://example.org/rl_plugins/")
    link = functools.partial(hooks.site_link, page="tour.md", folder="docs", config=config)
    assert link("../rl_plugins/hooks.py") == "https://example.org/rl_plugins/blob/main/rl_plugins/hooks.py"
    assert link("../rl_plugins/trl") == "https://example.org/rl_plugins/tree/main/rl_plugins/trl"
    assert link("critic.md") == "critic.md"


def test_a_link_shows_the_title_of_a_page_in_place_of_its_file() -> None:
    assert hooks.link_text("ppo.md", "ppo.md#presets", "docs") == "PPO"
    assert hooks.link_text("docs/critic.md", "docs/critic.md", ".") == "The critic in detail"
    assert hooks.link_text("a critic", "critic.md", "docs") == "a critic"


def test_code_is_left_alone() -> None:
    text = "[a](x.md)\n\n```python\nb[0](x.md)\n```\n\n[c](x.md)\n"
    changed = hooks.outside_code(text, lambda part: part.replace("x.md", "y.md"))
    assert changed == "[a](y.md)\n\n```python\nb[0](x.md)\n```\n\n[c](y.md)\n"


def test_badges_are_for_the_repository_alone() -> None:
    badge = "[![Python](https://x.org/a.svg)](docs/versions.md)"
    assert hooks.BADGE.sub("", f"# T\n\n{badge} {badge}\n\nText") == "# T\n\nText"
    for kept in ("![Plot](images/a.png)", "[![Plot](images/a.png)](a.md)", "[a](https://x.org)"):
        assert hooks.BADGE.sub("", kept) == kept


# Docstrings


def read(folder: Path, sources: dict[str, str]) -> Any:
    """Package of these files, as the site reads it."""
    for name, text in sources.items():
        path = folder / "rl_plugins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    extensions = griffe.load_extensions(f"{ROOT}/docs/site/docstrings.py:Docstrings")
    loader = griffe.GriffeLoader(search_paths=[folder], extensions=extensions)
    return loader.load("rl_plugins", try_relative_path=False)


def test_references_in_docstrings_become_links(tmp_path: Path) -> None:
    package = read(
        tmp_path,
        {
            "__init__.py": "",
            "nn/__init__.py": "from rl_plugins.nn.head import Head\n__all__ = ['Head']",
            "nn/head.py": 'class Head:\n    """A head; see [`run`], [`~trl.GRPOTrainer`] and [a page](x.md)."""\n'
            '    def run(self):\n        """Run a [`Head`]."""',
            "trl/__init__.py": 'def train():\n    """Train a [`~rl_plugins.nn.Head`] by [`Head.run`]."""',
        },
    )
    head, train = package["nn.head.Head"], package["trl.train"]
    assert head.docstring.value.startswith(
        "A head; see [`run`][rl_plugins.nn.head.Head.run], `trl.GRPOTrainer` and [a page](x.md)."
    )
    assert head["run"].docstring.value.startswith("Run a [`Head`][rl_plugins.nn.head.Head].")
    assert train.docstring.value.startswith(
        "Train a [`Head`][rl_plugins.nn.head.Head] by [`Head.run`][rl_plugins.nn.head.Head.run]."
    )
    assert train.docstring.value.endswith("[source][source:rl_plugins.trl.train]{ .source }")


def test_a_reference_to_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"rl_plugins\.nn\.f refers to Missing"):
        read(tmp_path, {"__init__.py": "", "nn/__init__.py": 'def f():\n    """See [`Missing`]."""'})


def test_names_of_other_libraries_exist() -> None:
    named = set()
    for path in (ROOT / "rl_plugins").rglob("*.py"):
        named |= set(re.findall(r"\[`~((?:gymnasium|lightning|torch|transformers|trl)\.[\w.]+)`\]", path.read_text()))
    assert "trl.GRPOTrainer" in named
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


OPTIONS = [kind for kind in vars(signal_options).values() if isinstance(kind, type)]
OPTIONS = [kind for kind in OPTIONS if issubclass(kind, signal_options.Options) and kind is not signal_options.Options]


@pytest.mark.parametrize("kind", [*OPTIONS, MTPCriticConfig, MTPSFTConfig, GRPOVariantConfig, PPOConfig])
def test_tables_of_options_have_the_defaults_and_the_texts(kind: type) -> None:
    found = hooks.package()[f"{kind.__module__}.{kind.__name__}".removeprefix("rl_plugins.")]
    documented = {p.name: p for p in found.parameters if p.name != "self"}
    sections = {s.kind.value: s for s in griffe.parse_google(found.docstring)}
    texts = {item.name: item.description for item in sections["parameters"].value}
    own = {f.name: f for f in fields(kind) if any(f.name in vars(b).get("__annotations__", {}) for b in ours(kind))}
    assert {*documented} == {*own} == {*texts}
    for name, option in own.items():
        default = option.default if option.default is not MISSING else option.default_factory()  # type: ignore[misc]
        assert ast.literal_eval(documented[name].default) == default, name
        assert texts[name], name


def ours(kind: type) -> list[type]:
    """Classes of this package that a dataclass inherits from, itself included."""
    return [base for base in kind.__mro__ if base.__module__.startswith("rl_plugins.")]


# In a browser


EMPTY_INDEX = json.dumps({"config": {"lang": ["en"], "separator": " ", "pipeline": [], "fields": {}}, "docs": []})


@contextmanager
def served(folder: Path, index: str | None = None) -> Iterator[str]:
    """Address of a server of the site on this machine, also with another index of the search."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            if index is None or not self.path.endswith("search_index.json"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(index.encode())

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with served(site) as url:
        yield url


@pytest.fixture(scope="module")
def address_without_search(site: Path) -> Iterator[str]:
    """Server for tests that open many pages, each of which would read the whole index and prepare a search."""
    with served(site, EMPTY_INDEX) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # As root Chromium has no sandbox; it opens pages of this repository only.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    context.set_default_timeout(120_000)  # other work may share the machine
    yield context.new_page()
    context.close()


@pytest.mark.slow
def test_every_page_opens_on_a_phone_without_complaint(site: Path, address_without_search: str, page: Any) -> None:
    address = address_without_search
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(f"{page.url}: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(f"{page.url}: {error}"))
    page.on("request", lambda r: None if r.url.startswith((address, "data:")) else complaints.append(r.url))
    page.on("response", lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.set_viewport_size({"width": 390, "height": 844})
    names = [*pages(site), "source/rl_plugins/hooks.py.html", "source/recipes/index.html"]
    assert len(names) > 80
    for name in names:
        page.goto(address + name)
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > 390:
            complaints.append(f"{name} is {width} pixels wide")
    assert not complaints


@pytest.mark.slow
@pytest.mark.parametrize("where", ["server", "folder"])
def test_search_finds_explained_variance(where: str, site: Path, address: str, page: Any) -> None:
    start = address if where == "server" else f"{site.as_uri()}/"
    errors: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(f"{start}index.html")
    page.get_by_role("textbox", name="Search").click()
    page.keyboard.type("explained variance")
    result = page.locator(".md-search-result__link").first
    result.wait_for()
    links = page.locator(".md-search-result__link").evaluate_all("links => links.map(link => link.href)")
    assert any("/troubleshooting.html" in link or "/logs.html" in link for link in links)
    assert "explained variance" in page.locator(".md-search-result__list").inner_text().lower()
    assert not errors


@pytest.mark.slow
def test_the_reference_shows_the_signature_of_the_trainer(address: str, page: Any) -> None:
    page.goto(f"{address}api/trl.html#rl_plugins.trl.MTPCriticTrainer")
    entry = page.locator(".doc-object", has=page.locator('h3[id="rl_plugins.trl.MTPCriticTrainer"]')).last
    signature = entry.locator(".doc-signature").first
    assert signature.is_visible()
    shown = " ".join(signature.inner_text().split())
    assert shown.startswith("MTPCriticTrainer( model: str | PreTrainedModel | Module, reward_funcs: Any = None,")
    source = entry.locator("a.source").first
    source.click()
    page.wait_for_url("**/trainers.py.html#L*")
    page.wait_for_function("document.getElementById(location.hash.slice(1)) !== null")
    line = page.evaluate("document.getElementById(location.hash.slice(1)).nextSibling.textContent")
    assert page.url.startswith(f"{address}source/rl_plugins/trl/trainers.py.html#L")
    assert line.startswith("class MTPCriticTrainer(RLTrainer):")


@pytest.mark.slow
def test_light_and_dark(address: str, page: Any) -> None:
    def ground() -> int:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)[:3]))

    page.goto(f"{address}concepts.html")
    assert ground() > 700
    page.locator("label[for=__palette_1]:visible").click()  # from the system's choice to light
    page.locator("label[for=__palette_2]:visible").click()  # to dark
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
    assert ground() < 200
    # The drawings take the page's colours: their ink is light now.
    ink = page.locator(".drawing text.d-text").first.evaluate("e => getComputedStyle(e).fill")
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) > 600
    page.goto(f"{address}index.html")  # the choice stays
    assert ground() < 200


@pytest.mark.slow
def test_the_system_decides_on_dark_at_first(address: str, page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.goto(f"{address}index.html")
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
