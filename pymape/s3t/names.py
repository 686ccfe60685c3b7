"""From ids and subjects, as a caller writes them, to the keyed names that the ledger knows them by."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pymape.data.records import listed
from pymape.s3t.config import S3TConfig
from pymape.s3t.ledger import Ledger, RecordRow
from pymape.s3t.ledger.requests import names_digest
from pymape.s3t.partition import place, read_identifier, record_name, subject_name
from pymape.s3t.rows import RecordCheck, model_fields

__all__ = ["RecordNames"]


class RecordNames:
    """The names of a system's records and subjects.

    Args:
        ledger: which has the key, and knows who is live.
        config: options of the system.
        normal: whether ids are brought into Unicode's composed form, which systems of earlier versions did not do.
    """

    def __init__(self, ledger: Ledger, config: S3TConfig, normal: bool) -> None:
        self._ledger, self._config, self._normal = ledger, config, normal

    def rows(self, records: Iterable[Mapping[str, Any]]) -> Iterable[RecordRow]:
        """Records as the ledger takes them, each in the slice that its name falls into.

        Raises:
            ValueError: a record without an id, one repeated, or one that the model cannot be trained on.
        """
        key, check, seen = self._ledger.key, RecordCheck(self._config), set()
        for number, record in enumerate(records, start=1):
            identifier, subject = (
                self._read(record.get(name), f"{name} of record {number}") for name in ("id", "subject")
            )
            if not identifier:
                raise ValueError(f"records must each have an id, got none in record {number}")
            if identifier in seen:
                raise ValueError(f"records must not repeat an id, got {identifier!r} again in record {number}")
            seen.add(identifier)
            content = check(model_fields(record), identifier)
            about = subject_name(key, subject) if subject else None
            shard, part = place(key, subject or identifier, self._config.shards, self._config.slices)
            yield RecordRow.of(record_name(key, identifier), about, shard, part, content, identifier)

    def wanted(
        self, ids: Sequence[str], subjects: Sequence[str], request: str | None = None
    ) -> tuple[list[str], str | None]:
        """Names of the live records given by id and by subject; with subjects also a digest of what was asked for.

        Nobody can say any more which records a deleted subject had. A request that was asked for the same before says.

        Raises:
            ValueError: an id or subject that is not known or not live, or none at all.
        """
        key, ids, subjects = self._ledger.key, listed(ids, "ids"), listed(subjects, "subjects")
        stripped = [self._read(identifier, "ids") for identifier in ids]
        names = [record_name(key, identifier) for identifier in stripped]
        people = [self._read(subject, "subjects") for subject in subjects]
        asked = names_digest([*names, *{subject_name(key, person) for person in people}]) if people else None
        if request is not None and asked is not None:
            repeated = self._ledger.names_asked(request, asked)
            if repeated:
                return repeated, asked
        self._ledger.require_live(names, stripped, request)
        wanted = dict.fromkeys(names)
        for subject, person in zip(subjects, people, strict=True):
            found = self._of_subject(person)
            if not found:
                raise ValueError(f"subjects must have records, got {subject!r} with none")
            wanted |= dict.fromkeys(found)
        if not wanted:
            raise ValueError("ids must name at least one record, got none")
        return list(wanted), asked

    def _read(self, value: Any, argument: str) -> str:
        return read_identifier(value, argument, normal=self._normal)

    def _of_subject(self, subject: str) -> list[str]:
        """Names of a subject's live records, also of those that an older system took another spelling for."""
        forms = [] if self._normal else [unicodedata.normalize(form, subject) for form in ("NFC", "NFD")]
        names = [subject_name(self._ledger.key, form) for form in dict.fromkeys([subject, *forms])]
        return [found for name in names for found in self._ledger.names_of_subject(name)]
