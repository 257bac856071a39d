"""Make the six-language corpus in data/handbook/ from the Debian package `debian-handbook`.

    python tests/make_handbook.py
    python tests/make_handbook.py norwegian FILE       another translation, for train.py --add

The package is fetched with apt-get and unpacked with dpkg-deb. One paragraph a line, in the order of the English book's
table of contents in every language, so that the last 5% of each file covers the same chapters.
"""

import json
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import atomic

OUT = Path(__file__).resolve().parent.parent / "data/handbook"
SIX = {
    "english": "en-US",
    "spanish": "es-ES",
    "french": "fr-FR",
    "german": "de-DE",
    "italian": "it-IT",
    "portuguese": "pt-BR",
}
OTHERS = {
    "dutch": "nl-NL", "polish": "pl-PL", "norwegian": "nb-NO", "swedish": "sv-SE", "indonesian": "id-ID", "russian": "ru-RU",
    "greek": "el-GR", "japanese": "ja-JP", "chinese": "zh-CN", "arabic": "ar-MA", "turkish": "tr-TR", "romanian": "ro-RO",
    "croatian": "hr-HR", "vietnamese": "vi-VN", "catalan": "ca-ES", "danish": "da-DK",
}  # fmt: skip
SKIP = {"script", "style", "pre", "head", "nav"}
BREAK = {"p", "h1", "h2", "h3", "h4", "li", "div", "td", "dt", "dd", "br", "tr"}
ENGLISH = set(
    [
        "the",
        "of",
        "to",
        "and",
        "is",
        "in",
        "that",
        "for",
        "it",
        "are",
        "be",
        "this",
        "with",
        "as",
        "on",
        "which",
        "by",
        "not",
        "can",
        "from",
        "an",
        "will",
    ]
)
BOOK_BYTES = 1_330_000  # six books stay under 8 MB


class Paragraphs(HTMLParser):
    """Collects text outside SKIP, with a line break at every tag of BREAK."""

    def __init__(self):
        super().__init__()
        self.parts, self.depth = [], 0

    def handle_starttag(self, tag, attrs):
        self.depth += tag in SKIP
        if tag in BREAK:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.depth -= tag in SKIP and self.depth > 0
        if tag in BREAK:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.depth:
            self.parts.append(data.replace("\n", " "))


def reading_order(folder):
    """Page names in the order of the table of contents."""
    names = re.findall(r'href="([\w.-]+\.html)', (folder / "index.html").read_text(encoding="utf-8"))
    return [n for n in dict.fromkeys(names) if (folder / n).exists() and n != "index.html"]


def paragraphs(folder, pages, known, shortest=80):
    """Paragraphs of at least `shortest` characters that are not in the set `known` yet."""
    found = []
    for page in pages:
        if not (folder / page).exists():
            continue
        parser = Paragraphs()
        parser.feed((folder / page).read_text(encoding="utf-8"))
        for line in "".join(parser.parts).split("\n"):
            line = re.sub(r"\s+", " ", line).strip()
            if len(line) >= shortest and line not in known:
                known.add(line)
                found.append(line)
    return found


def looks_english(line):
    words = re.findall(r"[a-z]+", line.lower())
    return sum(w in ENGLISH for w in words) > 0.15 * len(words)


def main(html):
    pages = reading_order(html / "en-US")
    english = set(paragraphs(html / "en-US", pages, set()))
    for name, code in SIX.items():
        lines = paragraphs(html / code, pages, set() if name == "english" else set(english))
        if name != "english":
            lines = [line for line in lines if not looks_english(line)]
        # Every k-th paragraph is left out of a book that is too long, so that the books stay parallel to their ends.
        size = sum(len(line.encode()) + 1 for line in lines)
        drop = max(0, size - BOOK_BYTES) / size
        lines = [line for i, line in enumerate(lines) if int((i + 1) * drop) == int(i * drop)]
        with atomic(OUT / f"{name}.txt") as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines):,} paragraphs, {sum(len(x.encode()) + 1 for x in lines):,} bytes")
    with atomic(OUT.parent / "other_languages.jsonl") as path, open(path, "w", encoding="utf-8") as file:
        for name, code in OTHERS.items():
            lines = [x for x in paragraphs(html / code, pages, set(english), 200) if not looks_english(x)]
            lines = lines[:: max(1, len(lines) // 40)][:40]
            for line in lines:
                file.write(json.dumps({"language": name, "text": line[:600]}, ensure_ascii=False) + "\n")
            print(f"{name}: {len(lines)} paragraphs for the router's test")


def another(html, language, path):
    english = set(paragraphs(html / "en-US", pages := reading_order(html / "en-US"), set()))
    lines = [line for line in paragraphs(html / OTHERS[language], pages, english) if not looks_english(line)]
    with atomic(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(["apt-get", "download", "-qq", "debian-handbook"], cwd=tmp, check=True)
        subprocess.run(["dpkg-deb", "-x", str(next(Path(tmp).glob("*.deb"))), tmp], check=True)
        html = Path(tmp, "usr/share/doc/debian-handbook/html")
        another(html, *sys.argv[1:]) if sys.argv[1:] else main(html)
