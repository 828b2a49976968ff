# Short names for the commands of the project; `just` lists them. Those with logic are in xtask.

default:
    @just --list

# Block-sparse attention on a real text, with its proof and its picture
demo *ARGS:
    cargo run --release -p fsa-cli -- demo {{ARGS}}

# Every test
test:
    cargo test --workspace

# The conformance suite against the oracle, on this machine
check *ARGS:
    cargo run --release -p fsa-cli -- check {{ARGS}}

# Measure this machine
bench *ARGS:
    cargo run --release -p fsa-cli -- bench {{ARGS}}

# Format everything
fmt:
    cargo fmt --all

# What CI checks before it runs the tests
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings -D clippy::too_many_lines
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
    cargo xtask layers
    cargo xtask sizes
    cargo xtask stages
    cargo xtask readme --check

# All that CI runs
ci:
    .ci/run
