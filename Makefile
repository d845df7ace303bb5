# `make demo` runs the main job on a local store; `make test` passes the tests. Both install what
# they need first, and both can be run twice.

export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: demo test test-s3 fleet soak bench bench-pack build install clean

demo: build
	./target/release/demo

test: build
	./tests/servers/install.sh
	./tests/run.sh

# The tests over S3's protocol against a real server, Ceph's radosgw.
test-s3: build
	./tests/servers/test-s3.sh

# 100 rounds of a fleet of real processes on radosgw, with faults on the way, kills and stops.
fleet: build
	./tests/servers/with-server.sh radosgw ./target/release/fleet --rounds 100

# Long runs: every function in guests of both sizes, the collection protocol in larger scopes,
# and 20,000 seeds of the simulator.
soak: build
	cargo test --release --locked -p reap-tests --features soak --test end_to_end every_function
	cargo test --release --locked -p reap-store --features soak --lib larger_scopes
	cargo test --release --locked -p reap-store --features soak --lib many_seeds

# Cold and warm starts by every way, with guests of the laboratory.
bench: build
	./target/release/reap-bench guests

# Minutes: boots seven guests. The figures of docs/BENCHMARKS.md, "Packing".
bench-pack: build
	./target/release/bench-pack

build: install
	cargo build --release --workspace --locked

install:
	./tests/install.sh

clean:
	cargo clean
