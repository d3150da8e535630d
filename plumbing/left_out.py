"""What prepare_data.py does not use, and why: counted, and said with the first places."""

from collections import Counter, defaultdict

MAX_BAD = 0.01  # there is an error if more than this share of the lines is bad, or of the files cannot be read
EARLY = 1000  # bad lines from which on the share of the lines read so far is enough for that
SHOWN = 3  # places that are named for each reason
BAD_LINES, BAD_FILES = "bad lines", "files that cannot be read, or only in part"


class TooMuchLeftOut(ValueError):
    """More than MAX_BAD is bad."""


class LeftOut:
    """Counts by reason, and notes. `lines` is how many lines were read, the bad ones too; `files` how many files there
    are."""

    def __init__(self):
        self.counts, self.places, self.notes = Counter(), defaultdict(list), []
        self.lines = self.files = 0

    def add(self, what: str, where: object = None):
        """Count one more thing that is left out; `where` is its place."""
        self.counts[what] += 1
        if where is not None and len(self.places[what]) < SHOWN:
            self.places[what].append("".join(c if c.isprintable() else "?" for c in str(where)))

    def bad_line(self, where: str):
        """Count a line that holds no document. `where` says its file, its number and what is wrong."""
        self.lines += 1
        self.add(BAD_LINES, where)
        if self.counts[BAD_LINES] >= EARLY:
            self.check()

    def bad_file(self, where: str):
        """Count a file whose rest cannot be read. TooMuchLeftOut if there are too many of them."""
        self.add(BAD_FILES, where)
        self._refuse(BAD_FILES, self.files, "files cannot be read")

    def check(self):
        """TooMuchLeftOut if too many of the lines are bad."""
        self._refuse(BAD_LINES, self.lines, "lines are bad")

    def _refuse(self, what: str, total: int, are: str):
        if self.counts[what] > MAX_BAD * total:
            places = "; ".join(self.places[what])
            raise TooMuchLeftOut(f"{self.counts[what]:,} of {total:,} {are}, more than {MAX_BAD:.0%}: {places}")

    def told(self) -> list[str]:
        """The notes, and a line of text for each reason."""
        return self.notes + [
            f"left out: {count:,} {what}" + (f", as {'; '.join(self.places[what])}" if self.places[what] else "")
            for what, count in self.counts.items()
        ]
