"""What the text of a data set holds: rows without text, roles that a model does not know, messages written as text.

Rows with these train, but hardly as they were meant to, so they are warned of; a column without any text is an error.
"""

from __future__ import annotations

import difflib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fusedalign.trl.lengths import STREAM_ROWS

_logger = logging.getLogger(__name__)

#: Columns that are trained on, where a row without text teaches to end at once, or nothing.
_TRAINED = ("completion", "chosen", "rejected", "messages", "text")
#: Roles that chat templates know without naming each of them.
ROLES = ("system", "user", "assistant", "tool", "developer", "function")
_SYNONYMS = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "chatbot": "assistant"}
#: Most rows whose conversations are rendered.
RENDERED_ROWS = 16
