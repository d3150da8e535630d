"""One book in seven languages: The Debian Administrator's Handbook, from Debian's package, as a folder a language.

    apt-get download debian-handbook && dpkg -x debian-handbook_*.deb handbook
    python experiments/languages.py handbook/usr/share/doc/debian-handbook/html data/handbook
    python prepare_data.py data/handbook --out data/languages --held_out 0.15 --drop_shared

A page of the book is a document. Paragraphs that a translation still has in English are left out of it.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.command_line import Parser, user_errors  # noqa: E402

LANGUAGES = "ar-MA de-DE en-US fr-FR ja-JP ru-RU zh-CN".split()  # translated for the most part
UNSEEN = {"script", "style", "head"}
INLINE = set("a abbr acronym b code em i span strong sub sup tt u".split())


class Paragraphs(HTMLParser):
    """The text of a page: one line a paragraph."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.unseen = "", 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        """A block begins a line; from here on, text of an unseen tag does not count."""
        self.unseen += tag in UNSEEN
        self.text += "" if tag in INLINE else "\n"

    def handle_endtag(self, tag):
        """A block ends its line."""
        self.unseen = max(0, self.unseen - (tag in UNSEEN))
        self.text += "" if tag in INLINE else "\n"

    def handle_data(self, data):
        """Text that is seen, with single spaces."""
        self.text += "" if self.unseen else re.sub(r"\s+", " ", data)

    def lines(self) -> list[str]:
        """The paragraphs that are not empty."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]


def main():
    parser = Parser(__doc__)
    parser.add_argument("html", type=Path, help="folder of the package that has a folder a language")
    parser.add_argument("out", type=Path, help="folder to make, with a folder a language")
    with user_errors():
        args = parser.parse_args()
        if missing := [name for name in LANGUAGES if not (args.html / name).is_dir()]:
            raise ValueError(f"{args.html} has no folder {', '.join(missing)}")
        write(args.html, args.out)


def write(html: Path, out: Path) -> None:
    """Read the book in all languages, and write each as a folder of texts."""
    books = {
        name: {page.stem: Paragraphs(page.read_text("utf-8")).lines() for page in (html / name).rglob("*.html")}
        for name in LANGUAGES
    }
    english = {line for page in books["en-US"].values() for line in page}
    for name, pages in books.items():
        folder = out / name.split("-")[0]
        folder.mkdir(parents=True, exist_ok=True)
        for page, lines in sorted(pages.items()):
            own = lines if name == "en-US" else [line for line in lines if line not in english]
            if own:
                (folder / f"{page}.txt").write_text("\n".join(own) + "\n", "utf-8")


if __name__ == "__main__":
    main()
