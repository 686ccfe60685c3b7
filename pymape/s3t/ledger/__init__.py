"""The ledger of an S3T system: records, stages, exports, requests and audit log, in a folder that survives crashes."""

from pymape.s3t.ledger.ledger import Ledger
from pymape.s3t.ledger.records import FoundRecord, RecordRow
from pymape.s3t.ledger.stages import StageRow

__all__ = ["FoundRecord", "Ledger", "RecordRow", "StageRow"]
