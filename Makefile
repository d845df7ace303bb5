# `make demo` runs the main job on a local store; `make test` passes the tests. Both install what
# they need first, and both can be run twice.

export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: demo test bench-pack build install clean

demo: build
	./target/release/demo

test: build
	./tests/run.sh

# Minutes: boots seven guests. The figures of docs/BENCHMARKS.md, "Packing".
bench-pack: build
	./target/release/bench-pack

build: install
	cargo build --release --workspace --locked

install:
	./tests/install.sh

clean:
	cargo clean
