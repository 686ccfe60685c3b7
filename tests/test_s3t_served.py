"""What a system serves, as its ensembles follow it: every change, from whatever process, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from s3t_ledger_tools import keys, make_ledger, make_stage, names_in, trained_ledger

from pymape.s3t.ledger import Ledger, StageRow
from pymape.s3t.served import ServedStages


def test_a_change_is_one_of_what_is_served(tmp_path: Path) -> None:
    with make_ledger(tmp_path / "ledger", shards=1) as ledger:
        order = ledger.sequences[0][0]
        row = next(row for row in ledger.runnable() if row.key.prefix == order[:1])
        ledger.land(row.key, make_stage(ledger, row))
        source = ServedStages(tmp_path / "ledger")
        assert source.changed()
        assert source.read().stages == [row.key]
        assert not source.changed()
        other = next(row for row in ledger.runnable() if row.key.prefix != order[:2])
        ledger.land(other.key, make_stage(ledger, other))
        assert not source.changed()
        deeper = next(row for row in ledger.runnable() if row.key.prefix == order[:2])
        ledger.land(deeper.key, make_stage(ledger, deeper))
        assert source.changed()
        assert source.changed()  # until it is read
        assert source.read().stages == [row.key, deeper.key]
        assert source.read().sizes == ledger.served_records(ledger.serving())
        ledger.tombstone([("one", names_in(ledger, 0, order[0])[:1])])
        assert source.changed()
        with pytest.raises(ValueError, match="no shard can be served"):  # until it is switched to the other root
            source.read()
        assert source.changed()
        ledger.finish()
        assert source.changed()
        assert source.read().stages == [other.key]


def test_what_serves_nothing_says_what_to_do(tmp_path: Path) -> None:
    with make_ledger(tmp_path / "ledger") as ledger:

        def refusal() -> str:
            with pytest.raises(ValueError, match="no shard can be served") as caught:
                ServedStages(tmp_path / "ledger").read()
            return str(caught.value).partition(": ")[2]

        assert refusal() == "nothing is trained yet: train the system first"
        row = next(row for row in ledger.runnable() if row.key.shard == 0)
        ledger.land(row.key, make_stage(ledger, row))
        ledger.tombstone([("one", names_in(ledger, 0, row.key.prefix[0])[:1])])
        ledger.finish()
        assert refusal() == "nothing is trained yet: train the system first"  # other sequences are planned still
        ledger.tombstone([("all", [name for part in range(4) for name in names_in(ledger, 0, part)[:1]])])
        ledger.finish()
        assert ledger.untrained() == [1]
        assert refusal() == "every shard is dead or not trained yet: train the system first"
        ledger.tombstone([("more", [name for part in range(4) for name in names_in(ledger, 1, part)[:1]])])
        ledger.finish()
        assert ledger.untrained() == []
        assert refusal() == "every shard is dead: repair the system first"
        ledger.repair()
        assert ledger.untrained() == [0, 1]
        assert refusal() == "nothing is trained yet: train the system first"


def test_a_stage_that_ends_while_it_is_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trained_ledger(tmp_path / "ledger") as ledger:
        source = ServedStages(tmp_path / "ledger")
        [chain, _] = ledger.serving()
        read = Ledger.read_stage

        def late(self: Ledger, row: StageRow) -> bytes:
            if not ledger.deleted:
                ledger.tombstone([("one", names_in(ledger, 0, chain[2].key.prefix[2])[:1])])
                ledger.finish()
            return read(self, row)

        monkeypatch.setattr(Ledger, "read_stage", late)
        served = source.read()
        assert ledger.deleted
        assert served.stages == [key for chain in ledger.serving() for key in keys(chain)]
        assert not source.changed()


def test_a_forked_process_has_a_connection_of_its_own(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "ledger") as ledger:
        source = ServedStages(tmp_path / "ledger")
        source.read()
        own = source._ledger
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.read(ready, 1)
                stages = [key for row in Ledger(tmp_path / "ledger", "read").serving() for key in keys(row)]
                found = source.changed() and source._ledger is not own and source.read().stages == stages
                code = 0 if found and not source.changed() else 2
            finally:
                os._exit(code)
        ledger.tombstone([("one", names_in(ledger, 0, 0)[:1])])
        ledger.finish()
        os.write(told, b"x")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        os.close(ready)
        os.close(told)
        assert source.changed()
        assert source._ledger is own
