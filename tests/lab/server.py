"""The guest's only process: serves one function on the first serial line.

A request is one line of JSON, `{"input": "any text"}`; the answer is one line of JSON,
`{"function": ..., "input": ..., "output": {...}}`, and depends on nothing but the input. The function is
named on the kernel's command line (`reap.function=NAME`), imported and called once before the line
`{"ready": NAME}` goes out, so that a snapshot taken afterwards holds it warm.
"""

import glob
import importlib
import os
import sys
import termios

sys.path[:0] = ["/lab", *glob.glob("/usr/lib/python3/dist-packages")]

import json


def function_name():
    with open("/proc/cmdline", encoding="ascii") as file:
        for word in file.read().split():
            if word.startswith("reap.function="):
                return word.partition("=")[2]
    raise SystemExit("server: the kernel's command line names no reap.function")


def open_line():
    """The serial line, raw: no echo, no translation, one byte is enough to wake a read."""
    line = os.open("/dev/ttyS0", os.O_RDWR | os.O_NOCTTY)
    settings = termios.tcgetattr(line)
    settings[0] = settings[1] = settings[3] = 0
    settings[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
    settings[4] = settings[5] = termios.B115200
    settings[6][termios.VMIN] = 1
    settings[6][termios.VTIME] = 0
    termios.tcsetattr(line, termios.TCSANOW, settings)
    return line


def send(line, message):
    data = json.dumps(message, sort_keys=True).encode() + b"\n"
    while data:
        data = data[os.write(line, data) :]


def requests(line):
    """Every line that arrives."""
    pending = b""
    while True:
        pending += os.read(line, 4096)
        while b"\n" in pending:
            request, _, pending = pending.partition(b"\n")
            yield request


def answer(name, function, request):
    try:
        text = json.loads(request)["input"]
        return {"function": name, "input": text, "output": function.answer(text)}
    except Exception as error:  # the caller is told; the server lives on
        return {"function": name, "error": f"{type(error).__name__}: {error}"}


def main():
    name = function_name()
    function = importlib.import_module("functions." + name)
    function.answer("warm")
    line = open_line()
    send(line, {"ready": name})
    for request in requests(line):
        send(line, answer(name, function, request))


main()
