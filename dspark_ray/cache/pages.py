"""Page allocation of the compressed cache: integers only."""

from __future__ import annotations


class PagePool:
    """Hands out page numbers 0 .. num_pages - 1 of `page_size` positions each."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of pages in use."""
        return 1 - len(self._free) / self.num_pages

    def num_missing(self, pages: list[int], num_positions: int) -> int:
        """Pages that a sequence holding `pages` still lacks to keep `num_positions`."""
        return max(0, -(-num_positions // self.page_size) - len(pages))

    def can_grow(self, pages: list[int], num_positions: int) -> bool:
        return self.num_missing(pages, num_positions) <= len(self._free)

    def grow(self, pages: list[int], num_positions: int) -> None:
        """Append to `pages` until they hold `num_positions`; ask `can_grow` first."""
        for _ in range(self.num_missing(pages, num_positions)):
            pages.append(self._free.pop())

    def release(self, pages: list[int]) -> None:
        """Free all of `pages` and empty the list."""
        self._free.extend(reversed(pages))
        pages.clear()
