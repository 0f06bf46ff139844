"""A page as a tree of elements, by Python's own parser."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

_EMPTY = {"meta", "link", "img", "br", "hr", "input", "path", "circle", "use", "rect", "stop"}


class Element:
    """One element: its tag, its attributes, and its children, elements and texts."""

    def __init__(self, tag: str, attributes: dict[str, str | None], parent: Element | None) -> None:
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children: list[Element | str] = []

    def all(self, *tags: str) -> list[Element]:
        """Those of the tags below it, in their order; of any tag if none is given."""
        return [e for e in self._below() if not tags or e.tag in tags]

    def one(self, tag: str, **attributes: str) -> Element:
        """The only one of that tag and these attributes below it."""
        found = [
            e
            for e in self.all(tag)
            if all(e.attributes.get(k.rstrip("_")) == v for k, v in attributes.items())
        ]
        assert len(found) == 1, (tag, attributes, len(found))
        return found[0]

    @property
    def text(self) -> str:
        """All text below it, blanks made one."""
        return " ".join("".join(self._texts()).split())

    def _below(self) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child._below()

    def _texts(self) -> Iterator[str]:
        for child in self.children:
            if isinstance(child, str):
                yield child
            else:
                yield from child._texts()


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.at = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, attrs)
        element = Element(tag, dict(attrs), self.at)
        self.at.children.append(element)
        if tag not in _EMPTY:
            self.at = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.children.append(Element(tag, dict(attrs), self.at))

    def handle_endtag(self, tag: str) -> None:
        if tag in _EMPTY:
            return
        assert self.at.tag == tag, f"</{tag}> ends <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)


def parse(source: str) -> Element:
    """The tree of a page; every element must be closed, in order, and no attribute be doubled."""
    builder = _Builder()
    builder.feed(source)
    builder.close()
    assert builder.at is builder.root, f"<{builder.at.tag}> is not closed"
    return builder.root


def cells(table: Element) -> list[list[str]]:
    """The texts of a table, row by row, its heads first."""
    return [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")]


def table_of(page: Element, caption: str) -> Element:
    """The table whose caption begins so."""
    found = [t for t in page.all("table") if t.all("caption")[0].text.startswith(caption)]
    assert len(found) == 1, (caption, [t.all("caption")[0].text for t in page.all("table")])
    return found[0]
