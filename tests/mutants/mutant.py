"""A mutant, and the files that mutants change."""

from dataclasses import dataclass
from pathlib import Path

DEBIT_SQL = "supabase/migrations/*_debit.sql"  # a change of the file changes its timestamp


class DoesNotApply(Exception):
    """The text to replace does not occur exactly once."""


@dataclass(frozen=True)
class Mutant:
    """A mistake: the replacement of a piece of text in a file."""

    name: str
    file: str
    old: str
    new: str
    found_by: str  # the file with the tests that are tried first

    def apply(self, root: Path) -> tuple[Path, str]:
        """Change the file in a copy of the project; return it with its original text.

        Raises:
            DoesNotApply: the code has changed since the mutant was written.
        """
        files = sorted(root.glob(self.file))
        text = files[0].read_text() if len(files) == 1 else ""
        if (found := text.count(self.old)) != 1:
            raise DoesNotApply(
                f'"{self.name}": its text occurs {found} times in {self.file}. Adapt it to '
                f"the code:\n{self.old}"
            )
        files[0].write_text(text.replace(self.old, self.new))
        return files[0], text
