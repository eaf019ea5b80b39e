"""Self-contained HTML pages: one file with its style, script and data inside."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from r1s_jax.io.errors import ConfigError
from r1s_jax.system.files import write_text

# Stand-ins for control characters, of which HTML drops some: Unicode's pictures of them, and the
# code points of those that change the direction of the text around them.
_PICTURES: dict[int, int | str] = {
    **{i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"},
    0x7F: 0x2421,
    **{i: f"[U+{i:04X}]" for i in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}
_SURROGATES = re.compile("[\ud800-\udfff]")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Writes `templates/TEMPLATE`, filled with `values`, as one atomic operation.

    Values are escaped; characters that HTML cannot hold are shown by a stand-in. Raises ConfigError
    for a path that is not named .html, which is probably a mistake.
    """
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise ConfigError(f"{path}: a page must be a file named .html")
    environment = Environment(
        loader=PackageLoader("r1s_jax.tracking"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_printable,
    )
    page = environment.get_template(template).render(source=_source, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, [page])


def breakable(name: str) -> Markup:
    """A long name in which a line may break after each part."""
    parts = re.split(r"(?<=[._-])", name)
    return Markup("<wbr>").join(_printable(part) for part in parts)


def _printable(value: Any) -> Any:
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", value.translate(_PICTURES))


def _source(name: str) -> Markup:
    """A style sheet or script of this package, not escaped."""
    return Markup((files("r1s_jax.tracking") / "templates" / name).read_text("utf-8"))
