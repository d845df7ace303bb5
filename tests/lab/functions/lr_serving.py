"""Classifies a text by logistic regression: reads scattered weights of a model of 4 MiB."""

import array
import hashlib
import math
import random

CLASSES = 16
FEATURES = 1 << 17
SCALE = 1 << 14


def make_model():
    """Weights as 16-bit fixed point, feature by feature; the generator's seed is fixed."""
    weights = array.array("h")
    weights.frombytes(random.Random(20210419).randbytes(CLASSES * FEATURES * 2))
    return weights


WEIGHTS = make_model()


def features(text):
    """Sixteen hashed features for each word, and for each pair of neighbours."""
    words = text.split() or [""]
    for gram in words + [a + " " + b for a, b in zip(words, words[1:])]:
        digest = hashlib.shake_128(gram.encode()).digest(64)
        for at in range(0, 64, 4):
            yield int.from_bytes(digest[at : at + 4], "big") % FEATURES


def answer(text):
    scores = [0] * CLASSES
    # A document of its own size, whatever the request's: forty sections, each salted.
    for section in range(40):
        for feature in features(f"{text} {section}"):
            at = feature * CLASSES
            for index, weight in enumerate(WEIGHTS[at : at + CLASSES]):
                scores[index] += weight
    largest = max(scores)
    powers = [math.exp((score - largest) / SCALE / 16) for score in scores]
    total = sum(powers)
    odds = [round(power / total, 9) for power in powers]
    checksum = hashlib.sha256(repr((scores, odds)).encode()).hexdigest()
    return {"class": odds.index(max(odds)), "odds": max(odds), "checksum": checksum}
