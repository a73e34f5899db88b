"""The desired state that one server follows, with its entries as they were read or written last."""

from astra_serve.adapters.fetch import Sources
from astra_serve.control.followed import Followed
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Adapter, Document
from astra_serve.document.entry_text import with_entry
from astra_serve.errors import BadDocument, ServeError
from converter.errors import without_secrets


class DesiredState(Followed[Document]):
    """The document of adapters at `where`; only a file is edited."""

    def __init__(self, where: str, sources: Sources | None = None, page_s: float = 60.0) -> None:
        super().__init__(where, Document(), sources, page_s)

    @property
    def document(self) -> Document:
        """Return the last good document."""
        return self.content

    def check_writable(self) -> None:
        """Raise ServeError where the document can only be read."""
        if self.file is None:
            raise ServeError(f"the desired state is at {without_secrets(self._where)}: change it there")
        document_text.check_writable(self._where)

    async def replace(self, name: str, old: Adapter | None, new: Adapter | None) -> None:
        """Write the entry `new` in place of `old`, and read the changes of others meanwhile; None is no entry.

        Raises ServeError, Conflict where the document has another entry of this name; then nothing is written.
        """
        found = self.document

        def change(text: str) -> str:
            nonlocal found
            self._check_not_gone(text)
            known = self.document if text == self._text and text else None
            found, text = with_entry(text, self._where, name, old, new, known)
            return text

        self.check_writable()
        async with self._busy:
            try:  # in a thread: it waits for other writers and for the disk
                _, self._text = await self._in_thread(document_text.edit, self._where, change)
            except OSError as error:
                raise ServeError(f"the document cannot be changed: {error.strerror or error}") from error
            self.content = found

    def _parse(self, text: str) -> Document:
        self._check_not_gone(text)
        return desired.parse(text, self._where).sharing(self.document)

    def _check_not_gone(self, text: str) -> None:
        if not text.strip() and self.document.adapters:
            raise BadDocument(f"{self._where} is empty or gone: write 'adapters: []' to serve none")
