"""Reads a JSON document of some 400 KiB, changes it and writes it again."""

import hashlib
import json
import random

RECORDS = 1500


def make_document():
    """The same document in every guest: the generator's seed is fixed."""
    generator = random.Random(20210419)
    records = []
    for number in range(RECORDS):
        records.append(
            {
                "id": number,
                "name": "user-%08x" % generator.getrandbits(32),
                "tags": ["t%d" % generator.randrange(100) for _ in range(6)],
                "position": [generator.randrange(10**9), generator.randrange(10**9)],
                "text": "%064x" % generator.getrandbits(256),
                "active": generator.randrange(2) == 1,
            }
        )
    return json.dumps({"records": records})


DOCUMENT = make_document()


def answer(text):
    document = json.loads(DOCUMENT)
    first = len(text) % RECORDS
    for record in document["records"][first :: len(text) + 1]:
        record["name"] += text
    document["changed_by"] = text
    written = json.dumps(document, sort_keys=True).encode()
    return {"bytes": len(written), "checksum": hashlib.sha256(written).hexdigest()}
