"""The README stays one page, and its links lead somewhere."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_is_one_page_and_its_links_lead_somewhere():
    text = README.read_text()
    assert len(text.split()) <= 600
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (README.parent / target).is_file(), target
