"""How texts and data get into a page: nothing that comes from outside can become markup or script.

Texts are escaped (`html.escape` where a page is put together, `textContent` in the pages' scripts). Data for a script
is JSON in which no tag can end. And a page says to the browser which scripts may run: the one that it was made with,
known by its hash, so that even an escape that was forgotten would run nothing (Content Security Policy level 2).
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Replace each {{name}} of `template` by parts[name], once: what is filled in is not searched again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def script_json(value: Any) -> str:
    """`value` as JSON for the inside of a script element. Raises ValueError for NaN and infinity."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def content_policy(page: str, **more: str) -> str:
    """The Content-Security-Policy of `page`: its own script and styles, pictures that it contains, and nothing from any
    other place. `more`: further rules, as connect_src="'self'"."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    rules = {
        "default-src": "'none'", "script-src": " ".join(f"'sha256-{value}'" for value in hashes),
        "style-src": "'unsafe-inline'", "img-src": "data: blob:", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    rules |= {name.replace("_", "-"): value for name, value in more.items()}
    return "; ".join(f"{name} {value}" for name, value in rules.items())
