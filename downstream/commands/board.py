"""`adpretrain board` collects results of many evaluations and renders them as tables, a plot and a page."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from downstream.board.tasks import Filters
from downstream.commands.options import POSITIONAL, Command
from downstream.terminal import number_of, plain


@dataclass(frozen=True, kw_only=True)
class BoardCommand(Command):
    """Compare features under one protocol: which are best, at what cost, and may they be used in a product?

    actions:
      render   write board.md, board.tex, index.html (one self-contained page) and plots of the board in --at
      add      add RESULTS (files or folders that adpretrain evaluate wrote to OUT/results) to the board in --at
      check    say whether RESULTS are what they claim to be, without adding them
      schema   print the JSON Schema of a result
    A result is refused if its digests are wrong, if its metrics are not those of its scores, or if it claims a data set
    or a protocol of the board but used other photographs.

      adpretrain evaluate recipes/board.yaml --out runs/board
      adpretrain board add runs/board/results --at board
      adpretrain board render --at board --out site --tasks "few-shot*" --commercial

    exit codes:
      0  done
      2  wrong usage, or a result that is refused: nothing was added

    Args:
        action: render, add, check or schema
        results: files or folders of results
        at: folder of the board
        out: with render, folder for the files; default: site, in the folder of the board
        replace: with add, take results that were measured before instead of the older ones
    """

    action: Literal["render", "add", "check", "schema"] = field(metadata=POSITIONAL)
    results: list[str] = field(default_factory=list, metadata=POSITIONAL)
    at: Path = Path("board")
    out: Path | None = None
    replace: bool = False
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        if (self.action in ("add", "check")) != bool(self.results):
            raise ValueError(
                f"{self.action} {'needs' if not self.results else 'takes no'} RESULTS: adpretrain board add "
                "runs/NAME/results --at board, or adpretrain board render --at board"
            )
        if self.filters != Filters() and self.action != "render":
            raise ValueError(f"filters such as --sets go with render, not with {self.action}")
        if self.replace and self.action != "add":
            raise ValueError(f"--replace goes with add, not with {self.action}")

    def run(self) -> int:
        from downstream.board.result import Result
        from downstream.board.store import add, check_files

        files = [Path(given) for given in self.results]
        if self.action == "schema":
            print(json.dumps(Result.model_json_schema(), indent=1))
        elif self.action == "check":
            count = check_files(files)
            print(f"{number_of(count, 'result')} {'is' if count == 1 else 'are'} what they claim to be")
        elif self.action == "add":
            added = add(self.at, files, self.replace)
            parts = [f"{len(added.new)} new", f"{len(added.replaced)} replaced", f"{len(added.known)} known before"]
            print(f"{plain(self.at)}: {', '.join(parts)}")
        else:
            self._render()
        return 0

    def _render(self) -> None:
        from downstream.board.render import tables_of, write_board
        from downstream.board.store import read_board
        from downstream.board.tasks import tasks_of
        from downstream.table_text import markdown

        results = read_board(self.at)
        tasks = tasks_of(results, self.filters)
        kept = [result for result in results if self.filters.keep(result)]
        written = write_board(self.out or self.at / "site", tasks, kept)
        for task in tasks:
            title, columns, lines = tables_of(task)[0]
            columns = columns[:7]
            body = [[column.text(line) for column in columns] for line in lines[:15]]
            print(markdown(f"{title}, in %", [column.title for column in columns], body, 2))
        print("\n".join(f"written: {plain(path)}" for path in written))
