"""Hooks of the documentation site: pages from outside `docs/`, the pages of the reference, links to source files.

MkDocs calls the functions `on_*`. A link in a Markdown file is one that works in the repository's web view; here it is
turned into the link that works in the site. Notebooks of `docs/tutorials` become pages with their saved outputs. (The
plugin mkdocs-jupyter puts a script of another host on every page, and MkDocs does not check its links.)
"""

import base64
import json
import os
import re
from collections.abc import Iterator
from functools import cache, partial
from html import escape
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any, NamedTuple

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "recipes/launch/README.md": "launch.md",
}
"""Pages that are not in `docs/`, and their names in the site."""
LAYERS = ("trl", "lightning", "signals", "rollouts", "nn", "moe", "functional", "report", "classic", "tabular")
"""Folders of the package with public names, in the order of the reference."""
FIRST = {"trl": ("trainers", "configs", "sft"), "lightning": ("modules", "sft", "module")}
"""Files of a folder that come first in its reference; the others follow by name."""
LARGE = 30
"""Public names of a folder from which on each of its files has a page."""
SOURCE_FOLDERS = ("rl_plugins", "recipes", "tests", "docs/site")
SOURCE_SUFFIXES = {".py", ".sh", ".json", ".yaml", ".yml", ".toml", ".txt", ".md"}
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2\s*$", re.M | re.S)
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)")
EXTERNAL = re.compile(r"\]\((https?://[^)\s]+)\)")
BADGE = re.compile(r"\[!\[[^\]]*\]\(https?://[^)\s]+\)\]\([^)\s]+\)[ \n]*")
"""A linked picture from another host. The site leaves it out, so that its pages open without a network."""
NOTEBOOKS = ROOT / "docs" / "tutorials"
IN_COLAB = "rl-plugins[trl,lightning,report]"
"""Extras that the notebooks need."""
REFERENCE = "<!-- The site lists the public names here. -->"
"""Line of `docs/api.md` in whose place the site has the table of public names."""


# Links


def outside_code(markdown: str, change: Any) -> str:
    """Change a page's text and leave its blocks of code as they are."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def source_page(path: str) -> str:
    """Name the page of the site that shows a file or a folder of the repository."""
    return f"source/{path}/index.html" if (ROOT / path).is_dir() else f"source/{path}.html"


def source_url(config: MkDocsConfig, path: str) -> str:
    """Find where a file or a folder of the repository is shown: in the repository, or on a page of the site."""
    if config.repo_url:
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{config.repo_url.rstrip('/')}/{kind}/main/{path}"
    return source_page(path)


def site_link(target: str, page: str, folder: str, config: MkDocsConfig) -> str:
    """Turn a link of the repository into one of the site.

    Args:
        target: The link as it is written.
        page: Name of the page in the site, from its root.
        folder: Folder of the page's file in the repository, from its root.
        config: The site's configuration.
    """
    file, hash_, anchor = target.partition("#")
    if not file or re.match(r"[a-z]+:", target):
        return target
    path = normpath(f"{folder}/{file}")
    if path in OUTSIDE:
        found = OUTSIDE[path]
    elif path.startswith("docs/") and not path.startswith("docs/site/") and (ROOT / path).is_file():
        found = re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    elif (ROOT / path).exists():
        found = source_url(config, path)
    else:
        return target  # a generated page, or a mistake, which MkDocs reports
    if "://" in found:
        return found + hash_ + anchor
    return relpath(found, os.path.dirname(page) or ".") + hash_ + anchor


def link_text(text: str, target: str, folder: str) -> str:
    """Text of a link: a page's title where the repository shows the name of its file."""
    if not re.fullmatch(r"[\w/]+\.(md|ipynb)", text):
        return text
    path = ROOT / normpath(f"{folder}/{target.partition('#')[0]}")
    heading = re.search(r"^# (.+)$", page_text(path), re.M) if path.is_file() else None
    return heading[1] if heading else text


def repository_folder(src_uri: str) -> str:
    """Folder of a page's file in the repository."""
    return os.path.dirname({page: file for file, page in OUTSIDE.items()}.get(src_uri, f"docs/{src_uri}")) or "."


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn a page's links into links of the site, and fill in the table of public names."""
    src_uri = page.file.src_uri
    if src_uri == "api.md":
        assert REFERENCE in markdown
        markdown = markdown.replace(REFERENCE, "\n".join(overview()))
        markdown = re.sub(r"\(\.\./rl_plugins/(\w+)/__init__\.py\)", r"(#rl_plugins\1)", markdown)
    if page.parent is None:
        page.meta["hide"] = ["navigation"]  # its column would hold this page alone
    folder = repository_folder(src_uri)

    def change(text: str) -> str:
        text = BADGE.sub("", text)
        return LINK.sub(lambda m: f"[{link_text(*m.groups(), folder)}]({to_site(m['target'])})", text)

    to_site = partial(site_link, page=src_uri, folder=folder, config=config)
    markdown = outside_code(markdown, change)
    if NOTEBOOKS / f"{Path(src_uri).stem}.ipynb" in notebooks() and src_uri.startswith("tutorials/"):
        title, rest = markdown.split("\n", 1)
        markdown = f"{title}\n\n{notebook_links(Path(src_uri).stem, config)}\n{rest}"
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write drawings into the page, where they take the page's colours, and let wide tables scroll by themselves."""

    def inline(match: re.Match[str]) -> str:
        path = Path(config.docs_dir, os.path.dirname(page.file.src_uri), match["src"])
        return f'<div class="drawing">{path.read_text()}</div>'

    return re.sub(r'<img [^>]*src="(?P<src>[^":]+\.svg)"[^>]*/?>', inline, html)


# Pages that are made


class Group(NamedTuple):
    """Public objects of one file of the package, as mkdocstrings is asked for them."""

    module: str
    paths: list[str]


@cache
def package() -> griffe.Module:
    """Read the package without importing it."""
    extensions = griffe.load_extensions(f"{Path(__file__).parent}/docstrings.py:Docstrings")
    module = griffe.GriffeLoader(search_paths=[ROOT], extensions=extensions).load("rl_plugins")
    assert isinstance(module, griffe.Module)
    return module


def groups(layer: str) -> list[Group]:
    """Public objects of a folder by the file that defines them, in the order of the files."""
    module = package()[layer]
    found: dict[str, list[str]] = {}
    for name in map(str, module.exports):
        # A function may be imported from a file of its own name; griffe keeps the file.
        path = f"{layer}.{name}.{name}" if module[name].is_module else f"{layer}.{name}"
        found.setdefault(package()[path].canonical_path.rpartition(".")[0], []).append(path)
    files = [f"rl_plugins.{layer}.{file}" for file in FIRST.get(layer, ())]
    order = [*files, *sorted({*found} - {*files})]
    return [Group(name, sorted(found[name], key=lambda p: package()[p].lineno)) for name in order]


def reference_pages(layer: str) -> dict[str, list[Group]]:
    """Pages of a folder's reference, and the groups on each."""
    found = groups(layer)
    if sum(len(group.paths) for group in found) <= LARGE:
        return {f"api/{layer}.md": found}
    return {f"api/{group.module.removeprefix('rl_plugins.').replace('.', '/')}.md": [group] for group in found}


def title(module: str) -> str:
    """Make a heading of a module's name."""
    return module.rpartition(".")[2].replace("_", " ").capitalize()


def page_title(uri: str) -> str:
    """Title of a page of the reference."""
    parts = uri.removeprefix("api/").removesuffix(".md").split("/")
    return f"rl_plugins.{parts[0]}" if len(parts) == 1 else title(parts[-1])


def reference(layer: str, uri: str, found: list[Group]) -> str:
    """Write a page of the reference: for each file its docstring and its public names."""
    whole = len(found) > 1 or found == groups(layer)
    lines = [f"# {page_title(uri)}", "", *(docstring(f"rl_plugins.{layer}") if whole else ())]
    for group in found:
        lines += [*([f"## {title(group.module)}", ""] if whole else ()), *docstring(group.module)]
        for path in group.paths:
            lines += [f"::: rl_plugins.{path}", "    options:", f"      heading_level: {3 if whole else 2}"]
            if is_options(package()[path]):  # the table says all, and the methods are for the trainers
                lines += ["      members: []", "      show_signature: false"]
            lines.append("")
    return "\n".join(lines)


def is_options(obj: Any) -> bool:
    """Whether an object is a dataclass of options."""
    return bool(obj.is_class) and any(base.name == "Options" for base in obj.mro())


def docstring(module: str) -> list[str]:
    """Docstring of a file or folder of the package, and where it is."""
    found = package()[module.removeprefix("rl_plugins.")].docstring
    return [*(found.value.splitlines() if found else ()), "", f"[source][source:{module}]{{ .source }}", ""]


def overview() -> Iterator[str]:
    """Table of all public names with the first sentence of each docstring."""
    for layer in LAYERS:
        yield from (f"## rl_plugins.{layer}", "", "| name | purpose |", "|---|---|")
        for uri, found in reference_pages(layer).items():
            for group in found:
                for path in group.paths:
                    docstring = package()[path].docstring
                    link = f"[`{path.rpartition('.')[2]}`]({uri}#rl_plugins.{path})"
                    yield f"| {link} | {first_sentence(docstring.value) if docstring else ''} |"
        yield ""


def first_sentence(docstring: str) -> str:
    """First sentence of a docstring on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s+(?=[A-Z`])", paragraph)[0].rstrip(".:").replace("|", r"\|")


def links_page() -> str:
    """List the links that leave the site, and the pages that have them."""
    found: dict[str, list[str]] = {}
    for path in [ROOT / name for name in OUTSIDE] + sorted((ROOT / "docs").rglob("*.md")) + notebooks():
        name = path.relative_to(ROOT).as_posix()
        for url in EXTERNAL.findall(FENCE.sub("", page_text(path))):
            found.setdefault(url, [])
            if name not in found[url]:
                found[url].append(name)
    rows = (f"| <{url}> | {', '.join(f'`{name}`' for name in names)} |" for url, names in sorted(found.items()))
    text = "Pages of this site link to these addresses, and to no others. The site itself loads nothing from them."
    return "\n".join(["# External links", "", text, "", "| address | file |", "|---|---|", *rows, ""])


# Notebooks


def notebooks() -> list[Path]:
    """Notebooks that become pages."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def page_text(path: Path) -> str:
    """Markdown of a file of the repository, be it a notebook."""
    return notebook_page(path)[0] if path.suffix == ".ipynb" else path.read_text()


@cache
def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Turn a notebook into Markdown.

    Args:
        path: The notebook.

    Returns:
        The text, and the figures by their names beside the page.
    """
    cells = json.loads(path.read_text())["cells"]
    texts, figures = [], {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            texts.append(source)
            continue
        texts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(figures) + 1}.png"
                figures[name] = base64.b64decode(data["image/png"])
                texts.append(f"![{caption(cells[number + 1 : number + 2])}]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
                texts.append(f"``` {{ .text .output }}\n{text}\n```")
    return "\n\n".join(texts) + "\n", figures


def caption(following: list[dict[str, Any]]) -> str:
    """Caption of a figure: the text in italics at the beginning of the cell below it."""
    found = re.match(r"\*([^*]+)\*", "".join("".join(cell["source"]) for cell in following))
    return re.sub(r"[\[\]`\s]+", " ", found[1]).strip() if found else "Figure"


def notebook_links(name: str, config: MkDocsConfig) -> str:
    """Links at the top of a notebook's page: to the file and, once the repository has an address, to Colab."""
    links = f"[Download the notebook]({name}.ipynb){{ .notebook }}\n"
    repository = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", config.repo_url or "")
    if repository is None:
        return links
    url = f"https://colab.research.google.com/github/{repository[1]}/blob/main/docs/tutorials/{name}.ipynb"
    return (
        f"{links}[Open in Colab]({url}){{ .notebook .colab }}\n\nIn Colab, run this line first:\n\n"
        f'```text\n%pip install "{IN_COLAB} @ git+https://github.com/{repository[1]}"\n```\n'
    )


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the reference to the navigation."""
    entries: list[Any] = []
    for layer in LAYERS:
        pages = [*reference_pages(layer)]
        if len(pages) == 1:
            entries.append({f"rl_plugins.{layer}": pages[0]})
        else:
            entries.append({f"rl_plugins.{layer}": [{page_title(page): page} for page in pages]})
    (section,) = [item["API"] for item in config.nav if "API" in item]
    section += entries
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`."""
    for name, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for layer in LAYERS:
        for uri, found in reference_pages(layer).items():
            files.append(File.generated(config, uri, content=reference(layer, uri, found)))
    for path in notebooks():
        text, figures = notebook_page(path)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, picture in figures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=picture))
    files.append(File.generated(config, "links.md", content=links_page()))
    if not config.repo_url:
        for path in source_paths():
            name = path.relative_to(ROOT).as_posix()
            show = folder_page if path.is_dir() else file_page
            files.append(File.generated(config, source_page(name), content=show(name)))
    return files


def on_nav(nav: Any, config: MkDocsConfig, files: Files) -> None:
    """Tell mkdocstrings where the source of every object is. The page of a public object wins over its source."""

    def register(parent: griffe.Object) -> None:
        for member in parent.members.values():
            if member.is_alias:
                continue
            url = source_url(config, Path(str(member.filepath)).relative_to(ROOT).as_posix())
            for identifier in (member.path, f"source:{member.path}"):
                autorefs.register_url(identifier, f"{url}#L{member.lineno or 1}")
            if isinstance(member, griffe.Class | griffe.Module):
                register(member)

    autorefs: Any = config.plugins["autorefs"]
    register(package())


# Source files


def source_paths() -> list[Path]:
    """Files and folders of the repository that have a page, caches left out."""
    paths = [ROOT / folder for folder in SOURCE_FOLDERS]
    paths += [path for folder in SOURCE_FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    paths = [p for p in paths if "__pycache__" not in p.parts and (p.is_dir() or p.suffix in SOURCE_SUFFIXES)]
    return paths + [ROOT / name for name in ("CITATION.cff", "LICENSE", "constraints.txt", "pyproject.toml")]


def file_page(path: str) -> str:
    """Show a source file with a number and an anchor for each line; colours would take most of the build's time."""
    lines = escape((ROOT / path).read_text()).splitlines()
    numbered = (f'<a id="L{n}" href="#L{n}">{n:4}</a>{line}' for n, line in enumerate(lines, 1))
    return source_frame(path, "<pre>" + "\n".join(numbered) + "</pre>")


def folder_page(path: str) -> str:
    """List the files of a folder."""
    inside = [p for p in source_paths() if p.parent == ROOT / path]
    items = (
        f'<li><a href="{relpath(source_page(p.relative_to(ROOT).as_posix()), f"source/{path}")}">{p.name}'
        f"{'/' if p.is_dir() else ''}</a></li>"
        for p in inside
    )
    return source_frame(path, f"<ul>{''.join(items)}</ul>")


def source_frame(path: str, body: str) -> str:
    """Put the text of a source page between head and foot."""
    up = relpath(".", os.path.dirname(source_page(path)))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{path}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="{up}/images/site/icon.svg"><link rel="stylesheet" href="{up}/stylesheets/source.css">'
        f'</head><body><header><a href="{up}/index.html">rl_plugins</a> <span>{path}</span></header>'
        f"<main>{body}</main></body></html>"
    )
