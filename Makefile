# `make demo` runs the main job on a local store; `make test` passes the tests. Both install what
# they need first, and both can be run twice.

export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: demo demo-s3 test test-s3 fleet fuzz kill-points soak bench bench-pack build install clean

demo: build
	./target/release/demo

# The same with the store on a real S3 server, Ceph's radosgw.
demo-s3: build
	./tests/servers/with-server.sh radosgw ./target/release/demo s3://snapshots/demo

test: build
	./tests/servers/install.sh
	./tests/install.sh g++
	./tests/run.sh

# The tests over S3's protocol, and the store's own over it, against a real server.
test-s3: build
	./tests/servers/with-server.sh radosgw ./tests/servers/test-s3.sh

# Minutes: reap-pack killed at every system call that changes the store.
kill-points: build
	cargo test --release --locked -p reap-tests --features soak --test end_to_end -- --nocapture \
		commands_killed_at_every_system_call

# 100 rounds of a fleet of real processes on radosgw, with faults on the way, kills and stops.
fleet: build
	./tests/servers/with-server.sh radosgw ./target/release/fleet --rounds 100

# 10 million executions of every parser; what crashed one is kept in fuzz/artifacts.
fuzz: install
	./tests/install.sh g++
	./fuzz/run.sh long

# Long runs: every function in guests of both sizes, hundreds of VMs at once, the collection protocol in larger scopes,
# and 20,000 seeds of the simulator.
soak: build kill-points
	cargo test --release --locked -p reap-tests --features soak --test end_to_end every_function -- --nocapture
	cargo test --release --locked -p reap-tests --features soak --test end_to_end crowd -- --nocapture --test-threads 1
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
