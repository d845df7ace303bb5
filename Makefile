# `make demo` runs the main job on a local store; `make test` passes the tests. Both install what
# they need first, and both can be run twice.

export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: demo test build install clean

demo: build
	./target/release/demo

test: build
	./tests/run.sh

build: install
	cargo build --release --workspace --locked

install:
	./tests/install.sh

clean:
	cargo clean
