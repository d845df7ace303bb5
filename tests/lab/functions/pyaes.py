"""AES-128 in counter mode, in plain Python: a function that computes and touches little memory.

After FIPS 197; `self_test` holds it to the standard's own example.
"""

import hashlib

BLOCKS = 24


def double(value):
    """Times x in AES's field."""
    value <<= 1
    return value ^ 0x11B if value & 0x100 else value


def make_substitution():
    """The S-box: the inverse in the field, then an affine map. 3 generates the field's units."""
    powers, logarithms, value = [], {}, 1
    for exponent in range(255):
        powers.append(value)
        logarithms[value] = exponent
        value ^= double(value)
    box = []
    for value in range(256):
        inverse = powers[-logarithms[value] % 255] if value else 0
        mapped = 0x63
        for shift in range(5):
            mapped ^= (inverse << shift | inverse >> (8 - shift)) & 0xFF
        box.append(mapped)
    return bytes(box)


SUBSTITUTION = make_substitution()
DOUBLES = [double(value) for value in range(256)]
# Row r of the state, stored column by column, turns left by r.
SHIFTED = [(column + row) % 4 * 4 + row for column in range(4) for row in range(4)]


def expand(key):
    """The eleven round keys."""
    words = [list(key[at : at + 4]) for at in range(0, 16, 4)]
    constant = 1
    for index in range(4, 44):
        word = words[-1]
        if index % 4 == 0:
            word = [SUBSTITUTION[byte] for byte in word[1:] + word[:1]]
            word[0] ^= constant
            constant = double(constant)
        words.append([a ^ b for a, b in zip(words[-4], word)])
    flat = [byte for word in words for byte in word]
    return [flat[at : at + 16] for at in range(0, 176, 16)]


def encrypt(round_keys, block):
    state = [a ^ b for a, b in zip(block, round_keys[0])]
    for round_key in round_keys[1:]:
        state = [SUBSTITUTION[state[at]] for at in SHIFTED]
        if round_key is not round_keys[-1]:
            mixed = []
            for at in range(0, 16, 4):
                a, b, c, d = state[at : at + 4]
                every = a ^ b ^ c ^ d
                mixed += [
                    a ^ every ^ DOUBLES[a ^ b],
                    b ^ every ^ DOUBLES[b ^ c],
                    c ^ every ^ DOUBLES[c ^ d],
                    d ^ every ^ DOUBLES[d ^ a],
                ]
            state = mixed
        state = [a ^ b for a, b in zip(state, round_key)]
    return bytes(state)


def self_test():
    key = bytes(range(16))
    block = bytes(value * 0x11 for value in range(16))
    if encrypt(expand(key), block).hex() != "69c4e0d86a7b0430d8cdb78070b4c55a":
        raise AssertionError("AES does not give the standard's example")


self_test()


def answer(text):
    key = hashlib.sha256(text.encode()).digest()[:16]
    round_keys = expand(key)
    cipher = bytearray()
    for counter in range(BLOCKS):
        stream = encrypt(round_keys, counter.to_bytes(16, "big"))
        plain = (text.encode() + bytes(16))[:16]
        cipher += bytes(a ^ b for a, b in zip(plain, stream))
    return {"bytes": len(cipher), "checksum": hashlib.sha256(cipher).hexdigest()}
