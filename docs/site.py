"""What `make docs` changes of the pages: files of the repository that are not part of the site become plain names.

In: the text of a page. Out: the same, `[text](../file)` as `text` and its path.
"""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Mkdocs calls it for every page."""
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", r"\1 (`\2` in the repository)", markdown)
